"""`state.json` of a checkpoint: the step that it was taken after, and the hashes of its files. Imports no torch.

The step of a run is written here and nowhere else: whoever resumes reads it from the checkpoint that it loads.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pipelines.config import NonNegativeInt
from pipelines.errors import UserError
from pipelines.stored_json import parse_json

PARAMETERS, MOMENTS, STATE = "parameters.safetensors", "moments.safetensors", "state.json"
FIX = "resume from another checkpoint, or start a run under a new name"


@dataclass(frozen=True)
class Origin:
    """What a checkpoint comes from."""

    plan_fingerprint: str
    """Fingerprint of the batches. A checkpoint of another plan is refused."""
    run: str = ""
    """Id of the run."""
    settings_sha256: str = ""
    """Hash of the settings and data that decide the weights."""


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says about itself."""

    step: NonNegativeInt
    """Steps done, and so the number of the next one."""
    updates: NonNegativeInt
    """Steps that were not skipped, by which the optimizer corrects its moments."""
    plan_fingerprint: str
    sha256: dict[str, str]
    """Hash of each file."""
    world_size: int = 0
    """Ranks that wrote it. For information."""
    torch: str = ""
    """Version of torch. For information."""
    run: str = ""
    """Id of the run that wrote it."""
    settings_sha256: str = ""
    """Hash of the settings and data that decide the weights."""

    def to_json(self) -> str:
        """Return the content of `state.json`."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def parse_state(content: str | bytes, place: str) -> CheckpointState:
    """Return the state in the content of a `state.json`. Raises `UserError` at `place` for anything else."""
    state = parse_json(content, place, CheckpointState, FIX)
    for name in (PARAMETERS, MOMENTS):
        if name not in state.sha256:
            raise UserError(place, f"has no sha256.{name}", FIX)
    return state
