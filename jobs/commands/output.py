"""What the commands print: without secrets and without control characters, because names come from others."""

from __future__ import annotations

import logging
import sys

from pipelines.redaction import printable, redact_text


def print_text(text: str = "", *, end: str = "\n") -> None:
    """Print to the standard output."""
    print(printable(redact_text(text)), end=end)


def print_error(text: str) -> None:
    """Print to the standard error."""
    print(printable(redact_text(text)), file=sys.stderr)


class SafeFormatter(logging.Formatter):
    """Formats log messages as `print_text` prints texts."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(redact_text(super().format(record)))
