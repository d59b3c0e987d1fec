"""The chunks of a serialized xorb: huggingface.co/docs/xet/xorb.

Chunks follow each other, each after eight bytes: version, stored size, scheme, raw size, the sizes
in three bytes, little-endian.
A footer that begins with XETBLOB may follow; we make our own index and do not read it.
"""

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import lz4.frame

from hub.errors import BadUpload
from hub.xet.hashes import Tree, XetHash, chunk_hash, to_text

KiB, MiB = 2**10, 2**20

MAX_CHUNKS = 8192
MAX_CHUNK_BYTES = 128 * KiB
# 64 MiB of chunks, which LZ4 may not make smaller, their headers and a footer.
MAX_XORB_BYTES = 65 * MiB

_HEADER = struct.Struct("<B3sB3s")
_FOOTER = b"XETBLOB"
_NONE, _LZ4, _GROUPED_LZ4 = range(3)


class ChunkReader:
    """Raw chunks out of serialized bytes that come in any pieces; holds one chunk at most."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._is_over = False
        # Bytes of whole chunks so far, as they are stored.
        self.position = 0

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The chunks that this piece completes. BadUpload."""
        if self._is_over:
            return
        self._waiting += piece
        at = 0
        while len(self._waiting) - at >= _HEADER.size:
            if self._waiting.startswith(_FOOTER, at):
                self._is_over = True
                self._waiting.clear()
                return
            scheme, stored, raw = self._header(at)
            end = at + _HEADER.size + stored
            if end > len(self._waiting):
                break
            with memoryview(self._waiting) as view:
                body = bytes(view[at + _HEADER.size : end])
            chunk = self._unpacked(scheme, body, raw)
            self.position += end - at
            at = end
            yield chunk
        del self._waiting[:at]

    def finish(self) -> None:
        """BadUpload if the bytes ended inside a chunk."""
        if self._waiting:
            raise self._error("is cut short")

    def _header(self, at: int) -> tuple[int, int, int]:
        version, stored_bytes, scheme, raw_bytes = _HEADER.unpack_from(self._waiting, at)
        stored = int.from_bytes(stored_bytes, "little")
        raw = int.from_bytes(raw_bytes, "little")
        if version != 0:
            raise self._error(f"has version {version}, not 0")
        if scheme not in (_NONE, _LZ4, _GROUPED_LZ4):
            raise self._error(f"has the unknown compression scheme {scheme}")
        if not 0 < raw <= MAX_CHUNK_BYTES:
            raise self._error(f"holds {raw} bytes, not 1 to {MAX_CHUNK_BYTES}")
        if not 0 < stored <= 2 * MAX_CHUNK_BYTES or (scheme == _NONE and stored != raw):
            raise self._error(f"stores {raw} bytes in {stored}")
        return scheme, stored, raw

    def _unpacked(self, scheme: int, body: bytes, size: int) -> bytes:
        if scheme == _NONE:
            return body
        frame = lz4.frame.LZ4FrameDecompressor()
        try:
            # One byte more than announced, so that a frame with more in it is found out.
            data: bytes = frame.decompress(body, max_length=size + 1)
        except RuntimeError as error:
            raise self._error("is no LZ4 frame") from error
        if len(data) != size or not frame.eof or frame.unused_data:
            raise self._error(f"does not unpack to its {size} bytes")
        return _ungrouped(data) if scheme == _GROUPED_LZ4 else data

    def _error(self, what: str) -> BadUpload:
        return BadUpload(f"the chunk at byte {self.position} of the xorb {what}")


def _ungrouped(data: bytes) -> bytes:
    """Undo the grouping by position modulo four: all first bytes, all second bytes, and so on."""
    size = len(data)
    out = bytearray(size)
    at = 0
    for k in range(4):
        count = (size - k + 3) // 4
        out[k::4] = data[at : at + count]
        at += count
    return bytes(out)


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """Where the chunks of a xorb end: two little-endian 32-bit numbers each, stored and raw."""

    data: bytes

    @property
    def n_chunks(self) -> int:
        return len(self.data) // 8

    def ends(self, n_chunks: int) -> tuple[int, int]:
        """How many bytes the first `n_chunks` take, stored and raw."""
        if n_chunks == 0:
            return 0, 0
        stored, raw = struct.unpack_from("<II", self.data, 8 * (n_chunks - 1))
        return stored, raw


class XorbCheck:
    """Follows a xorb as it arrives, and says at its end whether it is the one that was announced."""

    def __init__(self) -> None:
        self._reader = ChunkReader()
        self._tree = Tree()
        self._ends = array("Q")
        self._raw = 0

    @property
    def index(self) -> ChunkIndex:
        return ChunkIndex(struct.pack(f"<{len(self._ends)}I", *self._ends))

    def feed(self, piece: bytes) -> None:
        """BadUpload."""
        for chunk in self._reader.feed(piece):
            if len(self._ends) == 2 * MAX_CHUNKS:
                raise BadUpload(f"the xorb has more than {MAX_CHUNKS} chunks")
            self._tree.add(chunk_hash(chunk), len(chunk))
            self._raw += len(chunk)
            self._ends.extend((self._reader.position, self._raw))

    def finish(self, expected: XetHash) -> None:
        """BadUpload if the xorb is not whole, or another one."""
        self._reader.finish()
        if not self._ends:
            raise BadUpload("the xorb has no chunks")
        found = to_text(self._tree.root())
        if found != expected:
            raise BadUpload(f"the xorb's hash is {found}, not {expected}; send it again")
