"""What an input is for, in the words of each dialect, and the instruction of a model that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pipelines.samples import DecodedInput
from rzen.serving.dialects.fields import Body, text
from rzen.serving.types import RequestError, Role, ServedInput, Wish

if TYPE_CHECKING:  # it loads torch, which a process that only reads requests does not need
    from rzen.embedding.tasks import NamedTask

ROLES: dict[str, Role | None] = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "target": "target",
    "document": "target",
    "passage": "target",
    "search_document": "target",
    "retrieval.passage": "target",
    "image": "target",
    "classification": None,
    "clustering": None,
    "separation": None,
    "text-matching": None,
}
"""Word of a client -> role. The last ones ask for no instruction."""
_SIDES: dict[Role, Literal["instruction", "target_instruction"]] = {
    "query": "instruction",
    "target": "target_instruction",
}
WISH_FIELDS = ("instruction", "task", "role", "input_type", "prompt_name")


def read_wish(body: Body) -> Wish:
    """Return how the inputs of a request are to be embedded.

    `instruction` is any text. `task`, `input_type` and `prompt_name` are a word of `ROLES`, or a task of the model.
    `role` says on which side of that task the inputs are.
    """
    words = {name: word for name in WISH_FIELDS[1:] if (word := text(body, name)) is not None}
    role = words.pop("role", None)
    if role not in (None, "query", "target"):
        raise RequestError(400, f"role={role!r} is not known; use query or target", "role")
    if len(words) > 1:
        raise RequestError(400, f"{' and '.join(words)} are both given; give one of them", next(iter(words)))
    instruction = text(body, "instruction")
    if instruction is not None and words:
        raise RequestError(400, f"instruction and {next(iter(words))} are both given; give one of them", "instruction")
    word = next(iter(words.values()), None)
    if word is None or word in ROLES:
        return Wish(instruction, None, ROLES[word] if word else role)  # type: ignore[arg-type]
    return Wish(None, word, role or "query")  # type: ignore[arg-type]


def instruction_for(given: ServedInput, decoded: DecodedInput, wish: Wish, tasks: Mapping[str, NamedTask]) -> str:
    """Return the instruction of an input: its own, that of the request, or that of a task which fits.

    Raises `RequestError` 400 for a task that the model does not know.
    """
    if given.instruction is not None:
        return given.instruction
    if wish.instruction is not None:
        return wish.instruction
    if wish.task is not None:
        if wish.task not in tasks:
            raise RequestError(400, f"task {wish.task!r} is not known; use {', '.join([*tasks, *ROLES])}", "task")
        return tasks[wish.task][_SIDES[wish.role or "query"]]
    if wish.role is None:
        return ""
    fitting = tasks.get(_fitting(decoded, wish.role))
    return fitting[_SIDES[wish.role]] if fitting else ""


def _fitting(decoded: DecodedInput, role: Role) -> str:
    """Return the task of a query by what it consists of, and of a target by its first medium."""
    if not decoded.visuals:
        return "text_image" if role == "query" else "text_text"
    if role == "query" and decoded.text:
        return "image_text_image"
    return {"image": "text_image", "document": "text_page", "video": "text_video"}[decoded.visuals[0].kind]
