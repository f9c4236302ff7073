"""safetensors files, read and written one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipelines.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
Layout = dict[str, tuple[list[int], torch.dtype]]  # name -> shape and dtype, in the order of the file


class Tensors:
    """The tensors of some files, each read when asked for.

    What has been read of a mapped file counts as memory until the file is closed. So every read opens the file again,
    which takes less than a millisecond, and returns a copy.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files: dict[Path, Layout] = {}
        self.layout: Layout = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
                self.files[path] = {name: (s.get_shape(), _dtype(path, s)) for name, s in slices.items()}
            for name in self.files[path]:
                if name in self._paths:
                    raise UserError(str(path), f"{name} is in {self._paths[name].name} too", "remove one of the files")
                self._paths[name] = path
            self.layout |= self.files[path]

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor. Raises `UserError` where a number in it is not finite."""
        path = self._paths[name]
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(name).clone()
        # Both ends are NaN where any number is.
        if tensor.is_floating_point() and tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
            raise UserError(
                f"{path} {name}", "holds NaN or infinity", "leave this fine-tune out, its training diverged"
            )
        return tensor


def write_tensors(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> None:
    """Write a file of this layout from tensors in the same order, without keeping them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), tensor in zip(layout.items(), tensors, strict=True):
            assert (list(tensor.shape), tensor.dtype) == (shape, dtype), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(str(path), f"is not a whole safetensors file ({error})", "copy or write it again") from error


def _dtype(path: Path, entry: Any) -> torch.dtype:
    code = entry.get_dtype()
    if code not in DTYPES:
        raise UserError(str(path), f"holds numbers of type {code}", "export it in bfloat16 or float32")
    return DTYPES[code]
