"""The embedder against a plain transformers forward, one input at a time, and planted faults that must show."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, AutoTokenizer

from pipelines.errors import UserError
from pipelines.samples import DecodedInput, Visual
from rzen.config import LoraConfig, ModelIdentity, ReadoutConfig
from rzen.families import FAMILIES
from rzen.inputs.layout import BatchLayout
from rzen.inputs.processor import Processor
from rzen.inputs.prompts import render
from rzen.model import embedding_model as embedder_module
from rzen.model.backbone import load_backbone
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import add_lora, load_adapter, save_adapter
from rzen.model.vision import use_fast_vision
from tests.library_pixels import library_visuals
from tests.tiny import PROMPT, TEXTS, TINY, mixed_inputs, noise, tiny_checkpoint, tiny_model, trainable_state

LORA = LoraConfig(rank=3)
IDENTITY = ModelIdentity(prompt=PROMPT)
# Two vision blocks, merger and, for Qwen3-VL, deepstack merger.
VISION_LINEARS = {"qwen2_vl": 2 * 4 + 2, "qwen2_5_vl": 2 * 5 + 2, "qwen3_vl": 2 * 4 + 2 + 2, "qwen3_5": 2 * 4 + 2}
# Two language layers; the recurrent one of Qwen3.5 has five linear layers instead of the four of attention.
LINEARS = {name: count + 2 * 7 + (name == "qwen3_5") for name, count in VISION_LINEARS.items()}
RELEASED = ("1d", "causal", "last_token")
READOUTS = {
    " ".join(choice): ReadoutConfig.model_validate(dict(zip(ReadoutConfig.model_fields, choice, strict=True)))
    for choice in [*product(["mrope"], ["causal", "bidirectional"], ["last_token", "mean"]), RELEASED]
}


UMARVEL = READOUTS["mrope bidirectional mean"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_dir(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny backbone with no weight at its initial 0 or 1: a norm of ones would hide where the pooling happens."""
    model_dir = tiny_checkpoint(tmp_path_factory.mktemp("tiny"), TINY.model_copy(update={"family": family}))
    model = AutoModel.from_pretrained(model_dir)
    shake(model, 0.2)
    model.save_pretrained(model_dir)
    return model_dir


def shake(module: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def processor(model_dir: str) -> Processor:
    return Processor(model_dir, PROMPT)


def embedder_of(
    model_dir: str, processor: Processor, readout: ReadoutConfig | None = None, packing: Any = "auto", **settings: Any
) -> EmbeddingModel:
    model = tiny_model(model_dir).model_copy(update=settings)
    return EmbeddingModel(load_backbone(model_dir, model), processor.layout, readout, packing)


@pytest.fixture(scope="module")
def library(model_dir: str, processor: Processor, family: str) -> dict[str, Tensor]:
    """Readout -> vectors of the mixed inputs, for readouts that the family has."""
    return {
        name: reference_vectors(model_dir, processor, mixed_inputs(), readout)
        for name, readout in READOUTS.items()
        if FAMILIES[family].bidirectional or readout.direction == "causal"
    }


def is_refused(family: str, readout: ReadoutConfig, packing: str = "auto") -> bool:
    """Whether the family cannot do this, which a test then expects to be refused."""
    entry = FAMILIES[family]
    return (readout.direction == "bidirectional" and not entry.bidirectional) or (
        packing == "packed" and not entry.packs
    )


@pytest.fixture(scope="module")
def expected(library: dict[str, Tensor]) -> Tensor:
    return library["mrope causal last_token"]


def reference_vectors(
    model_dir: str, processor: Processor, inputs: Sequence[DecodedInput], readout: ReadoutConfig
) -> Tensor:
    """[B, D]: the library's tokenizer, image processor and model, one input at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir, attn_implementation="eager").eval()
    rows = []
    for input in inputs:
        ids = torch.tensor([tokenizer(render(processor.pieces(input)))["input_ids"]])
        types = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id)
        inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": types}
        inputs |= library_visuals(input.visuals, FAMILIES[model.config.model_type])
        if model.config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = [1.4 if v.times_s else 2 / 24 for v in input.visuals if v.kind == "video"]
        if readout.positions == "1d":
            inputs["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
        if readout.direction == "bidirectional":
            if readout.positions == "mrope" and input.visuals:  # or it is computed from the mask below
                inputs["position_ids"] = model.get_rope_index(**without_pixels(inputs))[0]
            inputs["attention_mask"] = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # added to the scores: all count
        with torch.no_grad():
            hidden_LD = model(**inputs).last_hidden_state[0]
        if readout.pooling == "mean":
            instruction = tokenizer(input.instruction)["input_ids"] if input.instruction else []
            vector = hidden_LD[outside(ids[0].tolist(), instruction)].mean(dim=0)
        else:
            vector = hidden_LD[-1]
        rows.append(vector / vector.norm())
    return torch.stack(rows)


def without_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if "pixel" not in name}


def outside(ids: list[int], part: list[int]) -> list[int]:
    """Places of `ids` without those of its first stretch that equals `part`, as the code of U-MARVEL finds it."""
    if not part:
        return list(range(len(ids)))
    start = next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)
    return [*range(start), *range(start + len(part), len(ids))]


def vectors(embedder: EmbeddingModel, processor: Processor, inputs: Sequence[DecodedInput]) -> Tensor:
    with torch.no_grad():
        return embedder(processor.encode(inputs))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", ["padded", "packed", "one at a time"])
@pytest.mark.parametrize("readout", READOUTS)
def test_batches_equal_the_library_on_single_inputs(
    model_dir: str,
    processor: Processor,
    family: str,
    library: dict[str, Tensor],
    readout: str,
    packing: str,
    attention: str,
) -> None:
    if is_refused(family, READOUTS[readout], packing):
        with pytest.raises(UserError, match=r"Qwen3.5 cannot be (packed|bidirectional): some of its layers are recur"):
            embedder_of(model_dir, processor, READOUTS[readout], packing)
        return
    inputs = mixed_inputs()
    assert len(set(processor.encode(inputs).lengths.tolist())) > 5
    alone = packing == "one at a time"
    embedder = embedder_of(model_dir, processor, READOUTS[readout], "auto" if alone else packing, attention=attention)
    groups = [[input] for input in inputs] if alone else [inputs]
    actual = torch.cat([vectors(embedder, processor, group) for group in groups])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, library[readout], atol=1e-5, rtol=0)


def test_the_choices_and_the_inputs_are_told_apart(library: dict[str, Tensor]) -> None:
    for vectors_BD in library.values():
        assert (vectors_BD @ vectors_BD.T - torch.eye(9)).max() < 0.9995
    for name, other in combinations(library, 2):
        difference_B = (library[name] - library[other]).abs().amax(dim=1)
        if {name, other} == {"mrope causal last_token", "1d causal last_token"}:
            assert difference_B[[0, 2, 6]].max() < 1e-6  # inputs without patches: the positions are the same
            difference_B = difference_B[[1, 3, 4, 5, 7, 8]]
        assert difference_B.min() > 1e-3, (name, other)


def test_bidirectional_attention_without_a_mask_shows_where_it_is_left_causal(
    model_dir: str, processor: Processor, family: str, library: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_refused(family, UMARVEL):
        # Were it not refused, attention would go both ways in one layer, and the recurrent one would stay as it is.
        monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], bidirectional=True))
        with pytest.raises(UserError, match=r"^backbone Qwen3.5: has no is_causal in language_model.layers.0; set bid"):
            embedder_of(model_dir, processor, UMARVEL)
        return
    monkeypatch.setattr(embedder_module, "_set_direction", lambda backbone, readout: None)
    input = mixed_inputs()[:1]
    actual = vectors(embedder_of(model_dir, processor, UMARVEL), processor, input)
    assert (actual - library["mrope bidirectional mean"][:1]).abs().max() > 1e-3


def test_a_backbone_can_be_read_one_way_and_then_the_other(
    model_dir: str, processor: Processor, family: str, expected: Tensor
) -> None:
    backbone = load_backbone(model_dir, tiny_model(model_dir))
    if is_refused(family, UMARVEL):
        with pytest.raises(UserError, match=r"^model.readout.direction=bidirectional: Qwen3.5 cannot be bidirectional"):
            EmbeddingModel(backbone, processor.layout, UMARVEL)
    else:
        EmbeddingModel(backbone, processor.layout, UMARVEL)
    actual = vectors(EmbeddingModel(backbone, processor.layout), processor, mixed_inputs())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def varlen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **given: Any
) -> tuple[Tensor, None]:
    """What flash attention makes of one row: stretches that see themselves alone, begun by `cu_seq_lens_q` in vision
    towers, and where positions restart in language models.
    """
    assert attention_mask is None
    assert len(query) == 1
    starts = given.get("cu_seq_lens_q")
    if starts is None:
        starts = torch.cat([(given["position_ids"][0] == 0).nonzero().flatten(), torch.tensor([query.shape[2]])])
    key, value = (state.repeat_interleave(query.shape[1] // state.shape[1], dim=1) for state in (key, value))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(state[:, :, start:end] for state in (query, key, value)),
            is_causal=given.get("is_causal", module.is_causal),
            scale=given["scaling"],
        )
        for start, end in pairwise(starts.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("readout", READOUTS)
def test_flash_attention_is_given_packed_inputs_and_no_mask(
    model_dir: str, processor: Processor, family: str, library: dict[str, Tensor], readout: str
) -> None:
    if is_refused(family, READOUTS[readout]):
        return  # shown above
    AttentionInterface.register("flash_by_hand", varlen)
    embedder = embedder_of(model_dir, processor, READOUTS[readout])
    embedder.backbone.config._attn_implementation = "flash_by_hand"
    assert embedder.packs == FAMILIES[family].packs
    if not embedder.packs:
        return  # padded, which flash attention gets by rows
    actual = vectors(embedder, processor, mixed_inputs())
    torch.testing.assert_close(actual, library[readout], atol=1e-5, rtol=0)


def test_flash_attention_cuts_padding_by_the_mask(processor: Processor) -> None:
    batch = processor.encode(mixed_inputs())
    layout = BatchLayout(batch, packed=False)
    assert layout.mask(ReadoutConfig(), "flash_attention_2", torch.float32) is None  # causal: padding comes after
    mask = layout.mask(UMARVEL, "flash_attention_2", torch.float32)
    assert mask is not None
    assert mask.sum(dim=1).tolist() == batch.lengths.tolist()


def test_a_text_batch_after_an_image_batch_keeps_its_own_positions(
    model_dir: str, processor: Processor, expected: Tensor
) -> None:
    embedder = embedder_of(model_dir, processor)
    inputs = mixed_inputs()
    vectors(embedder, processor, inputs[1:2])
    torch.testing.assert_close(vectors(embedder, processor, inputs[0:1]), expected[:1], atol=1e-5, rtol=0)


def test_packed_inputs_of_recurrent_layers_would_run_into_each_other(
    model_dir: str, processor: Processor, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a family says whether it packs. A padded batch equals its inputs one by one up to the rounding of fp32."""
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], packs=True))
    padded, packed = (embedder_of(model_dir, processor, packing=packing) for packing in ("padded", "packed"))
    inputs = mixed_inputs()
    alone = torch.cat([vectors(padded, processor, [input]) for input in inputs])
    assert (vectors(padded, processor, inputs) - alone).abs().max() < 1e-6
    assert ((vectors(packed, processor, inputs) - alone).abs().max() > 1e-2) == (family == "qwen3_5")


def test_parts_under_another_name_are_refused(model_dir: str, processor: Processor, family: str) -> None:
    """As in SmolVLM, whose language model is called `text_model`: attention would stay causal without an error."""
    title, causal = re.escape(FAMILIES[family].title), ReadoutConfig()
    backbone: Any = load_backbone(model_dir, tiny_model(model_dir))
    layout = BatchLayout(processor.encode(mixed_inputs()), packed=False)
    with_index = backbone.get_rope_index
    backbone.get_rope_index = None
    with pytest.raises(UserError, match=rf"^backbone {title}: has no get_rope_index; give the family a hook"):
        layout.positions(backbone, causal)
    backbone.get_rope_index = with_index
    with pytest.raises(UserError, match=rf"^backbone {title}: has a visual.patch_embed.proj of another kind: Patch"):
        use_fast_vision(backbone)  # a second time
    backbone.text_model, backbone.tower = backbone.language_model, backbone.visual
    del backbone.language_model, backbone.visual
    with pytest.raises(UserError, match=rf"^backbone {title}: has no visual; give the family a hook"):
        use_fast_vision(backbone)
    if FAMILIES[family].bidirectional:
        with pytest.raises(
            UserError, match=rf"^backbone {title}: has no language_model.layers; give the family a hook"
        ):
            EmbeddingModel(backbone, processor.layout, UMARVEL)


def test_a_backbone_of_an_unknown_family_is_refused(model_dir: str, processor: Processor) -> None:
    backbone: Any = load_backbone(model_dir, tiny_model(model_dir))
    backbone.config.model_type = "smolvlm"
    with pytest.raises(UserError, match=r"^backbone: model_type 'smolvlm' is not supported; use one of \['qwen2_5_vl'"):
        EmbeddingModel(backbone, processor.layout)


FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooled before the final norm": lambda post_norm, pre_norm: pre_norm,
    "pooled one token early": lambda post_norm, pre_norm: post_norm.roll(1, dims=1),
    "pooled one token late": lambda post_norm, pre_norm: post_norm.roll(-1, dims=1),
    "pooled at the last column": lambda post_norm, pre_norm: post_norm[:, -1:].expand_as(post_norm),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_pooling_faults_show(model_dir: str, processor: Processor, expected: Tensor, fault: str) -> None:
    embedder = embedder_of(model_dir, processor)
    seen: dict[str, Tensor] = {}
    embedder.backbone.language_model.norm.register_forward_pre_hook(lambda _, inputs: seen.update(pre=inputs[0]))
    embedder.backbone.register_forward_hook(
        lambda *call: SimpleNamespace(last_hidden_state=FAULTS[fault](call[2].last_hidden_state, seen["pre"]))
    )
    actual = vectors(embedder, processor, mixed_inputs())
    assert (actual - expected).abs().max() > 1e-2


def test_videos_fed_as_images_show(model_dir: str, processor: Processor, expected: Tensor) -> None:
    video = mixed_inputs()[4].visuals[0]
    images = DecodedInput(visuals=tuple(Visual("image", frame[None]) for frame in video.frames))
    actual = vectors(embedder_of(model_dir, processor), processor, [images])
    assert (actual - expected[4]).abs().max() > 1e-2


def with_lora(model_dir: str, processor: Processor, seed: int = 0, **settings: Any) -> EmbeddingModel:
    model = tiny_model(model_dir).model_copy(update=settings)
    return EmbeddingModel(add_lora(load_backbone(model_dir, model), LORA, seed), processor.layout)


def test_lora_is_on_every_linear_layer_and_nothing_else_is_trained(
    model_dir: str, processor: Processor, family: str
) -> None:
    linears = [m for m in load_backbone(model_dir, tiny_model(model_dir)).modules() if isinstance(m, nn.Linear)]
    state = trainable_state(with_lora(model_dir, processor))
    assert len(linears) == LINEARS[family]
    assert len(state) == 2 * LINEARS[family]
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    assert sum(".visual." in name for name in state) == 2 * VISION_LINEARS[family]
    assert not any("patch_embed" in name for name in state)


@pytest.mark.parametrize("readout", ["mrope causal last_token", "mrope bidirectional mean"])
def test_a_merged_adapter_gives_the_vectors_of_the_unmerged_one(
    model_dir: str, processor: Processor, family: str, library: dict[str, Tensor], readout: str
) -> None:
    if is_refused(family, READOUTS[readout]):
        return  # shown above
    embedder = with_lora(model_dir, processor)
    embedder = EmbeddingModel(embedder.backbone, processor.layout, READOUTS[readout])
    shake(embedder, 0.1)
    unmerged = vectors(embedder, processor, mixed_inputs())
    merged = EmbeddingModel(embedder.backbone.merge_and_unload(), processor.layout, READOUTS[readout])
    torch.testing.assert_close(vectors(merged, processor, mixed_inputs()), unmerged, atol=1e-5, rtol=0)
    assert (unmerged - library[readout]).abs().max() > 1e-2


def test_a_new_adapter_changes_nothing_and_equal_seeds_give_equal_adapters(
    model_dir: str, processor: Processor, expected: Tensor
) -> None:
    first, again, other = (with_lora(model_dir, processor, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(vectors(first, processor, mixed_inputs()), expected, atol=1e-5, rtol=0)
    states = [trainable_state(embedder) for embedder in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_gradients_reach_the_vision_tower_with_and_without_checkpointing(
    model_dir: str, processor: Processor, tune: str
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(model_dir).model_copy(update={"gradient_checkpointing": checkpointing})
        backbone = load_backbone(model_dir, model)
        embedder = EmbeddingModel(add_lora(backbone, LORA, 0) if tune == "lora" else backbone, processor.layout).train()
        shake(embedder, 0.1)
        batch = processor.encode(mixed_inputs())
        embedder(batch)[:, 0].sum().backward()
        assert backbone.visual.is_gradient_checkpointing == checkpointing
        gradients.append({name: p.grad for name, p in embedder.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)
    assert sum("visual" in name for name in plain) > 10


def test_a_saved_adapter_is_loaded_by_us_and_by_peft(
    model_dir: str, processor: Processor, family: str, tmp_path: Path
) -> None:
    trained = with_lora(model_dir, processor)
    shake(trained, 0.1)
    for name in ("one", "two"):
        save_adapter(trained.backbone, tmp_path / name, identity=IDENTITY, base="tiny", base_sha256="ab")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "rzen.json"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)

    inputs = mixed_inputs()
    before = vectors(trained, processor, inputs)
    ours = load_adapter(load_backbone(model_dir, tiny_model(model_dir)), tmp_path / "one", trainable=True)
    theirs = peft.PeftModel.from_pretrained(load_backbone(model_dir, tiny_model(model_dir)), str(tmp_path / "one"))
    for loaded in (ours, theirs):
        torch.testing.assert_close(
            vectors(EmbeddingModel(loaded, processor.layout), processor, inputs), before, atol=0, rtol=0
        )
    assert len(trainable_state(ours)) == 2 * LINEARS[family]
    assert len(trainable_state(theirs)) == 0
    assert (before - vectors(embedder_of(model_dir, processor), processor, inputs)).abs().max() > 1e-2


def test_an_adapter_of_another_backbone_is_refused(
    model_dir: str, processor: Processor, family: str, tmp_path: Path
) -> None:
    trained = with_lora(model_dir, processor).backbone
    save_adapter(trained, tmp_path / "a", identity=IDENTITY, base="t", base_sha256="ab")
    backbone = load_backbone(model_dir, tiny_model(model_dir))
    backbone.language_model.layers = backbone.language_model.layers[:1]
    num_tensors = 14  # of the second layer
    with pytest.raises(UserError, match=f"does not fit the backbone: {num_tensors} tensors without a partner"):
        load_adapter(backbone, tmp_path / "a")
    wider = tiny_checkpoint(tmp_path / "wider", TINY.model_copy(update={"hidden": 80, "family": family}))
    with pytest.raises(UserError, match=r"does not fit the backbone \(.*size mismatch for [^\n]*; name the base"):
        load_adapter(load_backbone(wider, tiny_model(wider)), tmp_path / "a")
    with pytest.raises(UserError, match=r"has no adapter_config.json"):
        load_adapter(backbone, tmp_path)


def test_a_read_only_batch_is_accepted(model_dir: str, processor: Processor) -> None:
    batch = processor.encode([DecodedInput(text=TEXTS[0], visuals=(noise("image", 1, 40, 40),))])
    for array in vars(batch).values():
        array.flags.writeable = False  # as arrays that come from Ray's object store
    with torch.no_grad():
        assert embedder_of(model_dir, processor)(batch).norm(dim=-1).item() == pytest.approx(1.0, abs=1e-6)
