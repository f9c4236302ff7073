"""M-BEIR's prompts: several for each dataset, modality of the query and modality of the candidate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pipelines.errors import BadMedia, UserError
from pipelines.sources.values import Part, draw
from pipelines.storage.location import open_object
from pipelines.texts import decode_text, lines_of


@dataclass(frozen=True)
class MbeirPrompts:
    """The file `query_instructions.tsv`. The number before the colon of a query id names the dataset."""

    url: str
    endpoint: str | None

    def wordings(self, qid: str, query: Part, positive: Part, seed: int) -> list[str]:
        """Return the prompts for a row, from one on that the seed and the id draw. Raises `BadMedia`: no_prompt."""
        key = (qid.partition(":")[0], _modality(query), _modality(positive))
        found = _prompts(self.url, self.endpoint).get(key)
        if not found:
            raise BadMedia("no_prompt", f"dataset {key[0]!r}, {key[1]} to {key[2]}")
        first = draw(seed, "prompt", qid) % len(found)
        return found[first:] + found[:first]

    def check(self) -> None:
        """Raise `UserError` for a file that is missing or damaged."""
        _prompts(self.url, self.endpoint)


def _modality(part: Part) -> str:
    return ",".join([*(["image"] if part.media else []), *(["text"] if part.text else [])])


@cache
def _prompts(url: str, endpoint: str | None) -> dict[tuple[str, str, str], list[str]]:
    store, path = open_object(url, endpoint)
    try:
        lines = [line for line in lines_of(decode_text(store.read(path))) if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"instruction.mbeir={url}", "there is no such file", "fetch it, or correct the path") from error
    found = {}
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) < 5:
            problem = f"has {len(cells)} cells, needs modalities, name, dataset and prompts"
            raise UserError(f"{url}:{number}", problem, "fetch it again")
        query, candidate, _, dataset, *prompts = cells
        found[dataset, query, candidate] = [prompt.strip() for prompt in prompts if prompt.strip()]
    return found
