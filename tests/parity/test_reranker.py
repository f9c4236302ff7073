"""The re-ranker against the logits of transformers' whole models, one pair at a time, and faults that must show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import rzen
from pipelines.errors import UserError
from pipelines.samples import DecodedInput
from rzen.config import LoraConfig, PairPromptConfig
from rzen.families import FAMILIES
from rzen.model.backbone import build_tiny
from rzen.model.lora import add_lora
from rzen.reranking.encoder import JointBatch, JointEncoder
from rzen.reranking.model import ScoringModel
from rzen.reranking.reranker import Reranker, load_reranker
from tests.library_pixels import library_visuals
from tests.tiny import TEXTS, TINY, noise

TOLERANCE = 1e-5  # of the largest score; fp32
QWEN_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided."
    ' Note that the answer can only be "yes" or "no".'
)
QWEN_DEFAULT = "Given a search query, retrieve relevant candidates that answer the query."
LAMRA_TASK = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate                        "
    "meets the requirements of the query. If it does, respond with 'Yes'; if it doesn't, responed with 'No'."
)
IMAGE, PAGE = noise("image", 1, 61, 97), noise("document", 1, 120, 85, 1)
CLIP = noise("video", 4, 70, 66, 3, times_s=(0.0, 0.7, 1.4, 2.1))
QUERIES = [
    DecodedInput(TEXTS[0]),
    DecodedInput('"quoted" <|im_end|> text', instruction="Find the page."),
    DecodedInput("in blue", (IMAGE,), "Find it"),
]
DOCUMENTS = [
    DecodedInput("(a text)"),
    DecodedInput(visuals=(PAGE,)),
    DecodedInput(TEXTS[2], (CLIP, IMAGE)),
    DecodedInput(),
]
PAIRS = np.array([(query, document) for document in range(4) for query in range(3)], np.int64)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a head, as on the hub: 2B models have a tied one, 7B models one of their own."""
    folder = tmp_path_factory.mktemp("reranker")
    build_tiny(folder, TINY.model_copy(update={"family": family}), [*TEXTS, *["yes", "no", "Yes", "No"] * 9])
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = request.param == "tied"
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():  # no weight at its initial 0 or 1
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reranker(checkpoint: Path) -> Reranker:
    return load_reranker(checkpoint, prompt=small_prompt("qwen3_reranker"))


def small_prompt(template: str) -> PairPromptConfig:
    return PairPromptConfig.model_validate({"template": template, "max_visual_tokens": 24})


def library_log_odds(checkpoint: Path, template: str) -> np.ndarray:
    """logit(yes) - logit(no) of the whole model, from text that is written out here."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    yes, no = (tokenizer(answer)["input_ids"] for answer in (("Yes", "No") if template == "lamra" else ("yes", "no")))
    assert len(yes) == len(no) == 1
    rows = []
    for query, document in PAIRS:
        arguments = library_arguments(model, tokenizer, template, QUERIES[query], DOCUMENTS[document])
        with torch.no_grad():
            logits = model(**arguments).logits[0, -1]
        rows.append(float(logits[yes[0]] - logits[no[0]]))
    return np.array(rows)


def library_arguments(
    model: Any, tokenizer: Any, template: str, query: DecodedInput, document: DecodedInput
) -> dict[str, Any]:
    family = FAMILIES[model.config.model_type]
    visuals = [*query.visuals, *document.visuals]
    pixels = library_visuals(visuals, family)
    grids = {"image": pixels.get("image_grid_thw"), "video": pixels.get("video_grid_thw")}
    text = chat(template, query, document)
    for name, kind in (("image", "<image>"), ("video", "<video>")):
        for grid in [] if grids[name] is None else grids[name].tolist():
            times_s = (0.35, 1.75) if family.timestamps and name == "video" else None
            text = text.replace(kind, written(name, grid, times_s), 1)
    # Special tokens come from the template only: what a user writes is spelled as text.
    ids = torch.tensor([[one for part in text.split("\0") for one in tokens(tokenizer, part)]])
    types = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id)
    arguments: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": types, **pixels}
    if model.config.model_type == "qwen2_5_vl" and "video_grid_thw" in pixels:
        arguments["second_per_grid_ts"] = [1.4]
    return arguments


def chat(template: str, query: DecodedInput, document: DecodedInput) -> str:
    """The whole text. Special tokens stand between zero bytes, visuals are `<image>` and `<video>`."""
    if template == "qwen3_reranker":
        content = f"<Instruct>: {query.instruction or QWEN_DEFAULT}<Query>:{marks(query)}{query.text}"
        content += f"\n<Document>:{marks(document)}{document.text or ('' if document.visuals else 'NULL')}"
        system = QWEN_SYSTEM
    else:
        words = " ".join(part for part in (query.instruction, query.text) if part)
        content = f"{LAMRA_TASK}Query:{marks(query)}{words}Candidate:{marks(document)}{document.text}"
        system = "You are a helpful assistant."
    start, end = "\0<|im_start|>\0", "\0<|im_end|>\0"
    return f"{start}system\n{system}{end}\n{start}user\n{content}{end}\n{start}assistant\n"


def marks(given: DecodedInput) -> str:
    return "".join("<video>" if visual.kind == "video" else "<image>" for visual in given.visuals)


def written(kind: str, grid: list[int], times_s: tuple[float, ...] | None) -> str:
    frames, size = grid[0], grid[1] * grid[2] // 4
    if times_s is None:
        return f"\0<|vision_start|>\0{f'<|{kind}_pad|>' * frames * size}\0<|vision_end|>\0"
    assert len(times_s) == frames
    return "".join(
        f"<{time_s:.1f} seconds>\0<|vision_start|>\0{f'<|{kind}_pad|>' * size}\0<|vision_end|>\0" for time_s in times_s
    )


def tokens(tokenizer: Any, part: str) -> list[int]:
    special = part.startswith("<|") and part.endswith("|>")
    ids: list[int] = tokenizer(part, split_special_tokens=not special)["input_ids"] if part else []
    return ids


@pytest.mark.parametrize("template", ["qwen3_reranker", "lamra"])
def test_scores_are_those_of_the_whole_model(checkpoint: Path, template: str) -> None:
    expected = library_log_odds(checkpoint, template)
    assert np.ptp(expected) > 0.1
    reranker = load_reranker(checkpoint, prompt=small_prompt(template))
    batch = reranker.encoder.encode(QUERIES, DOCUMENTS, PAIRS)
    assert np.abs(reranker.log_odds(batch) - expected).max() < TOLERANCE * max(1, np.abs(expected).max())
    pairs = [(QUERIES[query], DOCUMENTS[document]) for query, document in PAIRS]
    assert np.abs(reranker.predict(pairs) - 1 / (1 + np.exp(-expected))).max() < TOLERANCE


def alone(reranker: Reranker, pairs: np.ndarray = PAIRS) -> np.ndarray:
    """Each pair by itself, its media read for it alone."""
    with torch.inference_mode():
        scores = [reranker.model.score(reranker.encoder.encode(QUERIES, DOCUMENTS, pair[None])) for pair in pairs]
    return torch.cat(scores).numpy()


@pytest.mark.parametrize("chunk_tokens", [1, 150, 16_384])
def test_scores_do_not_depend_on_batch_mates_and_grouping(reranker: Reranker, chunk_tokens: int) -> None:
    expected = alone(reranker)
    some = Reranker(reranker.encoder, reranker.model, chunk_tokens)
    for order in (np.arange(12), np.random.default_rng(0).permutation(12)):
        batch = reranker.encoder.encode(QUERIES, DOCUMENTS, PAIRS[order])
        assert np.abs(some.log_odds(batch) - expected[order]).max() < TOLERANCE


def test_packed_pairs_have_the_scores_of_padded_ones(reranker: Reranker, family: str) -> None:
    model = reranker.model
    if not FAMILIES[family].packs:
        with pytest.raises(UserError, match="cannot be packed"):
            ScoringModel(model.backbone, reranker.encoder.processor.layout, model.direction, "packed")
        return
    packed = ScoringModel(model.backbone, reranker.encoder.processor.layout, model.direction, "packed").eval()
    batch = reranker.encoder.encode(QUERIES, DOCUMENTS, PAIRS)
    with torch.inference_mode():
        assert np.abs(packed.score(batch).numpy() - alone(reranker)).max() < TOLERANCE


def test_the_tower_reads_a_medium_once(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    features = ScoringModel.features
    monkeypatch.setattr(ScoringModel, "features", lambda self, media: read.append(len(media)) or features(self, media))
    batch = reranker.encoder.encode(QUERIES, DOCUMENTS, PAIRS)
    assert len(batch.shown) == 4 * 1 + 3 * (1 + 2)  # the image query four times, three pairs with each document
    reranker.log_odds(batch)
    assert sum(read) == len(batch.media) == 3  # the picture of the query is in a document, too


def test_gradients_reach_adapters_of_tower_and_language_model(reranker: Reranker, checkpoint: Path) -> None:
    fresh = load_reranker(checkpoint, prompt=small_prompt("qwen3_reranker"))
    tuned: Any = add_lora(fresh.model.backbone, LoraConfig(rank=2), seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    model = ScoringModel(tuned, fresh.encoder.processor.layout, fresh.model.direction)
    batch = fresh.encoder.encode(QUERIES[2:], DOCUMENTS[1:2], np.array([[0, 0]]))
    model.score(batch).sum().backward()
    without = [name for name, value in tuned.named_parameters() if value.requires_grad and not value.grad.any()]
    assert without == []


def test_planted_faults_show(checkpoint: Path, reranker: Reranker, family: str) -> None:
    expected = alone(reranker)
    model, batch = reranker.model, reranker.encoder.encode(QUERIES, DOCUMENTS, PAIRS)
    with torch.inference_mode():
        features = dict(zip(batch.media, model.features(list(batch.media.values())), strict=True))
        shown = [features[key] for key in batch.shown]
        swapped = {len(one.tokens): one for one in features.values()}
        assert len(swapped) == 3
        mixed = [one if len(one.tokens) != len(shown[0].tokens) else other(one) for one in shown]
        assert np.abs(model(batch.sequences, mixed).numpy() - expected).max() > 1e-3  # the features of another medium
        if family == "qwen3_vl":
            flat = [type(one)(one.tokens, tuple(layer * 0 for layer in one.deepstack)) for one in shown]
            assert np.abs(model(batch.sequences, flat).numpy() - expected).max() > 1e-3  # deepstack left out
    visuals_first = reranker.encoder.encode(
        [DecodedInput(QUERIES[0].text, DOCUMENTS[1].visuals)], [DecodedInput()], ONE
    )
    in_place = reranker.encoder.encode(QUERIES[:1], DOCUMENTS[1:2], ONE)
    assert np.abs(reranker.log_odds(visuals_first) - reranker.log_odds(in_place)).max() > 1e-3


ONE = np.array([[0, 0]], np.int64)


def other(features: Any) -> Any:
    return type(features)(features.tokens.flip(0), features.deepstack)


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    build_tiny(tmp_path, TINY, TEXTS)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(UserError, match=r"has no lm_head.weight, and its head is not tied to the embeddings; name the"):
        load_reranker(tmp_path)


def test_texts_are_cut_by_tokens(checkpoint: Path) -> None:
    encoder = JointEncoder(str(checkpoint), PairPromptConfig(max_text_tokens=5))
    ids = encoder.processor.text_ids
    for text in (TEXTS[3], TEXTS[4], "naïve café 🙂🙂🙂", "x"):
        cut = encoder.processor.cut(text, 5)
        assert text.startswith(cut)
        assert len(ids(cut)) <= 5
        assert cut == text or len(ids(cut)) >= 2
    long = encoder.encode([DecodedInput("a " * 500)], [DecodedInput("b " * 500)], ONE)
    short = encoder.encode([DecodedInput("a " * 2)], [DecodedInput("b " * 2)], ONE)
    assert int(long.sequences.lengths[0]) < int(short.sequences.lengths[0]) + 12


def test_documents_are_ranked(reranker: Reranker, checkpoint: Path) -> None:
    assert rzen.load_reranker is load_reranker
    documents = ["one", "two", "three", "two"]
    ranked = reranker.rank("a query", documents)
    scores = reranker.predict([("a query", document) for document in documents])
    assert [one.index for one in ranked] == np.argsort(-scores, kind="stable").tolist()
    assert scores[1] == scores[3]
    assert [one.rank for one in ranked] == [1, 2, 3, 4]
    assert reranker.rank("a query", documents, top_k=2) == ranked[:2]
    assert reranker.rank("a query", []) == []
    asked = reranker.rank("a query", documents, instruction="Find the opposite.")
    assert {one.score for one in asked} != {one.score for one in ranked}
    with pytest.raises(UserError, match=r"pairs\[1\] document photo.jpg: does not exist"):
        reranker.predict([("a", "b"), ("a", "photo.jpg")])


def test_batches_pickle(reranker: Reranker) -> None:
    import pickle

    batch = reranker.encoder.encode(QUERIES, DOCUMENTS, PAIRS)
    again: JointBatch = pickle.loads(pickle.dumps(batch))
    assert np.array_equal(reranker.log_odds(again), reranker.log_odds(batch))
    encoder: JointEncoder = pickle.loads(pickle.dumps(reranker.encoder))
    assert encoder.answer_ids == reranker.encoder.answer_ids
