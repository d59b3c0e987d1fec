"""ASGI's `http.response.zerocopysend` under uvicorn: files go from the page cache to the socket.

uvicorn does not have the extension. Reading a file into Python and writing it again takes as long
as sending it, so a large download would take twice as long as from a server with sendfile(2).
Elsewhere than on Linux, under another server or with TLS the extension is not announced, and
responses send their bytes.
"""

import asyncio
import errno
import os
import sys
from io import FileIO

from anyio import to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

ZERO_COPY = "http.response.zerocopysend"
# Of one system call: others wait for their turn meanwhile.
PIECE = 2**20
# How often a client that reads nothing is looked after: nobody says when it ends its connection.
LOOK_S = 5


class ZeroCopySend:
    """ASGI middleware that announces the extension and does what its messages ask for.

    Only what the server gives passes here, so it is the outermost one. To a client that has gone
    its `send` raises OSError, as ASGI says since 2.4.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(receive, "__self__", None)
        if sys.platform != "linux" or not isinstance(cycle, RequestResponseCycle):
            await self._app(scope, receive, send)
            return
        if scope["scheme"] != "http":  # TLS encrypts in this process.
            await self._app(scope, receive, send)
            return

        async def send_file_too(message: Message) -> None:
            if message["type"] != ZERO_COPY:
                await send(message)
                return
            try:
                await _send_file(cycle, message["file"], message["offset"], message["count"])
            except ConnectionError:
                cycle.transport.abort()
                # uvicorn says so of the last of pipelined requests alone, and takes a response for
                # a faulty one that ends early while it has its client.
                cycle.disconnected = True
                raise
            more = message.get("more_body", False)
            await send({"type": "http.response.body", "body": b"", "more_body": more})

        scope.setdefault("extensions", {})[ZERO_COPY] = {}
        await self._app(scope, receive, send_file_too)


async def _send_file(cycle: RequestResponseCycle, file: FileIO, offset: int, count: int) -> None:
    """All of it has left for the client, or ConnectionError."""
    await _until_written(cycle)
    assert cycle.response_started
    assert not cycle.chunked_encoding
    # A descriptor of its own: the event loop lets nobody wait for one of its transports.
    descriptor = os.dup(cycle.transport.get_extra_info("socket").fileno())
    try:
        while count:
            _require_client(cycle)
            size = min(PIECE, count)
            try:
                if _is_cached(file.fileno(), offset, size):
                    sent = os.sendfile(descriptor, file.fileno(), offset, size)
                else:  # A disk that is waited for here would stop every other request.
                    sent = await to_thread.run_sync(
                        os.sendfile, descriptor, file.fileno(), offset, size
                    )
            except BlockingIOError:
                await _until_writable(descriptor)
                continue
            if not sent:
                raise OSError(errno.EIO, "the file is shorter than it was", file.name)
            offset, count = offset + sent, count - sent
            cycle.expected_content_length -= sent
            await asyncio.sleep(0)
    finally:
        os.close(descriptor)


async def _until_written(cycle: RequestResponseCycle) -> None:
    """The head of the response, and what was pipelined before it, come first."""
    _require_client(cycle)
    wait_s = 0.0
    while cycle.transport.get_write_buffer_size():
        await asyncio.sleep(wait_s)
        _require_client(cycle)
        wait_s = 0.01


def _require_client(cycle: RequestResponseCycle) -> None:
    if cycle.disconnected or cycle.transport.is_closing():
        raise ConnectionResetError(errno.ECONNRESET, "the client has gone")


async def _until_writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(descriptor, wake)
    timer = loop.call_later(LOOK_S, wake)
    try:
        await ready
    finally:
        timer.cancel()
        loop.remove_writer(descriptor)


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether both ends of a piece are in the page cache; what lies between was read with them."""
    byte = memoryview(bytearray(1))
    return all(read_cached(descriptor, byte, at) for at in (offset, offset + size - 1))


def read_cached(descriptor: int, buffer: memoryview, offset: int) -> int | None:
    """How much was read; None if that would have waited for a disk, or nobody can tell."""
    if sys.platform != "linux":
        return None
    try:
        return os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        return None
