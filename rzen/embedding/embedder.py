"""The one way from inputs to vectors: evaluation, embedding jobs, search and Python users call `Embedder`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import numpy.typing as npt
import torch

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.samples import MediaKind, Modality, Visual
from rzen.config import Dtype, ModelConfig, ModelIdentity
from rzen.embedding.corpus import Corpus, CorpusHit, read_corpus
from rzen.embedding.inputs import Embeddable, InputReader, named, several_of
from rzen.embedding.tasks import NamedTask, modalities_of, read_tasks, task_of
from rzen.evaluation.vectors import check_width
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import MadeBy, check_base, made_by, read_identity, stored_dtype
from rzen.model.chunks import chunks_of, embed
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.locate import checkpoint_folder, local_folder
from rzen.model.lora import load_adapter
from rzen.vectors import cut

CHUNK_TOKENS = 16_384
_CHUNKS_AT_ONCE = 8
"""Chunks whose inputs are encoded before they are grouped by length: at most 0.7 GB of patches."""
Vectors = npt.NDArray[np.float32]
Role = Literal["query", "target"]


class Embedder:
    """Processor and model as one: inputs in, unit vectors out. `rzen.load` makes it.

    `model` is frozen and in evaluation mode. `chunk_tokens` limits what is embedded at once, visual tokens and padding
    included. Vectors do not depend on it, but for rounding. `media` says how files become pixels, `endpoint` where
    `s3://` URLs are. Videos and documents are decoded in a child process with limits. `base` and `adapter` are the
    folders that the model was loaded from.
    """

    def __init__(
        self,
        processor: Processor,
        model: EmbeddingModel,
        chunk_tokens: int = CHUNK_TOKENS,
        media: MediaConfig | None = None,
        *,
        base: Path,
        adapter: Path | None = None,
        endpoint: str | None = None,
    ) -> None:
        self.processor = processor
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.media = (media or MediaConfig()).for_model(processor.visual_pixels)
        self.base = base
        self.adapter = adapter
        self._endpoint = endpoint
        self._reader = InputReader(self.media, endpoint)
        self._made_by: MadeBy | None = None
        self._corpus: Corpus | None = None

    @property
    def dimensions(self) -> int:
        """Return the width of a vector."""
        backbone: Any = self.model.backbone
        return int(backbone.config.get_text_config().hidden_size)

    @property
    def made_by(self) -> MadeBy:
        """Return what identifies the vectors of this model: hashes of its weights, prompt and readout.

        The first call reads all weights.
        """
        if self._made_by is None:
            identity = ModelIdentity(prompt=self.processor.prompt, readout=self.model.readout)
            self._made_by = made_by(self.base, self.adapter, identity)
        return self._made_by

    @cached_property
    def tasks(self) -> dict[str, NamedTask]:
        """Return the tasks that the model knows by name: their instructions, and the modality of their targets."""
        return read_tasks(self.adapter or self.base)

    def encode(
        self,
        inputs: Embeddable | Iterable[Embeddable],
        *,
        instruction: str | None = None,
        task: str | None = None,
        role: Role = "query",
        dimensions: int | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool = True,
    ) -> Vectors:
        """Return unit vectors in fp32 `[N, D]` for N inputs, in their order, and `[D]` for one input.

        An input is one of these. A mix has one vector.

        * A `str`. With a scheme and no white space it is a URL (`https://`, `s3://`, `gs://`, `abfs://`, `hf://`,
          `file://`). If it names a file with the extension of an image, video or PDF, it is that file. If it looks like
          one that does not exist, it is an error. Any other `str` is a text.
        * A `pathlib.Path`: a file.
        * A PIL image, or a uint8 RGB array: `[H, W, 3]` is an image, `[T, H, W, 3]` a video.
        * A dict with some of `text`, `image`, `video`, `document`, `page`, `instruction`. Its `text` is never taken for
          a path. Media are paths, URLs, PIL images, arrays, or lists of them.
        * A `DecodedInput`, as it is.

        A PDF is one page: `report.pdf#page=2` is the third one, as pages count from zero. Only a PDF of one page needs
        no number.

        `instruction` goes with all inputs, except those that have one of their own. `task` names an instruction of
        `tasks`, such as `text_image`, `text_page`, `text_video`, `image_text_image`, `text_text`, `image_class`. Each
        has one for queries and one for targets, which are what is found: `role` says which. Without both there is none.

        `dimensions` cuts the vectors to their first values, again of length 1, for models that were trained with
        Matryoshka widths. `batch_size` is the most inputs at once. Tokens limit them in any case (`chunk_tokens`).
        `device` moves the model there first. `normalize_embeddings=False` is refused, because vectors have length 1.

        Raises `BadMedia` for a file that cannot be read, decoded or taken by the backbone, and `UserError` for what is
        no input. Both name the position: `inputs[3]`.
        """
        if not normalize_embeddings:
            raise UserError("normalize_embeddings", "is False, and vectors have length 1", "leave it out")
        _check_at_most("dimensions", dimensions, self.dimensions)
        _check_at_most("batch_size", batch_size, None)
        if device is not None:
            self.model.to(device)
        several, single = several_of(inputs)
        total = len(several) if isinstance(several, Sized) else None
        words = _instruction(self.tasks, instruction, task, role)
        with _progress(show_progress_bar, total) as advance:
            vectors = [np.empty((0, self.dimensions), np.float32)]
            for group in self._groups(several, words, single):
                vectors.append(self.embed_encoded(group, batch_size))
                advance(len(group))
        vectors_ND = np.concatenate(vectors)
        if dimensions is not None:
            vectors_ND = cut(torch.from_numpy(vectors_ND), dimensions).numpy()
        return vectors_ND[0] if single else vectors_ND

    def similarity(self, a: npt.ArrayLike, b: npt.ArrayLike) -> Vectors:
        """Return the cosines `[N, M]` in fp32 of vectors `[N, D]` with vectors `[M, D]`; `[D]` is one vector.

        Vectors need not have length 1, such as those that were cut. The cosine with a zero vector is 0.
        """
        a_ND, b_MD = (_unit_rows(some) for some in (a, b))
        check_width(a_ND, b_MD.shape[1], "similarity")
        cosines: Vectors = a_ND @ b_MD.T
        return cosines

    @overload
    def search(  # type: ignore[overload-overlap]  # a str is an iterable of str, too
        self,
        vectors: str | os.PathLike[str],
        query: Embeddable,
        *,
        top_k: int = ...,
        task: str | None = ...,
        instruction: str | None = ...,
        modalities: Sequence[Modality] | None = ...,
        filters: Sequence[str] | Mapping[str, Any] = ...,
        version: str | None = ...,
    ) -> list[CorpusHit]: ...

    @overload
    def search(
        self,
        vectors: str | os.PathLike[str],
        query: Iterable[Embeddable],
        *,
        top_k: int = ...,
        task: str | None = ...,
        instruction: str | None = ...,
        modalities: Sequence[Modality] | None = ...,
        filters: Sequence[str] | Mapping[str, Any] = ...,
        version: str | None = ...,
    ) -> list[list[CorpusHit]]: ...

    def search(
        self,
        vectors: str | os.PathLike[str],
        query: Embeddable | Iterable[Embeddable],
        *,
        top_k: int = 10,
        task: str | None = None,
        instruction: str | None = None,
        modalities: Sequence[Modality] | None = None,
        filters: Sequence[str] | Mapping[str, Any] = (),
        version: str | None = None,
    ) -> list[CorpusHit] | list[list[CorpusHit]]:
        """Return the best targets for one query, or a list of them for each of several queries.

        `vectors` is a directory or s3:// URL that `rzen embed` wrote with this model. Queries are inputs as in
        `encode`. `task` is one of `tasks`: it sets the instruction, and the only modality that may be found.
        `instruction` goes with queries without one of their own. By default it is that of a task which fits the query.
        There is none if the targets have none. `modalities` are those that may be found, instead of that of `task`.
        `filters` are conditions for all hits: `["source=photos", "index<100"]` or `{"source": ["photos", "scans"]}`.
        `version` names an earlier version that is kept. What an index needs stays in memory until another directory is
        searched, or until the vectors change.

        Raises `UserError` for vectors of another model, for an unknown task, and the errors of `encode`.
        """
        named_task = None if task is None else task_of(self.tasks, task, instruction)
        modalities = modalities or modalities_of(named_task)
        corpus = read_corpus(
            os.fspath(vectors), modalities, self._endpoint, self._corpus, filters=filters, version=version
        )
        self._corpus = corpus
        corpus.check_made_by(self.made_by, str(self.adapter or self.base))
        several, single = several_of(query)
        words = corpus.instruction_of(named_task) if named_task else instruction
        asked = corpus.read_queries(several, words, self.processor.visual_pixels, self._endpoint)
        hits = corpus.nearest(self.encode(asked), top_k)
        return hits[0] if single else hits

    def decode(self, kind: MediaKind, data: bytes) -> Visual:
        """Return the pixels of a file, by the limits and frames of `media`. Raises `BadMedia`."""
        return self._reader.decode(kind, data)

    def embed_encoded(self, inputs: Sequence[EncodedBatch], batch_size: int | None = None) -> Vectors:
        """Return unit vectors `[len(inputs), D]` of inputs that were encoded elsewhere, each a batch of one."""
        lengths = np.concatenate([one.lengths for one in inputs])
        chunks = chunks_of(lengths, self.chunk_tokens, packed=self.model.packs)
        if batch_size is not None:
            chunks = [chunk[i : i + batch_size] for chunk in chunks for i in range(0, len(chunk), batch_size)]
        with torch.inference_mode():
            vectors: Vectors = embed(self.model, inputs, chunks, twice=False).cpu().numpy()
        return vectors

    def _groups(self, inputs: Iterable[Embeddable], instruction: str, single: bool) -> Iterator[list[EncodedBatch]]:
        """Encoded inputs, as many at a time as memory allows."""
        group: list[EncodedBatch] = []
        num_tokens = 0
        for number, one in enumerate(self._reader.ahead(inputs)):
            with named("input" if single else f"inputs[{number}]"):
                group.append(self.processor.encode([self._reader.read(one, instruction)]))
            num_tokens += int(group[-1].lengths.sum())
            if num_tokens >= _CHUNKS_AT_ONCE * self.chunk_tokens:
                yield group
                group, num_tokens = [], 0
        if group:
            yield group


def load(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: Dtype | None = None,
    identity: ModelIdentity | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    media: MediaConfig | None = None,
    endpoint: str | None = None,
) -> Embedder:
    """Load a checkpoint, an exported model or a hub name, with or without a LoRA adapter.

    Checkpoint and adapter are directories, or `file://`, `s3://`, `gs://` or `abfs://` URLs. Files of an object store
    are downloaded once into RZEN_CACHE. `endpoint` is that of S3, AWS_ENDPOINT_URL if it is not given. Downloads of
    `s3://` media use it, too.

    `device` is a GPU if there is one. `dtype` is that of the export; without one, float32 on a CPU and bfloat16 on a
    GPU. `identity` holds for models that do not say how they are read (`rzen.json`). Raises `UserError` for anything
    that is not a checkpoint of a supported family, and for an adapter that was trained on another checkpoint.
    """
    base = Path(checkpoint_folder(os.fspath(path), endpoint))
    tuned = Path(local_folder(os.fspath(adapter), endpoint)) if adapter is not None else None
    if tuned is not None:
        check_base(tuned, base)
    read = read_identity(tuned or base, identity or ModelIdentity())
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(
        backbone=str(base), dtype=dtype or default_dtype(base, where), gradient_checkpointing=False, tune="full"
    )
    backbone = load_backbone(str(base), config)
    processor = Processor(str(base), read.prompt)
    model = EmbeddingModel(load_adapter(backbone, tuned) if tuned else backbone, processor.layout, read.readout)
    model = model.requires_grad_(False).eval().to(where)
    return Embedder(processor, model, chunk_tokens, media, base=base, adapter=tuned, endpoint=endpoint)


def _instruction(tasks: Mapping[str, NamedTask], instruction: str | None, task: str | None, role: Role) -> str:
    """Return the instruction that these keywords of `encode` ask for."""
    if task is None:
        return instruction or ""
    found = task_of(tasks, task, instruction)
    if role not in ("query", "target"):
        raise UserError(f"role={role!r}", "is not known", "use query or target")
    return found["target_instruction" if role == "target" else "instruction"]


def _check_at_most(name: str, value: int | None, most: int | None) -> None:
    """Raise `UserError` unless a number is at least 1 and at most `most`."""
    if value is not None and not 1 <= value <= (most or value):
        fix = f"use 1 to {most}, the width of the model" if most else "use at least 1"
        raise UserError(name, f"is {value}", fix)


def _unit_rows(vectors: npt.ArrayLike) -> Vectors:
    """Return vectors `[N, D]` or `[D]` as `[N, D]` in fp32, each of length 1 or zero."""
    rows_ND = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    lengths_N = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    unit: Vectors = np.divide(rows_ND, lengths_N, out=np.zeros_like(rows_ND), where=lengths_N > 0)
    return unit


@contextmanager
def _progress(shown: bool, total: int | None) -> Iterator[Callable[[int], None]]:
    """Give a function that counts inputs on a bar of the standard error, if it is wanted."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("encode", total=total)
        yield lambda count: progress.advance(bar, count)


def default_dtype(folder: Path, device: str) -> Dtype:
    """Return the compute type that an export names. Without one, float32 on a CPU and bfloat16 on a GPU."""
    default: Dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return cast(Dtype | None, stored_dtype(folder)) or default
