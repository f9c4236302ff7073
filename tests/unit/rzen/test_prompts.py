import pytest

from rzen.config import ModelIdentity, PromptConfig, PromptName, ReadoutConfig
from rzen.inputs.prompts import TEMPLATES, Piece, Span, input_pieces, render

SYSTEM = "Given an image, summarize the provided image in one word. Given only text, describe the text in one word."


def test_paper_prompt_of_text() -> None:
    assert render(input_pieces("rzen_paper", "", "a red cat", [])) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\na red cat Represent the given text in one word.<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def test_paper_prompt_of_an_image_and_a_video_with_text() -> None:
    assert render(input_pieces("rzen_paper", "", "find it", [Span("image", 3), Span("video", 2)])) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
        "find it Represent the given image in one word.<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def test_paper_suffix_follows_a_visual_without_a_space() -> None:
    assert "<|vision_end|>Represent the given image in one word.<|im_end|>" in render(
        input_pieces("rzen_paper", "", "", [Span("image", 1)])
    )


def test_release_prompt_has_its_system_text_and_no_suffix() -> None:
    assert render(input_pieces("rzen_release", "", "a red cat", [Span("image", 1)])) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a red cat<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def test_plain_prompt_has_no_system_turn() -> None:
    assert render(input_pieces("plain", "", "a red cat", [])) == (
        "<|im_start|>user\na red cat<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )


def test_umarvel_prompt_is_qwens_chat_with_an_answer() -> None:
    assert render(input_pieces("umarvel", "Find it.", "a red cat", [Span("image", 1)])) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find it. a red cat<|im_end|>\n"
        "<|im_start|>assistant\n<emb>.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_prompt_without_an_answer_ends_with_the_pooled_token(name: PromptName) -> None:
    if not TEMPLATES[name].answer:
        assert input_pieces(name, "", "a", [])[-1] == Piece("special", "<|endoftext|>")


def test_an_answer_needs_the_mean() -> None:
    with pytest.raises(ValueError, match=r"ends with an answer.*pooling: mean"):
        ModelIdentity(prompt=PromptConfig(template="umarvel"))
    umarvel = ReadoutConfig(direction="bidirectional", pooling="mean")
    ModelIdentity(prompt=PromptConfig(template="umarvel"), readout=umarvel)


def test_users_texts_are_pieces_apart_from_ours() -> None:
    pieces = input_pieces("rzen_paper", "Find it:", "<|im_end|>", [Span("image", 1)])
    assert [piece.text for piece in pieces if piece.kind == "instruction"] == ["Find it:"]
    assert [piece.text for piece in pieces if piece.kind == "text"] == [" <|im_end|>"]


def test_temporal_patches_stand_after_their_times() -> None:
    pieces = input_pieces("plain", "", "a cat", [Span("video", 2, "<0.3 seconds>"), Span("video", 2, "<1.0 seconds>")])
    patch = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    assert f"user\n<0.3 seconds>{patch}<1.0 seconds>{patch}a cat" in render(pieces)


@pytest.mark.parametrize(
    ("instruction", "text", "joined"),
    [
        ("Find it: ", " a cat\n", "Find it: a cat"),
        ("", "a cat", "a cat"),
        ("Find it.", "", "Find it."),
        (" ", "\n", ""),
    ],
)
def test_instruction_and_text_are_stripped_and_joined(instruction: str, text: str, joined: str) -> None:
    assert f"<|im_start|>user\n{joined}<|im_end|>" in render(input_pieces("plain", instruction, text, []))
