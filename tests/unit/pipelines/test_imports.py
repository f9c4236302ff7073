"""Cheaper imports leave the interpreter as they found it."""

import gc
import importlib
import subprocess
import sys

import pytest

from pipelines.imports import without_garbage_collection, without_modules


def test_garbage_is_collected_again_after_the_block() -> None:
    with without_garbage_collection():
        with without_garbage_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), without_garbage_collection():
        raise KeyError
    assert gc.isenabled()


def test_a_hidden_module_cannot_be_imported_and_can_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(ModuleNotFoundError), without_modules("colorsys"):
        importlib.import_module("colorsys")
    module = importlib.import_module("colorsys")
    with without_modules("colorsys"):
        assert importlib.import_module("colorsys") is module
    assert sys.modules["colorsys"] is module


@pytest.mark.parametrize("first", ["", "import transformers.utils as u; u.is_scipy_available()"])
def test_models_are_imported_whoever_imported_transformers_before(first: str) -> None:
    code = f"""
import sys
{first}
from pipelines.imports import importing_models
with importing_models():
    from transformers import PreTrainedModel
assert ("scipy" in sys.modules) == {bool(first)}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_renderer_of_documents_loads_no_networks() -> None:
    code = """
import sys
from pipelines.media.libraries import import_optional
print(import_optional("pymupdf", "media.document_backend", "pypdfium2").TOOLS.mupdf_version())
assert not [name for name in sys.modules if name.startswith(("onnxruntime", "pymupdf.layout", "pymupdf4llm"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_neither_the_driver_nor_the_decoders_of_a_training_run_load_torch() -> None:
    code = """
import sys
import jobs.training.launch, jobs.training.worker, jobs.training.process_group, jobs.training.encoder
import pipelines.feed.feed
import ray.train.v2.api.data_parallel_trainer
assert not {"torch", "transformers", "huggingface_hub.hf_api", "pymupdf", "boto3", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
