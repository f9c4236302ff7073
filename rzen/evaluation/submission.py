"""What the leaderboard of MMEB-V2 takes: one JSON file of a model, checked before it is written.

The form follows the published script and published entries. `Submission.model_json_schema()` is its JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pydantic import Field, ValidationError, create_model, model_validator

from pipelines.benchmarks.table import MMEB_V2, MODALITIES, submitted_name
from pipelines.config import Config, Fraction, PositiveInt
from pipelines.errors import UserError
from rzen.config import ModelCard
from rzen.evaluation.leaderboard import Scores
from rzen.evaluation.metrics import METRIC_NAMES
from rzen.evaluation.results import write_json


class Metadata(ModelCard):
    """The card, and when the report was made."""

    report_generated_date: str
    """ISO 8601."""


DatasetScores = create_model(
    "DatasetScores",
    __base__=Config,
    __doc__="The content of a `{dataset}_score.json`.",
    num_pred=(PositiveInt, ...),
    num_data=(PositiveInt, ...),
    **{name.replace("@", "_at_"): (Fraction, Field(alias=name)) for name in METRIC_NAMES},  # type: ignore[call-overload]
)


class Metrics(Config):
    """Dataset -> scores, by modality, under the names of the leaderboard."""

    image: dict[str, DatasetScores]
    """Image datasets, 36 in all."""
    video: dict[str, DatasetScores]
    """Video datasets, 18 in all."""
    visdoc: dict[str, DatasetScores]
    """Visual document datasets, 24 in all."""

    @model_validator(mode="after")
    def _are_of_the_table(self) -> Metrics:
        for modality in MODALITIES:
            counts = {submitted_name(row): row.num_queries for row in MMEB_V2.values() if row.modality == modality}
            for name, scores in getattr(self, modality).items():
                if name not in counts:
                    raise ValueError(f"{modality} has no dataset {name!r}")
                if not scores.num_pred == scores.num_data == counts[name]:
                    raise ValueError(f"{name} has {scores.num_data} queries, not {counts[name]}")
        return self


class Submission(Config):
    """The whole file."""

    metadata: Metadata
    """What the leaderboard shows of the model."""
    metrics: Metrics
    """Scores of the datasets that were measured whole. The others are scored as 0."""


def make_submission(card: ModelCard, scores: Mapping[str, Scores]) -> Submission:
    """Make a submission of scores by the table's names. Raises `UserError` for an incomplete or unknown dataset."""
    metrics: dict[str, dict[str, Scores]] = {modality: {} for modality in MODALITIES}
    for name, values in scores.items():
        if name not in MMEB_V2:
            raise UserError(f"submission {name}", "is no dataset of MMEB-V2", "leave it out")
        row = MMEB_V2[name]
        metrics[row.modality][submitted_name(row)] = values
    metadata = {**card.model_dump(), "report_generated_date": datetime.now().astimezone().isoformat()}
    try:
        return Submission.model_validate({"metadata": metadata, "metrics": metrics})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"submission {'.'.join(map(str, first['loc']))}", first["msg"], "score it whole") from error


def write_submission(path: Path, submission: Submission) -> None:
    """Readable JSON, atomically."""
    write_json(path, json.loads(submission.model_dump_json(by_alias=True)))
