"""Memory of a worker of a run, from its spec, a few samples of its data and the `config.json` of its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from jobs.runtime.inputs import errors_of
from jobs.training.runs import Run
from jobs.training.specs import TrainSpec
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader
from pipelines.plan.plan import Plan
from pipelines.plan.sources import PlanSource
from pipelines.samples import Input
from pipelines.storage.location import resolve_endpoint
from rzen.config import ObjectiveConfig, PairPromptConfig, PromptConfig, TinyBackbone
from rzen.inputs.prompts import TEMPLATES
from rzen.model.locate import config_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rzen.training.chunk_size import AutoChunk
    from rzen.training.memory import WorkerMemory, WorkerShare

GIB = 2**30
_PEEKED = 32  # samples of a source that stand for all of it
_PROMPT_TOKENS = 64  # of the longest template, with the marks around a visual; a pair has them twice
_BYTES_PER_TOKEN = 3  # of a text; Qwen's tokenizer has about 4 in English
_ROUND_TOKENS = 64  # so that sources of about the same length are counted once
_UNKNOWN_TEXT_BYTES = 512  # where there are no data to look at


def read_backbone_config(spec: TrainSpec) -> PreTrainedConfig:
    """Return the configuration of a run's backbone. Of a URL or a hub name, only `config.json` is read.

    Raises `UserError` for a backbone that is missing, cannot be reached or is of another family.
    """
    from rzen.model.activations import read_config

    backbone = spec.model.backbone
    if isinstance(backbone, TinyBackbone):
        return read_config(backbone)
    endpoint = resolve_endpoint(spec.run.endpoint)
    with errors_of("model.backbone", backbone), config_folder(backbone, endpoint) as folder:
        return read_config(str(folder))


@dataclass(frozen=True)
class MemoryForecast:
    """The memory of a worker in a step of the source that needs most."""

    worker: WorkerMemory
    largest_input_tokens: int
    chunk_tokens: int | None


def forecast_memory(
    spec: TrainSpec, config: PreTrainedConfig, reader: Reader, plan: Plan | None, limit_bytes: int | None
) -> MemoryForecast:
    """Return the memory of a worker. `chunk_tokens: auto` is fitted to the limit; without one, a chunk is one input."""
    from rzen.training.chunk_size import AutoChunk, fits_by_estimate, largest_count
    from rzen.training.memory import MemoryModel

    model, shares = MemoryModel(config, spec.model), shares_of(spec, reader, plan)
    chunk_tokens = spec.cluster.chunk_tokens
    auto = AutoChunk(shares, limit_bytes)
    if chunk_tokens == "auto":
        count = 1
        if limit_bytes is not None:
            count = max(1, largest_count(fits_by_estimate(auto, model, spec.objective, spec.optim), auto.most))
        chunk_tokens = count * auto.longest
    workers = [model.worker(share, spec.objective, spec.optim, chunk_tokens) for share in shares]
    return MemoryForecast(max(workers, key=lambda one: one.total), auto.longest, chunk_tokens)


def chunk_of(run: Run, plan: Plan) -> int | AutoChunk | None:
    """Return `cluster.chunk_tokens` as the trainer takes it. What `auto` has found before is taken again."""
    from rzen.training.chunk_size import AutoChunk

    spec = run.spec
    if spec.cluster.chunk_tokens != "auto":
        return spec.cluster.chunk_tokens
    return run.chunk_tokens() or AutoChunk(shares_of(spec, Reader(spec.data), plan), memory_limit(spec))


def memory_limit(spec: TrainSpec) -> int | None:
    """Return the bytes of `cluster.memory_gib`."""
    return None if spec.cluster.memory_gib is None else round(spec.cluster.memory_gib * GIB)


def shares_of(spec: TrainSpec, reader: Reader, plan: Plan | None) -> list[WorkerShare]:
    """Return what a worker has in a step at most, for each kind of source. A re-ranker reads pairs as one input.

    Every image, page and video counts with `max_visual_tokens`, and texts with the longest of a few samples. Without a
    plan, short texts are contrasted with such images.
    """
    from rzen.model.activations import ChunkInputs
    from rzen.training.memory import WorkerShare

    pairs, negatives = spec.global_batch // spec.cluster.workers, spec.data.negatives_per_sample
    num_tasks = len(reader.tasks(plan)) if plan else 1
    if plan is None:
        shapes = {_unknown_inputs(spec.prompt)}
    else:
        shapes = {_inputs_of(spec, reader, source) for source in plan.sources}
    shares = []
    for query, target in sorted(shapes):
        if not isinstance(spec.objective, ObjectiveConfig):
            joint = ChunkInputs(
                count=pairs * (1 + negatives),
                tokens=query[0] + target[0],
                visual_tokens=query[1] + target[1],
                list_pairs=1 + negatives,
                query_visual_tokens=query[1],
                whole_lists=spec.objective.loss == "listwise",
            )
            shares.append(WorkerShare(spec.cluster.workers, pairs, (joint,), negatives, num_tasks))
            continue
        inputs = [ChunkInputs(pairs, *query), ChunkInputs(pairs, *target)]
        if negatives:
            inputs.append(ChunkInputs(pairs * negatives, *target))
        shares.append(WorkerShare(spec.cluster.workers, pairs, tuple(inputs), negatives, num_tasks))
    return shares


_Shape = tuple[int, int]
"""Tokens of an input, and visual tokens among them."""


def _unknown_inputs(prompt: PromptConfig | PairPromptConfig) -> tuple[_Shape, _Shape]:
    return _shape(prompt, _UNKNOWN_TEXT_BYTES, 0), _shape(prompt, 0, prompt.max_visual_tokens)


def _inputs_of(spec: TrainSpec, reader: Reader, source: PlanSource) -> tuple[_Shape, _Shape]:
    """Return the largest query and the largest target of a source."""
    shapes: list[tuple[_Shape, _Shape]] = []
    for member, size in zip(source.members, source.sizes, strict=True):
        try:
            for sample, _ in reader.raw(member, range(min(size, _PEEKED))):
                instructions = (sample.instruction, sample.target_instruction) if spec.data.instructions else ("", "")
                query, target = (
                    _shape_of(spec, given, instruction)
                    for given, instruction in zip((sample.query, sample.positive), instructions, strict=True)
                )
                shapes.append((query, target))
        except BadMedia as error:
            raise UserError(f"source {member}", str(error), "`rzen verify` finds what is damaged") from error
    queries, targets = zip(*shapes, strict=True)
    return max(queries), max(targets)


def _shape_of(spec: TrainSpec, given: Input, instruction: str) -> _Shape:
    prompt = spec.prompt
    frame_tokens = TEMPLATES[prompt.template].frame_tokens if isinstance(prompt, PromptConfig) else None
    visual_tokens = 0
    for media in given.media:
        is_frames = media.kind == "video" and frame_tokens is not None
        visual_tokens += (
            spec.data.media.frames * frame_tokens[1] if is_frames and frame_tokens else prompt.max_visual_tokens
        )
    return _shape(prompt, len(given.text.encode()) + len(instruction.encode()), visual_tokens)


def _shape(prompt: PromptConfig | PairPromptConfig, text_bytes: int, visual_tokens: int) -> _Shape:
    text_tokens = min(prompt.max_text_tokens, ceil(text_bytes / _BYTES_PER_TOKEN))
    tokens = _PROMPT_TOKENS + ceil(text_tokens / _ROUND_TOKENS) * _ROUND_TOKENS + visual_tokens
    return tokens, visual_tokens
