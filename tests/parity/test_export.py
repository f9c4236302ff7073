"""Exports in other libraries equal rzen's own encoder.

What needs torchvision, transformers 4.51 or mteb is checked by the scripts of tests/export, whose results lie there.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pipelines.samples import DecodedInput
from rzen.config import BackboneFamily, ModelIdentity, PromptConfig, ReadoutConfig, TinyBackbone
from rzen.export.export import ExportOptions, Format, export_model, load_encoder
from rzen.export.opening import encode_decoded, has_torchvision, open_in_sentence_transformers
from rzen.families import FAMILIES
from rzen.inputs.processor import Processor
from rzen.inputs.prompts import IMAGE_PAD, TEMPLATES, render
from rzen.model.backbone import load_backbone
from rzen.model.embedding_model import EmbeddingModel
from rzen.model.lora import load_adapter
from rzen.model.vision import use_fast_vision
from tests.export.make import trained_adapter
from tests.tiny import PROMPT, TEXTS, mixed_inputs, noise, tiny_checkpoint, tiny_model

INSTRUCTION = "Find what matches the given side."
TEXT_SIDES = [
    *(DecodedInput(text=text) for text in TEXTS),
    *(DecodedInput(text=text, instruction=INSTRUCTION) for text in TEXTS),
    DecodedInput(text=f"  {TEXTS[3]}\n", instruction=f" {INSTRUCTION} "),
]
IMAGE_SIDES = [input for input in mixed_inputs() if all(visual.kind != "video" for visual in input.visuals)]
Made = tuple[str, Path, Path]


def export(
    folder: Path, identity: ModelIdentity, format: Format = "model", family: BackboneFamily = "qwen2_vl"
) -> Made:
    """Base, adapter and export, whose folder is called `out`."""
    base = tiny_checkpoint(folder / "base", TinyBackbone(vocabulary=640, family=family))
    adapter = trained_adapter(base, folder / "adapter", identity)
    export_model(base, adapter, folder / "out", identity, ExportOptions(format=format, dtype="float32"))
    return base, adapter, folder / "out"


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return export(tmp_path_factory.mktemp("made"), ModelIdentity(prompt=PROMPT), family=request.param)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("qwen2"), ModelIdentity(prompt=PROMPT))[2]


def rzen_vectors(out: Path, inputs: list[DecodedInput]) -> Tensor:
    processor, embedder = load_encoder(str(out))
    return embedder(processor.encode(inputs))


def messages(input: DecodedInput) -> list[dict[str, Any]]:
    """A side as chat templates take it."""
    content: list[dict[str, Any]] = [
        {"type": "video"} if visual.kind == "video" else {"type": "image"} for visual in input.visuals
    ]
    content += [{"type": "text", "text": input.text}] if input.text else []
    system = [{"role": "system", "content": input.instruction}] if input.instruction else []
    return [*system, {"role": "user", "content": content}]


def encode(model: SentenceTransformer, inputs: list[DecodedInput], **settings: Any) -> Tensor:
    return torch.tensor(encode_decoded(model, inputs, **settings))


def auto_vectors(out: Path, inputs: list[DecodedInput]) -> Tensor:
    """Without rzen: chat template, tokenizer, Pillow's image processor, AutoModel, last state of each side."""
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModel.from_pretrained(out)
    image_processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    vectors = []
    for input in inputs:
        text = tokenizer.apply_chat_template(messages(input), tokenize=False)
        visuals: dict[str, Any] = {}
        if input.visuals:
            images = [Image.fromarray(visual.frames[0]) for visual in input.visuals]
            visuals = dict(image_processor(images, return_tensors="pt"))
            first, *others = text.split(IMAGE_PAD)
            counts = (visuals["image_grid_thw"].prod(dim=1) // 4).tolist()
            text = first + "".join(IMAGE_PAD * n + part for n, part in zip(counts, others, strict=True))
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        types = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            vectors.append(model(input_ids=ids, mm_token_type_ids=types, **visuals).last_hidden_state[0, -1])
    return normalize(torch.stack(vectors), dim=-1)


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_chat_template_writes_what_the_processor_writes(made: Made, tmp_path: Path, template: Any) -> None:
    base = Path(made[0])
    prompt = PromptConfig(template=template, max_visual_tokens=24)
    readout = ReadoutConfig(pooling="mean" if TEMPLATES[template].answer else "last_token")
    identity = ModelIdentity(prompt=prompt, readout=readout)
    export_model(str(base), None, tmp_path / "out", identity, ExportOptions(dtype="float32"))
    tokenizer, processor = AutoTokenizer.from_pretrained(tmp_path / "out"), Processor(str(base), prompt)
    for input in [*mixed_inputs(), *TEXT_SIDES]:
        if input.instruction and readout.pooling == "mean":
            with pytest.raises(Exception, match="only rzen can take one"):
                tokenizer.apply_chat_template(messages(input), tokenize=False)
            continue
        has_video = any(visual.kind == "video" for visual in input.visuals)
        if has_video and TEMPLATES[template].frame_tokens:
            with pytest.raises(Exception, match="a video is read as images of 160 to 180 tokens"):
                tokenizer.apply_chat_template(messages(input), tokenize=False)
            continue
        expected = render(processor.pieces(input))
        # Libraries write one pad for a visual, and processors as many as there are; times and their marks too.
        expected = re.sub(r"(<\|(image|video)_pad\|>)+", r"<|\2_pad|>", expected)
        expected = re.sub(
            r"(<[\d.]+ seconds><\|vision_start\|><\|video_pad\|><\|vision_end\|>)+", "<|video_pad|>", expected
        )
        assert tokenizer.apply_chat_template(messages(input), tokenize=False) == expected


def test_what_is_no_input_is_refused_by_the_chat_template(qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2)
    for message, why in (
        ({"role": "assistant", "content": "x"}, "an input has a system message"),
        ({"role": "user", "content": [{"type": "audio", "audio": "x.wav"}]}, "an input has texts, images and videos"),
    ):
        with pytest.raises(Exception, match=why):
            tokenizer.apply_chat_template([message], tokenize=False)


def test_sentence_transformers_equals_on_texts(made: Made) -> None:
    model = open_in_sentence_transformers(made[2], "cpu")
    torch.testing.assert_close(encode(model, TEXT_SIDES), rzen_vectors(made[2], TEXT_SIDES), atol=1e-5, rtol=0)
    padded = torch.tensor(model.encode(list(TEXTS), batch_size=len(TEXTS)))
    torch.testing.assert_close(padded, rzen_vectors(made[2], TEXT_SIDES[: len(TEXTS)]), atol=1e-5, rtol=0)


def test_sentence_transformers_equals_on_images_pages_and_mixed_inputs(made: Made) -> None:
    model = open_in_sentence_transformers(made[2], "cpu")
    torch.testing.assert_close(encode(model, IMAGE_SIDES), rzen_vectors(made[2], IMAGE_SIDES), atol=1e-5, rtol=0)
    if not has_torchvision():
        video = {"video": np.zeros((8, 3, 56, 56), np.uint8)}
        with pytest.raises(ImportError, match="videos need torchvision"):
            model.encode([video])


def test_sentence_transformers_cuts_texts_as_rzen_where_it_is_told_to(tmp_path: Path) -> None:
    prompt = PromptConfig(max_text_tokens=9, max_visual_tokens=24)
    _, _, out = export(tmp_path, ModelIdentity(prompt=prompt))
    told = re.search(r"'max_length': (\d+)", (out / "README.md").read_text())
    assert told is not None
    model, expected = open_in_sentence_transformers(out, "cpu"), rzen_vectors(out, TEXT_SIDES)
    cut = {"text": {"truncation": True, "max_length": int(told[1])}}
    torch.testing.assert_close(encode(model, TEXT_SIDES, processing_kwargs=cut), expected, atol=1e-5, rtol=0)
    assert (encode(model, TEXT_SIDES) - expected).abs().max() > 1e-2  # uncut by itself


def test_sentence_transformers_means_all_tokens_and_refuses_instructions(tmp_path: Path) -> None:
    _, _, out = export(tmp_path, ModelIdentity(prompt=PROMPT, readout=ReadoutConfig(pooling="mean")))
    model, inputs = open_in_sentence_transformers(out, "cpu"), TEXT_SIDES[: len(TEXTS)]
    torch.testing.assert_close(encode(model, inputs), rzen_vectors(out, inputs), atol=1e-5, rtol=0)
    with pytest.raises(Exception, match="only rzen can take one"):
        model.encode(TEXTS[0], prompt=INSTRUCTION)


def test_auto_classes_equal_on_images_pages_and_mixed_inputs(made: Made) -> None:
    expected = rzen_vectors(made[2], IMAGE_SIDES)
    torch.testing.assert_close(auto_vectors(made[2], IMAGE_SIDES), expected, atol=1e-5, rtol=0)


def test_peft_loads_the_adapter(tmp_path: Path) -> None:
    identity = ModelIdentity(prompt=PROMPT)
    base, adapter, out = export(tmp_path, identity, "adapter")
    named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    backbone = AutoModel.from_pretrained(named)
    use_fast_vision(backbone)  # the last bits are those of the kernels
    model = peft.PeftModel.from_pretrained(backbone, out).eval()
    own = load_adapter(load_backbone(base, tiny_model(base)), adapter)
    processor = Processor(base, PROMPT)
    with torch.no_grad():
        actual, expected = (
            EmbeddingModel(some, processor.layout)(processor.encode(mixed_inputs())) for some in (model, own)
        )
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    export_model(base, out, tmp_path / "merged", identity, ExportOptions(dtype="float32"))  # it is an adapter to rzen
    torch.testing.assert_close(rzen_vectors(tmp_path / "merged", mixed_inputs()), expected, atol=1e-5, rtol=0)


def test_the_directory_for_the_released_script_is_one_of_transformers_4(tmp_path: Path) -> None:
    prompt = PromptConfig(template="rzen_release", min_visual_tokens=6, max_visual_tokens=24)
    base, adapter, out = export(
        tmp_path, ModelIdentity(prompt=prompt, readout=ReadoutConfig(positions="1d")), "rzen_release"
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["rope_theta"], config["torch_dtype"]) == (64, 1e6, "float32")
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [2, 3, 3]}
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert not set(config) & {"text_config", "rope_parameters", "dtype"}
    images = json.loads((out / "preprocessor_config.json").read_text())
    assert (images["min_pixels"], images["max_pixels"]) == (6 * 28**2, 24 * 28**2)
    assert not (out / "modules.json").exists()
    processor, own = Processor(base, prompt), load_adapter(load_backbone(base, tiny_model(base)), adapter)
    with torch.no_grad():
        expected = EmbeddingModel(own, processor.layout, ReadoutConfig(positions="1d"))(
            processor.encode(mixed_inputs())
        )
    torch.testing.assert_close(rzen_vectors(out, mixed_inputs()), expected, atol=1e-5, rtol=0)


def test_planted_faults_of_exports_show(qwen2: Path, tmp_path: Path) -> None:
    """Each in a copy of the export, against the comparisons above."""

    def copy(name: str, file: str, before: str, after: str) -> Path:
        shutil.copytree(qwen2, tmp_path / name)
        text = (tmp_path / name / file).read_text()
        assert before in text
        (tmp_path / name / file).write_text(text.replace(before, after))
        return tmp_path / name

    expected = rzen_vectors(qwen2, TEXT_SIDES)
    unended = copy("unended", "chat_template.jinja", "<|endoftext|>", "")
    assert (encode(open_in_sentence_transformers(unended, "cpu"), TEXT_SIDES) - expected).abs().max() > 1e-2

    unpooled = copy(
        "first", "1_Pooling/config.json", '"pooling_mode_lasttoken": true', '"pooling_mode_lasttoken": false'
    )
    assert (encode(open_in_sentence_transformers(unpooled, "cpu"), TEXT_SIDES) - expected).abs().max() > 1e-2

    modules = json.loads((qwen2 / "modules.json").read_text())
    normalizing = json.dumps(modules[-1], indent=2).replace("\n", "\n  ")
    unnormalized = copy("long", "modules.json", f",\n  {normalizing}", "")
    assert (encode(open_in_sentence_transformers(unnormalized, "cpu"), TEXT_SIDES) - expected).abs().max() > 1e-2

    larger = copy(
        "larger", "preprocessor_config.json", f'"longest_edge": {24 * 28**2}', f'"longest_edge": {48 * 28**2}'
    )
    (larger / "preprocessor_config.json").write_text(
        (larger / "preprocessor_config.json")
        .read_text()
        .replace(f'"max_pixels": {24 * 28**2}', f'"max_pixels": {48 * 28**2}')
    )
    page = [DecodedInput(visuals=(noise("document", 1, 250, 170),))]
    torch.testing.assert_close(auto_vectors(qwen2, page), rzen_vectors(qwen2, page), atol=1e-5, rtol=0)
    assert (auto_vectors(larger, page) - rzen_vectors(qwen2, page)).abs().max() > 1e-2


def test_pooling_at_the_last_padded_place_shows(qwen2: Path, tmp_path: Path) -> None:
    model = open_in_sentence_transformers(qwen2, "cpu")
    features = model.preprocess(list(TEXTS))
    assert not features["attention_mask"].all()
    with torch.no_grad():
        states = model[0](features)["token_embeddings"]
    actual, expected = normalize(states[:, -1], dim=-1), rzen_vectors(qwen2, TEXT_SIDES[: len(TEXTS)])
    assert (actual - expected).abs().max() > 1e-2


def test_mteb_reads_inputs(qwen2: Path) -> None:
    pytest.importorskip("mteb", reason="mteb is not installed; tests/export/mteb.md holds the result where it is")
    from rzen.export.mteb import load

    encoder = load(str(qwen2))
    metadata = type("Metadata", (), {"name": "Any", "prompt": {"query": INSTRUCTION}})
    image = noise("image", 1, 61, 97)
    batches = [{"text": list(TEXTS[:2])}, {"text": [TEXTS[2]], "image": [Image.fromarray(image.frames[0])]}]
    kind = type("Kind", (), {"value": "query"})
    actual = torch.tensor(encoder.encode(batches, task_metadata=metadata, prompt_type=kind))
    inputs = [DecodedInput(text=text, instruction=INSTRUCTION) for text in TEXTS[:2]]
    inputs.append(DecodedInput(text=TEXTS[2], instruction=INSTRUCTION, visuals=(image,)))
    torch.testing.assert_close(actual, rzen_vectors(qwen2, inputs), atol=1e-6, rtol=0)
    assert encoder.mteb_model_meta.embed_dim == 64
