"""Tensors of one safetensors file, one at a time.

The file is opened once and read by offset, never mapped into memory:
a file that is cut off while it is read gives BadFile, where a mapping would give SIGBUS.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from merge.errors import BadFile
from merge.formats.header import (
    DEFAULT_LIMITS,
    PREFIX_BYTES,
    Header,
    Limits,
    header_length,
    parse_header,
)
from merge.formats.positioned import read_at

if TYPE_CHECKING:
    import torch


class TensorFile:
    """An open safetensors file whose header kept every rule; safe to read from several threads.

    `name` is what messages call the file, by default the last part of its path.
    """

    def __init__(
        self, path: Path, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.path = path
        self.name = path.name if name is None else name
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise BadFile(self.name, "st_unreadable", error.strerror or str(error)) from error
        try:
            self.header = self._read_header(limits)
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self, limits: Limits) -> Header:
        size = os.fstat(self._fd).st_size
        prefix = self._read_bytes(0, min(size, PREFIX_BYTES))
        length = header_length(bytes(prefix), size, self.name, limits=limits)
        head = self._read_bytes(0, PREFIX_BYTES + length)
        return parse_header(bytes(head), size, self.name, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def read(self, key: str) -> bytearray:
        """The stored bytes of one tensor, little-endian and row-major, in memory of their own."""
        info = self.header.tensors[key]
        return self._read_bytes(self.header.data_offset + info.begin, info.size_bytes)

    def read_into(self, key: str, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the bytes of one tensor from its byte `start` on."""
        info = self.header.tensors[key]
        if start + len(buffer) > info.size_bytes:
            raise IndexError(f"{key} has no bytes {start}..{start + len(buffer)}")
        self._fill(buffer, self.header.data_offset + info.begin + start)

    def read_scalar(self, key: str) -> float:
        """The value of a one-element tensor, such as an alpha; needs no tensor library."""
        info = self.header.tensors[key]
        if info.n_elements != 1 or info.dtype not in _SCALARS:
            detail = f"{key} is {info.dtype}{list(info.shape)} and not one number"
            raise BadFile(self.name, "st_not_a_scalar", detail)
        return decode_scalar(info.dtype, bytes(self.read(key)))

    def read_tensor(self, key: str) -> "torch.Tensor":
        """One tensor as it is stored: dtype and shape of the header, memory of its own."""
        import torch

        info = self.header.tensors[key]
        dtype = getattr(torch, TORCH_DTYPES.get(info.dtype, ""), None)
        if dtype is None:
            detail = f"{key} has the dtype {info.dtype}, which torch cannot hold"
            raise BadFile(self.name, "st_unsupported_dtype", detail)
        if info.n_elements == 0:  # torch.frombuffer refuses an empty buffer
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(self.read(key), dtype=dtype).reshape(info.shape)

    def _read_bytes(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        self._fill(memoryview(buffer), offset)
        return buffer

    def _fill(self, buffer: memoryview, offset: int) -> None:
        try:
            got = read_at(self._fd, buffer, offset)
        except OSError as error:
            raise BadFile(self.name, "st_unreadable", error.strerror or str(error)) from error
        if got != len(buffer):
            raise BadFile(self.name, "st_short_read", "the file became shorter while it was read")


TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

_SCALARS = {
    "BOOL": "<?",
    "I8": "<b",
    "U8": "<B",
    "I16": "<h",
    "U16": "<H",
    "I32": "<i",
    "U32": "<I",
    "I64": "<q",
    "U64": "<Q",
    "F16": "<e",
    "BF16": "<f",
    "F32": "<f",
    "F64": "<d",
}


def decode_scalar(dtype: str, data: bytes) -> float:
    """One stored number as a float; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        data = b"\0\0" + data
    return float(struct.unpack(_SCALARS[dtype], data)[0])
