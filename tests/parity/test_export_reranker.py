"""Exported re-rankers in sentence-transformers and transformers equal rzen's own scores, one pair at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import rzen
from jobs.serving.export import run
from jobs.serving.specs import ExportSpec
from pipelines.errors import UserError
from pipelines.samples import DecodedInput
from rzen.config import LoraConfig, PairPromptConfig, RerankerIdentity
from rzen.export.export import ExportOptions
from rzen.export.opening import register_processors
from rzen.export.reranker import export_reranker
from rzen.families import FAMILIES
from rzen.model.backbone import build_tiny, load_backbone
from rzen.model.checkpoints import checkpoint_sha256
from rzen.model.lora import add_lora, save_adapter
from tests.tiny import TEXTS, TINY, noise, tiny_model

ROW = "| soup, text_page | hit@1 | 9 | 25.0 | 50.0 | – | – | 100.0 |"
WORDS = ["yes", "no", "Yes", "No"]
IMAGE, PAGE = noise("image", 1, 61, 97), noise("document", 1, 120, 85, 1)
QUERIES = [
    DecodedInput(TEXTS[0]),
    DecodedInput("  spaces \n", instruction="Find it."),
    DecodedInput("in blue", (IMAGE,)),
]
DOCUMENTS = [
    DecodedInput(TEXTS[4]),
    DecodedInput(visuals=(PAGE,)),
    DecodedInput(TEXTS[2], (PAGE, IMAGE)),
    DecodedInput(" a text "),
]


def prompt(template: str) -> PairPromptConfig:
    return PairPromptConfig.model_validate({"template": template, "max_visual_tokens": 24})


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen2_vl untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model; no weight is at its initial 0 or 1."""
    folder = tmp_path_factory.mktemp("whole")
    family, _, untied = request.param.partition(" ")
    build_tiny(folder, TINY.model_copy(update={"family": family}), [*TEXTS, *WORDS * 9])
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = not untied
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def make_adapter(checkpoint: Path, folder: Path, template: str) -> Path:
    tuned: Any = add_lora(load_backbone(str(checkpoint), tiny_model(str(checkpoint))), LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    sha256 = checkpoint_sha256(checkpoint)
    identity = RerankerIdentity(pair_prompt=prompt(template))
    save_adapter(tuned, folder, identity=identity, base=str(checkpoint), base_sha256=sha256)
    return folder


def side(given: DecodedInput) -> Any:
    """As sentence-transformers takes it."""
    images = [Image.fromarray(visual.frames[0]) for visual in given.visuals]
    parts = {"image": images if len(images) > 1 else images[0]} if images else {}
    if not parts:
        return given.text
    return parts | ({"text": given.text} if given.text else {})


def by_cross_encoder(folder: Path, pairs: list[tuple[DecodedInput, DecodedInput]]) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    register_processors()
    model = CrossEncoder(str(folder), device="cpu")
    assert isinstance(model.activation_fn, nn.Sigmoid)
    scores = [
        model.predict([(side(query), side(document))], prompt=query.instruction or None, activation_fn=nn.Identity())[0]
        for query, document in pairs
    ]
    return np.array(scores, np.float32)


def by_rzen(folder: Path, pairs: list[tuple[DecodedInput, DecodedInput]]) -> np.ndarray:
    reranker = rzen.load_reranker(folder)
    queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
    numbers = np.arange(len(pairs))
    return reranker.log_odds(reranker.encoder.encode(queries, documents, np.stack([numbers, numbers], axis=1)))


PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]


@pytest.mark.parametrize("template", ["qwen3_reranker", "lamra"])
def test_cross_encoder_gives_the_scores_of_rzen(checkpoint: Path, tmp_path: Path, template: str) -> None:
    adapter = make_adapter(checkpoint, tmp_path / "adapter", template)
    export_reranker(str(checkpoint), adapter, tmp_path / "out", prompt(template), ExportOptions(dtype="float32"))
    expected = by_rzen(tmp_path / "out", PAIRS)
    assert rzen.load_reranker(tmp_path / "out").encoder.prompt == prompt(template)
    assert np.ptp(expected) > 0.1
    assert np.abs(by_cross_encoder(tmp_path / "out", PAIRS) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    other = "lamra" if template == "qwen3_reranker" else "qwen3_reranker"
    with pytest.raises(UserError, match="the adapter was trained with"):
        export_reranker(str(checkpoint), adapter, tmp_path / "no", prompt(other), ExportOptions(dtype="float32"))


def test_the_whole_model_of_transformers_has_its_logits(checkpoint: Path, tmp_path: Path) -> None:
    """The exported weights against the base with its adapter, and the two rows of the head against the file."""
    adapter = make_adapter(checkpoint, tmp_path / "adapter", "qwen3_reranker")
    export_reranker(
        str(checkpoint), adapter, tmp_path / "out", prompt("qwen3_reranker"), ExportOptions(dtype="float32")
    )
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(whole).__name__.endswith("ForConditionalGeneration")
    reference = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "query", "content": TEXTS[0]}, {"role": "document", "content": TEXTS[4]}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")["input_ids"]
    scoring = json.loads((tmp_path / "out/1_LogitScore/config.json").read_text())
    yes, no = scoring["true_token_id"], scoring["false_token_id"]
    assert tokenizer.convert_ids_to_tokens([yes, no]) == ["yes", "no"]
    with torch.no_grad():
        logits = whole(input_ids=ids).logits[0, -1]
        bare = reference(input_ids=ids).logits[0, -1]
    z = by_rzen(tmp_path / "out", [(DecodedInput(TEXTS[0]), DecodedInput(TEXTS[4]))])[0]
    assert abs(float(logits[yes] - logits[no]) - z) < 1e-5 * max(1, abs(z))
    assert (logits - bare).abs().max() > 1e-3  # the adapter is in it
    tuned = rzen.load_reranker(checkpoint, adapter)
    batch = tuned.encoder.encode([DecodedInput(TEXTS[0])], [DecodedInput(TEXTS[4])], np.array([[0, 0]]))
    assert abs(float(tuned.log_odds(batch)[0]) - z) < 1e-5 * max(1, abs(z))


def test_the_job_writes_card_and_files_of_vllm(tmp_path: Path) -> None:
    build_tiny(tmp_path / "base", TINY, [*TEXTS, *WORDS * 9])
    spec = {"kind": "export", "model": {"base": str(tmp_path / "base")}, "format": "reranker", "dtype": "float32"}
    spec |= {"out": str(tmp_path / "fine"), "pair_prompt": {"template": "lamra"}, "license": "mit"}
    one = {"metric": "hit@1", "top_k": 9, "before": {"hit@1": 0.25}, "reranked": {"hit@1": 0.5}, "weight": None}
    results: dict[str, Any] = {"settings": {"reranker": [checkpoint_sha256(tmp_path / "base"), None]}, "rows": []}
    results |= {"rerank": {"soup": {"text_page": one | {"ceiling": {"hit@1": 1.0}}}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    spec |= {"scores": str(tmp_path / "results.json")}
    assert run(ExportSpec.model_validate(spec)) == {"outputs": [spec["out"]]}
    assert json.loads((tmp_path / "fine/vllm_hf_overrides.json").read_text()) == {
        "architectures": ["Qwen2VLForSequenceClassification"],
        "classifier_from_token": ["No", "Yes"],
        "is_original_qwen3_reranker": True,
    }
    identity = json.loads((tmp_path / "fine/rzen.json").read_text())
    assert (identity["pair_prompt"]["template"], identity["dtype"], identity["license"]) == ("lamra", "float32", "mit")
    _, front, card = (tmp_path / "fine/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-ranking"
    assert yaml.safe_load(front)["library_name"] == "sentence-transformers"
    for told in (
        "# fine",
        "`rzen.load_reranker",
        "CrossEncoder(",
        "prompt `lamra`",
        "vLLM has not been run",
        "| soup, text_page | hit@1 | 9 | 25.0 | 50.0 | – | – | 100.0 |",
    ):
        assert told.strip("`") in card, told
    assert rzen.load_reranker(tmp_path / "fine").predict([("a", "b")]).shape == (1,)
    with pytest.raises(UserError, match="is that of a re-ranker, which has no vectors"):
        rzen.load(tmp_path / "fine")
    (tmp_path / "results.json").write_text(json.dumps(results | {"settings": {"reranker": ["another", None]}}))
    with pytest.raises(UserError, match=r"has no score of the weights of base .*; evaluate with `rerank`, or set"):
        run(ExportSpec.model_validate(spec))


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    build_tiny(tmp_path / "base", TINY, TEXTS)
    config = tmp_path / "base/config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(UserError, match=r"has no lm_head.weight, and its head is not tied"):
        export_reranker(str(tmp_path / "base"), None, tmp_path / "out", prompt("lamra"), ExportOptions())


def test_planted_faults_show(tmp_path: Path) -> None:
    build_tiny(tmp_path / "base", TINY.model_copy(update={"init_std": 0.2}), [*TEXTS, *WORDS * 9])
    export_reranker(
        str(tmp_path / "base"), None, tmp_path / "out", prompt("qwen3_reranker"), ExportOptions(dtype="float32")
    )
    pairs = [(QUERIES[0], DOCUMENTS[0]), (QUERIES[2], DOCUMENTS[2])]
    expected = by_rzen(tmp_path / "out", pairs)
    assert np.abs(by_cross_encoder(tmp_path / "out", pairs) - expected).max() < 1e-5
    for right, wrong in (
        ("MIDDLE ~ document.visuals ~ (", "MIDDLE ~ (document.visuals) ~ ' ' ~ ("),
        ("query.visuals ~ (query.text if", "(query.text ~ query.visuals if"),
        ("assistant", "user"),
    ):
        path = tmp_path / "out/chat_template.jinja"
        whole = path.read_text()
        assert right in whole
        path.write_text(whole.replace(right, wrong))
        assert np.abs(by_cross_encoder(tmp_path / "out", pairs) - expected).max() > 1e-4, wrong
        path.write_text(whole)
    scoring = tmp_path / "out/1_LogitScore/config.json"
    ids = json.loads(scoring.read_text())
    scoring.write_text(
        json.dumps(ids | {"true_token_id": ids["false_token_id"], "false_token_id": ids["true_token_id"]})
    )
    assert np.abs(by_cross_encoder(tmp_path / "out", pairs) + expected).max() < 1e-5  # the sign is turned
