"""Consolidated checkpoints of a DeepSpeed engine of any ZeRO stage, for any number of workers and stage to resume.

    step-000123/
        parameters.safetensors      trained parameters, full, fp32
        moments.safetensors         AdamW's `exp_avg:` and `exp_avg_sq:` of each
        state.json                  steps done, updates among them, fingerprint of the plan, run, hash of its
                                    settings, SHA-256 of the files above; written last

Nothing else is needed: batches, learning rate and random numbers of a step are pure functions of its number. Restoring
is exact with the same number of workers and within rounding with another (tests/integration/test_training.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from pipelines.errors import UserError
from rzen.model.checkpoints import file_sha256
from rzen.training.checkpoint_state import FIX, MOMENTS, PARAMETERS, STATE, CheckpointState, Origin, parse_state

MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


def create_moments(engine: Any) -> None:
    """Give a new engine AdamW's state, all zero, so that it can be read and written.

    DeepSpeed links it to the parameters once the first group has stepped, when the other groups have no state yet.
    """
    adamw, sharded = engine.optimizer.optimizer, _is_sharded(engine)
    flats = engine.optimizer.fp32_partitioned_groups_flat if sharded else _flat_parameters(adamw)
    for flat in flats:
        moments = {moment: torch.zeros_like(flat) for moment in MOMENT_NAMES}
        adamw.state[flat] = {"step": torch.tensor(0.0), **moments}
    if not sharded:
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory that later steps do not touch, so that it can be written while training continues."""

    state: CheckpointState
    """What `state.json` will say, but for the hashes of files that do not exist yet."""
    tensors: dict[str, dict[str, Tensor]]
    """File -> its tensors, on the CPU."""

    def write(self, folder: Path) -> None:
        """Write the checkpoint into the new `folder`."""
        folder.mkdir(parents=True)
        for name, content in self.tensors.items():
            save_file(content, folder / name)
        state = replace(self.state, sha256={name: file_sha256(folder / name) for name in self.tensors})
        (folder / STATE).write_text(state.to_json())


def snapshot(engine: Any, *, step: int, origin: Origin) -> Snapshot | None:
    """Return the state after `step` steps on rank 0, None on all other ranks. A collective."""
    tensors = {PARAMETERS: full_parameters(engine), MOMENTS: {}}
    for moment in MOMENT_NAMES:
        tensors[MOMENTS] |= {f"{moment}:{name}": value for name, value in full_parameters(engine, moment).items()}
    if dist.get_rank() != 0:
        return None
    state = CheckpointState(
        step=step,
        updates=_updates(engine),
        sha256={},
        world_size=dist.get_world_size(),
        torch=torch.__version__,
        **asdict(origin),
    )
    return Snapshot(state, tensors)


def restore(engine: Any, folder: Path, *, plan_fingerprint: str) -> int:
    """Put parameters and moments into an engine with `create_moments`, and return the number of steps done.

    Every rank reads the files. Raises `UserError` for a damaged checkpoint, or one of another plan or model. The engine
    is then unchanged.
    """
    state = _read_state(folder)
    if state.plan_fingerprint != plan_fingerprint:
        problem = f"belongs to plan {state.plan_fingerprint}, this run has plan {plan_fingerprint}"
        raise UserError(str(folder), problem, "restore data, mixture, batch size, steps and seed, or name a new run")
    trained, shapes = _trained(engine), _shapes(engine)
    parameters = _read_tensors(folder / PARAMETERS, shapes)
    by_moment = {f"{moment}:{name}": shape for moment in MOMENT_NAMES for name, shape in shapes.items()}
    moments = _read_tensors(folder / MOMENTS, by_moment)

    for moments_of_flat in engine.optimizer.optimizer.state.values():
        moments_of_flat["step"].fill_(state.updates)
    put = _put_piece if _is_sharded(engine) else _put_whole
    for name, parameter in trained.items():
        put(parameter, parameters[name])
        for moment in MOMENT_NAMES:
            put(parameter, moments[f"{moment}:{name}"], moment)
    _use_masters(engine)
    return state.step


def put_parameters(engine: Any, values: Mapping[str, Tensor]) -> None:
    """Put fp32 values of some trained parameters into an engine with `create_moments`. Every rank has all of them."""
    trained = _trained(engine)
    put = _put_piece if _is_sharded(engine) else _put_whole
    for name, value in values.items():
        put(trained[name], value)
    _use_masters(engine)


def full_fp32(parameter: Any) -> Tensor:
    """Return one trained parameter in fp32, on all ranks. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor = safe_get_full_fp32_param(parameter)
    return value


def full_parameters(engine: Any, moment: str | None = None) -> dict[str, Tensor]:
    """Return each trained parameter in fp32, or a moment of it, on the CPU of rank 0. Other ranks get nothing.

    A collective. It gathers one parameter at a time, so that no other rank ever holds more than one of them whole.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    full = {}
    for name, parameter in _trained(engine).items():
        value = safe_get_full_optimizer_state(parameter, moment) if moment else full_fp32(parameter)
        if dist.get_rank() == 0:
            full[name] = value.cpu()
    return full


def read_parameters(engine: Any, folder: Path) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint by name, on the CPU. Raises `UserError` as `restore` does."""
    _read_state(folder)
    return _read_tensors(folder / PARAMETERS, _shapes(engine))


def _updates(engine: Any) -> int:
    return int(next(iter(engine.optimizer.optimizer.state.values()))["step"])


def _is_sharded(engine: Any) -> bool:
    """Return whether each rank holds pieces of the parameters: ZeRO stage 3."""
    return int(engine.zero_optimization_stage()) == 3


def _flat_parameters(adamw: Any) -> list[Tensor]:
    return [flat for group in adamw.param_groups for flat in group["params"]]


def _put_whole(parameter: Any, value: Tensor, moment: str | None = None) -> None:
    parameter.set_full_hp_param(value, moment)


def _put_piece(parameter: Any, value: Tensor, moment: str | None = None) -> None:
    """Put this rank's piece of the value. All pieces are equally long, with padding at the end of the last.

    DeepSpeed's own call for the whole value knows no padding. It fails, or leaves out the last rank's piece.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    padded = pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    piece = padded.narrow(0, size * dist.get_rank(), size)
    if moment is None:
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, moment)


def _use_masters(engine: Any) -> None:
    """Give the model the values of its fp32 parameters, in its own type."""
    optimizer = engine.optimizer
    if not _is_sharded(engine):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def _trained(engine: Any) -> dict[str, Any]:
    """Return trained parameters. `Any`, because DeepSpeed gives each of them methods to read its pieces."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def _read_state(folder: Path) -> CheckpointState:
    """Return the state, after every file has been compared with its hash."""
    path = folder / STATE
    if not path.is_file():
        raise UserError(str(path), "does not exist", FIX)
    state = parse_state(path.read_bytes(), str(path))
    for name, expected in state.sha256.items():
        if not (folder / name).is_file():
            raise UserError(str(folder / name), "does not exist", FIX)
        if file_sha256(folder / name) != expected:
            raise UserError(str(folder / name), "is damaged: other bytes than were written", FIX)
    return state


def _shapes(engine: Any) -> dict[str, torch.Size]:
    """Return the shapes of the trained parameters. ZeRO stage 3 leaves these empty and keeps their shape separately."""
    return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in _trained(engine).items()}


def _read_tensors(path: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    unmatched = set(tensors) ^ set(expected)
    if unmatched:
        problem = f"is of another model: {len(unmatched)} tensors without a partner, such as {min(unmatched)}"
        raise UserError(str(path), problem, FIX)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            problem = f"is of another model: {name} has shape {_listed(tensors[name].shape)}, not {_listed(shape)}"
            raise UserError(str(path), problem, FIX)
    return tensors


def _listed(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
