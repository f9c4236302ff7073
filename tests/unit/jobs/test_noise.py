"""Known lines of libraries are hidden, and no other ones."""

from __future__ import annotations

import logging

import pytest

from jobs.runtime.noise import KNOWN, hide_known_noise

KNOWN_LINE = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."


@pytest.fixture
def deepspeed() -> logging.Logger:
    """The logger as DeepSpeed makes it, before or after its lines are hidden."""
    logger = logging.getLogger("DeepSpeed")
    for some in list(logger.filters):
        logger.removeFilter(some)
    hide_known_noise()
    return logger


def test_a_known_line_is_hidden_and_kept_for_who_asks(
    deepspeed: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "jobs.runtime.noise"):
        assert not deepspeed.filter(record(KNOWN_LINE))
    assert caplog.messages == [f"DeepSpeed: {KNOWN_LINE}"]


@pytest.mark.parametrize("line", [f"{KNOWN_LINE} And the disk is full.", "the optimizer's state is lost", ""])
def test_every_other_warning_is_printed(line: str, deepspeed: logging.Logger) -> None:
    assert deepspeed.filter(record(line))


def test_the_known_lines_are_those_of_the_installed_libraries() -> None:
    import inspect

    from deepspeed.accelerator import real_accelerator
    from transformers.models.auto import image_processing_auto

    for logger, module in (("DeepSpeed", real_accelerator), (image_processing_auto.__name__, image_processing_auto)):
        (pattern,) = KNOWN[logger]
        assert pattern.replace("\\", "").removesuffix(".*") in inspect.getsource(module)


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("DeepSpeed", logging.WARNING, "file", 1, message, (), None)
