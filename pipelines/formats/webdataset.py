"""WebDataset tars: `jpg` and `txt` as img2dataset writes them, or a member for each input of a sample.

000000001.json          texts, instructions, relevance and origin
000000001.jpg, .txt     a text as the query of one medium, without negatives
000000001.query.jpg     otherwise: query.EXT, positive.EXT, negative0.EXT, ...
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from pipelines.formats.format import Samples, constants, folders_of, partly_graded, several_media
from pipelines.formats.shape import InputShape, SourceShape, extension
from pipelines.samples import Members, Sample


class WebDataset:
    """Tars of webdataset and img2dataset, for `rzen index` and for any loader of such tars."""

    reader = "index"

    def problem(self, shape: SourceShape) -> tuple[str, str] | None:
        """Return why the tars cannot hold such samples: a mapping names one medium, and has no optional parts."""
        if found := several_media(shape):
            return found
        for name, given in shape.inputs().items():
            if not given.is_uniform:
                problem = f"has text in {given.with_text:,} and media in {given.with_media:,} of {given.num_inputs:,}"
                return f"{problem} {name}: they differ from sample to sample", "use the format mmeb"
        return partly_graded(shape)

    def write(self, folder: Path, place: str, samples: Samples, shape: SourceShape) -> list[str]:
        """Write a tar. Equal samples give equal bytes."""
        path = f"{place}.tar"
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (sample, members) in enumerate(samples):
                for name, data in _members(sample, members, shape):
                    header = tarfile.TarInfo(f"{number:09d}.{name}")
                    header.size, header.mode = len(data), 0o644
                    tar.addfile(header, io.BytesIO(data))
        return [path]

    def settings(self, root: str, task: str, shape: SourceShape, files: list[str]) -> dict[str, Any]:
        """Return the settings for `rzen index`."""
        found: dict[str, Any] = {"urls": folders_of(root, files), "task": task}
        simple = _is_simple(shape)
        found["query"] = _mapping(shape.query, "json:query", "query")
        found["positive"] = _mapping(shape.positive, "json:positive", "" if simple else "positive")
        if shape.negatives.with_media:
            each = range(shape.max_negatives)
            found["negatives"] = [_mapping(shape.negatives, f"json:negative{n}", f"negative{n}") for n in each]
        elif shape.max_negatives:
            found["negatives"] = [{"text": "json:negatives"}]
        for name in ("instruction", "target_instruction"):
            found[name] = constants(shape).get(name, {"member": f"json:{name}"})
        if shape.num_graded:
            found["relevance"] = "json:relevance"
        return found


def _is_simple(shape: SourceShape) -> bool:
    """Return whether all samples are a text that asks for one medium."""
    asks = not shape.query.with_media and not shape.positive.with_text
    return bool(asks and shape.positive.with_media and not shape.max_negatives)


def _members(sample: Sample, members: Members, shape: SourceShape) -> list[tuple[str, bytes]]:
    content: dict[str, Any] = {"source": sample.source, "task": sample.task, "origin": sample.origin}
    instruction = list(sample.instructions) if sample.instruction_variants else sample.instruction
    content |= {"instruction": instruction, "target_instruction": sample.target_instruction}
    content |= {"query": sample.query.text, "positive": sample.positive.text}
    if sample.negatives:
        texts = [negative.text for negative in sample.negatives]
        content |= {"negatives": texts} | {f"negative{number}": text for number, text in enumerate(texts)}
    if sample.relevance is not None:
        content["relevance"] = sample.relevance
    found = [("json", json.dumps(content, ensure_ascii=False, sort_keys=True).encode())]
    if _is_simple(shape):
        (medium,) = sample.positive.media
        found += [("txt", sample.query.text.encode()), (extension(medium.member), members[medium.member])]
        return found
    named = {"query": sample.query, "positive": sample.positive}
    named |= {f"negative{number}": negative for number, negative in enumerate(sample.negatives)}
    for name, given in named.items():
        found += [(f"{name}.{extension(media.member)}", members[media.member]) for media in given.media]
    return found


def _mapping(given: InputShape, text: str, member: str) -> dict[str, str]:
    prefix = f"{member}." if member else ""
    media = " | ".join(f"{prefix}{name}" for name in sorted(given.extensions))
    return ({"text": text} if given.with_text else {}) | ({"media": media} if media else {})
