"""`rzen.load` and `Embedder`: what a Python user passes, and that only the inputs decide the vectors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rzen
from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.samples import DecodedInput, Visual
from rzen.config import ModelIdentity
from tests.tiny import PROMPT, TEXTS, mixed_inputs, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def embedder(checkpoint: str) -> rzen.Embedder:
    return rzen.load(checkpoint, identity=ModelIdentity(prompt=PROMPT))


@pytest.mark.parametrize("chunk_tokens", [1, 200, 16_384])
def test_vectors_are_those_of_each_input_alone_in_order(checkpoint: str, chunk_tokens: int) -> None:
    embedder = rzen.load(checkpoint, identity=ModelIdentity(prompt=PROMPT), chunk_tokens=chunk_tokens)
    inputs = mixed_inputs() * 2
    vectors = embedder.encode(inputs)
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(inputs), 64))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embedder.encode([input]) for input in inputs])
    assert np.abs(vectors - alone).max() < 1e-5
    encoded = [embedder.processor.encode([input]) for input in inputs]
    assert np.abs(embedder.embed_encoded(encoded) - alone).max() < 1e-5


def test_a_text_a_file_and_an_image_are_inputs(embedder: rzen.Embedder, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    decoded = DecodedInput(visuals=(Visual("image", pixels[None]),))
    found = embedder.encode([TEXTS[0], tmp_path / "a.png", Image.open(tmp_path / "a.png"), decoded])
    assert np.abs(found[1:] - found[3]).max() < 1e-5
    assert np.abs(found[0] - embedder.encode([DecodedInput(text=TEXTS[0])])[0]).max() < 1e-5
    asked = embedder.encode([TEXTS[0], decoded], instruction="Find it.")
    expected = embedder.encode([DecodedInput(text=TEXTS[0], instruction="Find it."), decoded])
    assert np.abs(asked - expected).max() < 1e-5
    assert np.abs(asked[0] - found[0]).max() > 1e-3


def test_media_settings_reach_files(checkpoint: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (400, 300, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", quality=95)
    small = rzen.load(checkpoint, media=MediaConfig(image_pixels=1000))
    assert np.abs(small.encode([tmp_path / "a.jpg"]) - rzen.load(checkpoint).encode([tmp_path / "a.jpg"])).max() > 1e-4


def test_importing_rzen_loads_no_torch() -> None:
    code = "import sys, rzen; print(rzen.__version__); assert 'torch' not in sys.modules; assert callable(rzen.load)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == version("rzen") == rzen.__version__
    assert (rzen.UserError, rzen.BadMedia) == (UserError, BadMedia)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        rzen.lod  # type: ignore[attr-defined]  # noqa: B018


def test_a_model_embeds_without_ray_deepspeed_object_stores_and_tables(checkpoint: str, tmp_path: Path) -> None:
    """Machines that only embed have torch and transformers."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    code = """
import sys

for name in ("ray", "deepspeed", "boto3", "botocore", "pyarrow", "webdataset", "typer", "jobs"):
    sys.modules[name] = None  # importing it fails
import rzen

model = rzen.load(sys.argv[1])
vectors = model.encode(["a red circle", sys.argv[2]], show_progress_bar=True)
print(model.similarity(vectors, vectors).shape)
"""
    command = [sys.executable, "-c", code, checkpoint, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(2, 2)", done.stderr
