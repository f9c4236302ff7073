"""Settings of the synthetic corpus."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.config import Config, NonNegativeInt, PositiveInt


class CorpusConfig(Config):
    """How much of what is drawn. Defaults are sized for a demo: 4200 samples, 11 MB, ten seconds of one core."""

    seed: NonNegativeInt = 0
    """Equal seeds give equal bytes, file by file."""
    num_images: NonNegativeInt = 1200
    """Captioned images of two objects."""
    num_composed: NonNegativeInt = 800
    """Pairs of images with an instruction that turns the first into the second."""
    num_documents: NonNegativeInt = 100
    """PDF reports; every page has its own caption."""
    pages_per_document: PositiveInt = 8
    """Pages of each report."""
    num_clips: NonNegativeInt = 600
    """Captioned videos of one moving object and one at rest."""
    num_texts: NonNegativeInt = 800
    """Pairs of sentences that describe the same scene."""
    image_px: Annotated[int, Field(ge=56, multiple_of=2)] = 112
    """Width and height of images and clips; even, as H.264 halves the resolution of colour."""
    clip_frames: Annotated[int, Field(ge=2)] = 8
    """Frames of a clip, at 8 frames per second."""
