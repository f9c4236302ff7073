"""The page of a look at a table: columns, problems, a spec, and samples with their pictures and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.samples import DecodedInput, DecodedSample, Members, Modality
from rzen.config import PromptConfig
from rzen.inputs.prompts import IM_END, IM_START, Span, input_pieces, render
from rzen.report.hits import Hit
from rzen.report.render import make_card, write_html
from rzen.report.thumbnails import ThumbnailPool


@dataclass(frozen=True, slots=True)
class ShownSide:
    """A query, positive or negative: its media in words, its prompt with one token a medium, and its pixels."""

    role: str
    media: list[str]
    prompt: str
    decoded: DecodedInput

    @property
    def content(self) -> str:
        """Return what differs from prompt to prompt: the user's turn."""
        return self.prompt.partition(f"{IM_START}user\n")[2].partition(IM_END)[0]

    @property
    def modality(self) -> Modality:
        """Return what the side shows, by its first medium."""
        names: dict[str, Modality] = {"image": "image", "video": "video", "document": "page"}
        return names[self.decoded.visuals[0].kind] if self.decoded.visuals else "text"


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A sample as a model will get it."""

    origin: str
    source: str
    task: str
    sides: list[ShownSide]

    def as_json(self) -> dict[str, Any]:
        """Return the sample without pixels."""
        sides = [{"role": side.role, "media": side.media, "prompt": side.prompt} for side in self.sides]
        return {"origin": self.origin, "source": self.source, "task": self.task, "sides": sides}


def show_sample(decoded: DecodedSample, members: Members) -> ShownSample:
    """Return a sample for people. `members` are the bytes that are stored."""
    sample = decoded.sample
    roles = ["query", "positive", *(f"negative {number}" for number in range(1, len(sample.negatives) + 1))]
    inputs = [decoded.query, decoded.positive, *decoded.negatives]
    sides = []
    for role, stored, given in zip(roles, sample.inputs(), inputs, strict=True):
        media = [
            f"{medium.kind} {medium.member.partition('.')[2]}, {len(members[medium.member]):,} bytes, "
            f"{visual.frames.shape[2]} x {visual.frames.shape[1]} pixels"
            for medium, visual in zip(stored.media, given.visuals, strict=True)
        ]
        sides.append(ShownSide(role, media, _prompt(given), given))
    return ShownSample(sample.origin, sample.source, sample.task, sides)


def _prompt(given: DecodedInput) -> str:
    spans = [Span("video" if visual.kind == "video" else "image", 1) for visual in given.visuals]
    return render(input_pieces(PromptConfig().template, given.instruction, given.text, spans))


def write_look(
    path: Path,
    *,
    title: str,
    columns: Sequence[Mapping[str, str]],
    facts: Mapping[str, str],
    problems: Sequence[str],
    spec: str,
    samples: Sequence[ShownSample],
) -> None:
    """Write one HTML file that needs no network, no script and no other file."""
    pool = ThumbnailPool()
    shown = []
    for sample in samples:
        cards = []
        for side in sample.sides:
            hit = Hit(0, None, side.modality, side.decoded.text, "", side.decoded.frames)
            cards.append((side, make_card(hit, pool) if side.decoded.visuals else None))
        shown.append((sample, cards))
    write_html(
        path,
        "look.html.jinja",
        title=title,
        sections={"columns": columns, "problems": problems, "samples": shown, "spec": spec, "settings": facts},
        columns=columns,
        problems=problems,
        spec=spec,
        samples=shown,
        plots={},
        facts=facts,
        pool=pool,
    )
