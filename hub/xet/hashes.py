"""The hashes of the Xet protocol: huggingface.co/docs/xet/hashing.

As bytes they are BLAKE3 digests; as text each group of eight bytes is written backwards, because
the protocol prints them as four little-endian numbers.
SHA-256 digests inside shards are in the same byte order.
"""

import re
from typing import NewType

from blake3 import blake3

# 64 hexadecimal digits, groups of eight bytes backwards.
XetHash = NewType("XetHash", str)
_TEXT = re.compile(r"[0-9a-f]{64}")

# Of the specification: they separate the kinds of hashes and are no secrets.
_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_RANGE_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")
_FILE_KEY = bytes(32)

NOTHING = bytes(32)
# A node has two children at least and nine at most, four on average.
_MIN_CHILDREN = 3
_MAX_CHILDREN = 9


def to_text(digest: bytes) -> XetHash:
    """The printed form of 32 bytes."""
    return XetHash("".join(digest[i : i + 8][::-1].hex() for i in range(0, 32, 8)))


def is_hash(text: str) -> bool:
    """Whether a text could be a hash of the protocol."""
    return _TEXT.fullmatch(text) is not None


def chunk_hash(data: bytes) -> bytes:
    """Of the bytes of one chunk."""
    return blake3(data, key=_CHUNK_KEY).digest()


def range_hash(chunk_hashes: bytes) -> bytes:
    """Of a run of chunks, from their hashes one after the other; terms in shards carry it."""
    return blake3(chunk_hashes, key=_RANGE_KEY).digest()


def file_hash(root: bytes) -> bytes:
    """Of a file, from the root over its chunks."""
    return root if root == NOTHING else blake3(root, key=_FILE_KEY).digest()


class Tree:
    """The Merkle tree over a row of chunks, built as they pass; a xorb's hash is its root.

    A node ends after the first child from its third on whose hash is a multiple of four (its last
    eight bytes as a little-endian number), or after nine.
    Memory grows with the height, not with the number of chunks.
    """

    def __init__(self) -> None:
        self._levels: list[list[tuple[bytes, int]]] = [[]]
        self._seen = [0]

    def add(self, digest: bytes, size: int) -> None:
        """The next chunk: its hash and its number of bytes."""
        self._add(0, digest, size)

    def root(self) -> bytes:
        """Asked once, after the last chunk; 32 zeros if there was none."""
        level = 0
        while self._seen[level] > 1:
            if self._levels[level]:
                self._close(level)
            level += 1
        return self._levels[level][0][0] if self._seen[level] else NOTHING

    def _add(self, level: int, digest: bytes, size: int) -> None:
        if level == len(self._levels):
            self._levels.append([])
            self._seen.append(0)
        children = self._levels[level]
        children.append((digest, size))
        self._seen[level] += 1
        ends_here = digest[24] % 4 == 0 and len(children) >= _MIN_CHILDREN
        if ends_here or len(children) == _MAX_CHILDREN:
            self._close(level)

    def _close(self, level: int) -> None:
        children = self._levels[level]
        text = "".join(f"{to_text(digest)} : {size}\n" for digest, size in children)
        total = sum(size for _, size in children)
        self._levels[level] = []
        self._add(level + 1, blake3(text.encode(), key=_NODE_KEY).digest(), total)
