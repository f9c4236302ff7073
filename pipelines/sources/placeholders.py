"""Placeholders of media in texts, such as `<image>`: they are removed, as the prompt says where media go.

Left in a text, they would be learned as letters, because special tokens never come from texts.
"""

from __future__ import annotations

import re

_MEDIUM = (
    r"<\|(?:vision_start|vision_end)\|>",
    r"<\|(?P<pad>image|video)_pad\|>(?:\s*<\|(?P=pad)_pad\|>)*",
    r"<\|(?:image|video)(?:_\d+)?\|>",
    r"<(?:image|video)>",
)
_ANY = re.compile(rf"(?P<frame>{_MEDIUM[0]})|(?:{'|'.join(_MEDIUM[1:])})")
_SPACE = re.compile(r"[ \t]{2,}")


def strip_placeholders(text: str) -> tuple[str, int]:
    """Return the text without placeholders, and the number of media that they stand for.

    A run of `<|image_pad|>` stands for one medium. `<|vision_start|>` and `<|vision_end|>` stand for none.
    """
    count = 0

    def removed(match: re.Match[str]) -> str:
        nonlocal count
        count += match["frame"] is None
        return ""

    stripped = _ANY.sub(removed, text)
    return (_SPACE.sub(" ", stripped).strip(), count) if stripped != text else (text, 0)
