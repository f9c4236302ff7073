"""The tasks that a model knows by name: what is said to it, and what is searched.

`rzen.json` of an exported model has the table. A model without one has that of the project.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from pipelines.errors import UserError
from pipelines.instructions import INSTRUCTIONS, TARGETS
from pipelines.samples import Modality
from pipelines.stored_json import read_json, stored_file
from rzen.model.checkpoints import IDENTITY

TASKS = "tasks"
"""Entry of `rzen.json`."""


@stored_file
class NamedTask(TypedDict):
    """One task. Without a `modality`, its targets are of any kind."""

    instruction: str
    target_instruction: str
    modality: NotRequired[Modality]


@stored_file
class _TasksFile(TypedDict, total=False):
    tasks: dict[str, NamedTask]


def named_tasks(instructions: Mapping[str, str] | None = None) -> dict[str, NamedTask]:
    """Return the tasks of the project, with the instructions of a model instead of or in addition to theirs."""
    found = {
        name: NamedTask(instruction=query, target_instruction=target, modality=TARGETS[name])
        for name, (query, target) in INSTRUCTIONS.items()
    }
    for name, text in (instructions or {}).items():
        known = found.get(name) or NamedTask(instruction="", target_instruction="")
        found[name] = {**known, "instruction": text}
    return found


def read_tasks(folder: Path) -> dict[str, NamedTask]:
    """Return the tasks of the model or adapter in a folder."""
    path = folder / IDENTITY
    saved = read_json(path, _TasksFile, "export the model again") if path.is_file() else _TasksFile()
    return saved.get("tasks") or named_tasks()


def task_of(tasks: Mapping[str, NamedTask], name: str, instruction: str | None = None) -> NamedTask:
    """Return the task of this name. Raises `UserError` for an unknown one, and for an `instruction` next to it."""
    if instruction is not None:
        raise UserError(f"task={name!r}", f"and instruction={instruction!r} are both given", "give one of them")
    if name not in tasks:
        raise UserError(f"task={name!r}", "is not known", f"use {', '.join(tasks)}, or give an instruction")
    return tasks[name]


def modalities_of(task: NamedTask | None) -> tuple[Modality, ...] | None:
    """Return what a search for a task may find; None for everything."""
    return None if task is None or "modality" not in task else (task["modality"],)
