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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from merge.errors import BadFile

_AUTOV1_START = 0x100000
_AUTOV1_BYTES = 0x10000
_CHUNK_BYTES = 4 * 2**20


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
    path: Path,
    data_offset: int,
    *,
    name: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Hashes:
    """Hash the file at `path` whose tensor data begins at `data_offset` (of its header).

    `progress` is called with the number of bytes that were hashed since it was last called.
    """
    whole, data, window, blake = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), blake3()
    crc = 0
    at = 0
    try:
        # All of these release the interpreter lock, so that on two cores the second SHA-256
        # and BLAKE3 cost little time of their own.
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(3) as pool:
            chunk = file.read(_CHUNK_BYTES)
            while chunk:
                view = memoryview(chunk)
                running: list[Future[object]] = [
                    pool.submit(whole.update, view),
                    pool.submit(data.update, view[max(0, data_offset - at) :]),
                    pool.submit(blake.update, view),
                ]
                crc = zlib.crc32(view, crc)
                window.update(_overlap(view, at, _AUTOV1_START, _AUTOV1_BYTES))
                next_chunk = file.read(_CHUNK_BYTES)
                for hashing in running:
                    hashing.result()
                at += len(chunk)
                if progress is not None:
                    progress(len(chunk))
                chunk = next_chunk
    except OSError as error:
        shown = path.name if name is None else name
        raise BadFile(shown, "st_unreadable", error.strerror or str(error)) from error
    return Hashes(
        sha256=whole.hexdigest(),
        autov1=window.hexdigest()[:8] if at > _AUTOV1_START else None,
        data_sha256=data.hexdigest(),
        blake3=blake.hexdigest(),
        crc32=f"{crc:08x}",
    )


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _overlap(view: memoryview, at: int, start: int, size: int) -> memoryview:
    """The part of `view`, which begins at byte `at` of a file, that lies in a window."""
    return view[max(0, start - at) : max(0, start + size - at)]
