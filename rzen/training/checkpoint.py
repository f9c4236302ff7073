"""Consolidated checkpoints of a DeepSpeed engine, ZeRO stage 1 or 2, that any number of workers can resume.

    step-000123/
        parameters.safetensors      trained parameters, full, fp32
        moments.safetensors         AdamW's `exp_avg:` and `exp_avg_sq:` of each
        state.json                  steps done, updates among them, fingerprint of the plan, SHA-256 of the files
                                    above; written last

Nothing else is needed: batches, learning rate and random numbers of a step are pure functions of its number. Restoring
is exact with the same number of workers and within rounding with another (tests/integration/test_training.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import UserError
from rzen.checkpoints import file_sha256

PARAMETERS, MOMENTS, STATE = "parameters.safetensors", "moments.safetensors", "state.json"
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")
FIX = "resume from another checkpoint, or start a run under a new name"


def create_moments(engine: Any) -> None:
    """Give a new engine AdamW's state, all zero, and link it to the parameters, so that both can be read and written.

    DeepSpeed would link all parameter groups once the first of them has stepped, when the others have no state yet.
    Raises `UserError` for ZeRO stage 3, of which `restore` would load wrong values without an error.
    """
    stage = int(engine.zero_optimization_stage())
    if stage not in (1, 2):
        raise UserError("optim.zero_stage", f"stage {stage} cannot be checkpointed", "use 1 or 2")
    adamw = engine.optimizer.optimizer
    for group in adamw.param_groups:
        for flat in group["params"]:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENT_NAMES}
            adamw.state[flat] = {"step": torch.tensor(0.0), **moments}
    engine.optimizer._lazy_init_hp_params_optimizer_state()


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory, which later steps do not touch: it can be written while training goes on."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """File -> its tensors, on the CPU."""
    facts: dict[str, Any]
    """Of `state.json`."""

    def write(self, folder: Path) -> None:
        """Into the new `folder`."""
        folder.mkdir(parents=True)
        for name, content in self.tensors.items():
            save_file(content, folder / name)
        state = self.facts | {"step": self.step, "sha256": {name: file_sha256(folder / name) for name in self.tensors}}
        (folder / STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def snapshot(engine: Any, *, step: int, plan_fingerprint: str) -> Snapshot | None:
    """Of the state after `step` steps. A collective; None on all ranks but rank 0."""
    tensors = {PARAMETERS: full_parameters(engine), MOMENTS: {}}
    for moment in MOMENT_NAMES:
        tensors[MOMENTS] |= {f"{moment}:{name}": value for name, value in full_parameters(engine, moment).items()}
    if dist.get_rank() != 0:
        return None
    facts = {
        "updates": _updates(engine),
        "plan_fingerprint": plan_fingerprint,
        "world_size": dist.get_world_size(),
        "torch": torch.__version__,
    }
    return Snapshot(step, tensors, facts)


def restore(engine: Any, folder: Path, *, plan_fingerprint: str) -> int:
    """Put parameters and moments into an engine with `create_moments`; returns the number of steps done.

    Every rank reads the files. Raises `UserError` where the checkpoint is damaged, of another plan or another model,
    before the engine is touched.
    """
    state = _read_state(folder)
    if state.plan_fingerprint != plan_fingerprint:
        problem = f"belongs to plan {state.plan_fingerprint}, this run has plan {plan_fingerprint}"
        raise UserError(str(folder), problem, "restore data, mixture, batch size, steps and seed, or name a new run")
    trained = _trained(engine)
    parameters = _read_tensors(folder / PARAMETERS, trained)
    by_moment = {f"{moment}:{name}": value for moment in MOMENT_NAMES for name, value in trained.items()}
    moments = _read_tensors(folder / MOMENTS, by_moment)

    for moments_of_flat in engine.optimizer.optimizer.state.values():
        moments_of_flat["step"].fill_(state.updates)
    for name, parameter in trained.items():
        parameter.set_full_hp_param(parameters[name])
        for moment in MOMENT_NAMES:
            parameter.set_full_hp_param(moments[f"{moment}:{name}"], moment)
    engine.optimizer.update_lp_params()
    return state.step


def full_parameters(engine: Any, moment: str | None = None) -> dict[str, Tensor]:
    """Copy of each trained parameter in fp32, or of a moment of it, on the CPU of rank 0; nothing on other ranks.

    A collective. Goes through one parameter at a time: no other rank ever holds more than one of them whole.
    """
    full = {}
    for name, parameter in _trained(engine).items():
        value = parameter.get_full_hp_param(moment)
        if dist.get_rank() == 0:
            full[name] = value.cpu()
    return full


def read_parameters(engine: Any, folder: Path) -> dict[str, Tensor]:
    """Of a checkpoint, by name, on the CPU. Raises `UserError` as `restore` does."""
    _read_state(folder)
    return _read_tensors(folder / PARAMETERS, _trained(engine))


def _updates(engine: Any) -> int:
    return int(next(iter(engine.optimizer.optimizer.state.values()))["step"])


def _trained(engine: Any) -> dict[str, Any]:
    """Any: DeepSpeed gives each parameter methods that see through its partitions."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class _State:
    step: int
    updates: int
    """Of the optimizer: steps that were not skipped, by which it corrects its moments."""
    plan_fingerprint: str
    sha256: dict[str, str]


def _read_state(folder: Path) -> _State:
    """The state, after every file has been compared with its hash."""
    path = folder / STATE
    try:
        content = json.loads(path.read_text())
        sha256 = {name: content["sha256"][name] for name in (PARAMETERS, MOMENTS)}
        state = _State(int(content["step"]), int(content["updates"]), content["plan_fingerprint"], sha256)
    except FileNotFoundError as error:
        raise UserError(str(path), "does not exist", FIX) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(str(path), f"is no state of a checkpoint ({error})", FIX) from error
    for name, expected in state.sha256.items():
        if not (folder / name).is_file():
            raise UserError(str(folder / name), "does not exist", FIX)
        if file_sha256(folder / name) != expected:
            raise UserError(str(folder / name), "is damaged: other bytes than were written", FIX)
    return state


def _read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    unmatched = set(tensors) ^ set(expected)
    if unmatched:
        problem = f"is of another model: {len(unmatched)} tensors without a partner, such as {min(unmatched)}"
        raise UserError(str(path), problem, FIX)
    for name, value in expected.items():
        if tensors[name].shape != value.shape:
            problem = f"is of another model: {name} has shape {_shape(tensors[name])}, not {_shape(value)}"
            raise UserError(str(path), problem, FIX)
    return tensors


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
