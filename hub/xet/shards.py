"""The files that an uploaded shard describes: huggingface.co/docs/xet/shard.

After a header of 48 bytes come records of 48 bytes.
Files first: a record with the file's hash, flags and the number of its terms, the terms, as many
hashes of their chunks if a flag says so, and the SHA-256 if another does.
Then xorbs and their chunks, which we know better ourselves.
A record that begins with 32 bytes of 0xFF ends each of the two sections.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from hub.blobs.store import Sha256
from hub.errors import BadUpload
from hub.xet.hashes import XetHash, to_text

MAX_SHARD_BYTES = 64 * 2**20

_TAG = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9")
_VERSION = 2
_SIZE = 48
_HEADER = struct.Struct("<32sQQ")
_FILE = struct.Struct("<32sII8x")
_TERM = struct.Struct("<32s4xIII")
_PROOF = struct.Struct("<32s16x")
_XORB = struct.Struct("<32s4xI8x")
_BOOKEND = b"\xff" * 32
_HAS_PROOFS = 1 << 31
_HAS_SHA256 = 1 << 30


@dataclass(frozen=True, slots=True)
class Term:
    """The chunks [start, end) of a xorb, `size` bytes; `proof` is the hash of their hashes."""

    xorb: XetHash
    size: int
    start: int
    end: int
    proof: bytes | None


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file: its claims about itself, and its terms, kept packed because there can be many."""

    hash: bytes
    sha256: Sha256 | None
    packed_terms: bytes
    packed_proofs: bytes | None

    def terms(self) -> Iterator[Term]:
        """In the order of the file's bytes."""
        proofs = None
        if self.packed_proofs is not None:
            proofs = _PROOF.iter_unpack(self.packed_proofs)
        for xorb, size, start, end in _TERM.iter_unpack(self.packed_terms):
            yield Term(to_text(xorb), size, start, end, next(proofs)[0] if proofs else None)


def read_shard(file: BinaryIO) -> Iterator[ShardFile]:
    """From the start of a seekable file to its end; memory is that of its largest file's terms.

    BadUpload, which may come after files that were fine.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    tag, version, footer = _HEADER.unpack(_take(file, size, 1, "its header"))
    if tag != _TAG:
        raise BadUpload("the body is no shard")
    if version != _VERSION:
        raise BadUpload(f"the shard has version {version}, not {_VERSION}")
    while True:
        digest, flags, n_terms = _FILE.unpack(_take(file, size, 1, "its files"))
        if digest == _BOOKEND:
            break
        if flags & ~(_HAS_PROOFS | _HAS_SHA256):
            raise BadUpload(f"a file of the shard has unknown flags {flags:#x}")
        terms = _take(file, size, n_terms, "a file's terms")
        proofs = _take(file, size, n_terms, "a file's hashes") if flags & _HAS_PROOFS else None
        sha256 = None
        if flags & _HAS_SHA256:
            sha256 = Sha256(to_text(_take(file, size, 1, "a file's SHA-256")[:32]))
        yield ShardFile(digest, sha256, terms, proofs)
    while True:
        digest, n_chunks = _XORB.unpack(_take(file, size, 1, "its xorbs"))
        if digest == _BOOKEND:
            break
        _take(file, size, n_chunks, "a xorb's chunks")
    # Tables for looking things up follow where a footer is announced.
    if not footer and file.tell() != size:
        raise BadUpload(f"{size - file.tell()} bytes follow the end of the shard")


def _take(file: BinaryIO, size: int, n_records: int, what: str) -> bytes:
    # Compared before reading: the number is the client's, and memory would be taken for it.
    wanted = n_records * _SIZE
    if wanted > size - file.tell():
        raise BadUpload(f"the shard is cut short in {what}")
    return file.read(wanted)
