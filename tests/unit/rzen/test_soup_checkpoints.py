"""Soups of full checkpoints, in shards too, and how much memory soups take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from pipelines.errors import UserError
from rzen.config import DareSoup, MeanSoup, SlerpSoup, TiesSoup
from rzen.model.checkpoints import checkpoint_sha256
from rzen.soup.make import make_soup, total_weight
from tests.paths import ROOT
from tests.tiny import tiny_checkpoint

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 1.0}
SHARES = [0.25, 0.5, 0.25]


def save(folder: Path, tensors: Mapping[str, Tensor], *, like: Path, base_sha256: str | None = None) -> Path:
    """A checkpoint in one file, its other files those of another."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    if base_sha256 is not None:
        content = {"prompt": {"template": "plain"}, "dtype": "float32", "lineage": {"base_sha256": base_sha256}}
        (folder / "rzen.json").write_text(json.dumps(content | {"step": folder.name}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_checkpoint(folder)
    return folder


@pytest.fixture
def three(tmp_path: Path, base: Path) -> dict[str, Path]:
    """Fine-tunes: the base and noise."""
    tensors, found = load_file(base / "model.safetensors"), {}
    for seed, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        tuned = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
        found[name] = save(tmp_path / name, tuned, like=base, base_sha256=checkpoint_sha256(base))
    return found


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors, fp64."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.double() for file in files for name, tensor in load_file(file).items()}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def mean(paths: Mapping[str, Path]) -> dict[str, Tensor]:
    parents = [weights_of(paths[name]) for name in WEIGHTS]
    return {key: sum(s * p[key] for s, p in zip(SHARES, parents, strict=True)) for key in parents[0]}


def test_mean_of_checkpoints(tmp_path: Path, three: dict[str, Path], base: Path) -> None:
    lineage = make_soup(three, tmp_path / "soup", MeanSoup(weights=WEIGHTS))
    assert apart(weights_of(tmp_path / "soup"), mean(three)) < 1e-6
    assert total_weight(tmp_path / "soup") == 4.0
    assert [parent["sha256"] for parent in lineage["parents"]] == [checkpoint_sha256(path) for path in three.values()]
    assert json.loads((tmp_path / "soup/soup.json").read_text()) == lineage
    common = {"prompt": {"template": "plain"}, "dtype": "float32", "lineage": {"base_sha256": checkpoint_sha256(base)}}
    assert json.loads((tmp_path / "soup/rzen.json").read_text()) == common


def test_a_soup_has_the_shards_of_its_first_parent_and_loads(tmp_path: Path, three: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(three["a"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shutil.copyfile(three["a"] / "rzen.json", tmp_path / "shards/rzen.json")
    parents = {**three, "a": tmp_path / "shards"}
    make_soup(parents, tmp_path / "soup", MeanSoup(weights=WEIGHTS))
    names = [path.name for path in sorted((tmp_path / "soup").iterdir())]
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert sorted([*(path.name for path in (tmp_path / "shards").iterdir()), "soup.json"]) == names
    expected = mean(three)
    assert apart(weights_of(tmp_path / "soup"), expected) < 1e-6
    loaded = AutoModel.from_pretrained(tmp_path / "soup").state_dict()
    assert apart({name: loaded[name].double() for name in expected}, expected) < 1e-6


def test_a_checkpoint_soup_takes_in_one_more(tmp_path: Path, three: dict[str, Path]) -> None:
    make_soup(three, tmp_path / "two", MeanSoup(weights={"a": 1.0, "b": 2.0}))
    both = {"two": tmp_path / "two", "c": three["c"]}
    make_soup(both, tmp_path / "all", MeanSoup(weights={"two": total_weight(tmp_path / "two"), "c": 1.0}))
    assert apart(weights_of(tmp_path / "all"), mean(three)) < 1e-6


def test_bf16_is_mixed_in_fp32_and_rounded_once(tmp_path: Path, three: dict[str, Path], base: Path) -> None:
    inputs = {}
    for name, path in three.items():
        tensors = {key: tensor.bfloat16() for key, tensor in load_file(path / "model.safetensors").items()}
        inputs[name] = save(tmp_path / f"{name}16", tensors | {"count": torch.tensor([7])}, like=base)
    make_soup(inputs, tmp_path / "soup", MeanSoup(weights=WEIGHTS))  # shares that fp32 holds exactly
    found = load_file(tmp_path / "soup/model.safetensors")
    parents = [load_file(path / "model.safetensors") for path in inputs.values()]
    assert found.pop("count").tolist() == [7]
    for key, tensor in found.items():
        expected = sum(share * parent[key].double() for share, parent in zip(SHARES, parents, strict=True))
        assert torch.equal(tensor, expected.bfloat16())
    save_file({**parents[2], "count": torch.tensor([8])}, inputs["c"] / "model.safetensors")
    with pytest.raises(UserError, match="count: is of whole numbers and differs"):
        make_soup(inputs, tmp_path / "other", MeanSoup())


@pytest.mark.parametrize("based", [True, False], ids=["from the base", "from zero"])
def test_slerp_of_checkpoints_is_that_of_their_differences(
    tmp_path: Path, three: dict[str, Path], base: Path, based: bool
) -> None:
    two = {name: three[name] for name in "ac"}
    make_soup(two, tmp_path / "soup", SlerpSoup(weights={"a": 1.0, "c": 3.0}), base=base if based else None)
    origin, keys = weights_of(base), list(weights_of(base))
    zero = torch.cat([origin[key].flatten() for key in keys]) * based
    a, c, found = (
        torch.cat([weights_of(path)[key].flatten() for key in keys]) - zero
        for path in (*two.values(), tmp_path / "soup")
    )
    angle = torch.acos(a @ c / a.norm() / c.norm())
    expected = (torch.sin(0.25 * angle) * a + torch.sin(0.75 * angle) * c) / torch.sin(angle)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert (float(angle) > 1) == based


@pytest.mark.parametrize("config", [TiesSoup(density=0.25), DareSoup(weights=WEIGHTS, density=0.9)])
def test_ties_and_dare_of_checkpoints_are_of_their_differences(
    tmp_path: Path, three: dict[str, Path], base: Path, config: Any
) -> None:
    lineage = make_soup(three, tmp_path / "soup", config, base=base)
    origin, found = weights_of(base), weights_of(tmp_path / "soup")
    parents = [weights_of(path) for path in three.values()]
    assert lineage["base"] == {"path": str(base), "sha256": checkpoint_sha256(base)}
    for key, tensor in found.items():
        deltas = [parent[key] - origin[key] for parent in parents]
        if config.method == "ties":
            expected = merge_utils.ties(deltas, torch.ones(3), config.density)
            torch.testing.assert_close(tensor - origin[key], expected, rtol=0, atol=1e-6)
        else:  # an entry is one of the eight sums that dropping can leave
            ways = torch.cartesian_prod(*[torch.tensor([0.0, 1 / 0.9])] * 3).double()
            values = torch.einsum("wp,p,p...->w...", ways, torch.tensor(SHARES).double(), torch.stack(deltas))
            assert float((values - (tensor - origin[key])).abs().amin(0).max()) < 1e-6


def test_ties_and_dare_need_the_base_of_the_fine_tunes(tmp_path: Path, three: dict[str, Path], base: Path) -> None:
    for config in (TiesSoup(), DareSoup()):
        with pytest.raises(UserError, match="full checkpoints do not hold; name their base"):
            make_soup(three, tmp_path / "soup", config)
    with pytest.raises(UserError, match=r"is not what .*a was fine-tuned from"):
        make_soup(three, tmp_path / "soup", TiesSoup(), base=three["b"])
    tensors = load_file(base / "model.safetensors")
    tensors.pop(min(tensors))
    other = save(tmp_path / "other", tensors, like=base)
    unsaid = {name: save(tmp_path / f"{name}-unsaid", weights_of(path), like=base) for name, path in three.items()}
    with pytest.raises(UserError, match=r"other: has no .* of shape"):
        make_soup(unsaid, tmp_path / "soup", TiesSoup(), base=other)
    with pytest.raises(UserError, match="rank=4, but full checkpoints have no rank"):
        make_soup(three, tmp_path / "soup", MeanSoup(rank=4))
    assert not (tmp_path / "soup").exists()


def changed(path: Path, change: str, base: Path) -> None:
    """A checkpoint that belongs elsewhere."""
    file = path / "model.safetensors"
    tensors, name = load_file(file), "language_model.norm.weight"
    config, identity = (json.loads((path / name).read_text()) for name in ("config.json", "rzen.json"))
    assert name in tensors
    if change == "nan":
        tensors[name][1] = float("nan")
    elif change == "tensors":
        tensors["more"] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "type":
        tensors[name] = tensors[name].half()
    elif change == "config":
        config["text_config"]["rms_norm_eps"] = 0.5
    elif change == "base":
        identity["lineage"]["base_sha256"] = "cd34"
    elif change == "prompt":
        identity["prompt"]["template"] = "rzen_paper"
    save_file(tensors, file)
    (path / "config.json").write_text(json.dumps({**config, "transformers_version": "1"}))
    (path / "rzen.json").write_text(json.dumps(identity))


REFUSED = {
    "nan": r"b/model.safetensors language_model.norm.weight: holds NaN",
    "tensors": "only one has more",
    "shape": r"differ in language_model.norm.weight: \[64\] torch.float32 and \[63\]",
    "type": "differ in language_model.norm.weight: .* and .*float16",
    "config": "differ in config.json text_config.rms_norm_eps: 1e-05 and 0.5",
    "base": "differ in base_sha256: .* and 'cd34'",
    "prompt": "differ in prompt: .*plain.* and .*rzen_paper",
}


@pytest.mark.parametrize("change", REFUSED)
def test_checkpoints_that_do_not_belong_together_are_refused(
    tmp_path: Path, three: dict[str, Path], base: Path, change: str
) -> None:
    changed(three["c"], "", base)  # another version of transformers wrote it, which is no reason
    changed(three["b"], change, base)
    with pytest.raises(UserError, match=REFUSED[change]):
        make_soup(three, tmp_path / "soup", MeanSoup())
    assert not list(tmp_path.glob("soup*"))


PARENTS, MODULES, RANK, SIDE = 6, 48, 64, 1024
MODULE_BYTES = 2 * RANK * SIDE * 4  # of one parent: half a MiB
GROWTH = """
import json, sys
from pathlib import Path
from rzen.config import MeanSoup, SlerpSoup
from rzen.soup.make import make_soup

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

folder, found = Path(sys.argv[1]), {}
for kind, name, config in (
    ("adapter", "mean", MeanSoup()), ("adapter", "svd", MeanSoup(rank=16)), ("checkpoint", "slerp", SlerpSoup())
):
    make_soup({"a": folder / kind / "warm"}, folder / f"warm {name}", config)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now on
    before = resident("VmRSS")
    make_soup({str(i): folder / kind / str(i) for i in range(%d)}, folder / f"soup {name}", config)
    found[name] = resident("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.slow
def test_memory_is_that_of_one_module_of_each_parent(tmp_path: Path) -> None:
    """6 parents of 24 MiB, and a soup of up to all of these, pass through a process that grows by less than one."""
    names = {
        "adapter": ("adapter_model.safetensors", "adapter_config.json"),
        "checkpoint": ("model.safetensors", "config.json"),
    }
    for kind, (weights, settings) in names.items():
        for name in [*map(str, range(PARENTS)), "warm"]:
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            tensors = {}
            for module in range(1 if name == "warm" else MODULES):
                tensors[f"layers.{module}.lora_A.weight"] = torch.randn(RANK, SIDE)
                tensors[f"layers.{module}.lora_B.weight"] = torch.randn(SIDE, RANK)
            save_file(tensors, folder / weights)
            (folder / settings).write_text(json.dumps({"r": RANK, "lora_alpha": RANK}))
    command = [sys.executable, "-c", GROWTH % PARENTS, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"mean", "svd", "slerp"}
    assert max(found.values()) < MODULES * MODULE_BYTES, found


def test_a_checkpoint_and_what_was_trained_from_it_become_one(tmp_path: Path, base: Path) -> None:
    """Retraining with `tune: full`, twice: each candidate was trained from the champion, and that is its base."""
    tensors = load_file(base / "model.safetensors")
    champion = save(tmp_path / "champion", tensors, like=base, base_sha256=checkpoint_sha256(base))
    for number in (1, 2):
        tuned = {name: tensor + 0.1 * number for name, tensor in load_file(champion / "model.safetensors").items()}
        candidate = save(tmp_path / f"tuned {number}", tuned, like=base, base_sha256=checkpoint_sha256(champion))
        parents = {"champion": champion, "candidate": candidate}
        make_soup(parents, tmp_path / f"soup {number}", MeanSoup(rank="keep"))
        one, other = weights_of(champion), weights_of(candidate)
        expected = {name: (one[name] + other[name]) / 2 for name in one}
        champion = tmp_path / f"soup {number}"
        assert apart(weights_of(champion), expected) < 1e-6
    stranger = save(tmp_path / "other", tensors, like=base, base_sha256="ab" * 32)
    with pytest.raises(UserError, match="differ in base_sha256"):
        make_soup({"champion": champion, "other": stranger, "candidate": candidate}, tmp_path / "none", MeanSoup())
