"""A stand-alone SVG made fit to live inside the page: harmless, without clashes, in the colors of the page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from pipelines.errors import UserError

# Shapes and text only: what is not listed (script, style, metadata, foreignObject, a, ...) goes, with its children.
ELEMENTS = frozenset({
    "svg", "g", "defs", "symbol", "use", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text",
    "tspan", "image", "clipPath", "linearGradient", "radialGradient", "stop", "marker", "pattern", "title", "desc",
})  # fmt: skip
_GREY = re.compile(r"#([0-9a-fA-F]{2})\1\1\b|#([0-9a-fA-F])\2\2\b|(?<![-\w])(black|white)(?![-\w])")
_LOCAL_URL = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")


def inline_svg(text: str, name: str, prefix: str) -> str:
    """`text` as an `<svg>` element for an HTML page, labelled `name`.

    Every id gets `prefix`, because two plots of one library use the same ones. Grays become the same share of the
    page's ink over its paper, so that a plot drawn black on white is light on dark in the dark. Raises `UserError`
    when `text` is not SVG.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"plot {name}", f"is not XML: {error}") from error
    if _local(root.tag) != "svg":
        raise UserError(f"plot {name}", f"is <{_local(root.tag)}>, not <svg>")
    svg = _clean(root, prefix)
    svg.attrib.setdefault("viewBox", f"0 0 {_number(root, 'width', 640)} {_number(root, 'height', 400)}")
    for attribute in ("width", "height"):
        svg.attrib.pop(attribute, None)
    svg.attrib |= {"role": "img", "aria-label": name}
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False)


def _clean(element: ElementTree.Element, prefix: str) -> ElementTree.Element:
    clean = ElementTree.Element(_local(element.tag))
    clean.text, clean.tail = element.text, element.tail
    for qualified, value in element.attrib.items():
        attribute = _local(qualified)
        kept = _attribute(attribute, value, prefix)
        if kept is not None:
            clean.set(attribute, kept)
    clean.extend(_clean(child, prefix) for child in element if _local(child.tag) in ELEMENTS)
    return clean


def _attribute(name: str, value: str, prefix: str) -> str | None:
    """The value to keep, or None for handlers and for anything that points out of the page."""
    if name.startswith("on"):
        return None
    if name == "id":
        return prefix + value
    if name == "href":
        return f"#{prefix}{value[1:]}" if value.startswith("#") else value if value.startswith("data:image/") else None
    elsewhere = _LOCAL_URL.sub("", value).lower()
    if "url(" in elsewhere or "//" in elsewhere or "\\" in elsewhere:  # a backslash can spell url( in CSS
        return None
    value = _LOCAL_URL.sub(rf"url(#{prefix}\1)", value)
    return _GREY.sub(_ink, value) if name in {"style", "fill", "stroke", "stop-color"} else value


def _ink(match: re.Match[str]) -> str:
    """The page's words for a grey: `#404040` is three quarters of ink on paper."""
    long, short, word = match.groups()
    level = int(long or short * 2, 16) if not word else 255 * (word == "white")
    return f"color-mix(in srgb, var(--ink) {100 - level * 100 / 255:.0f}%, var(--plot-paper))"


def _number(element: ElementTree.Element, name: str, default: float) -> str:
    match = re.match(r"[\d.]+", element.get(name, ""))
    return match.group() if match else str(default)


def _local(name: object) -> str:
    """The name without its namespace; comments and instructions have none."""
    return name.rpartition("}")[2] if isinstance(name, str) else ""
