"""What a stage starts from: an adapter, whose settings hold, and temperatures, which are never rounded."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rzen
from jobs.cli import main
from jobs.runtime.lease import HeldLeases
from jobs.spec.load import Document
from jobs.spec.model import ModelRef
from jobs.spec.run import RunConfig
from jobs.training.fit import Prepared, prepare
from jobs.training.specs import TrainSpec
from jobs.training.start import describe_start, with_init_adapter
from jobs.workflows.retrain import _train_spec
from jobs.workflows.specs import RetrainSpec
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from rzen.config import LoraConfig, MeanSoup, ModelConfig, ObjectiveConfig, OptimConfig, TemperatureConfig
from rzen.inputs.processor import Processor
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import checkpoint_sha256, read_temperatures
from rzen.model.lora import add_lora, save_adapter
from rzen.soup.make import make_soup
from rzen.training import checkpoint
from rzen.training.build import build_learner
from rzen.training.stage import Stage
from rzen.training.worker import build_engine, save_model, update
from tests.adapters import adapter
from tests.data import publish
from tests.gloo import run_workers
from tests.specs import evaluate, stage
from tests.tiny import PROMPT, TINY, tiny_checkpoint, tiny_model

TASKS, MEAN = ("a", "b"), MeanSoup()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def first(tmp_path: Path, base: str) -> Path:
    """An adapter of rank 4, alpha 8, dropout 0.1 on `base`, with the temperatures of two tasks."""
    model = tiny_model(base)
    config = LoraConfig(rank=4, dropout=0.1)
    save_adapter(
        add_lora(load_backbone(base, model), config, 0),
        tmp_path / "first",
        identity=model.identity,
        base=base,
        base_sha256=checkpoint_sha256(Path(base)),
        temperatures={"a": 0.013, "b": 0.031},
    )
    return tmp_path / "first"


def test_an_adapter_of_the_language_model_leaves_the_vision_tower_alone(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(base)
    folders = []
    for seed in range(2):
        adapted: Any = add_lora(load_backbone(base, model), LoraConfig(rank=4, scope="language_model"), seed)
        names = [name for name, value in adapted.named_parameters() if value.requires_grad]
        assert len(names) == 28
        assert all(".language_model." in name for name in names)
        folders.append(tmp_path / f"adapter {seed}")
        sha256 = checkpoint_sha256(Path(base))
        save_adapter(adapted, folders[-1], identity=model.identity, base=base, base_sha256=sha256)
    make_soup({str(folder): folder for folder in folders}, tmp_path / "soup", MEAN)
    for folder in (folders[0], tmp_path / "soup"):
        spec, found = with_init_adapter(spec_of(base, folder))
        assert spec.model.lora.scope == "language_model"
        with pytest.raises(UserError, match=r"^model\.lora\.scope=all: init_adapter .* has language_model"):
            with_init_adapter(spec_of(base, folder, scope="all"))
        learner = build_learner(stage_of(model), base, folder, TASKS)
        assert not any(".visual." in name for name, value in learner.named_parameters() if value.requires_grad)
    describe_start(spec, found)
    assert " 14 modules (down_proj, gate_proj, " in " ".join(capsys.readouterr().out.split())


def stage_of(model: ModelConfig, temperature: TemperatureConfig | None = None, zero_stage: Any = 1) -> Stage:
    optim = OptimConfig(lr=1e-5, zero_stage=zero_stage)
    return Stage(model, ObjectiveConfig(temperature=temperature or TemperatureConfig()), optim, 3, 0, 3, "plan")


def spec_of(base: str, init_adapter: Path, **lora: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "kind": "train",
        "name": "r",
        "data": {"root": "data"},
        "model": {"backbone": base} | ({"lora": lora} if lora else {}),
        "init_adapter": str(init_adapter),
    }
    return TrainSpec.model_validate(fields)


def lora_of(base: str, init_adapter: Path, lora: LoraConfig) -> Any:
    model = tiny_model(base).model_copy(update={"lora": lora})
    backbone: Any = build_learner(stage_of(model), base, init_adapter, TASKS).embedder.backbone
    return backbone.peft_config["default"]


def test_an_adapter_decides_its_rank_alpha_and_dropout(
    base: str, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, found = with_init_adapter(spec_of(base, first))
    assert (spec.model.lora.rank, spec.model.lora.alpha, spec.model.lora.dropout) == (4, 8, 0.1)
    describe_start(spec, found)
    linear = [some for some in load_backbone(base, tiny_model(base)).modules() if isinstance(some, torch.nn.Linear)]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"LoRA rank 4, alpha 8, dropout 0.1, {len(linear)} modules (down_proj, fc1, fc2, gate_proj, " in printed
    assert "mlp.0, mlp.2, o_proj" in printed
    for lora in (LoraConfig(), spec.model.lora, LoraConfig(rank=4), pickle.loads(pickle.dumps(LoraConfig()))):
        trained = lora_of(base, first, lora)
        assert (trained.r, trained.lora_alpha, trained.lora_dropout) == (4, 8, 0.1)


@pytest.mark.parametrize(("name", "value"), [("rank", 64), ("alpha", 16), ("dropout", 0.0)])
def test_settings_that_contradict_the_adapter_are_refused(base: str, first: Path, name: str, value: float) -> None:
    """Also those that are the default, if the spec says so."""
    for start in (
        lambda: with_init_adapter(spec_of(base, first, **{name: value})),
        lambda: lora_of(base, first, LoraConfig.model_validate({name: value})),
    ):
        with pytest.raises(
            UserError, match=rf"^model.lora.{name}={value}: init_adapter .*first has .*; leave model.lora"
        ):
            start()


def test_an_adapter_of_another_base_is_refused_everywhere(tmp_path: Path, base: str, first: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", TINY.model_copy(update={"seed": 7}))
    for start in (
        lambda: lora_of(other, first, LoraConfig()),
        lambda: with_init_adapter(spec_of(other, first)),
        lambda: rzen.load(other, first, device="cpu"),
    ):
        with pytest.raises(UserError, match=r"rzen.json base_sha256: the adapter was trained with \w{16}, not \w{16}"):
            start()
    rzen.load(base, first, device="cpu")


def poison(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[max(tensors)].view(-1)[0] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def set_config(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nan": (poison, "holds NaN or infinity"),
    "other method": (set_config(peft_type="LOHA"), "peft_type: LOHA is not supported"),
    "rank pattern": (set_config(rank_pattern={"q_proj": 2}), "rank_pattern: .* is not supported"),
    "rank": (set_config(r=5), "has rank 4; adapter_config.json says r=5"),
    "pissa": (set_config(init_lora_weights="pissa"), "changes the base"),
    "no adapter": (lambda folder: (folder / "adapter_config.json").unlink(), "is neither an adapter nor a checkpoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_soup_refuses_is_refused_before_training(tmp_path: Path, base: str, first: Path, name: str) -> None:
    change, problem = REFUSED[name]
    change(first)
    with pytest.raises(UserError, match=problem):
        make_soup({"first": first}, tmp_path / "soup", MEAN)
    with pytest.raises(UserError, match=problem):
        with_init_adapter(spec_of(base, first))
    with pytest.raises(UserError, match=problem):
        lora_of(base, first, LoraConfig())


def test_dora_is_refused_before_training(tmp_path: Path, base: str) -> None:
    with pytest.raises(UserError, match="has tensors that a soup cannot mix"):
        with_init_adapter(spec_of(base, adapter(tmp_path / "dora", 4, 8, seed=1, use_dora=True)))


def temperatures(_rank: int, _world_size: int, base: str, first: Path, root: Path) -> dict[str, Any]:
    """Temperatures of bf16 engines, by case: those used, those of the optimizer, those saved with the model."""
    from tests.integration.test_training import batches

    found = {}
    model = tiny_model(base).model_copy(update={"dtype": "bfloat16", "lora": LoraConfig(rank=2)})
    for zero_stage in (1, 2, 3):
        fixed = stage_of(model, TemperatureConfig(initial=0.012, learnable=False), zero_stage)
        engine, _ = build_engine(build_learner(fixed, base, None, TASKS), fixed)
        found[f"fixed {zero_stage}"] = engine.module.objective.temperatures()

        learned = stage_of(model, TemperatureConfig(initial=0.012), zero_stage)
        engine, _ = build_engine(build_learner(learned, base, None, TASKS), learned)
        feed = batches(Processor(base, PROMPT), 0)
        for step in range(2):
            fed = next(feed)
            loss, _ = engine(fed.batch, [(block.task, block.num_samples) for block in fed.blocks], step)
            update(engine, [loss])
        masters = checkpoint.full_parameters(engine)["objective.theta_T"].exp()
        found[f"learned {zero_stage}"] = (engine.module.objective.temperatures(), masters.tolist())
        save_model(learned, engine, checkpoint.full_parameters(engine), base, root / f"model {zero_stage}")

        learned = replace(learned, model=model.model_copy(update={"lora": LoraConfig()}))
        engine, _ = build_engine(build_learner(learned, base, first, TASKS), learned)
        save_model(learned, engine, checkpoint.full_parameters(engine), base, root / f"untrained {zero_stage}")

    carried = stage_of(model.model_copy(update={"lora": LoraConfig()}), TemperatureConfig(carried=True))
    found["carried"] = build_learner(carried, base, first, ("a", "c")).objective.temperatures()
    return found


def test_temperatures_are_fp32_and_saved_and_carried(tmp_path: Path, base: str, first: Path) -> None:
    """The nearest bf16 value of theta gives 0.01183 instead of 0.012. The learning rate is far below its steps."""
    (found,) = run_workers(temperatures, 1, base, first, tmp_path)
    for zero_stage in (1, 2, 3):
        assert found[f"fixed {zero_stage}"] == pytest.approx(dict.fromkeys(TASKS, 0.012), rel=1e-6)
        used, masters = found[f"learned {zero_stage}"]
        assert list(used.values()) == pytest.approx(masters, rel=1e-6)
        assert 1e-6 < max(abs(math.log(value / 0.012)) for value in masters) < 1e-3, masters
        assert read_temperatures(tmp_path / f"model {zero_stage}") == pytest.approx(used, rel=1e-6)
        untrained = load_file(tmp_path / f"untrained {zero_stage}/adapter_model.safetensors")
        for name, value in load_file(first / "adapter_model.safetensors").items():
            assert torch.equal(untrained[name], value), (zero_stage, name)  # fp32, and not what bf16 leaves of it
    assert found["carried"] == pytest.approx({"a": 0.013, "c": 0.02})


def test_temperatures_that_cannot_be_carried_are_refused(
    tmp_path: Path, base: str, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(base, first)
    for config, problem in (
        (TemperatureConfig(carried=True), None),
        (TemperatureConfig(carried=True, maximum=0.03), r"task 'b' of .*first has 0.031, outside of .*maximum=0.03"),
    ):
        asked = spec.model_copy(update={"objective": ObjectiveConfig(temperature=config)})
        if problem is None:
            describe_start(asked, None)
            assert "temperatures carried over: a 0.013, b 0.031" in capsys.readouterr().out
            continue
        with pytest.raises(UserError, match=problem):
            describe_start(asked, None)
    shutil.copytree(base, tmp_path / "plain")
    plain = spec.model_copy(
        update={
            "init_adapter": None,
            "model": tiny_model(str(tmp_path / "plain")),
            "objective": ObjectiveConfig(temperature=TemperatureConfig(carried=True)),
        }
    )
    with pytest.raises(UserError, match=r"objective.temperature.carried: .*plain names no temperatures"):
        describe_start(plain, None)


def test_a_soup_has_the_mean_of_the_logarithms_of_temperatures(tmp_path: Path, first: Path) -> None:
    shutil.copytree(first, tmp_path / "second")
    path = tmp_path / "second/rzen.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperatures": {"a": 0.052}}))
    make_soup({"x": first, "y": tmp_path / "second"}, tmp_path / "soup", MEAN)
    assert read_temperatures(tmp_path / "soup") == pytest.approx({"a": 0.026, "b": 0.031})
    assert torch.tensor([0.013, 0.052]).log().mean().exp() == pytest.approx(0.026)


def prepared(spec: TrainSpec) -> Prepared | None:
    """Start a run, and give it back."""
    with HeldLeases() as leases:
        return prepare(spec, leases)


def test_a_run_does_not_resume_on_other_weights(tmp_path: Path, base: str, first: Path) -> None:
    """The folders keep their names. Other notes of a writer are no other weights."""
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 16)})
    shutil.copytree(base, tmp_path / "own")
    spec = spec_of(str(tmp_path / "own"), first).model_copy(
        update={
            "run": RunConfig(root=str(tmp_path / "runs")),
            "data": DataConfig(root=str(tmp_path / "data")),
            "global_batch": 4,
        }
    )
    assert prepared(spec) is not None
    config = tmp_path / "own/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "9"}))
    assert prepared(spec) is not None
    tensors = load_file(first / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, first / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds a run with other settings: plan.weights.init_adapter '\w+' -> '\w+'"):
        prepared(spec)
    save_file(tensors, first / "adapter_model.safetensors")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_token_id": 7}))
    with pytest.raises(UserError, match="base_sha256: the adapter was trained with"):
        prepared(spec)


def test_a_frozen_set_of_three_queries_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("data", 16), ("frozen", 3)):
        publish(open_store(str(tmp_path / name)), {"red": ("text_image", size)})
    (tmp_path / "stage.yaml").write_text(stage(str(tmp_path)))
    (tmp_path / "evaluate.yaml").write_text(evaluate(f"{tmp_path}/frozen"))
    spec = "kind: retrain\nstage: stage.yaml\nevaluate: {spec: evaluate.yaml}\n"
    (tmp_path / "retrain.yaml").write_text(f"{spec}registry: {tmp_path}/registry\n")
    assert main(["run", str(tmp_path / "retrain.yaml")]) == 1
    problem = f"{tmp_path}/frozen/train: text_image has 3 queries, fewer than 100: too few to decide; add samples"
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_retraining_carries_temperatures_from_the_champion_only(tmp_path: Path, base: str) -> None:
    (tmp_path / "stage.yaml").write_text(stage(str(tmp_path), objective={"temperature": {"carried": True}}))
    data = {"kind": "retrain", "stage": "stage.yaml", "evaluate": {"spec": "e"}, "registry": "r"}
    document = Document(data, "retrain.yaml", tmp_path)
    spec = RetrainSpec.model_validate(data)
    first = _train_spec(spec, document, "first", None)
    later = _train_spec(spec, document, "later", ModelRef(base=base, adapter="champion"))
    assert [some.objective.temperature.carried for some in (first, later)] == [False, True]
    assert later.init_adapter == "champion"
    assert (first.model.lora.rank, "lora" in later.model.model_fields_set) == (2, False)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"a": {}, "b": {"model": {"prompt": {"template": "plain"}}}}, "model.prompt.template 'rzen_paper' -> 'plain'"),
        ({"a": {}, "b": {"model": {"backbone": "other/model"}}}, "a and b cannot be one model: model.backbone"),
        ({"a": {}, "b": {"model": {"readout": {"pooling": "mean"}}}}, "model.readout.pooling 'last_token' -> 'mean'"),
    ],
)
def test_fine_tunes_that_no_soup_could_join_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], problem: str
) -> None:
    (tmp_path / "stage.yaml").write_text(stage(str(tmp_path)))
    path = tmp_path / "finetunes.yaml"
    path.write_text(json.dumps({"kind": "finetunes", "stage": "stage.yaml", "runs": changes, "out": "o"}))
    assert main(["validate", str(path)]) == 1
    assert problem in capsys.readouterr().err
    assert main(["validate", str(path), "--set", "soups={one: {method: mean, weights: {a: 1.0}}, uniform: null}"]) == 0


def test_frames_that_no_budget_holds_are_refused() -> None:
    """Two frames are a token at least."""
    spec = spec_of("x", Path("y")).model_dump(mode="json")
    spec["model"]["prompt"] |= {"max_visual_tokens": 4, "min_visual_tokens": 1}
    with pytest.raises(ValueError, match=r"data.media.frames=9 need 5 tokens of a video at least, above .*tokens=4"):
        TrainSpec.model_validate(spec | {"data": {"root": "d", "media": {"frames": 9}}})
    TrainSpec.model_validate(spec | {"data": {"root": "d", "media": {"frames": 8}}})
