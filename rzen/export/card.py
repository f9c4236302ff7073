"""The model card: README.md of an export, in Markdown with the front matter that the hub reads.

It repeats what the directory and the files that it was made from say, and adds nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.redaction import code_span, escape_markdown, redact_text, redacted
from pipelines.stored_json import read_json
from rzen.config import ModelIdentity
from rzen.evaluation.mixed_pool import ROUTED_HIT
from rzen.export import sentence_transformers
from rzen.export.card_metadata import ModelCardData, front_matter
from rzen.families import read_family
from rzen.inputs.prompts import TEMPLATES
from rzen.model.checkpoints import AdapterFile, read_identity_file

CARD = "README.md"


def model_card(
    folder: Path,
    identity: ModelIdentity,
    format: str,
    unsupported_reason: str | None,
    frames: int,
    facts: ModelCardData,
) -> str:
    """Return the card of an exported directory, whose files are in place.

    `unsupported_reason` says why other libraries cannot read it.
    """
    parts = [
        front_matter(folder, format, unsupported_reason, facts),
        f"# {escape_markdown(facts.title)}",
        "Text, images, document pages, videos and any mix of them become vectors of length 1 in one space; the inner"
        " product of two is their similarity.",
        "## Scores",
        scores_section(facts.scores),
        "## How to load it",
        *_loading(folder, identity, format, unsupported_reason),
        "## How it reads an input",
        _reading(identity),
        "## How it was made",
        *making(folder, facts),
        "## Limits",
        bullets(_limits(folder, identity, format, unsupported_reason, frames)),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _loading(folder: Path, identity: ModelIdentity, format: str, unsupported_reason: str | None) -> list[str]:
    if format == "adapter":
        base = read_json(folder / "adapter_config.json", AdapterFile).get("base_model_name_or_path")
        return [
            "An adapter for PEFT. Prompt and reading of its base are in `rzen.json`; `rzen` folds it into its base.",
            code(
                "from peft import PeftModel",
                "from transformers import AutoModel",
                "",
                f"base = AutoModel.from_pretrained({json.dumps(redact_text(str(base)))})",
                'model = PeftModel.from_pretrained(base, "PATH")',
            ),
        ]
    blocks = [
        "rzen, every kind of input (text, image, page, video, any mix):",
        code(
            "import rzen",
            "",
            'model = rzen.load("PATH")',
            'vectors = model.encode(["a red circle"])',
        ),
    ]
    if format == "rzen_release":
        low, high = identity.prompt.min_visual_tokens, identity.prompt.max_visual_tokens
        return [
            *blocks,
            "The inference script released with RzenEmbed, under transformers 4.51:",
            code(
                "from rzen_embed_inference import RzenEmbed",
                "",
                f'model = RzenEmbed("PATH", min_image_tokens={low}, max_image_tokens={high})',
                'vectors = model.get_fused_embeddings(texts=["a red circle"], instruction="Find an image: ")',
            ),
        ]
    if unsupported_reason is not None:
        return [
            *blocks,
            f"There are no files for sentence-transformers and vLLM: {unsupported_reason}. `AutoModel` loads the"
            " weights, but only rzen makes of them what was trained.",
            *_MTEB,
        ]
    return [
        *blocks,
        "sentence-transformers 6, the instruction as `prompt`. It needs `torchvision`, or for texts and images"
        " `rzen.export.opening`. Videos given as files also need a decoder.",
        code(
            "from PIL import Image",
            "from sentence_transformers import SentenceTransformer",
            "",
            'image = Image.new("RGB", (320, 240), "red")',
            'model = SentenceTransformer("PATH")',
            'model.encode("a red circle", prompt="Find an image that matches the given caption:")',
            'model.encode([image, {"text": "the same at night", "image": image}])',
        ),
        "vLLM reads the same files with `vllm serve PATH --runner pooling`. Send each input as `messages`, with the"
        " instruction as system message. Do not send plain `input`: vLLM puts no chat template around it, and the"
        " vector is another one. That holds for `texts` of its Cohere interface, and for its `/rerank` and `/score`.",
        *_dimensions(folder),
        "transformers 5, where the last state of the last token, divided by its length, is the vector:",
        code(
            "from transformers import AutoModel, AutoProcessor",
            "",
            'model = AutoModel.from_pretrained("PATH")',
            'processor = AutoProcessor.from_pretrained("PATH", use_fast=False)  # images resized by Pillow, as trained',
            'chat = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]',
            'inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")',
            "vector = model(**inputs).last_hidden_state[:, -1]",
        )
        if identity.readout.pooling == "last_token"
        else "",
        *_MTEB,
    ]


def _dimensions(folder: Path) -> list[str]:
    widths = read_json(folder / "config.json", dict[str, Any]).get("matryoshka_dimensions", [])
    if not widths:
        return []
    names = ", ".join(map(str, widths))
    return [f"The first values of a vector, divided by their length, are a vector too. Trained widths: {names}."]


def _reading(identity: ModelIdentity) -> str:
    readout, prompt = identity.readout, identity.prompt
    return bullets(
        [
            f"prompt `{prompt.template}`, written by `chat_template.jinja` where there is one:"
            f" system prompt {TEMPLATES[prompt.template].system!r}, visuals, instruction, text",
            f"at most {prompt.max_text_tokens} tokens of instruction and text, {prompt.min_visual_tokens} to"
            f" {prompt.max_visual_tokens} tokens for an image, or for all frames of a video together",
            f"positions `{readout.positions}`, attention `{readout.direction}`, pooling `{readout.pooling}`, length 1",
        ]
    )


def making(folder: Path, facts: ModelCardData) -> list[str]:
    """Return what the weights were made from: lineage, versions, soup, and the settings of the runs."""
    lineage = read_identity_file(folder).get("lineage", {})
    parts = [
        bullets(
            [
                f"{escape_markdown(name.replace('_', ' '))}: {code_span(redact_text(value))}"
                for name, value in lineage.items()
            ]
        )
    ]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    parts[0] += f"\n* versions: {escape_markdown(versions) or 'not recorded'}"
    if facts.weights:
        shares = [f"{weight:.3f} x {escape_markdown(name)}" for name, weight in facts.weights.items()]
        parts.append(f"A soup ({code_span(str(facts.method))}) of {', '.join(shares)}.")
    if not facts.recipes:
        return [*parts, "No settings of a training run were found beside the weights."]
    settings = {name: redacted(recipe["spec"]) for name, recipe in facts.recipes.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(spec, sort_keys=True)}" for name, spec in settings.items()]
    return [
        *parts,
        bullets([_run(name, recipe) for name, recipe in facts.recipes.items()]),
        "<details><summary>Settings of the runs</summary>",
        "```json\n{" + ",\n".join(lines) + "}\n```",
        "</details>",
    ]


def _run(name: str, recipe: Mapping[str, Any]) -> str:
    """Return a line about a training run: length, code, and data by the fingerprints of their manifest."""
    data = [
        f"{escape_markdown(source)} {code_span(str(fingerprint)[:12])}"
        for source, fingerprint in recipe["data"].get("data", {}).items()
    ]
    steps, revision = recipe["data"].get("steps", "?"), code_span(str(recipe.get("revision", "unknown")))
    length = f"{steps} steps of {recipe['spec']['global_batch']} pairs"
    return f"run {escape_markdown(name)}: {length}, code revision {revision}, data {', '.join(data) or 'not recorded'}"


def scores_section(scores: Mapping[str, Any]) -> str:
    """Return the tables of an evaluation."""
    if not scores:
        return "None were given."
    head = "| task | metric | % | chance % | queries | candidates | split |\n|---|---|---:|---:|---:|---:|---|"
    rows = [
        f"| {escape_markdown(row['task'])} | {escape_markdown(row['metric'])} |"
        f" {100 * row['value']:.1f} | {100 * row['chance']:.1f} |"
        f" {row['num_queries']} | {row['num_candidates']}{_pool(row)} | {row['split']} |"
        for row in scores["rows"]
    ]
    data = scores["settings"].get("data", "unknown")
    measured = f"Measured by `rzen evaluate` on the data with fingerprint {code_span(str(data))}."
    return "\n".join([head, *rows, "", measured, *rerank_section(scores)])


def rerank_section(scores: Mapping[str, Any]) -> list[str]:
    """Return a table of what a re-ranker makes of the first candidates, if there was one."""
    found: Mapping[str, Any] = scores.get("rerank", {})
    if not found:
        return []
    spec = scores["settings"].get("spec", {}).get("rerank", {}).get("model", {})
    model = code_span(redact_text(str(spec.get("adapter") or spec.get("base") or "not recorded")))
    lines = [
        f"| {escape_markdown(task)} | {escape_markdown(one['metric'])} | {one['top_k']} |"
        f" {_percent(one, 'before')} | {_percent(one, 'reranked')} | {_percent(one, 'fused')} |"
        f" {one['weight']['weight'] if one['weight'] else '–'} | {_percent(one, 'ceiling')} |"
        for task, one in found.items()
    ]
    return [
        "",
        f"With the re-ranker {model} on the first candidates. `fused` is the order by cos + w z, with z its log-odds."
        " The ceiling is the best order of the same candidates.",
        "",
        "| task | metric | candidates | before % | re-ranked % | fused % | w | ceiling % |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *lines,
    ]


def _percent(scores: Mapping[str, Any], stage: str) -> str:
    """Return the metric that counts at a stage of re-ranking."""
    return f"{100 * scores[stage][scores['metric']]:.1f}" if stage in scores else "–"


def _pool(row: Mapping[str, Any]) -> str:
    """Return what the candidates of a row are, after their number."""
    if row["pool"] == "task":
        return ""
    return " of the asked modality" if row["metric"] == ROUTED_HIT else " of all tasks"


def _limits(
    folder: Path, identity: ModelIdentity, format: str, unsupported_reason: str | None, frames: int
) -> list[str]:
    limits = ["What it knows of languages and pictures is its base's; what it finds alike is its data's."]
    if format == "rzen_release":
        limits += [
            "The script cuts a sequence at its `max_length` from the right, together with the token that is pooled.",
            "It resizes twice what is outside of its limits, and computes in bfloat16.",
        ]
    if format == "model" and unsupported_reason is None:
        limit = sentence_transformers.text_limit(folder, identity.prompt)
        limits += [
            "Other libraries do not cut long texts: they would cut from the right, which beside visuals takes the token"
            " that is pooled. For inputs of text only, sentence-transformers cuts as rzen with `encode(...,"
            f" processing_kwargs={{'text': {{'truncation': True, 'max_length': {limit}}}}})`.",
            f"Other libraries give {frames} frames to a video, sampled by their own rule, and refuse shorter ones;"
            " frames are resized by torchvision, which rounds otherwise than Pillow.",
            "In vLLM, plain `input` gives other vectors than `messages`, without an error.",
            "In other libraries, `<|im_end|>` and the like within a text are marks, not text.",
        ]
        if read_family(folder).timestamps:
            limits.append(
                "vLLM wants marks around a video of Qwen3-VL that transformers writes itself: none are there."
            )
        if TEMPLATES[identity.prompt.template].frame_tokens:
            limits.append("Videos are read by rzen alone.")
        if identity.readout.pooling == "mean":
            limits.append("Instructions are read by rzen alone, for their tokens are not averaged in.")
    return limits


def bullets(lines: list[str]) -> str:
    """Return a list in Markdown."""
    return "\n".join(f"* {line}" for line in lines)


def code(*lines: str) -> str:
    """Return a block of Python in Markdown."""
    return "\n".join(["```python", *lines, "```"])


_MTEB = ('mteb, through rzen (`pip install rzen[mteb]`): `mteb.evaluate(rzen.export.mteb.load("PATH"), tasks)`.',)
