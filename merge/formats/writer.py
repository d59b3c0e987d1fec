"""Write a safetensors file that appears whole or not at all.

The bytes go to a temporary file beside the target, are synced, and take the target's name by one
rename; leaving the context with an exception removes the temporary file.
The same tensors and metadata give the same bytes, always.
"""

import json
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from merge.errors import CannotWrite
from merge.formats.header import DTYPE_BITS, METADATA, PREFIX_BYTES, TensorInfo
from merge.formats.positioned import reserve, sync_folder, write_at
from merge.formats.reader import TORCH_DTYPES

if TYPE_CHECKING:
    import numpy as np
    import torch

# The library pads the header so that the data begins at a multiple of this.
_ALIGNMENT = 8


class Layout(NamedTuple):
    """Everything before the data, and where each tensor's bytes go in the data region."""

    head: bytes
    tensors: dict[str, TensorInfo]

    @property
    def file_size(self) -> int:
        return len(self.head) + max((info.end for info in self.tensors.values()), default=0)


def layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Layout:
    """Place (key, dtype, shape) one after the other in the order given.

    Metadata keys are sorted and come first, so that one recipe gives one sequence of bytes.
    """
    entries: dict[str, Any] = {}
    if metadata:
        entries[METADATA] = dict(sorted(metadata.items()))
    placed: dict[str, TensorInfo] = {}
    at = 0
    for key, dtype, shape in tensors:
        n_bits = DTYPE_BITS[dtype]
        for size in shape:
            n_bits *= size
        assert n_bits % 8 == 0, f"{key} ends inside a byte"
        assert key not in placed, f"{key} is written twice"
        placed[key] = TensorInfo(dtype, tuple(shape), at, at + n_bits // 8)
        entries[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + n_bits // 8],
        }
        at += n_bits // 8
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return Layout(len(text).to_bytes(PREFIX_BYTES, "little") + text, placed)


def aligned_order(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Widest dtype first, then by key: every tensor aligned, as the safetensors library orders.

    A dtype's rank there is its place in the library's enum, not its width alone.
    """
    rank = {dtype: index for index, dtype in enumerate(DTYPE_BITS)}
    return sorted(tensors, key=lambda tensor: (-rank[tensor[1]], tensor[0]))


class NewFile:
    """A file that gets its name when the block ends, or leaves nothing if the block fails."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(self._temporary, flags, 0o666)
        except OSError as error:
            raise self.failure(error) from error
        try:
            reserve(self._fd, self.size)
            self._start()
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise self.failure(error) from error
            raise
        return self

    def fileno(self) -> int:
        return self._fd

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._abandon()
            return
        try:
            self._finish()
            os.fsync(self._fd)
        except BaseException as problem:
            self._abandon()
            if isinstance(problem, OSError):
                raise self.failure(problem) from problem
            raise
        os.close(self._fd)
        try:
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as problem:
            self._temporary.unlink(missing_ok=True)
            raise self.failure(problem) from problem

    def failure(self, error: OSError) -> CannotWrite:
        """What a system's refusal means for this file."""
        return CannotWrite(self.path.name, error.strerror or str(error))

    def _start(self) -> None:
        """What comes first into the new file, which has its size but no bytes."""

    def _finish(self) -> None:
        """What must be true before the file is synced."""

    def _abandon(self) -> None:
        os.close(self._fd)
        self._temporary.unlink(missing_ok=True)


class FileWriter(NewFile):
    """Stream tensors to their final places, in any order and from any thread.

    with FileWriter(path, tensors, metadata) as writer:
        writer.write("a.weight", data)
    The file gets its name when the block ends, and only if every byte was written exactly once.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self.layout = layout(tensors, metadata)
        super().__init__(path, self.layout.file_size)
        self.data_offset = len(self.layout.head)
        self._written = 0
        self._lock = threading.Lock()

    def write(self, key: str, data: Any, start: int = 0) -> None:
        """Put `data` (any buffer) at byte `start` of the tensor `key`."""
        view = memoryview(data).cast("B")
        offset = self._claim(key, start, len(view))
        try:
            write_at(self._fd, view, offset)
        except OSError as error:
            raise self.failure(error) from error

    def _start(self) -> None:
        write_at(self._fd, memoryview(self.layout.head), 0)

    def _finish(self) -> None:
        missing = self.layout.file_size - self.data_offset - self._written
        assert missing == 0, f"{missing} bytes of {self.path.name} were not written"

    def _claim(self, key: str, start: int, size: int) -> int:
        info = self.layout.tensors[key]
        assert 0 <= start <= info.size_bytes - size, f"write outside {key}"
        with self._lock:
            self._written += size
        return self.data_offset + info.begin + start


def write_file(
    path: Path,
    tensors: "Mapping[str, torch.Tensor | np.ndarray[Any, Any]]",
    metadata: Mapping[str, str],
) -> None:
    """Write tensors that are in memory, in the order of `aligned_order`."""
    described = [(key, *describe(tensor)) for key, tensor in tensors.items()]
    with FileWriter(path, aligned_order(described), metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, raw_bytes(tensor))


def describe(tensor: "torch.Tensor | np.ndarray[Any, Any]") -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and the shape of a tensor or array."""
    import numpy as np  # Planning needs none of it.

    if isinstance(tensor, np.ndarray):
        return _NUMPY_NAMES[tensor.dtype.newbyteorder("=").name], tensor.shape
    return _TORCH_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)


def raw_bytes(tensor: "torch.Tensor | np.ndarray[Any, Any]") -> Any:
    """The little-endian row-major bytes of a tensor or array, without a copy where possible."""
    import numpy as np

    if isinstance(tensor, np.ndarray):
        little = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
        return np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


_TORCH_NAMES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
_NUMPY_NAMES = {
    torch_name: name
    for torch_name, name in _TORCH_NAMES.items()
    if not torch_name.startswith(("float8", "bfloat"))
}
