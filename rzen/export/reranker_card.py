"""The model card of a re-ranker."""

from __future__ import annotations

from pathlib import Path

from pipelines.redaction import escape_markdown
from rzen.config import PairPromptConfig
from rzen.export.card import bullets, code, making, rerank_section
from rzen.export.card_metadata import ModelCardData, front_matter
from rzen.reranking.prompts import PAIR_TEMPLATES

VLLM = "vllm_hf_overrides.json"
"""File with the settings of vLLM."""


def reranker_card(folder: Path, prompt: PairPromptConfig, frames: int, facts: ModelCardData) -> str:
    """Return the card of an exported re-ranker, whose other files are in place."""
    template = PAIR_TEMPLATES[prompt.template]
    parts = [
        front_matter(folder, "reranker", None, facts),
        f"# {escape_markdown(facts.title)}",
        "A query and a document, each text, images, pages, videos or a mix, are read together. The score is the"
        f" probability of `{template.yes}` against `{template.no}`.",
        "## Scores",
        "\n".join(rerank_section(facts.scores)) or "None were given.",
        "## How to load it",
        *_loading(),
        "## How it reads a pair",
        bullets(
            [
                f"prompt `{prompt.template}`, written by `chat_template.jinja`: system prompt {template.system!r}",
                f"without an instruction: {template.default_instruction!r}",
                f"at most {prompt.max_text_tokens} tokens of text for the query and for the document,"
                f" {prompt.min_visual_tokens} to {prompt.max_visual_tokens} tokens for an image, or for all frames of a"
                " video together",
            ]
        ),
        "## How it was made",
        *making(folder, facts),
        "## Limits",
        bullets(
            [
                "Other libraries do not cut long texts, and `<|im_end|>` and the like within a text are marks to them.",
                f"Other libraries give {frames} frames to a video, sampled by their own rule, and resize frames with"
                " torchvision, which rounds in another way than Pillow.",
                "vLLM has not been run.",
            ]
        ),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _loading() -> list[str]:
    return [
        "rzen, every kind of input (text, image, page, video, any mix):",
        code(
            "import rzen",
            "",
            'reranker = rzen.load_reranker("PATH")',
            'hits = reranker.rank("a red circle", ["a circle that is red", "a blue square"])',
        ),
        "sentence-transformers 6, the instruction as `prompt`. It needs `torchvision`, or for texts and images"
        " `rzen.export.opening`.",
        code(
            "from PIL import Image",
            "from sentence_transformers import CrossEncoder",
            "",
            'image = Image.new("RGB", (320, 240), "red")',
            'model = CrossEncoder("PATH")',
            'scores = model.predict([("a red circle", image), ("a red circle", {"text": "red", "image": image})])',
        ),
        "transformers 5: `AutoModelForImageTextToText.from_pretrained`. The score is the sigmoid of the difference of"
        " two logits at the last token.",
        "vLLM, with texts or messages of the roles `query` and `document`:\n\n```bash\n"
        f'vllm serve PATH --runner pooling --hf-overrides "$(cat PATH/{VLLM})" --chat-template PATH/chat_template.jinja'
        "\n```",
    ]
