"""Inputs of a request on their way to the model: decoded in a sandbox, with an instruction, encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from pipelines.errors import BadMedia, UserError
from pipelines.media.signatures import sniff
from pipelines.samples import DecodedInput, Visual
from rzen.embedding.corpus import Corpus
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.serving.dialects.wishes import instruction_for
from rzen.serving.served import Decoders, Served
from rzen.serving.types import MediaPart, RequestError, ServedInput, Usage, Wish

_BYTES_PER_TOKEN = 3  # of text, to estimate a request before it is encoded
_UNSUPPORTED = "unsupported_format"


@dataclass(frozen=True, slots=True)
class PreparedInput:
    """An input as the model takes it, and what it costs."""

    encoded: EncodedBatch
    usage: Usage


def estimate_tokens(served: Served, given: ServedInput) -> int:
    """Return about how many tokens an input has, before it is decoded."""
    prompt = served.embedder.processor.prompt
    text = min(prompt.max_text_tokens, len(given.text) // _BYTES_PER_TOKEN + len(given.token_ids))
    return 1 + text + len(given.media) * prompt.max_visual_tokens


def prepare_input(
    served: Served,
    decoders: Decoders,
    given: ServedInput,
    index: int,
    wish: Wish,
    truncate: bool,
    searched: Corpus | None,
) -> PreparedInput:
    """Decode and encode an input. Raises `RequestError` with its index."""
    processor = served.embedder.processor
    decoded = decode_input(processor, decoders, given, "input", index)
    decoded = replace(decoded, instruction=_instruction(served, given, decoded, wish, searched))
    if not truncate and (count := processor.num_text_tokens(decoded)) > processor.prompt.max_text_tokens:
        problem = f"input {index} has {count} tokens of text; the model takes {processor.prompt.max_text_tokens}"
        raise RequestError(400, problem, f"input[{index}]", index, "too_many_tokens")
    with named_errors("input", index):
        encoded = processor.encode([decoded])
    merged = processor.layout.merge_patches**2
    visual_tokens = int(encoded.grids.prod(axis=1).sum()) // merged
    pixels = [(visual.kind == "video", visual.frames.size // visual.frames.shape[-1]) for visual in decoded.visuals]
    usage = Usage(
        int(encoded.lengths[0]),
        visual_tokens,
        len(decoded.visuals),
        image_pixels=sum(count for is_video, count in pixels if not is_video),
        video_pixels=sum(count for is_video, count in pixels if is_video),
    )
    return PreparedInput(encoded, usage)


def decode_input(processor: Processor, decoders: Decoders, given: ServedInput, name: str, index: int) -> DecodedInput:
    """Return an input with pixels, without its instruction. Raises `RequestError` with its index."""
    with named_errors(name, index):
        text = processor.text_of(given.token_ids) if given.token_ids else given.text
        return DecodedInput(text, tuple(_decoded(decoders, part) for part in given.media))


@contextmanager
def named_errors(name: str, index: int | None) -> Iterator[None]:
    """Raise what an input does wrong as a `RequestError` that names it."""
    place, param = (name, None) if index is None else (f"{name} {index}", f"{name}[{index}]")
    try:
        yield
    except BadMedia as error:
        status = 413 if error.reason == "too_many_bytes" else 415 if error.reason == _UNSUPPORTED else 422
        raise RequestError(status, f"{place}: {error}", param, index, error.reason) from error
    except UserError as error:
        raise RequestError(422, f"{place}: {error}", param, index, "bad_input") from error
    except ValueError as error:
        raise RequestError(400, f"{place}: {error}", param, index) from error


def _instruction(served: Served, given: ServedInput, decoded: DecodedInput, wish: Wish, searched: Corpus | None) -> str:
    """Return the instruction of an input. A query of a corpus gets what `Embedder.search` would give it."""
    asked = instruction_for(given, decoded, wish, served.embedder.tasks)
    if searched is None or given.instruction is not None or wish.instruction is not None:
        return asked
    if wish.task is not None:
        return searched.instruction_of(served.embedder.tasks[wish.task])
    return searched.fitting_instruction(decoded)


def _decoded(decoders: Decoders, part: MediaPart) -> Visual:
    """Return the pixels of a file. Its first bytes decide what it is, and must agree with what the client says."""
    found = sniff(part.data)
    if found is None:
        raise BadMedia(_UNSUPPORTED, "the first bytes are those of no image, video or PDF")
    kind, extension = found
    with decoders.borrow() as decoder:
        if part.kind == "document" and kind == "image":  # the picture of a page
            return replace(decoder.member("image", part.data), kind="document")
        if part.kind is not None and part.kind != kind:
            is_animation = part.kind == "video" and extension in (".gif", ".webp")
            hint = "; animated images are not read as videos" if is_animation else ""
            raise BadMedia("other_kind", f"is a {kind} and not a {part.kind}{hint}")
        if kind == "document" and part.page is None and (count := decoder.num_pages(part.data)) > 1:
            raise BadMedia("several_pages", f"has {count} pages; an input is one page: give page=0 to page={count - 1}")
        if kind != "document" and part.page is not None:
            raise BadMedia("no_such_page", f"is a {kind} and has no pages")
        return decoder.member(kind, part.data, part.page)


def total_usage(parts: Sequence[Usage]) -> Usage:
    """Return the sum of all fields."""
    names = [one.name for one in fields(Usage)]
    return Usage(**{name: sum(getattr(part, name) for part in parts) for name in names})
