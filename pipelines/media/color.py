"""Colors of images: pixels of an embedded ICC profile to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_COLOR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_MAX_PROFILE_BYTES = 4 << 20  # a table for printing inks has about one
_NUM_PROFILES = 16
# Profiles that call themselves sRGB differ from each other by this much. They leave the pixels as they are.
_SAME_COLOR = 3
_DAMAGE = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an image of mode RGB, L or CMYK in sRGB, with mode RGB.

    Without a profile, RGB and L are taken to be sRGB. A profile that is damaged or belongs to other colors is ignored,
    as in browsers.
    """
    if profile and len(profile) <= _MAX_PROFILE_BYTES and image.mode in _COLOR_SPACES:
        transform = _transform(profile, image.mode)
        if transform is not None:
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None
            return converted
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(_NUM_PROFILES)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way from a profile to sRGB, or None if it changes nothing or cannot be used."""
    try:
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != _COLOR_SPACES[mode]:
            return None
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, target, mode, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION)
    except _DAMAGE:
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a grid of all colors stays as it is."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 16, 3) if mode == "RGB" else steps[None]
    image = Image.fromarray(colors)
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return int(np.abs(np.asarray(converted, int) - np.asarray(image.convert("RGB"), int)).max()) <= _SAME_COLOR
