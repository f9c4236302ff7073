"""What a format is: it checks a source, writes the samples of a shard, and says how `rzen` reads them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelines.formats.shape import SourceShape
from pipelines.samples import Members, Sample

FormatName = Literal["webdataset", "mmeb", "sentence_transformers"]
Samples = Iterable[tuple[Sample, Members]]


class Format(Protocol):
    """A format of another library. One file, or a few, for each shard."""

    reader: str
    """Kind of the job that reads it back: `ingest` or `index`."""

    def problem(self, shape: SourceShape) -> tuple[str, str] | None:
        """Return why the format cannot hold such samples, and what to do. None if it can."""

    def write(self, folder: Path, place: str, samples: Samples, shape: SourceShape) -> list[str]:
        """Write the samples of a shard below `folder`. Return the paths of the files, which contain `place`.

        `place` is the path of the shard without an extension: split, source and number.
        """

    def settings(self, root: str, task: str, shape: SourceShape, files: list[str]) -> Mapping[str, Any]:
        """Return the settings of a source of `reader` that read the files of all its shards back.

        `root` is the folder or URL that has the `files`.
        """


def several_media(shape: SourceShape) -> tuple[str, str] | None:
    """Return the problem of an input with several media, for formats that have room for one."""
    for name, given in shape.inputs().items():
        if given.max_media > 1:
            return f"has {given.max_media} media in the {name}", "use the format sentence_transformers"
    return None


def partly_graded(shape: SourceShape) -> tuple[str, str] | None:
    """Return the problem of a source where only some samples have a relevance."""
    if shape.num_graded in (0, shape.num_samples):
        return None
    return f"has a relevance in {shape.num_graded:,} of {shape.num_samples:,} samples", "use the format mmeb"


def constants(shape: SourceShape) -> dict[str, str]:
    """Return the settings `instruction` and `target_instruction` where all samples have the same."""
    found = {"instruction": shape.instructions, "target_instruction": shape.target_instructions}
    return {name: next(iter(texts), "") for name, texts in found.items() if len(texts) < 2}


def folders_of(root: str, files: list[str]) -> list[str]:
    """Return the folders of files, below `root`, each once."""
    return list(dict.fromkeys(f"{root}/{path.rpartition('/')[0]}" for path in files))
