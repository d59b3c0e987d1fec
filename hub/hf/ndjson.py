"""The body of a commit: one JSON object per line, read without ever holding a whole file.

A line is `{"key": ..., "value": {...}}`. A regular file travels as base64 inside its line, so a line
can be far larger than memory should be: past `HEAD_BYTES` the base64 text is decoded while it
arrives and handed to `keep` in pieces. Memory is bounded by HEAD_BYTES plus one network chunk.
"""

import binascii
import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hub.errors import BadRequest

HEAD_BYTES = 2**20
TAIL_BYTES = 2**16
MAX_LINES = 25_000

# In JSON a quote inside a string is written \", so outside the look-behind's reach the bytes
# "content":" can only be a member's name, its colon and the start of its value.
_CONTENT = re.compile(rb'(?<!\\)"content"[ \t]*:[ \t]*"')

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Line(Generic[Kept]):
    """One line; `kept` is what `keep` made of a file's content, and `value` has it no longer."""

    number: int
    key: str
    value: dict[str, Any]
    kept: Kept | None


async def read_lines(
    body: AsyncIterable[bytes], keep: Callable[[AsyncIterator[bytes]], Awaitable[Kept]]
) -> AsyncIterator[Line[Kept]]:
    """The lines of a commit body; BadRequest names the line that is malformed."""
    source = _Source(body)
    number = 0
    while await source.fill(HEAD_BYTES):
        number += 1
        if number > MAX_LINES:
            raise BadRequest(f"a commit has at most {MAX_LINES} lines; send several commits")
        text = source.take_line()
        if text is not None:
            if text.strip():
                yield await _short_line(number, text, keep)
        else:
            yield await _long_line(number, source, keep)


async def _short_line(
    number: int, text: bytes, keep: Callable[[AsyncIterator[bytes]], Awaitable[Kept]]
) -> Line[Kept]:
    key, value = _parse(number, text)
    if key != "file":
        return Line(number, key, value, None)
    content = value.pop("content", None)
    if not isinstance(content, str):
        raise BadRequest(f"line {number}: a file has its content as a string")
    if value.get("encoding", "base64") == "utf-8":
        return Line(number, key, value, await keep(_one(content.encode())))
    return Line(number, key, value, await keep(_decoded(number, _one(content.encode()))))


async def _long_line(
    number: int, source: "_Source", keep: Callable[[AsyncIterator[bytes]], Awaitable[Kept]]
) -> Line[Kept]:
    start = _CONTENT.search(source.buffer)
    if start is None:
        raise BadRequest(f"line {number} is longer than {HEAD_BYTES} bytes and is not a file")
    head = source.take(start.end())
    kept = await keep(_decoded(number, source.until_quote()))
    await source.fill(TAIL_BYTES)
    tail = source.take_line()
    if tail is None:
        raise BadRequest(f"line {number}: more than {TAIL_BYTES} bytes follow the content")
    key, value = _parse(number, head + tail)
    # What was decoded must have been the content of a file, in base64, and the only one.
    if key != "file" or value.pop("content", None) != "":
        raise BadRequest(f"line {number} is longer than {HEAD_BYTES} bytes and is not a file")
    if value.get("encoding", "base64") != "base64":
        raise BadRequest(f"line {number}: content of this size must be base64")
    return Line(number, key, value, kept)


def _parse(number: int, text: bytes) -> tuple[str, dict[str, Any]]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"line {number} is not JSON") from error
    if not isinstance(line, dict) or not isinstance(line.get("key"), str):
        raise BadRequest(f'line {number} is not {{"key": …, "value": …}}')
    if not isinstance(line.get("value"), dict):
        raise BadRequest(f"line {number}: the value of {line['key']!r} is not an object")
    return line["key"], line["value"]


async def _one(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _decoded(number: int, text: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest, ended = b"", False
    async for piece in text:
        if ended:
            raise BadRequest(f"line {number}: base64 goes on after its padding")
        piece = rest + piece
        whole = len(piece) - len(piece) % 4
        piece, rest = piece[:whole], piece[whole:]
        if piece:
            ended = piece.endswith(b"=")
            try:
                yield binascii.a2b_base64(piece, strict_mode=True)
            except binascii.Error as error:
                raise BadRequest(f"line {number}: the content is not base64") from error
    if rest:
        raise BadRequest(f"line {number}: the base64 of the content is cut short")


class _Source:
    """A buffer over the chunks of a request body."""

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._chunks = aiter(body)
        self._ended = False
        self.buffer = bytearray()

    async def fill(self, size: int) -> bool:
        """Read until a line end, `size` bytes or the end of the body; False if nothing is left."""
        seen = 0
        while not self._ended and len(self.buffer) < size:
            if self.buffer.find(b"\n", seen) >= 0:
                break
            seen = len(self.buffer)
            self.buffer += await self._next()
        return bool(self.buffer)

    def take_line(self) -> bytes | None:
        """The next line, or None if its end is not in the buffer yet."""
        end = self.buffer.find(b"\n")
        if end >= 0:
            return self.take(end + 1)
        return self.take(len(self.buffer)) if self._ended else None

    def take(self, size: int) -> bytes:
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    async def until_quote(self) -> AsyncIterator[bytes]:
        """Everything before the next quote, piece by piece; the quote stays in the buffer."""
        while (end := self.buffer.find(b'"')) < 0:
            if self.buffer:
                yield self.take(len(self.buffer))
            if self._ended:
                raise BadRequest("the body ends inside a file")
            self.buffer += await self._next()
        if end:
            yield self.take(end)

    async def _next(self) -> bytes:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            self._ended = True
            return b""
