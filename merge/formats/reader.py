"""Tensors of one safetensors file, one at a time, read by offset."""

import struct
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from merge.errors import BadFile
from merge.formats.header import DEFAULT_LIMITS, Limits, header_of
from merge.formats.sources import File, fill, opened, read_bytes

if TYPE_CHECKING:
    import torch


class TensorFile:
    """An open safetensors file whose header kept every rule; safe to read from several threads.

    `name` is what messages call a file that is here, by default the last part of its path.
    """

    def __init__(
        self, file: File, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        with ExitStack() as stack:
            self._source = stack.enter_context(opened(file, name=name))
            self.name = self._source.name
            self.header = header_of(self._source, limits=limits)
            self._stack = stack.pop_all()

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
        self._stack.close()

    def read(self, key: str) -> bytearray:
        """The stored bytes of one tensor, little-endian and row-major, in memory of their own."""
        info = self.header.tensors[key]
        return read_bytes(self._source, self.header.data_offset + info.begin, info.size_bytes)

    def read_into(self, key: str, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the bytes of one tensor from its byte `start` on."""
        info = self.header.tensors[key]
        if start + len(buffer) > info.size_bytes:
            raise IndexError(f"{key} has no bytes {start}..{start + len(buffer)}")
        fill(self._source, buffer, self.header.data_offset + info.begin + start)

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
