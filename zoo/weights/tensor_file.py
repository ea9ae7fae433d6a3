"""The safetensors file format: headers checked on their own, data mapped, files streamed out.

Layout: 8 bytes, the little-endian length n of the header; n bytes of JSON, name -> dtype, shape,
data_offsets; then the data, row-major, without gaps. The `safetensors` package writes a file from
a dictionary that holds all of it; here one tensor at a time is in memory, and bfloat16 needs no
framework.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hackle.zoo.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
FLOATS = ("F32", "BF16", "F16")


def floating(dtype: Any) -> np.dtype:
    """The dtype that a person named, if parameters can have it.

    Raises:
      UserError: it is not float32, bfloat16 or float16.
    """
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = None
    if kind not in [DTYPES[code] for code in FLOATS]:
        raise UserError(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    return kind


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` is its offset in `file`, `dtype` a code such as "F32"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def map(self) -> np.ndarray:
        """The tensor as a read-only memory map; nothing is read until it is indexed."""
        if self.stop == self.start:
            return np.empty(self.shape, DTYPES[self.dtype])
        return np.memmap(
            self.file, dtype=DTYPES[self.dtype], mode="r", offset=self.start, shape=self.shape
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor in a file, from its header alone.

    Raises:
      UserError: the file cannot be read, is not a safetensors file, is truncated, or has a tensor
        of an unknown dtype.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    f"{path}: truncated or not a safetensors file ({size} bytes, header says "
                    f"{length})"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode("utf-8"))
        header.pop("__metadata__", None)
        begin = 8 + length
        found = {
            name: TensorInfo(
                path,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                *(begin + int(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged safetensors header: {error}") from error
    at = begin
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name} has unknown dtype {info.dtype!r}")
        nbytes = DTYPES[info.dtype].itemsize * math.prod(info.shape)
        if min(info.shape, default=1) < 0 or (info.start, info.stop) != (at, at + nbytes):
            raise UserError(f"{path}: damaged safetensors header: offsets of tensor {name}")
        at = info.stop
    if size < at:
        raise UserError(f"{path}: truncated: {size} of {at} bytes")
    if size > at:
        raise UserError(f"{path}: {size - at} bytes after the last tensor")
    return found


def write_file(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a new file, one tensor in memory at a time.

    Args:
      shapes: name -> shape of all tensors, in the order of the file.
      dtype: of all tensors in the file.
      tensors: (name, array) in the same order; arrays are cast to `dtype`.

    Raises:
      ValueError: the tensors are not those announced in `shapes`.
      OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        stop = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        expected = iter(shapes.items())
        for name, tensor in tensors:
            if next(expected, None) != (name, tensor.shape):
                raise ValueError(f"{path}: unexpected tensor {name} of shape {tensor.shape}")
            part = np.ascontiguousarray(tensor, dtype=dtype)
            file.write(part.reshape(-1).view(np.uint8).data)
        missing = next(expected, None)
        if missing is not None:
            raise ValueError(f"{path}: tensor {missing[0]} was announced and not given")
        file.flush()
        os.fsync(file.fileno())
