"""What a model card is made from, and its front matter: library, base, license, data, languages, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from pipelines.stored_json import read_json
from rzen.families import BackboneFile
from rzen.model.checkpoints import HUB_NAME

_TASK, _RERANKING = "feature-extraction", "text-ranking"
"""What the hub calls embedding and re-ranking."""


@dataclass(frozen=True)
class ModelCardData:
    """What the weights do not say."""

    title: str = "An embedding model trained with rzen"
    base: str | None = None
    """Base as the job names it. A hub name becomes a link."""
    adapter: str | None = None
    """Adapter as the job names it."""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of a training run -> its `spec.json`: resolved spec, data fingerprints, versions, revision of the code."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Name of a run -> its weight, where this is a soup."""
    method: str | None = None
    """Method of the soup."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Scores of this model: `rows` of an evaluation's results.json, and its `settings`."""
    license: str | None = None
    languages: Sequence[str] = ()
    """Codes of the languages, such as en."""
    datasets: Sequence[str] = ()
    """Names of training datasets on the hub."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that exported it, and `revision` of the code."""


def front_matter(folder: Path, format: str, unsupported_reason: str | None, facts: ModelCardData) -> str:
    """Return the YAML block between lines of `---`. What is not known is left out."""
    library = "peft" if format == "adapter" else "transformers"
    if format in ("model", "reranker") and unsupported_reason is None:
        library = "sentence-transformers"
    config = folder / "config.json"
    task, kind = (_RERANKING, "multimodal-reranker") if format == "reranker" else (_TASK, "multimodal-embeddings")
    tags = [task, kind, "rzen"]
    if config.is_file():
        tags.append(read_json(config, BackboneFile)["model_type"])
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": tags}
    if facts.base and HUB_NAME.fullmatch(facts.base) and not Path(facts.base).exists():
        relation = "adapter" if format == "adapter" else "finetune"
        fields |= {"base_model": facts.base, "base_model_relation": relation}
    known = {"license": facts.license, "language": facts.languages, "datasets": facts.datasets}
    fields |= {name: value for name, value in known.items() if value}
    if facts.scores.get("rows"):
        fields["model-index"] = [{"name": facts.title, "results": _results(facts.scores)}]
    text = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=1000)
    return f"---\n{text}---"


class _OneLine(list[Any]):
    """A list that stands on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_OneLine, lambda dumper, rows: dumper.represent_sequence("tag:yaml.org,2002:seq", rows, True))


def _results(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an entry of the model index for each task, with its own pool. Values are in percent, as in the card."""
    fingerprint = str(scores["settings"].get("data", "unknown"))
    own = [row for row in scores["rows"] if row["pool"] == "task"]
    return [
        {
            "task": {"type": _TASK, "name": task},
            "dataset": {"type": "rzen", "name": f"{task} ({split})", "split": split, "revision": fingerprint},
            "metrics": _OneLine({"type": row["metric"], "value": round(100 * row["value"], 1)} for row in rows),
        }
        for (task, split), rows in groupby(own, key=lambda row: (row["task"], row["split"]))
    ]
