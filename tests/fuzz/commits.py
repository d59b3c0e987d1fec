"""Bytes of any kind as the body of a commit, see `tests/fuzz/__main__.py`.

The first two bytes say how the rest is cut into the pieces of a network.
A body is refused with BadRequest, or read the same however it was cut.
"""

import asyncio
import json
from collections.abc import AsyncIterator

import atheris

with atheris.instrument_imports(include=["hub.hf.ndjson"]):
    from hub.errors import BadRequest
    from hub.hf import ndjson

# Small, so that the fuzzer reaches what happens to a line that is longer.
ndjson.HEAD_BYTES, ndjson.TAIL_BYTES, ndjson.MAX_LINES = 128, 64, 20


def seeds() -> list[bytes]:
    """Bodies as huggingface_hub writes them, and ones whose lines are longer than a buffer."""
    header = {"key": "header", "value": {"summary": "s", "description": ""}}
    long = {"content": "QUJD" * 40, "path": "p", "encoding": "base64"}
    short = {"content": "QUI=", "path": 'a"content":"b', "encoding": "base64"}
    text = {"path": "a.md", "content": "\u00e9", "encoding": "utf-8"}
    lfs = {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}
    lines = [header]
    lines += [{"key": "file", "value": value} for value in (long, short, text)]
    lines += [{"key": "lfsFile", "value": lfs}, {"key": "deletedFile", "value": {"path": "x"}}]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    bodies = [body, body + b"\n", *(json.dumps(line).encode() for line in lines)]
    return [cut + body for body in bodies for cut in (b"\x06\0", b"\x3f\0", b"\xff\0")]


def read(body: bytes, cut: int) -> list[ndjson.Line[bytes]] | None:
    """The lines of a body in pieces of `cut` bytes; None if it is refused."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), cut):
            yield body[start : start + cut]

    async def keep(content: AsyncIterator[bytes]) -> bytes:
        return b"".join([piece async for piece in content])

    async def collect() -> list[ndjson.Line[bytes]]:
        return [line async for line in ndjson.read_lines(pieces(), keep)]

    try:
        return asyncio.run(collect())
    except BadRequest:
        return None


def one_input(data: bytes) -> None:
    """Neither another error than BadRequest, nor a result that depends on the network."""
    cut, body = 1 + int.from_bytes(data[:2], "little") % 200, data[2:]
    found = read(body, cut)
    if found is None:
        return
    whole = read(body, max(1, len(body)))
    assert whole is None or whole == found, (whole, found)
    for line in found:
        assert (line.kept is not None) == (line.key == "file")
