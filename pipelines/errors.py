"""The two kinds of bad input: a mistake that the user must fix, and one sample that is skipped and counted."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that stops the job, reported in one line: place, value, rule, fix.

    All parts are in `args`, so that the error survives pickling across Ray.
    """

    status = 1
    """Exit status of a command that ends with it."""

    def __init__(self, place: str, problem: str, fix: str = "") -> None:
        super().__init__(place, problem, fix)
        self.place = place
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.place}: {self.problem}{fix}"


class TakenError(UserError):
    """Another process owns the output by now. Trying again is no use."""


class BadMedia(Exception):
    """One file or sample that cannot be used. `reason` is a short, stable, countable name such as `truncated_video`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
