"""The bytes of a blob as a response."""

import errno
from collections.abc import AsyncIterator, Callable, Mapping
from io import FileIO
from pathlib import Path

import anyio.lowlevel
from anyio import to_thread
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hub.blobs.store import BlobStore, Sha256
from hub.zerocopy import ZERO_COPY, read_cached

PIECE = 2**18


class BlobResponse(StreamingResponse):
    """The bytes [start, end) of a blob; `sent` is called after the last of them."""

    def __init__(
        self,
        store: BlobStore,
        sha256: Sha256,
        start: int,
        end: int,
        headers: Mapping[str, str],
        *,
        status: int = 200,
        sent: Callable[[], None] | None = None,
    ) -> None:
        self._path = store.path(sha256)
        self._range = start, end
        self._sent = sent
        self._pieces = read_blob(store, sha256, start, end)
        self._first: bytes | memoryview = b""
        super().__init__(
            self._content(),
            status,
            {**headers, "Content-Length": str(end - start)},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._path is None or ZERO_COPY not in scope.get("extensions", {}):
            # Before the status is sent: a store that is away is an error and no broken download.
            self._first = await anext(self._pieces, b"")
            await super().__call__(scope, receive, send)
            return
        start, end = self._range
        file = await to_thread.run_sync(FileIO, self._path)
        with file:
            head = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **head})
            body = {"file": file, "offset": start, "count": end - start}
            try:
                await send({"type": ZERO_COPY, **body})
            except ConnectionError:  # A download that broke is none.
                return
        if self._sent is not None:
            self._sent()

    async def _content(self) -> AsyncIterator[bytes | memoryview]:
        piece = self._first
        while piece:
            yield piece
            # What was sent to a client that has gone takes no time: let it be known.
            await anyio.lowlevel.checkpoint()
            piece = await anext(self._pieces, b"")
        if self._sent is not None:
            self._sent()


async def read_blob(
    store: BlobStore, sha256: Sha256, start: int, end: int
) -> AsyncIterator[bytes | memoryview]:
    """The bytes [start, end) of a blob, for a server that cannot send files."""
    path = await to_thread.run_sync(store.path, sha256)
    if path is not None:
        async for piece in _read_file(path, start, end):
            yield piece
        return
    chunks = await to_thread.run_sync(store.open, sha256, start, end)
    while chunk := await to_thread.run_sync(next, chunks, b""):
        yield chunk


async def _read_file(path: Path, start: int, end: int) -> AsyncIterator[memoryview]:
    """Pieces that fit the processor's cache, read without a thread where the page cache has them.

    A hop to a thread takes longer than reading a piece from memory; reading from the disk here
    would stop every other request.
    """
    file = await to_thread.run_sync(FileIO, path)
    try:
        while start < end:
            piece = memoryview(bytearray(min(PIECE, end - start)))
            count = read_cached(file.fileno(), piece, start)
            if count is None:
                count = await to_thread.run_sync(_read_at, file, piece, start)
            if not count:
                raise OSError(errno.EIO, f"{path.name} is shorter than it was")
            start += count
            yield piece[:count]
    finally:
        file.close()


def _read_at(file: FileIO, piece: memoryview, offset: int) -> int:
    file.seek(offset)
    return file.readinto(piece)
