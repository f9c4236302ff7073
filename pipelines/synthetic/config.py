"""Settings of the synthetic corpus."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipelines.config import Config, Fraction, NonNegativeInt, PositiveInt, has_pymupdf
from pipelines.synthetic.canvas import PdfLibrary


def _default_pdf_library() -> PdfLibrary:
    return "pymupdf" if has_pymupdf() else "reportlab"


class CorpusConfig(Config):
    """How much of each kind is drawn. The defaults are for a demo: 4200 samples, 11 MB, ten seconds of one core."""

    seed: NonNegativeInt = 0
    """Equal seeds give equal bytes, file by file."""
    num_images: NonNegativeInt = 1200
    """Captioned images of two objects."""
    num_composed: NonNegativeInt = 800
    """Pairs of images with an instruction that turns the first into the second."""
    num_documents: NonNegativeInt = 100
    """PDF reports. Every page has its own caption."""
    pages_per_document: PositiveInt = 8
    """Pages of each report."""
    pdf_library: PdfLibrary = Field(default_factory=_default_pdf_library)
    """Library that draws the reports: `pymupdf` if it is installed, else `reportlab`. The pages look the same."""
    num_clips: NonNegativeInt = 600
    """Captioned videos of one moving object and one at rest."""
    num_texts: NonNegativeInt = 800
    """Pairs of sentences that describe the same scene."""
    hard_fraction: Fraction = 0.0
    """Share of the captioned images that differ from another one in exactly one attribute: a color, a shape or the
    relation. Each has its own caption, so that they are hard negatives. With 0, differences are random."""
    num_repeated: NonNegativeInt = 0
    """Number of captioned images that are drawn again under the same caption: false negatives with different bytes. All
    drawings of such a scene belong to the training split."""
    repeats: PositiveInt = 8
    """How often each of the `num_repeated` images is drawn again."""
    num_classified: NonNegativeInt = 0
    """Images of each of three classification sources, whose targets are names of classes: shape, color, and number of
    objects. A fifth of the combinations is held out."""
    image_px: Annotated[int, Field(ge=56, multiple_of=2)] = 112
    """Width and height of images and clips. Even, because H.264 halves the resolution of color."""
    clip_frames: Annotated[int, Field(ge=2)] = 8
    """Frames of a clip, at 8 frames per second."""

    @model_validator(mode="after")
    def _possible(self) -> CorpusConfig:
        if self.num_repeated > self.num_images:
            raise ValueError(f"num_repeated={self.num_repeated} is more than num_images={self.num_images}")
        if self.pdf_library == "pymupdf" and not has_pymupdf():
            raise ValueError(
                "pymupdf is not installed: run `pip install 'rzen[pymupdf]'`, or set pdf_library: reportlab"
            )
        return self
