"""`DATA.md`, the card of a dataset: counts, licenses, skipped samples, examples. Equal datasets give equal cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.redaction import escape_markdown
from pipelines.samples import Input, Sample

CARD_PATH = "DATA.md"
NUM_EXAMPLES = 2
_MAX_TEXT = 120


def license_of(source: str, licenses: Mapping[str, str]) -> str:
    """Return the license of a source: its own, or that of the table whose values name it, as `visrag-ArxivQA`."""
    names = [name for name in licenses if source == name or source.startswith(f"{name}-")]
    return licenses[max(names, key=len)] if names else ""


def data_card(
    accepted: Mapping[str, Mapping[str, int]],
    tasks: Mapping[str, str],
    rejected: Mapping[str, int],
    licenses: Mapping[str, str],
    examples: Mapping[str, Sequence[Sample]],
) -> bytes:
    """Return the card as Markdown. `accepted` has the samples of each source by split, `licenses` those of tables."""
    splits = [split for split, counts in accepted.items() if counts]
    sources = sorted({source for counts in accepted.values() for source in counts})
    total = sum(sum(counts.values()) for counts in accepted.values())
    lines = ["# Dataset", "", f"{total:,} samples of {len(sources)} sources, made by rzen.", ""]
    lines += _table(
        ["source", "task", "license", *splits],
        [
            [source, tasks[source], license_of(source, licenses) or "not stated"]
            + [f"{accepted[split].get(source, 0):,}" for split in splits]
            for source in sources
        ],
    )
    if rejected:
        lines += ["", "## Skipped", ""]
        lines += _table(["reason", "samples"], [[reason, f"{rejected[reason]:,}"] for reason in sorted(rejected)])
    if examples:
        lines += ["", "## Examples", ""]
        rows = [
            [source, _shown(sample.query), _shown(sample.positive), str(len(sample.negatives)), sample.origin]
            for source in sources
            for sample in examples.get(source, ())
        ]
        lines += _table(["source", "query", "positive", "negatives", "origin"], rows)
    return ("\n".join(lines) + "\n").encode()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(escape_markdown(cell) for cell in row)} |" for row in rows]


def _shown(part: Input) -> str:
    """Return an input in words: the kinds of its media, and the start of its text."""
    text = part.text if len(part.text) <= _MAX_TEXT else f"{part.text[:_MAX_TEXT]}..."
    return " ".join([*(f"[{media.kind}]" for media in part.media), *([text] if text else [])])
