"""The cache of decoded pixels: equal bits, a bound that holds for all processes, and an owner that cleans up."""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import DataConfig, MediaConfig, MixtureConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader
from pipelines.media import decode
from pipelines.media.cache import PixelCache, cache_folder, remove
from pipelines.media.decode import Decoder
from pipelines.plan.build import build_plan
from pipelines.samples import DecodedSample
from pipelines.storage.location import open_store
from tests.data import publish
from tests.paths import ROOT
from tests.vectors import clip, document

ROOMY = 1 << 30


def picture(seed: int, px: int = 40) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (px, px, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(number: int, size: int = 1000) -> tuple[np.ndarray, list[float]]:
    return np.full((1, 1, size // 3, 3), number % 256, np.uint8), []


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.rgb"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was really decoded."""
    seen: list[bytes] = []
    real = decode.decode_page
    monkeypatch.setattr(decode, "decode_page", lambda kind, data, *rest: seen.append(data) or real(kind, data, *rest))
    return seen


@pytest.mark.parametrize(("kind", "data"), [("image", picture(0)), ("video", clip(1)), ("document", document(2))])
def test_kept_pixels_and_times_are_those_of_the_decoder(
    tmp_path: Path, kind: str, data: bytes, decoded: list[bytes]
) -> None:
    expected = Decoder(MediaConfig(frames=4), trusted=True).member(kind, data)  # type: ignore[arg-type]
    for _ in range(2):  # two processes, one after the other
        cache = PixelCache(tmp_path / "c", ROOMY)
        found = Decoder(MediaConfig(frames=4), trusted=True, cache=cache).member(kind, data)  # type: ignore[arg-type]
        assert found.frames.dtype == np.uint8
        assert np.array_equal(found.frames, expected.frames)
        assert (found.kind, found.times_s) == (expected.kind, expected.times_s)
    assert len(decoded) == 2
    assert (cache.num_hits, cache.num_misses) == (1, 0)


def test_other_settings_kinds_and_bytes_are_not_found(tmp_path: Path, decoded: list[bytes]) -> None:
    cache = PixelCache(tmp_path / "c", ROOMY)
    Decoder(MediaConfig(), trusted=True, cache=cache).member("image", picture(0))
    for config in (MediaConfig(image_pixels=100), MediaConfig(max_pixels=1700), MediaConfig()):
        Decoder(config, trusted=True, cache=cache).member("image", picture(0))
    Decoder(MediaConfig(), trusted=True, cache=cache).member("image", picture(1))
    assert decoded == [picture(0)] * 3 + [picture(1)]
    with pytest.raises(BadMedia, match="too_many_pixels"):
        Decoder(MediaConfig(max_pixels=100), trusted=True, cache=cache).member("image", picture(0))


def test_errors_are_raised_each_time_and_not_kept(tmp_path: Path, decoded: list[bytes]) -> None:
    cache = PixelCache(tmp_path / "c", ROOMY)
    for _ in range(2):
        with pytest.raises(BadMedia, match="corrupt_image"):
            Decoder(MediaConfig(), trusted=True, cache=cache).member("image", picture(0)[:200])
    assert len(decoded) == 2
    assert files(tmp_path / "c") == []


def test_batches_are_the_same_bit_for_bit_and_the_second_epoch_decodes_nothing(
    tmp_path: Path, decoded: list[bytes]
) -> None:
    publish(open_store(str(tmp_path / "data")), {"a": ("t2i", 12)}, {"a": {5}})
    config = DataConfig(root=str(tmp_path / "data"))
    plain, cached = Reader(config), Reader(config)
    cached.use_cache(PixelCache(tmp_path / "c", ROOMY))
    plan = build_plan(plain.tables(), MixtureConfig(run_length=2), global_batch=4, epochs=2)
    shares = []
    for step in range(plan.num_steps):
        expected, found = (reader.batch(plan, step, 0, 1) for reader in (plain, cached))
        assert [_content(one) for one in found.batch] == [_content(one) for one in expected.batch]
        assert (found.rejected, found.blocks) == (expected.rejected, expected.blocks)
        assert expected.cached_fraction == 0
        shares.append(found.cached_fraction)
    assert shares[0] == 0
    assert min(shares[3:]) > 0.7  # all but the damaged one, which is decoded again
    assert max(shares[3:]) == 1


def _content(sample: DecodedSample) -> tuple[object, ...]:
    parts = (sample.query, sample.positive)
    return (sample.sample, *((part.text, [frame.tobytes() for frame in part.frames]) for part in parts))


def test_a_full_cache_keeps_what_it_has_within_its_bound(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path / "c", 2500)
    for number in range(5):
        cache.put(f"{number:064x}", pixels(number))
    assert [path.name[:64] for path in files(tmp_path / "c")] == [f"{number:064x}" for number in (0, 1)]
    assert sum(path.stat().st_size for path in files(tmp_path / "c")) <= 2500
    found = cache.get(f"{1:064x}")
    assert found is not None
    assert np.array_equal(found[0], pixels(1)[0])
    assert cache.get(f"{4:064x}") is None
    assert (cache.num_hits, cache.num_misses) == (1, 1)


def _fill(folder: Path, barrier: object, first: int) -> None:
    cache = PixelCache(folder, 20_000)
    barrier.wait()  # type: ignore[attr-defined]
    for number in range(40):
        key = f"{(first + number) % 40:064x}"
        if cache.get(key) is None:
            cache.put(key, pixels(first + number))


def test_processes_that_write_at_once_stay_within_the_bound_and_see_whole_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_fill, args=(tmp_path / "c", barrier, 7 * number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    sizes = [path.stat().st_size for path in files(tmp_path / "c")]
    assert 15 <= len(sizes) <= 20, "nearly full: what was written twice is counted once"
    assert set(sizes) == {999 + 32}
    assert int((tmp_path / "c/bytes").read_text()) == sum(sizes)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "bytes",
        "holders",
        *(path.name for path in files(tmp_path / "c")),
    }


def test_a_full_disk_ends_keeping_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PixelCache(tmp_path / "c", ROOMY)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    for number in range(3):
        found = Decoder(MediaConfig(), trusted=True, cache=cache).member("image", picture(number))
        assert found.frames.shape == (1, 40, 40, 3)
    assert caplog.text.count("keeps no more pixels") == 1
    assert [path.name for path in (tmp_path / "c").iterdir() if path.name not in ("bytes", "holders")] == []


def test_a_cache_that_was_deleted_is_decoded_again(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path / "c", ROOMY)
    decoder = Decoder(MediaConfig(), trusted=True, cache=cache)
    decoder.member("image", picture(0))
    remove(tmp_path / "c")
    assert decoder.member("image", picture(0)).frames.shape == (1, 40, 40, 3)
    assert not (tmp_path / "c").exists()


def test_caches_of_jobs_that_were_killed_are_deleted_and_those_in_use_are_not(tmp_path: Path) -> None:
    dead, alive = (cache_folder(str(tmp_path), name) for name in ("dead", "alive"))
    for folder in (dead, alive):
        PixelCache(folder, ROOMY)._folder.joinpath("x.rgb").touch()
    holder = os.open(alive / "holders", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_SH)  # as another process holds it
    (tmp_path / f"rzen-pixels-{os.getuid()}-link").symlink_to(tmp_path)
    script = f"""
from pathlib import Path
from pipelines.media.cache import PixelCache, cache_folder
PixelCache(cache_folder({str(tmp_path)!r}, "new"), 1000)
"""
    # This process made both, and so holds both until it ends: another one sees what is abandoned.
    _release_all(dead)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    assert not dead.exists()
    assert (alive / "x.rgb").exists()
    os.close(holder)


def _release_all(folder: Path) -> None:
    """Close what this process has open of a cache, as its end would."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if entry.readlink() == folder / "holders":
                os.close(int(entry.name))
        except FileNotFoundError:  # the listing itself
            pass


def test_the_process_of_a_job_deletes_its_cache_at_its_end(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path

import numpy as np

from pipelines.media.cache import PixelCache, own

folder = Path({str(tmp_path / "c")!r})
own(folder)
own(folder)
PixelCache(folder, 10_000).put("00", (np.zeros((1, 2, 2, 3), np.uint8), [0.5]))
assert (folder / "00.rgb").stat().st_size == 12 + 8 + 32
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    assert not (tmp_path / "c").exists()


def test_a_link_or_the_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"c: belongs to another user, or is a link; name another feed.cache.folder"):
        PixelCache(tmp_path / "c", ROOMY)
    PixelCache(tmp_path / "d", ROOMY)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700
    assert cache_folder(str(tmp_path), "x") != cache_folder(str(tmp_path), "y")
