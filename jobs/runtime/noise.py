"""Lines of libraries that say nothing about a job. They are known one by one, and everything else is printed.

They are not lost: `rzen --log info` prints them, as messages of this module.
"""

from __future__ import annotations

import logging
import re

KNOWN = {
    "DeepSpeed": (
        # Printed once, when DeepSpeed is imported on a machine without GPU. `cluster.gpus_per_worker` decides that.
        r"Setting accelerator to CPU\. If you have GPU or other accelerator, we were unable to detect it\.",
    ),
    "transformers.models.auto.image_processing_auto": (
        # Exports say it so, because earlier versions of transformers do not know `backend`.
        r"The `use_fast` parameter is deprecated and will be removed in a future version\. .*",
    ),
}
"""Logger -> patterns of whole messages."""
_log = logging.getLogger(__name__)


class _Noise(logging.Filter):
    def __init__(self, patterns: tuple[str, ...]) -> None:
        super().__init__()
        self._pattern = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is printed. A known one goes to the logger of this module."""
        message = record.getMessage()
        if not self._pattern.fullmatch(message):
            return True
        _log.info("%s: %s", record.name, message)
        return False


_FILTERS = {logger: _Noise(patterns) for logger, patterns in KNOWN.items()}


def hide_known_noise() -> None:
    """Hide the known lines of this process. Call this before the libraries are imported."""
    for logger, noise in _FILTERS.items():
        logging.getLogger(logger).addFilter(noise)  # has no effect if it is there
