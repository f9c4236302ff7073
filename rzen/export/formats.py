"""Names of the formats of an export, which the command line and specs offer."""

from __future__ import annotations

from typing import Literal

ExportFormat = Literal["model", "adapter", "rzen_release", "reranker"]
FORMATS: dict[ExportFormat, str] = {
    "model": "for transformers, sentence-transformers, vLLM and mteb",
    "adapter": "for PEFT",
    "rzen_release": "for the script released with RzenEmbed",
    "reranker": "of a re-ranker, for transformers, CrossEncoder of sentence-transformers and vLLM",
}
"""Format -> who reads it."""
