"""Where the bytes of an input come from: a file here, or whatever else can be read at an offset.

This package knows no network; a program that does hands in a RemoteFile of its own.
"""

import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from merge.errors import BadFile
from merge.formats.positioned import read_at


class Source(Protocol):
    """Bytes that never change while they are read; BadFile where they do, or cannot be read.

    Safe to use from several threads.
    """

    @property
    def name(self) -> str:
        """What messages call it; two sources of one name are the same bytes."""

    @property
    def size(self) -> int: ...

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; the number of bytes read is smaller only at the end."""


class RemoteFile(Source, Protocol):
    """A file that is not on this machine; it needs no opening."""

    def beside(self, name: str) -> "RemoteFile | None":
        """What lies under `name` in the same folder; None where nothing does."""


File = Path | RemoteFile


def opened(file: File, *, name: str | None = None) -> AbstractContextManager[Source]:
    """The bytes of a file; one that is on this machine is open until the block ends.

    `name` is what messages call a file here, by default the last part of its path.
    """
    if isinstance(file, Path):
        return OpenFile(file, name=name)
    return nullcontext(file)


def is_folder(file: File) -> bool:
    """Whether it is a folder and not one file."""
    return isinstance(file, Path) and file.is_dir()


def beside(file: File, name: str) -> File | None:
    """What lies under `name` in the folder of a file; None where nothing does."""
    if isinstance(file, Path):
        path = file.with_name(name)
        return path if path.is_file() else None
    return file.beside(name)


# Names that tools give every adapter: the folder's says which one it is.
GENERIC_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
# Folders of huggingface_hub's cache, whose last is named by a commit.
_COMMIT = re.compile(r"models--(?:.+?--)?(.+)/snapshots/[0-9a-f]+")


def shown_name(file: File) -> str:
    """What messages call a file: the last part of its path, with its folder or repo where tools
    chose it.
    """
    if isinstance(file, Path) and file.name in GENERIC_NAMES:
        commit = _COMMIT.fullmatch("/".join(file.parts[-4:-1]))
        return "/".join((commit[1], file.name) if commit else file.parts[-2:])
    return file.name


class OpenFile:
    """A file of this machine, read by offset and never mapped into memory:
    one that is cut off while it is read gives a short read, where a mapping would give SIGBUS.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.name = path.name if name is None else name
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise self._failure(error) from error
        self.size = os.fstat(self._fd).st_size

    def read_at(self, buffer: memoryview, offset: int) -> int:
        try:
            return read_at(self._fd, buffer, offset)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _failure(self, error: OSError) -> BadFile:
        return BadFile(self.name, "st_unreadable", error.strerror or str(error))


def read_bytes(source: Source, offset: int, size: int) -> bytearray:
    """Exactly these bytes of a source, in memory of their own; BadFile where it ends before."""
    buffer = bytearray(size)
    fill(source, memoryview(buffer), offset)
    return buffer


def fill(source: Source, buffer: memoryview, offset: int) -> None:
    """Fill all of `buffer` from `offset`; BadFile where the source ends before."""
    if source.read_at(buffer, offset) != len(buffer):
        raise BadFile(source.name, "st_short_read", "the file became shorter while it was read")
