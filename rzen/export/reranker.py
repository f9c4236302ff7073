"""Export a re-ranker: the adapter merged into the whole model with its head, and files for other libraries.

    weights, tokenizer        `AutoModelForImageTextToText` of transformers, `rzen.load_reranker`
    modules.json, 1_LogitScore/, sentence_bert_config.json, chat_template.jinja, *processor_config.json
                              `CrossEncoder` of sentence-transformers 6
    vllm_hf_overrides.json    vLLM's pooling runner, with the same chat template

z is the difference of two logits, in all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.stored_json import read_json
from rzen.config import ModelConfig, PairPromptConfig, RerankerIdentity
from rzen.export.card import CARD
from rzen.export.export import ExportOptions, add_origin, write_identity
from rzen.export.pair_template import pair_chat_template
from rzen.export.reranker_card import VLLM, reranker_card
from rzen.export.sentence_transformers import transformer_settings, write_processors, write_settings, write_template
from rzen.export.weights import write_backbone
from rzen.families import read_family
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import (
    IDENTITY,
    atomic_directory,
    check_base,
    checkpoint_dir,
    checkpoint_sha256,
    read_pair_prompt,
)
from rzen.model.lora import load_adapter
from rzen.reranking.encoder import JointEncoder
from rzen.reranking.head import untied_head
from rzen.reranking.prompts import PAIR_TEMPLATES

_LOGIT_SCORE = "1_LogitScore"
_MODULES = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    _LOGIT_SCORE: "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}


def export_reranker(
    base_dir: str, adapter_dir: Path | None, out_dir: Path, prompt: PairPromptConfig, options: ExportOptions
) -> None:
    """Write the base with the adapter merged in fp32 and rounded once. `out_dir` appears complete or not at all.

    Raises `UserError` where `out_dir` exists, the base has no language-model head, the adapter does not fit the base,
    or the adapter was trained with another prompt.
    """
    if out_dir.exists():
        raise UserError(str(out_dir), "exists already", "name a new directory for the model")
    base = checkpoint_dir(base_dir)
    head = untied_head(base)
    encoder = JointEncoder(str(base), prompt)
    lineage = {"base": options.facts.base or base_dir, "base_sha256": checkpoint_sha256(base)}
    fp32 = ModelConfig(backbone=base_dir, tune="full", dtype="float32", gradient_checkpointing=False)
    model = load_backbone(str(base), fp32)
    if adapter_dir is not None:
        check_base(adapter_dir, base)
        _check_prompt(adapter_dir, prompt)
        lineage |= {
            "adapter": options.facts.adapter or str(adapter_dir),
            "adapter_sha256": checkpoint_sha256(adapter_dir),
        }
        model = load_adapter(model, adapter_dir).merge_and_unload(safe_merge=True)
    with atomic_directory(out_dir) as folder:
        write_backbone(model, base, folder, options.dtype, head)
        write_identity(folder, RerankerIdentity(pair_prompt=prompt), options.dtype, lineage)
        add_origin(folder / IDENTITY, options)
        _write_cross_encoder(folder, encoder, options.frames)
        _write_vllm(folder, prompt)
        (folder / CARD).write_text(reranker_card(folder, prompt, options.frames, options.facts), encoding="utf-8")


def _check_prompt(adapter_dir: Path, prompt: PairPromptConfig) -> None:
    """Refuse an adapter that was trained with another prompt. One from elsewhere names none."""
    trained = read_pair_prompt(adapter_dir)
    if trained is not None and trained != prompt:
        problem = f"the adapter was trained with {trained.model_dump()}, not {prompt.model_dump()}"
        raise UserError(f"{adapter_dir / IDENTITY} pair_prompt", problem, "leave out pair_prompt")


def _write_cross_encoder(folder: Path, encoder: JointEncoder, frames: int) -> None:
    yes, no = encoder.answer_ids
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(_MODULES.items())
    ]
    (folder / _LOGIT_SCORE).mkdir()
    scoring = {"true_token_id": yes, "false_token_id": no, "module_input_name": "causal_logits"}
    write_settings(folder / "modules.json", modules)
    write_settings(folder / _LOGIT_SCORE / "config.json", scoring)
    write_settings(folder / "sentence_bert_config.json", transformer_settings("any-to-any"))
    write_settings(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "activation_fn": "torch.nn.modules.activation.Sigmoid",
            "prompts": {},
            "default_prompt_name": None,
        },
    )
    write_processors(folder, encoder.processor.prompt, frames)
    write_template(folder, pair_chat_template(encoder.prompt.template, read_family(folder)))


def _write_vllm(folder: Path, prompt: PairPromptConfig) -> None:
    """Write what vLLM takes as `hf_overrides`. It makes one row of the rows of both answers: no first, then yes."""
    config = read_json(folder / "config.json", dict[str, Any])
    template = PAIR_TEMPLATES[prompt.template]
    (architecture,) = config["architectures"]
    write_settings(
        folder / VLLM,
        {
            "architectures": [architecture.replace("ForConditionalGeneration", "ForSequenceClassification")],
            "classifier_from_token": [template.no, template.yes],
            "is_original_qwen3_reranker": True,
        },
    )
