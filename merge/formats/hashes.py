"""Every hash by which people look a file up, from one pass over its bytes.

sha256   the whole file: identity here, on the Hugging Face Hub and in Git LFS
autov1   64 KiB at offset 1 MiB, first 8 hex digits (A1111's old model hash)
autov2   the first 10 hex digits of sha256 (A1111's model hash)
autov3   everything after the header, first 12 hex digits (A1111's "Lora hashes"); it survives
         edits of the metadata. Trainers store the full 64 digits as `sshs_model_hash`.
blake3   the whole file (StabilityMatrix, InvokeAI)
crc32    the whole file, as zlib prints it (Civitai prints the bytes reversed, in upper case)
"""

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from blake3 import blake3

from merge.formats.sources import File, OpenFile, Source, opened, read_bytes

_AUTOV1_START = 0x100000
_AUTOV1_BYTES = 0x10000
_CHUNK_BYTES = 4 * 2**20
_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Hashes:
    """All in lower-case hex. `autov1` is None for a file that ends before its window begins:
    the hash of nothing would make unrelated small files look alike.
    """

    sha256: str
    autov1: str | None
    data_sha256: str  # all 64 digits of autov3
    blake3: str
    crc32: str

    @property
    def autov2(self) -> str:
        return self.sha256[:10]

    @property
    def autov3(self) -> str:
        return self.data_sha256[:12]

    def to_json(self) -> dict[str, str | None]:
        return {
            "sha256": self.sha256,
            "autov1": self.autov1,
            "autov2": self.autov2,
            "autov3": self.autov3,
            "blake3": self.blake3,
            "crc32": self.crc32,
        }


def hash_file(
    file: File,
    data_offset: int,
    *,
    name: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Hashes:
    """Hash a file whose tensor data begins at `data_offset` (of its header).

    `progress` is called with the number of bytes that were hashed since it was last called.
    """
    whole, data, window, blake = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), blake3()
    crc = 0
    at = 0
    # All of these release the interpreter lock, so that on two cores the second SHA-256
    # and BLAKE3 cost little time of their own.
    with opened(file, name=name) as source, ThreadPoolExecutor(3) as pool:
        running: list[Future[object]] = []
        for view in _chunks(source):
            for hashing in running:
                hashing.result()
            running = [
                pool.submit(whole.update, view),
                pool.submit(data.update, view[max(0, data_offset - at) :]),
                pool.submit(blake.update, view),
            ]
            crc = zlib.crc32(view, crc)
            window.update(_overlap(view, at, _AUTOV1_START, _AUTOV1_BYTES))
            at += len(view)
            if progress is not None:
                progress(len(view))
        for hashing in running:
            hashing.result()
    return Hashes(
        sha256=whole.hexdigest(),
        autov1=window.hexdigest()[:8] if at > _AUTOV1_START else None,
        data_sha256=data.hexdigest(),
        blake3=blake.hexdigest(),
        crc32=f"{crc:08x}",
    )


def sha256_file(file: File) -> str:
    """The SHA-256 of a file in lower-case hex."""
    if isinstance(file, Path):
        with file.open("rb") as local:
            return hashlib.file_digest(local, "sha256").hexdigest()
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(source: Source) -> Iterator[memoryview]:
    """All of a source in order. What is far away is asked for before its turn comes."""

    def read(start: int) -> memoryview:
        return memoryview(read_bytes(source, start, min(_CHUNK_BYTES, source.size - start)))

    starts = iter(range(0, source.size, _CHUNK_BYTES))
    if isinstance(source, OpenFile):
        yield from map(read, starts)
        return
    with ThreadPoolExecutor(_AHEAD) as pool:
        reading = deque(pool.submit(read, start) for start in islice(starts, _AHEAD))
        while reading:
            chunk = reading.popleft().result()
            reading.extend(pool.submit(read, start) for start in islice(starts, 1))
            yield chunk


def _overlap(view: memoryview, at: int, start: int, size: int) -> memoryview:
    """The part of `view`, which begins at byte `at` of a file, that lies in a window."""
    return view[max(0, start - at) : max(0, start + size - at)]
