from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import rzen
from jobs.serving.export import run as run_export
from jobs.serving.export import trained_dimensions
from jobs.serving.specs import ExportSpec
from pipelines.errors import UserError
from pipelines.instructions import INSTRUCTIONS
from pipelines.samples import DecodedInput, MediaKind, Visual
from rzen.config import LoraConfig, MeanSoup, ModelIdentity, PromptConfig, ReadoutConfig, TinyBackbone
from rzen.embedding.tasks import read_tasks
from rzen.export.card_metadata import ModelCardData
from rzen.export.export import ExportOptions, Format, export_model, load_encoder, write_identity
from rzen.export.mteb import experiment, inputs_of, instruction_of, model_revision, with_video_files
from rzen.export.opening import has_torchvision, register_processors
from rzen.inputs.processor import Processor
from rzen.model.backbone import build_tiny, load_backbone
from rzen.model.checkpoints import checkpoint_dir, checkpoint_sha256
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.locate import local_folder
from rzen.model.lora import add_lora, load_adapter, save_adapter
from rzen.model.vision import use_fast_vision
from rzen.soup.make import make_soup
from tests.export.make import trained_adapter
from tests.tiny import PROMPT, TEXTS, TINY, mixed_inputs, tiny_checkpoint, tiny_model

IDENTITY = ModelIdentity(prompt=PROMPT)
FP32, BF16 = ExportOptions(dtype="float32"), ExportOptions(dtype="bfloat16")
RELEASE = ModelIdentity(prompt=PromptConfig(template="rzen_release"), readout=ReadoutConfig(positions="1d"))
UMARVEL = ReadoutConfig(direction="bidirectional", pooling="mean")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def unmerged_vectors(base: str, adapter: Path | None) -> Tensor:
    processor = Processor(base, PROMPT)
    backbone = load_backbone(base, tiny_model(base))
    model = load_adapter(backbone, adapter) if adapter else backbone
    with torch.no_grad():
        return EmbeddingModel(model, processor.layout)(processor.encode(mixed_inputs()))


def exported_vectors(model_dir: Path) -> Tensor:
    processor, embedder = load_encoder(str(model_dir))
    return embedder(processor.encode(mixed_inputs()))


def test_the_exported_model_gives_the_vectors_of_base_and_adapter(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    export_model(base, adapter, tmp_path / "model", IDENTITY, FP32)
    expected = unmerged_vectors(base, adapter)
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), expected, atol=1e-5, rtol=0)
    assert (expected - unmerged_vectors(base, None)).abs().max() > 1e-2


def test_the_exported_model_is_an_ordinary_checkpoint(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    export_model(base, adapter, tmp_path / "model", IDENTITY, FP32)
    model_dir = str(tmp_path / "model")
    processor = Processor(model_dir, PROMPT)
    model = AutoModel.from_pretrained(model_dir)
    use_fast_vision(model)  # the last bits are those of the kernels
    with torch.no_grad():
        actual = EmbeddingModel(model, processor.layout)(processor.encode(mixed_inputs()))
    torch.testing.assert_close(actual, exported_vectors(tmp_path / "model"), atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(model_dir)(TEXTS[0]) == AutoTokenizer.from_pretrained(base)(TEXTS[0])
    assert AutoImageProcessor.from_pretrained(model_dir, backend="pil").patch_size == 14
    assert not list(tmp_path.glob("*.partial"))


def test_weights_are_merged_in_fp32_and_rounded_once(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    export_model(base, adapter, tmp_path / "exact", IDENTITY, FP32)
    export_model(base, adapter, tmp_path / "model", IDENTITY, BF16)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "model"))
    assert {name: value.dtype for name, value in rounded.items()} == dict.fromkeys(exact, torch.bfloat16)
    assert all(torch.equal(value, exact[name].to(torch.bfloat16)) for name, value in rounded.items())
    difference = (exported_vectors(tmp_path / "model") - exported_vectors(tmp_path / "exact")).abs().max()
    assert 0 < difference < 0.02
    assert exported_vectors(tmp_path / "model").dtype == torch.float32

    name = "layers.0.mlp.down_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.language_model.{name}.lora_{factor}.weight"] for factor in "AB")
    original = load_file(Path(base) / "model.safetensors")[f"language_model.{name}.weight"]
    merged = rounded[f"model.{name}.weight"]
    assert torch.equal(merged, (original + 2 * b @ a).to(torch.bfloat16))
    assert not torch.equal(merged, original.bfloat16() + (2 * b @ a).bfloat16())  # planted: merged in bf16


def test_an_export_without_adapter_keeps_the_base(base: str, tmp_path: Path) -> None:
    export_model(base, None, tmp_path / "model", IDENTITY, FP32)
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), unmerged_vectors(base, None), atol=0, rtol=0)


def test_a_soup_of_one_adapter_twice_exports_as_the_adapter(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    make_soup({"a": adapter, "b": adapter}, tmp_path / "soup", MeanSoup(weights={"a": 0.3, "b": 0.7}))
    export_model(base, tmp_path / "soup", tmp_path / "model", IDENTITY, FP32)
    expected = unmerged_vectors(base, adapter)
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), expected, atol=1e-5, rtol=0)


def test_identity_holds_prompt_readout_and_descent(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    export_model(base, adapter, tmp_path / "model", IDENTITY, FP32)
    identity = json.loads((tmp_path / "model/rzen.json").read_text())
    assert identity["prompt"] == {
        "template": "rzen_paper",
        "max_text_tokens": 2000,
        "min_visual_tokens": 4,
        "max_visual_tokens": 24,
    }
    assert identity["readout"] == {"positions": "mrope", "direction": "causal", "pooling": "last_token"}
    assert (identity["normalize"], identity["dtype"]) == (True, "float32")
    assert sorted(identity["lineage"]) == ["adapter", "adapter_sha256", "base", "base_sha256"]
    assert load_encoder(str(tmp_path / "model"))[0].prompt == PROMPT


def test_an_exported_model_is_read_as_it_was_trained(base: str, tmp_path: Path) -> None:
    model = add_lora(load_backbone(base, tiny_model(base)), LoraConfig(rank=3), 0)
    identity = ModelIdentity(prompt=PROMPT, readout=UMARVEL)
    save_adapter(model, tmp_path / "adapter", identity=identity, base=base, base_sha256=checkpoint_sha256(Path(base)))
    export_model(base, tmp_path / "adapter", tmp_path / "model", identity, FP32)
    assert load_encoder(str(tmp_path / "model"))[1].readout == UMARVEL
    assert (exported_vectors(tmp_path / "model") - unmerged_vectors(base, None)).abs().max() > 1e-2
    with pytest.raises(UserError, match=r"rzen.json readout: the adapter was trained with .*'bidirectional'"):
        export_model(base, tmp_path / "adapter", tmp_path / "causal", IDENTITY, FP32)


def test_a_model_from_before_the_readout_could_be_chosen_is_read_as_ever(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    export_model(base, adapter, tmp_path / "model", IDENTITY, FP32)
    now = exported_vectors(tmp_path / "model")
    for folder in (adapter, tmp_path / "model"):
        saved = json.loads((folder / "rzen.json").read_text())
        del saved["readout"]
        (folder / "rzen.json").write_text(json.dumps(saved | {"pooling": "last_token"}))
    torch.testing.assert_close(exported_vectors(tmp_path / "model"), now, atol=0, rtol=0)
    export_model(base, adapter, tmp_path / "again", IDENTITY, FP32)
    with pytest.raises(UserError, match=r"rzen.json readout: the adapter was trained with"):
        export_model(base, adapter, tmp_path / "other", ModelIdentity(prompt=PROMPT, readout=UMARVEL), FP32)


def test_wrong_exports_are_the_users_errors(base: str, tmp_path: Path) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    other = tiny_checkpoint(tmp_path / "other", TinyBackbone(vocabulary=640, seed=1))
    with pytest.raises(UserError, match=r"rzen.json prompt: the adapter was trained with"):
        export_model(base, adapter, tmp_path / "model", ModelIdentity(), FP32)
    with pytest.raises(UserError, match=r"rzen.json base_sha256: the adapter was trained with"):
        export_model(other, adapter, tmp_path / "model", IDENTITY, FP32)
    with pytest.raises(UserError, match="exists already"):
        export_model(base, adapter, adapter, IDENTITY, FP32)
    for folder in (base, str(adapter)):
        with pytest.raises(UserError, match="written by export"):
            load_encoder(folder)
    assert not (tmp_path / "model").exists()


def test_formats_that_cannot_hold_a_model_are_refused(base: str, tmp_path: Path) -> None:
    adapter, out = trained_adapter(base, tmp_path / "adapter", IDENTITY), tmp_path / "model"
    with pytest.raises(UserError, match=r"format=adapter: there is no adapter"):
        export_model(base, None, out, IDENTITY, ExportOptions(format="adapter"))
    release = ExportOptions(format="rzen_release")
    with pytest.raises(UserError, match=r"reads only prompt.template=rzen_release, not rzen_paper"):
        export_model(base, adapter, out, IDENTITY, release)
    with pytest.raises(UserError, match=r"reads only readout.positions=1d, not mrope"):
        export_model(base, None, out, ModelIdentity(prompt=PromptConfig(template="rzen_release")), release)
    other = tiny_checkpoint(tmp_path / "other", TinyBackbone(vocabulary=640, family="qwen3_vl"))
    with pytest.raises(UserError, match=r"reads only model_type=qwen2_vl, not qwen3_vl"):
        export_model(other, None, out, RELEASE, release)
    assert not out.exists()


def test_what_breaks_leaves_nothing_behind(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("rzen.export.export.write_identity", full)
    with pytest.raises(OSError, match="no space left"):
        export_model(base, None, tmp_path / "model", IDENTITY, FP32)
    assert list(tmp_path.iterdir()) == []


def test_other_libraries_are_told_how_it_was_trained(base: str, tmp_path: Path) -> None:
    """The files as vLLM's pooling runner and sentence-transformers read them, which vLLM has not been run on."""
    options = ExportOptions(dtype="float32", frames=6, instructions={"query": "Find it."}, dimensions=(32, 16))
    assert export_model(base, None, tmp_path / "model", IDENTITY, options) is None
    found = {
        str(path.relative_to(tmp_path / "model")): json.loads(path.read_text())
        for path in (tmp_path / "model").rglob("*.json")
    }
    assert found["config.json"]["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert found["config.json"]["tie_word_embeddings"] is True  # there is no head, and none is missed
    names = load_file(tmp_path / "model/model.safetensors")
    assert {name.split(".")[0] for name in names} == {"model", "visual"}  # as on the hub
    assert [(module["path"], module["type"]) for module in found["modules.json"]] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    pooling = found["1_Pooling/config.json"]
    assert next(name for name, value in pooling.items() if value is True) == "pooling_mode_lasttoken"
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_lasttoken", "include_prompt"]
    assert pooling["word_embedding_dimension"] == 64
    prompts = found["config_sentence_transformers.json"]["prompts"]
    assert [prompts[name] for name in ("query", "document", "search_query")] == ["Find it.", "", ""]
    assert prompts["text_image"] == INSTRUCTIONS["text_image"][0]
    # vLLM accepts these as `dimensions` of a request, and no others; so does `rzen serve`.
    assert (found["config.json"]["is_matryoshka"], found["config.json"]["matryoshka_dimensions"]) == (
        True,
        [16, 32, 64],
    )
    assert AutoModel.from_pretrained(tmp_path / "model").config.matryoshka_dimensions == [16, 32, 64]
    assert "Trained widths: 16, 32, 64." in (tmp_path / "model/README.md").read_text()
    assert found["preprocessor_config.json"]["size"] == {"shortest_edge": 4 * 28**2, "longest_edge": 24 * 28**2}
    assert found["preprocessor_config.json"]["max_pixels"] == 24 * 28**2
    video = found["video_preprocessor_config.json"]  # 24 tokens for three pairs of frames
    assert (video["num_frames"], video["size"]) == (6, {"shortest_edge": 4 * 28**2, "longest_edge": 8 * 28**2})
    assert "max_model_len" not in found["config.json"]
    assert found["tokenizer_config.json"].get("chat_template") is None


def test_widths_that_may_be_asked_for_are_no_part_of_a_models_identity(base: str, tmp_path: Path) -> None:
    """A corpus stays that of the model when the model is exported again with widths."""
    for name, dimensions in (("without", ()), ("with", (16,))):
        export_model(base, None, tmp_path / name, IDENTITY, replace(FP32, dimensions=dimensions))
    assert checkpoint_sha256(tmp_path / "without") == checkpoint_sha256(tmp_path / "with")


def test_wider_vectors_than_there_are_cannot_be_exported(base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dimensions: has 65, and the vectors have 64 values"):
        export_model(base, None, tmp_path / "model", IDENTITY, replace(FP32, dimensions=(16, 65)))
    assert list(tmp_path.iterdir()) == []


def test_readouts_that_other_libraries_do_not_know_have_no_files(base: str, tmp_path: Path) -> None:
    for readout, why in (
        (UMARVEL, "its tokens see those after them too"),
        (ReadoutConfig(positions="1d"), "its positions count all tokens"),
    ):
        out = tmp_path / readout.positions
        told = export_model(base, None, out, ModelIdentity(prompt=PROMPT, readout=readout), FP32)
        assert told is not None
        assert told.startswith(why)
        assert f"no files for sentence-transformers and vLLM: {why}" in (out / "README.md").read_text()
        assert not [path for path in out.iterdir() if path.name in ("modules.json", "1_Pooling", "chat_template.jinja")]
        assert load_encoder(str(out))[1].readout == readout


@pytest.mark.parametrize(
    ("runs", "parents", "dimensions"),
    [
        ({"stage1": [8], "stage2": [16, 32]}, (), [16, 32]),  # the last training decides
        ({"stage1": [8]}, (), [8]),
        ({}, (), []),
        ({"a": [8, 16, 32], "b": [32, 8]}, ("runs/a/adapter", "runs/b/adapter"), [8, 32]),
        ({"a": [8]}, ("runs/a/adapter", "runs/unknown/adapter"), []),
    ],
)
def test_widths_of_an_export_are_those_of_its_training(
    runs: dict[str, list[int]], parents: tuple[str, ...], dimensions: list[int]
) -> None:
    recipes = {name: {"spec": {"objective": {"matryoshka": widths}}} for name, widths in runs.items()}
    assert trained_dimensions(recipes, parents) == dimensions


def test_a_card_tells_recipe_data_scores_and_limits(base: str, tmp_path: Path) -> None:
    """Through the job, which finds them."""
    runs = tmp_path / "runs"
    adapters = [
        trained_adapter(base, runs / name / "adapter", IDENTITY, seed) for seed, name in enumerate(("first", "second"))
    ]
    recipe = {
        "spec": {
            "global_batch": 48,
            "data": {"media": {"frames": 5}},
            "optim": {"lr": 2e-4},
        },
        "data": {"data": {"photos": "f00d"}, "steps": 70},
        "revision": "abc123",
    }
    (runs / "first/spec.json").write_text(json.dumps(recipe))
    weights = MeanSoup(weights={"one": 1.0, "two": 3.0})
    make_soup(dict(zip(("one", "two"), adapters, strict=True)), runs / "soup/adapter", weights)
    ref = {"base": base, "adapter": str(runs / "soup/adapter")}
    row = {"task": "text_image", "metric": "hit@1", "value": 0.25, "chance": 0.01, "split": "held_out"}
    row |= {"num_queries": 400, "num_candidates": 100}
    results: dict[str, Any] = {
        "settings": {"spec": {"models": {"soup": ref, "before": ref | {"adapter": None}}}, "data": "beef"},
        "rows": [row | {"model": "soup"}, row | {"model": "before", "value": 0.125}],
    }
    results["settings"]["spec"]["rerank"] = {"model": {"base": "judge", "adapter": None}}
    reranked = {"metric": "hit@1", "top_k": 50, "before": {"hit@1": 0.25}, "ceiling": {"hit@1": 0.75}, "weight": None}
    reranked |= {"reranked": {"hit@1": 0.375}}
    results["rerank"] = {"soup": {"text_image": reranked}, "before": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    spec = {"kind": "export", "model": ref, "out": str(tmp_path / "fine model"), "dtype": "float32"}
    spec |= {
        "scores": str(tmp_path / "results.json"),
        "license": "apache-2.0",
        "languages": ["en", "de"],
        "datasets": ["me/photos"],
        "dimensions": [8, 16],
    }
    assert run_export(ExportSpec.model_validate(spec | {"format": "adapter"})) == {"outputs": [spec["out"]]}
    assert (tmp_path / "fine model/adapter_config.json").is_file()
    assert run_export(ExportSpec.model_validate(spec)) == {"outputs": [spec["out"]]}

    assert not (tmp_path / "fine model/adapter_config.json").exists()
    assert (tmp_path / "fine model/1_Pooling/config.json").is_file()
    _, front, card = (tmp_path / "fine model/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["feature-extraction", "multimodal-embeddings", "rzen", "qwen2_vl"],
        "license": "apache-2.0",
        "language": ["en", "de"],
        "datasets": ["me/photos"],
        "model-index": [
            {
                "name": "fine model",
                "results": [
                    {
                        "task": {"type": "feature-extraction", "name": "text_image"},
                        "dataset": {
                            "type": "rzen",
                            "name": "text_image (held_out)",
                            "split": "held_out",
                            "revision": "beef",
                        },
                        "metrics": [{"type": "hit@1", "value": 25.0}],
                    }
                ],
            }
        ],
    }
    on_hub = ModelCard.load(tmp_path / "fine model/README.md")
    on_hub.data.to_dict()
    assert [(one.metric_type, one.metric_value, one.dataset_split) for one in on_hub.data.eval_results] == [
        ("hit@1", 25.0, "held_out")
    ]
    assert (on_hub.data.license, on_hub.data.language, on_hub.data.model_name) == (
        "apache-2.0",
        ["en", "de"],
        "fine model",
    )
    assert len(on_hub.content.splitlines()) < 130
    assert card.index("## Scores") < card.index("## How to load it")
    for told in (
        "# fine model",
        "A soup (`mean`) of 0.250 x first, 0.750 x second",
        "* run first: 70 steps of 48 pairs, code revision `abc123`, data photos `f00d`",
        "<details><summary>Settings of the runs</summary>",
        '"lr": 0.0002',
        "| text_image | hit@1 | 25.0 | 1.0 | 400 | 100 | held_out |",
        "fingerprint `beef`",
        "With the re-ranker `judge` on the first candidates.",
        "| text_image | hit@1 | 50 | 25.0 | 37.5 | – | – | 75.0 |",
        "give 6 frames to a video",
        f"* base: `{base}`",
        "Do not send plain `input`",
        "Trained widths: 8, 16, 64.",
        "* versions: deepspeed ",
        ", revision ",
    ):
        assert told in card, told
    assert "12.5" not in card
    with pytest.raises(UserError, match=r"results.json: has no score of the weights of base .*; it has soup, before"):
        run_export(ExportSpec.model_validate(spec | {"model": {"base": base, "adapter": str(adapters[0])}}))


@pytest.mark.parametrize("format", ["model", "adapter"])
def test_the_code_of_a_card_runs(base: str, format: Format, tmp_path: Path) -> None:
    """All blocks, one after the other. Without torchvision, rzen's processors stand in."""
    adapter = trained_adapter(base, tmp_path / "adapter", IDENTITY)
    export_model(base, adapter, tmp_path / "out", IDENTITY, replace(FP32, format=format))
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    assert len(blocks) == {"model": 3, "adapter": 1}[format]
    if not has_torchvision():
        register_processors()
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("PATH", str(tmp_path / "out")), found)
    if format == "model":
        own = rzen.load(str(tmp_path / "out"))
        assert np.allclose(found["vectors"], own.encode(["a red circle"]), atol=1e-6)
        last = torch.nn.functional.normalize(found["vector"], dim=-1).detach().numpy()
        assert np.allclose(last, found["vectors"], atol=1e-5)


def test_an_export_in_object_storage_is_whole(
    base: str, tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RZEN_CACHE", str(tmp_path / "cache"))
    for number in range(2):  # the second replaces the first
        spec = {"kind": "export", "model": {"base": base}, "out": "s3://exports/model", "endpoint": s3_endpoint}
        run_export(ExportSpec.model_validate(spec | {"instructions": {"query": f"version {number}"}}))
    model = Path(local_folder("s3://exports/model", s3_endpoint))
    assert json.loads((model / "1_Pooling/config.json").read_text())["pooling_mode_lasttoken"] is True
    assert json.loads((model / "config_sentence_transformers.json").read_text())["prompts"]["query"] == "version 1"
    assert load_encoder(str(model))[0].prompt.template == "rzen_paper"


def test_a_hub_name_is_linked_and_nothing_is_invented(base: str, tmp_path: Path) -> None:
    options = ExportOptions(dtype="float32", facts=ModelCardData(base="Qwen/Qwen2-VL-2B-Instruct"))
    export_model(base, None, tmp_path / "model", IDENTITY, options)
    _, front, card = (tmp_path / "model/README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert (fields["base_model"], fields["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "finetune")
    assert "license" not in fields
    assert "## Scores\n\nNone were given." in card
    assert "No settings of a training run were found" in card


@dataclass
class Decoder:
    """What rzen needs of torchcodec's: four frames a second, of which frame i has the grey value i."""

    num_frames: int

    @property
    def metadata(self) -> Decoder:
        return self

    def get_frames_at(self, indices: list[int]) -> Any:
        frames = torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 6)
        return SimpleNamespace(data=frames, pts_seconds=torch.tensor(indices) / 4)


def test_batches_of_mteb_become_inputs() -> None:
    image = Image.new("L", (6, 4), 7)
    asked, bare = as_inputs({"text": ["ab", "cd"], "query": ["a", "c"], "instruction": ["b", ""]}, "Find it.", 8)
    assert (asked.text, asked.instruction, bare.text, bare.instruction) == ("a", "b", "c", "")
    fused, alone = as_inputs({"text": ["x", "y"], "image": [[image, image], None]}, "Find it.", 8)
    assert [visual.frames.shape for visual in fused.visuals] == [(1, 4, 6, 3)] * 2
    assert (fused.instruction, alone.text, alone.visuals) == ("Find it.", "y", ())
    (long,), (short,) = (input.visuals for input in as_inputs({"video": [Decoder(21), Decoder(2)]}, "", 5))
    assert long.frames[:, 0, 0, 0].tolist() == [0, 5, 10, 15, 20]
    assert long.times_s == (0.0, 1.25, 2.5, 3.75, 5.0)
    assert short.frames.shape == (2, 4, 6, 3)
    with pytest.raises(UserError, match="the task has sound"):
        as_inputs({"video": [Decoder(2)], "audio": [None]}, "", 5)


def as_inputs(batch: Mapping[str, Any], instruction: str, frames: int) -> list[DecodedInput]:
    """With a decoder that shows the bytes of a file as the grey values of its frames."""

    def decode(kind: MediaKind, data: bytes) -> Visual:
        return Visual(kind, np.array(list(data), np.uint8)[:, None, None, None].repeat(3, axis=3))

    return inputs_of(batch, instruction, frames, decode)


def test_videos_of_mteb_are_decoded_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(bytes([7]))
    files = [{"bytes": bytes([3, 5]), "path": None}, {"bytes": None, "path": str(tmp_path / "clip.mp4")}]
    stored, named = (input.visuals[0] for input in as_inputs({"video": files}, "", 5))
    assert (stored.kind, stored.frames[:, 0, 0, 0].tolist()) == ("video", [3, 5])
    assert named.frames[:, 0, 0, 0].tolist() == [7]


class Video:
    """A column of videos, as `datasets` calls it."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class Rows(list[dict[str, Any]]):
    """Rows of `datasets`, with as much as a data loader needs."""

    features: Mapping[str, object] = {"video": Video(), "id": object()}

    def cast_column(self, name: str, feature: Video) -> Rows:
        assert not feature.decode
        rows = Rows({**row, name: {"bytes": row[name], "path": None}} for row in self)
        rows.features = {**self.features, name: feature}
        return rows


def test_data_loaders_of_mteb_pass_videos_as_files() -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in rows] for name in rows[0]}

    rows = Rows({"video": bytes([number]), "id": str(number)} for number in range(3))
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    first, second = with_video_files(loader)
    assert first["video"] == [{"bytes": bytes([number]), "path": None} for number in range(2)]
    assert second["id"] == ["2"]
    batches = [{"text": ["a"]}]
    assert with_video_files(batches) is batches


@pytest.mark.parametrize(
    ("prompt", "kind", "given", "expected"),
    [
        (None, "query", {}, "prompt of mteb's kind"),
        (None, "", {}, "prompt of mteb's kind"),
        (None, "document", {}, ""),
        ("Ask.", "query", {}, "Ask."),
        ("Ask.", "document", {}, ""),
        ({"query": "Ask."}, "query", {}, "Ask."),
        ({"query": "Ask."}, "", {}, "Ask."),
        ({"query": "Ask."}, "document", {}, ""),
        ({"query": "Ask.", "document": "Read."}, "document", {}, "Read."),
        ("Ask.", "query", {"query": "mine"}, "mine"),
        ("Ask.", "query", {"query": "mine", "Retrieval": "kind", "Task": "own"}, "own"),
        ("Ask.", "query", {"query": "mine", "Retrieval": "kind"}, "kind"),
        (None, "document", {"Task": "own", "document": "mine"}, "mine"),
        (None, "query", {"Task": ""}, ""),
    ],
)
def test_instructions_in_mteb(prompt: Any, kind: str, given: dict[str, str], expected: str) -> None:
    task = SimpleNamespace(name="Task", type="Retrieval", prompt=prompt)
    assert instruction_of(task, kind, given, lambda name: "prompt of mteb's kind" if name == "Task" else "") == expected


def test_the_revision_in_mteb_is_that_of_weights_and_reading(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed) / "model")
        build_tiny(folders[-1], TINY.model_copy(update={"seed": seed}), iter(TEXTS))
    plain = [model_revision(folder) for folder in folders]
    assert plain[0] != plain[1]
    assert all(len(revision) == 40 for revision in plain)
    write_identity(folders[0], ModelIdentity(), "float32", {})
    assert model_revision(folders[0]) == plain[0]  # the same as saying nothing
    write_identity(folders[0], ModelIdentity(readout=ReadoutConfig(pooling="mean")), "float32", {})
    assert model_revision(folders[0]) not in plain
    assert experiment({}, 8) is None
    kinds = [experiment({}, 4), experiment({"query": "a"}, 8), experiment({"query": "b"}, 8), {}, None]
    assert len({str(kind) for kind in kinds}) == 5


def test_an_export_names_license_and_training_data(tmp_path: Path) -> None:
    build_tiny(tmp_path / "base", TINY, iter(TEXTS))
    recipe = {"data": {"data": {"coco": "12", "abc": "34"}, "steps": 3}, "spec": {"global_batch": 4}}
    facts = ModelCardData(license="apache-2.0", recipes={"run": recipe})
    for name, given in (("known", facts), ("unknown", ModelCardData())):
        export_model(str(tmp_path / "base"), None, tmp_path / name, ModelIdentity(), ExportOptions(facts=given))
    known, unknown = (json.loads((tmp_path / name / "rzen.json").read_text()) for name in ("known", "unknown"))
    assert (known["license"], known["training_data"]) == ("apache-2.0", ["abc", "coco"])
    assert {"license", "training_data"}.isdisjoint(unknown)


def test_an_export_has_the_table_of_its_tasks(tmp_path: Path) -> None:
    build_tiny(tmp_path / "base", TINY, iter(TEXTS))
    options = ExportOptions(instructions={"text_page": "Find the page:", "law": "Find the law:"})
    export_model(str(tmp_path / "base"), None, tmp_path / "model", ModelIdentity(), options)
    tasks = read_tasks(tmp_path / "model")
    assert tasks == json.loads((tmp_path / "model/rzen.json").read_text())["tasks"]
    assert tasks["text_image"] == read_tasks(tmp_path / "base")["text_image"], (
        "a model without a table has the project's"
    )
    assert tasks["text_page"] == read_tasks(tmp_path / "base")["text_page"] | {"instruction": "Find the page:"}
    assert tasks["law"] == {"instruction": "Find the law:", "target_instruction": ""}
    assert {name: task.get("modality") for name, task in tasks.items()} == {
        "text_image": "image",
        "text_page": "page",
        "text_video": "video",
        "image_text_image": "image",
        "text_text": "text",
        "image_class": "text",
        "law": None,
    }
    path = tmp_path / "model/rzen.json"
    path.write_text(path.read_text().replace('"modality": "page"', '"modality": "sheet"'))
    with pytest.raises(UserError, match=r"sheet.*export the model again"):
        read_tasks(tmp_path / "model")


def test_wrong_backbones_are_the_users_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a directory nor a hub name"):
        checkpoint_dir(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"has no config.json"):
        checkpoint_dir(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"model_type 'llama' is not supported; use one of \['qwen2_5_vl', "):
        checkpoint_dir(str(tmp_path))


def test_equal_seeds_build_equal_bytes(tmp_path: Path) -> None:
    other = TINY.model_copy(update={"seed": 1})
    for outer_seed, (name, config) in enumerate((("a", TINY), ("b", TINY), ("other", other))):
        torch.manual_seed(outer_seed)  # the caller's generator plays no part
        build_tiny(tmp_path / name, config, iter(TEXTS))
    contents = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b", "other")}
    assert contents["a"] == contents["b"]
    assert [f for f, data in contents["a"].items() if data != contents["other"][f]] == ["model.safetensors"]


def test_the_tiny_backbone_has_the_sizes_asked_for(tmp_path: Path) -> None:
    config = TinyBackbone(hidden=48, layers=3, heads=3, vision_width=24, vision_depth=1, vocabulary=300, init_std=0.3)
    build_tiny(tmp_path / "tiny", config, TEXTS)
    model = AutoModel.from_pretrained(tmp_path / "tiny")
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        48,
        3,
        3,
        1,
    )
    assert (vision.embed_dim, vision.depth, vision.hidden_size) == (24, 1, 48)
    assert text.vocab_size == 300 + 7
    assert text.rope_parameters["mrope_section"] == [2, 3, 3]
    for weight in (model.language_model.embed_tokens.weight, model.visual.patch_embed.proj.weight):
        assert weight.std().item() == pytest.approx(0.3, rel=0.1)
