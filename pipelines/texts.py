"""Text files of any writer: encodings by their byte order mark, and what ends a line. Folders and tars use both."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

MAX_TEXT_BYTES = 1 << 20
"""Longest caption file, line of a list, and text or JSON member of a shard. Longer ones are `too_long_text`."""

# UTF-32 comes first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# `str.splitlines` also ends lines at form feeds, U+0085, U+2028 and others, which captions contain.
_LINE_END = re.compile(r"\r\n|\n|\r")


def encoding_of(data: bytes) -> str:
    """Return the encoding of a text by its byte order mark: UTF-32, UTF-16 or UTF-8, which needs none."""
    return next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")


def decode_text(data: bytes) -> str:
    """Return the text of a file without its byte order mark.

    Raises `UnicodeDecodeError`, also for zero bytes in UTF-8: such a file is probably UTF-16 without a mark.
    """
    data, encoding = bytes(data), encoding_of(data)
    if encoding.startswith("utf-8") and (position := data.find(b"\0")) >= 0:
        raise UnicodeDecodeError(encoding, data, position, position + 1, "zero byte, as in UTF-16 without a mark")
    return data.decode(encoding)


def lines_of(text: str) -> list[str]:
    """Return the lines of a text. CR LF, LF and CR end a line, and nothing else does."""
    return _LINE_END.split(text)


def bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines of a file, each with its end. A line beyond `MAX_TEXT_BYTES` is None, and never in memory."""
    while line := file.readline(MAX_TEXT_BYTES):
        if len(line) < MAX_TEXT_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(MAX_TEXT_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None
