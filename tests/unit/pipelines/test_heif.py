"""HEIF pictures, which phones write: as other pictures, but decoded in the sandbox and by an extra."""

import io
import random
import sys

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.curate.pictures import stored_size
from pipelines.errors import BadMedia
from pipelines.ingest.members import load_sample
from pipelines.media import decode, images
from pipelines.media.decode import Decoder
from pipelines.media.images import decode_image
from pipelines.media.libraries import library_versions
from pipelines.media.sandbox import Sandbox
from pipelines.media.signatures import is_heif, sniff
from pipelines.samples import FileRef, Input, Media, RawSample, Sample
from tests.paths import ROOT

CONFIG = MediaConfig()
ORIENTATION = 0x0112


def gradient(width: int = 160, height: int = 120) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    values = [x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)]
    return Image.fromarray(np.stack(values, axis=-1).astype(np.uint8))


def heic(image: Image.Image, **options) -> bytes:
    pillow_heif.register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", **options)
    return buffer.getvalue()


def difference(data: bytes, expected: Image.Image) -> float:
    return float(np.abs(decode_image(data, CONFIG).astype(int) - np.asarray(expected.convert("RGB"))).mean())


@pytest.mark.parametrize("options", [{}, {"grid_tile_size": 128}, {"quality": 95, "chroma": 444}], ids=str)
def test_pixels_are_those_of_the_picture(options):
    image = gradient(320, 240)
    assert difference(heic(image, **options), image) < 1


@pytest.mark.parametrize(
    ("orientation", "turn"), [(1, None), (6, Image.Transpose.ROTATE_270), (3, Image.Transpose.ROTATE_180)]
)
def test_it_is_turned_once(orientation, turn):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    shown = gradient() if turn is None else gradient().transpose(turn)
    assert difference(heic(gradient(), exif=exif.tobytes()), shown) < 1


def test_transparent_pixels_are_white_and_grey_ones_grey():
    image = gradient().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 160, 60))
    pixels = decode_image(heic(image), CONFIG)
    assert pixels[:50].min() > 250
    assert np.abs(pixels[70:].astype(int) - np.asarray(gradient())[70:]).mean() < 2
    assert np.ptp(decode_image(heic(gradient().convert("L")), CONFIG).astype(int), axis=-1).max() == 0


def test_a_profile_is_applied():
    swapped = Image.open(ROOT / "tests/cases/media/icc_channels_swapped.png").info["icc_profile"]
    png = io.BytesIO()
    gradient().save(png, "PNG", icc_profile=swapped)
    shown = Image.fromarray(decode_image(png.getvalue(), CONFIG))
    assert difference(heic(gradient(), icc_profile=swapped), shown) < 2
    assert difference(heic(gradient()), shown) > 20


@pytest.mark.parametrize(
    ("brand", "others", "expected"),
    [
        (b"heic", b"mif1heic", ".heic"),
        (b"heix", b"mif1", ".heic"),
        (b"mif1", b"mif1heic", ".heic"),
        (b"mif1", b"mif1avifmiaf", ".avif"),
        (b"avif", b"mif1", ".avif"),
        (b"heic", b"", ".heic"),
        (b"isom", b"iso2mp41", ".mp4"),
        (b"qt  ", b"", ".mov"),
    ],
)
def test_brands(brand, others, expected):
    data = (16 + len(others)).to_bytes(4) + b"ftyp" + brand + bytes(4) + others + b"\0\0\0\x08free"
    found = sniff(data)
    assert found is not None
    assert found[1] == expected
    assert is_heif(data) == (expected == ".heic")


@pytest.mark.parametrize("name", ["q0", "q0.heic", "q0.jpg"])
def test_ingest_takes_it_whatever_its_name_is(tmp_path, name):
    path, data = tmp_path / "IMG_0001.HEIC", heic(gradient())
    path.write_bytes(data)
    sample = Sample("0", "photos", "text_image", Input("a photo"), Input(media=(Media("image", name),)))
    stored, members = load_sample(RawSample(sample, {name: FileRef(str(path))}), CONFIG)
    (media,) = stored.positive.media
    assert (media.kind, members[media.member]) == ("image", data)
    assert stored_size("image", data, np.zeros((1, 2, 2, 3), np.uint8)) == (160, 120)


def test_it_is_decoded_in_the_sandbox_unless_it_is_trusted(monkeypatch):
    called = []
    monkeypatch.setattr(Sandbox, "call", lambda self, function, *args: called.append(function) or function(*args))
    data = heic(gradient())
    with Decoder(CONFIG) as decoder:
        np.testing.assert_array_equal(decoder.member("image", data).frames[0], decode_image(data, CONFIG))
    assert called == [decode.decode_page]
    with Decoder(CONFIG, trusted=True) as decoder:
        decoder.member("image", data)
    assert len(called) == 1


def test_the_child_decodes_it():
    data = heic(gradient())
    with Decoder(CONFIG) as decoder:
        np.testing.assert_array_equal(decoder.member("image", data).frames[0], decode_image(data, CONFIG))


def test_damage_is_named():
    data = heic(gradient(), grid_tile_size=64)
    for share in (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(BadMedia) as caught:
            decode_image(data[: int(len(data) * share)], CONFIG)
        assert caught.value.reason == "corrupt_image"
    rng = random.Random(0)
    outcomes = set()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            assert decode_image(bytes(changed), CONFIG).shape[2] == 3
        except BadMedia as error:
            outcomes.add(error.reason)
    assert "corrupt_image" in outcomes
    assert outcomes <= {"corrupt_image", "unsupported_format", "too_many_pixels", "extreme_aspect_ratio"}


def test_it_is_not_decoded_above_the_limit():
    with pytest.raises(BadMedia, match="160 x 120"):
        decode_image(heic(gradient()), CONFIG.model_copy(update={"max_pixels": 1000}))


def test_without_the_extra_it_is_refused_with_the_command_that_installs_it(monkeypatch):
    data = heic(gradient())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._heif.cache_clear()
    with pytest.raises(BadMedia, match=r"pip install 'rzen\[heif\]'") as caught:
        decode_image(data, CONFIG)
    assert caught.value.reason == "unsupported_format"
    assert "heif" not in library_versions(CONFIG)["image"]
    monkeypatch.undo()
    assert decode_image(data, CONFIG).shape == (120, 160, 3)
    assert "pillow-heif" in library_versions(CONFIG)["image"]
