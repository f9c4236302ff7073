"""Named prompt templates: how text and visuals become one sequence in Qwen's chat format.

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n{vision}{instruction} {text} {suffix}<|im_end|>\\n
    <|im_start|>assistant\\n<|endoftext|>                 (one line; the last token is the one that is pooled)

A sequence is handled in pieces, so that special tokens come from here only, never from a user's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rzen.config import PromptName

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

VisionKind = Literal["image", "video"]
PADS: dict[VisionKind, str] = {"image": IMAGE_PAD, "video": VIDEO_PAD}


@dataclass(frozen=True, slots=True)
class Template:
    """Fixed texts of a prompt. An empty `system` leaves the system turn out.

    The sequence ends with the start of the assistant's turn and one token, or with a whole turn that says `answer`.
    With `frame_tokens`, every frame of a video becomes an image of (at least, at most) that many tokens.
    """

    system: str
    text_suffix: str = ""
    visual_suffix: str = ""
    answer: str = ""
    frame_tokens: tuple[int, int] | None = None


TEMPLATES: dict[PromptName, Template] = {
    # RzenEmbed (arXiv 2510.27350v1), sections 3.4.4 and 4.4. The space between text and suffix is our choice.
    "rzen_paper": Template(
        system=(
            "Given an image, summarize the provided image in one word. Given only text, describe the text in one word."
        ),
        text_suffix="Represent the given text in one word.",
        visual_suffix="Represent the given image in one word.",
    ),
    # The inference script released with the weights of RzenEmbed.
    "rzen_release": Template(system="You are a helpful assistant.", frame_tokens=(160, 180)),
    "plain": Template(system=""),
    # U-MARVEL (arXiv 2507.14902): no request to compress the input. `<emb>` is written out, as ordinary text.
    "umarvel": Template(system="You are a helpful assistant.", answer="<emb>."),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a sequence: one `special` token `count` times, a `fixed` text of the template, the `instruction` or the
    `text` of an input.
    """

    kind: Literal["special", "fixed", "instruction", "text"]
    text: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one visual, or of a temporal patch of one, between their marks; `before` is written before them."""

    kind: VisionKind
    tokens: int
    before: str = ""


def input_pieces(name: PromptName, instruction: str, text: str, visuals: Sequence[Span]) -> list[Piece]:
    """Return the sequence of one input. Instruction and text are stripped."""
    template = TEMPLATES[name]
    suffix = template.visual_suffix if visuals else template.text_suffix
    pieces = _turn("system", [Piece("fixed", template.system)]) if template.system else []
    content = [piece for span in visuals for piece in vision_pieces(span)]
    words = [
        Piece("instruction", instruction.strip()),
        Piece("text", text.strip()),
        Piece("fixed", suffix),
    ]
    words = [piece for piece in words if piece.text]
    # A space, not a line break: ".\n" may be one token, and pieces must give the ids of the rendered text.
    content += words[:1] + [replace(piece, text=f" {piece.text}") for piece in words[1:]]
    return [*pieces, *_turn("user", content), *ending(template)]


def ending(template: Template) -> list[Piece]:
    """Return what follows the user's turn."""
    if template.answer:
        return _turn("assistant", [Piece("fixed", template.answer)])
    return [Piece("special", IM_START), Piece("fixed", "assistant\n"), Piece("special", END_OF_TEXT)]


def render(pieces: Iterable[Piece]) -> str:
    """Return the sequence as one string, for people and for tokenizers that parse special tokens."""
    return "".join(piece.text * piece.count for piece in pieces)


def fixed_texts() -> list[str]:
    """Return the fixed texts of all templates without an answer, which a tokenizer is trained on.

    An answer is a few tokens in any tokenizer. With it, tiny backbones would lose the vocabulary that they have had.
    """
    image = [Span("image", 0)]
    pieces = [
        piece
        for name, template in TEMPLATES.items()
        if not template.answer
        for text, visuals in (("x", []), ("", image), ("x", image))
        for piece in input_pieces(name, "", text, visuals)
    ]
    return [piece.text for piece in pieces if piece.kind == "fixed"]


def _turn(role: str, content: Sequence[Piece]) -> list[Piece]:
    first, *rest = content or [Piece("fixed", "")]
    header = f"{role}\n"
    # Fixed text joins the header, as a tokenizer sees them in one stretch.
    start = [Piece("fixed", header + first.text)] if first.kind == "fixed" else [Piece("fixed", header), first]
    return [Piece("special", IM_START), *start, *rest, Piece("special", IM_END), Piece("fixed", "\n")]


def vision_pieces(span: Span) -> list[Piece]:
    """Return the tokens of a visual between their marks."""
    pads = Piece("special", PADS[span.kind], span.tokens)
    before = [Piece("fixed", span.before)] if span.before else []
    return [*before, Piece("special", VISION_START), pads, Piece("special", VISION_END)]
