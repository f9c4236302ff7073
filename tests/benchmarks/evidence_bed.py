"""A test bed in which hardness weights and false-negative elimination can be seen, because the truth is known.

The data are 304 emoji in five skin tones: 1,520 real pictures with their names in Unicode's CLDR. Both packages come
from npm's registry, with the pins of `jobs.data.emoji`. A caption names the emoji and its tone, or the emoji only.

    hard negatives     pictures of the same emoji in other tones, for a caption with a tone
    false negatives    the same pictures, for a caption without a tone: no hash shows them
    duplicates         names of the same emoji, when pictures are the queries

The learner has two small towers on pixels and words. The loss is `rzen.objective.loss.Objective` itself, so that a run
takes seconds. One tone of each emoji is never trained on. It is what the tests ask for.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from rzen.config import FalseNegativeConfig, HardnessConfig, ObjectiveConfig, TemperatureConfig
from rzen.evaluation.metrics import Relevant, metrics_by_query
from rzen.evaluation.ranking import rank_candidates
from rzen.objective.batch import Batch
from rzen.objective.loss import Objective
from rzen.objective.terms import false_negatives

TONES = 5
NUM_EMOJI = 304
"""Emoji of the packages that have a picture in each tone."""
TUNING = 100
"""Seeds from here on choose settings. They hold out other tones than the seeds below, which test."""
_PIXELS, _COMPONENTS = 32, 128
_HIDDEN, _WIDTH = 256, 64
_LR = 2e-3
_WATCHED = 50  # last steps, over which the rule's decisions are counted


@dataclass(frozen=True)
class Bed:
    """The data. Picture `5 e + t` shows emoji `e` in tone `t`. E emoji, V words."""

    pictures: Tensor
    """`[5 E, 128]`, principal components of the pixels, of unit variance."""
    texts: Tensor
    """`[6 E, V]`, words of each caption as a unit vector: with tone `t` in row `6 e + t`, without one in `6 e + 5`."""

    @property
    def num_emoji(self) -> int:
        return len(self.pictures) // TONES


@dataclass(frozen=True)
class Cell:
    """What a run trains with. Everything else is the same for all runs."""

    direction: str = "names"
    """`names`: captions ask for pictures. `classes`: pictures ask for names, which repeat in a batch."""
    untoned: float = 0.0
    """Share of the captions that do not name the tone."""
    tones: int = 4
    """Tones of one emoji in a batch."""
    ids: bool = False
    """Whether the objective is given ids of contents."""
    rule: bool = False
    """Whether negatives that look like the positive are dropped."""
    oracle: bool = False
    """Whether the objective is told which negatives are false."""
    alpha: float = 0.0
    """Strength of hardness weights; 0 turns them off."""
    temperature: float = 0.02
    batch: int = 128
    steps: int = 400
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings of `ObjectiveConfig`."""
    normalized: bool = False
    """Whether hardness weights have a mean of 1."""
    hardness_from: int = 0
    """First step with hardness weights."""
    learnable: bool = False
    """Whether the temperature is learned."""

    def key(self) -> str:
        """Return a text that is equal for equal cells only."""
        return json.dumps(self.__dict__, sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """What a run scores, from 0 to 1, and what the rule did in its last steps (None without the rule)."""

    scores: dict[str, float]
    hits: list[bool]
    """Per emoji: whether the test that its direction is trained for found the right answer first."""
    found: float | None
    """Share of the false negatives that the rule drops."""
    lost: float | None
    """Share of the hard negatives that the rule drops."""
    temperature: float


class TruthIdentity:
    """Stands for `rzen.objective.identity.Identity` where the truth is told: `[N, N]`, right answers of each query."""

    def __init__(self, right: Tensor) -> None:
        self._right = right

    def query_to_targets(self, row_R: Tensor) -> Tensor:
        return self._right[row_R]


@dataclass(frozen=True)
class OracleBatch(Batch):
    """A batch whose right answers are known."""

    right: Tensor | None = None

    @cached_property
    def identity(self) -> Any:
        assert self.right is not None
        return TruthIdentity(self.right)


def load_bed(pictures: bytes, names: bytes) -> Bed:
    """Read the two npm packages (tar.gz)."""
    entries = json.loads(_member(names, re.compile(r"package/en/data\.json"))["package/en/data.json"])
    images = _member(pictures, re.compile(r"package/assets/[0-9a-f-]+\.webp"))
    pixels, captions = [], []
    for entry in sorted(entries, key=lambda entry: entry["hexcode"]):
        skins = {skin["tone"]: skin for skin in entry.get("skins", []) if isinstance(skin["tone"], int)}
        files = [f"package/assets/{skins[tone]['hexcode'].lower()}.webp" for tone in sorted(skins)]
        if len(files) != TONES or any(file not in images for file in files):
            continue
        pixels += [_pixels(images[file]) for file in files]
        captions += [*(skins[tone]["label"] for tone in sorted(skins)), entry["label"]]
    assert len(pixels) == TONES * NUM_EMOJI, "the packages are pinned"
    return Bed(_components(np.stack(pixels)), _words(captions))


def _member(package: bytes, pattern: re.Pattern[str]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as tar:
        files = [member for member in tar if member.isfile() and pattern.fullmatch(member.name)]
        return {member.name: file.read() for member in files if (file := tar.extractfile(member))}


def _pixels(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data)) as image:
        rgba = image.convert("RGBA").resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
    ground = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(ground, rgba).convert("RGB"), np.float32).reshape(-1) / 255


def _components(pixels_NP: np.ndarray[Any, Any]) -> Tensor:
    centered = torch.from_numpy(pixels_NP - pixels_NP.mean(axis=0)).double()
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    strongest = vectors[:, -_COMPONENTS:]
    strongest = strongest * strongest.sum(dim=0).sign()  # an eigenvector has no sign of its own
    found = centered @ strongest
    return (found / found.std(dim=0)).float()


def _words(captions: Sequence[str]) -> Tensor:
    split = [re.findall(r"\w+", caption.casefold()) for caption in captions]
    number = {word: n for n, word in enumerate(sorted({word for words in split for word in words}))}
    texts = torch.zeros(len(split), len(number))
    for row, words in enumerate(split):
        texts[row, [number[word] for word in words]] = 1
    return normalize(texts, dim=1)


class Towers(nn.Module):
    """Two layers on the pixels, and two on the words."""

    def __init__(self, bed: Bed) -> None:
        super().__init__()
        self.picture = _tower(bed.pictures.shape[1])
        self.text = _tower(bed.texts.shape[1])

    def pictures(self, rows: Tensor) -> Tensor:
        return normalize(self.picture(rows), dim=1)

    def texts(self, rows: Tensor) -> Tensor:
        return normalize(self.text(rows), dim=1)


def _tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _WIDTH))


def held_out_tones(num_emoji: int, seed: int) -> np.ndarray[Any, Any]:
    """Return the tone of each emoji that a seed never trains on. Seeds that tune and seeds that test share none."""
    rng = np.random.default_rng([seed, 0])
    return 3 + rng.integers(0, 2, num_emoji) if seed >= TUNING else rng.integers(0, 3, num_emoji)


def train(bed: Bed, cell: Cell, seed: int) -> Outcome:
    """Train and test one run. The seed draws the held-out tones, the captions, the weights and the order of the data.

    The captions and the order are the same for all cells that draw the same.
    """
    assert cell.batch % cell.tones == 0
    held = held_out_tones(bed.num_emoji, seed)
    rng = np.random.default_rng([seed, 1])
    is_toned = rng.random((bed.num_emoji, TONES)) >= cell.untoned
    torch.manual_seed(seed)
    towers = Towers(bed)
    loss = _objective(cell, hardness=cell.alpha > 0)
    early = _objective(cell, hardness=False)
    weights = [{"params": towers.parameters(), "lr": _LR}, {"params": loss.parameters(), "lr": 5 * _LR}]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    counted: list[tuple[float, float]] = []
    for step in range(cell.steps):
        emoji, tone = _draw(rng, held, cell)
        captioned = np.where(is_toned[emoji, tone], tone, TONES)
        batch, right = _batch(bed, towers, cell, *map(torch.from_numpy, (emoji, tone, captioned)))
        value, _ = (early if step < cell.hardness_from else loss)(batch, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss.clamp_()
        if cell.rule and step >= cell.steps - _WATCHED:
            counted.append(_rule_shares(batch.targets.detach(), torch.from_numpy(emoji), right, loss.config))
    scores, hits = _test(bed, towers, torch.from_numpy(held), cell)
    found, lost = (_mean(shares) for shares in (zip(*counted, strict=True) if counted else ((), ())))
    return Outcome(scores, hits, found, lost, loss.temperatures()["emoji"])


def _mean(shares: Iterable[float]) -> float | None:
    known = [share for share in shares if not math.isnan(share)]
    return statistics.fmean(known) if known else None


def _objective(cell: Cell, hardness: bool) -> Objective:
    weights = HardnessConfig(alpha=cell.alpha, normalized=cell.normalized) if hardness else None
    rule = FalseNegativeConfig() if cell.rule else None
    temperature = TemperatureConfig(initial=cell.temperature, learnable=cell.learnable)
    config = ObjectiveConfig(hardness=weights, false_negatives=rule, temperature=temperature, **cell.options)
    return Objective(config, ["emoji"])


def _draw(rng: np.random.Generator, held: np.ndarray[Any, Any], cell: Cell) -> tuple[Any, Any]:
    """Return emoji and tone of each sample of a batch: some tones of each of some emoji, none of them held out."""
    emoji = rng.choice(len(held), cell.batch // cell.tones, replace=False)
    order = rng.random((len(emoji), TONES))
    order[np.arange(len(emoji)), held[emoji]] = 2  # last, and never taken
    tone = order.argsort(axis=1)[:, : cell.tones]
    return np.repeat(emoji, cell.tones), tone.reshape(-1)


def _batch(
    bed: Bed, towers: Towers, cell: Cell, emoji: Tensor, tone: Tensor, captioned: Tensor
) -> tuple[Batch, Tensor]:
    """Return a batch, and `[B, B]`: which targets are right answers of each query."""
    pictures = towers.pictures(bed.pictures[TONES * emoji + tone])
    picture_ids = TONES * emoji + tone
    same = emoji[:, None] == emoji
    if cell.direction == "classes":
        queries, targets = pictures, towers.texts(bed.texts[6 * emoji + TONES])
        query_ids, target_ids, right = picture_ids, 10_000 + emoji, same
    else:
        queries, targets = towers.texts(bed.texts[6 * emoji + captioned]), pictures
        query_ids, target_ids = 10_000 + 6 * emoji + captioned, picture_ids
        right = same & ((captioned[:, None] == TONES) | (tone[:, None] == tone))
    if cell.oracle:
        return OracleBatch(queries, targets, "emoji", right=right), right
    if cell.ids:
        return Batch(queries, targets, "emoji", target_ids=target_ids, query_ids=query_ids), right
    return Batch(queries, targets, "emoji"), right


def _rule_shares(targets: Tensor, emoji: Tensor, right: Tensor, config: ObjectiveConfig) -> tuple[float, float]:
    """Return the shares of false and of hard negatives that the rule drops; NaN where there are none."""
    assert config.false_negatives is not None
    itself = torch.eye(len(targets), dtype=torch.bool)
    dropped = false_negatives(targets @ targets.T, itself, torch.zeros_like(itself), config.false_negatives)
    false = right & ~itself
    hard = (emoji[:, None] == emoji) & ~right
    return float(dropped[false].float().mean()), float(dropped[hard].float().mean())


@torch.no_grad()
def _test(bed: Bed, towers: Towers, held: Tensor, cell: Cell) -> tuple[dict[str, float], list[bool]]:
    """Score the held-out tones: captions against all pictures, and pictures against all names."""
    every = torch.arange(bed.num_emoji)
    pictures, texts = towers.pictures(bed.pictures), towers.texts(bed.texts)
    names, toned = texts[6 * every + TONES], texts[6 * every + held]
    asked = (TONES * every + held)[:, None]
    tones = TONES * every[:, None] + torch.arange(TONES)
    spec = _scored(toned, pictures, asked)["hit@1"]
    classes = _scored(pictures[asked[:, 0]], names, every[:, None])["hit@1"]
    by_query = {
        "spec": spec,
        "map": _scored(names, pictures, tones)[f"map@{len(pictures)}"],
        "ndcg": _scored(toned, pictures, tones, 1 + (tones == asked).double())["ndcg_exponential@10"],
        "classes": classes,
    }
    scores = {name: float(values.mean()) for name, values in by_query.items()}
    return scores, ((classes if cell.direction == "classes" else spec) == 1).tolist()


def _scored(queries: Tensor, candidates: Tensor, right_QR: Tensor, grade_QR: Tensor | None = None) -> dict[str, Any]:
    """Return the metrics of each query, as evaluations have them, of the rows of its right answers."""
    num_queries, num_right = right_QR.shape
    grades = torch.ones(right_QR.shape, dtype=torch.float64) if grade_QR is None else grade_QR
    query_P = np.repeat(np.arange(num_queries), num_right)
    relevant = Relevant(query_P, right_QR.flatten().numpy(), grades.flatten().numpy(), num_queries)
    ranked = rank_candidates(queries.numpy(), candidates.numpy(), relevant, num_top=1, device="cpu")
    return metrics_by_query(relevant, ranked.rank, (1, 10, len(candidates)))


def read_bed(folder: Path) -> Bed:
    """Fetch the packages into a folder once, and read them."""
    from jobs.data.emoji import NAMES, PICTURES
    from jobs.data.npm import fetch_package

    folder.mkdir(parents=True, exist_ok=True)
    data = []
    for package, name in ((PICTURES, "pictures.tgz"), (NAMES, "names.tgz")):
        if not (folder / name).exists():
            (folder / name).write_bytes(fetch_package(package))
        data.append((folder / name).read_bytes())
    return load_bed(*data)
