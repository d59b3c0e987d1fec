"""The wire formats alone: ranges, the commit body in every cut, cards, addresses."""

import asyncio
import base64
import itertools
import json
import os
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.errors import BadRequest
from hub.hf import ndjson
from hub.hf.cards import as_json, card_tags
from hub.hf.info import date
from hub.hf.ndjson import Line, read_lines
from hub.hf.ranges import RangeNotSatisfiable, parse_range

# Ranges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-", (0, 10)),
        ("bytes=3-5", (3, 6)),
        ("bytes=9-9", (9, 10)),
        ("bytes=3-99", (3, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=5-3", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("bytes= 0-1", None),
        ("items=0-1", None),
        ("bytes=0x1-2", None),
        ("bytes=\u0661-2", None),
        ("bytes=" + "9" * 1000 + "-", None),
    ],
)
def test_a_range_of_ten_bytes(header: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=999-1000", "bytes=-0"])
def test_a_range_past_the_end_is_not_satisfiable(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range(header, 10)


def test_no_range_of_an_empty_file_is_satisfiable() -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range("bytes=0-", 0)
    with pytest.raises(RangeNotSatisfiable):
        parse_range("bytes=-5", 0)


@given(st.text(max_size=80), st.integers(0, 2**40))
def test_any_header_gives_a_range_inside_the_file_or_none(header: str, size: int) -> None:
    try:
        found = parse_range("bytes=" + header, size)
    except RangeNotSatisfiable:
        return
    assert found is None or 0 <= found[0] < found[1] <= size


# Commit bodies


def read(body: bytes, cuts: Sequence[int] = ()) -> list[Line[bytes]]:
    """The lines of a body that arrives cut into pieces."""

    async def pieces() -> AsyncIterator[bytes]:
        edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
        for start, end in itertools.pairwise(edges):
            yield body[start:end]

    async def keep(content: AsyncIterator[bytes]) -> bytes:
        return b"".join([piece async for piece in content])

    async def collect() -> list[Line[bytes]]:
        return [line async for line in read_lines(pieces(), keep)]

    return asyncio.run(collect())


def file_line(path: str, content: bytes) -> bytes:
    """As huggingface_hub writes it: the content before the path."""
    text = base64.b64encode(content).decode()
    value = {"content": text, "path": path, "encoding": "base64"}
    return json.dumps({"key": "file", "value": value}).encode() + b"\n"


HEADER = b'{"key": "header", "value": {"summary": "s"}}\n'
TRAP = 'a"content":"b\\"content": "c'


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ndjson, "HEAD_BYTES", 200)
    monkeypatch.setattr(ndjson, "TAIL_BYTES", 200)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 149, 150, 151, 152, 153, 5000])
def test_files_arrive_whole_however_the_body_is_cut(size: int) -> None:
    content = os.urandom(size)
    body = HEADER + file_line(TRAP, content) + b"\n" + file_line("b", b"second")
    for cuts in ([], range(0, len(body), 7), range(0, len(body), 64), [len(body) - 1], range(300)):
        lines = read(body, cuts)
        assert [line.key for line in lines] == ["header", "file", "file"]
        assert [line.kept for line in lines] == [None, content, b"second"]
        assert lines[1].value == {"path": TRAP, "encoding": "base64"}


@pytest.mark.usefixtures("small_buffers")
def test_the_path_may_come_first_and_the_last_line_needs_no_end() -> None:
    content = os.urandom(1000)
    value = {
        'odd"content': "not it",
        "path": TRAP,
        "encoding": "base64",
        "content": base64.b64encode(content).decode(),
    }
    lines = read(HEADER + json.dumps({"value": value, "key": "file"}).encode())
    assert (lines[1].kept, lines[1].value["path"]) == (content, TRAP)


def test_short_files_may_be_text() -> None:
    value = {"path": "a.md", "content": "é\n", "encoding": "utf-8"}
    assert read(json.dumps({"key": "file", "value": value}).encode())[0].kept == "é\n".encode()


def long_line(**changes: object) -> bytes:
    value = {"content": "QUJD" * 100, "path": "p", "encoding": "base64"} | changes
    return json.dumps({"key": "file", "value": value}).encode()


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"not json\n", "line 1 is not JSON"),
        (HEADER + b'["key"]', "line 2 is not"),
        (b'{"key": "file", "value": 3}', "line 1: the value of 'file' is not an object"),
        (b'{"key": "file", "value": {"path": "p"}}', "line 1: a file has its content"),
        (b'{"key": "file", "value": {"path": "p", "content": "a!=="}}', "not base64"),
        (b'{"key": "file", "value": {"path": "p", "content": "QUJDR"}}', "cut short"),
        (b'{"key": "file", "value": {"path": "p", "content": "QUI=QUJD"}}', "not base64"),
        (
            b'{"key": "x", "value": {"a": "' + b"y" * 300 + b'"}}',
            "longer than 200 bytes and is not",
        ),
        (long_line().replace(b'"file"', b'"lfsFile"'), "is not a file"),
        (long_line(content="QUJD" * 100 + "!"), "base64"),
        (long_line(content="QUI=" * 100), "base64"),
        (long_line(content="QUJD" * 100 + "Q"), "cut short"),
        (long_line(encoding="utf-8"), "must be base64"),
        (long_line(path="x" * 300), "bytes follow the content"),
        (long_line()[:-30], "is not JSON"),
        (long_line()[:300], "ends inside a file"),
        (long_line()[:-2] + b', "content": "QUJD"}}', "is not a file"),
        (b'{"content": "' + b"QUJD" * 100 + b'", "key": "file", "value": {}}', "is not a file"),
        (b"[" * 100_000, "longer than"),
    ],
)
def test_a_malformed_body_names_the_line(body: bytes, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        read(body)
    with pytest.raises(BadRequest):
        read(body, range(0, len(body), 11))


def test_nested_json_is_refused_and_does_not_end_the_server() -> None:
    with pytest.raises(BadRequest, match="not JSON"):
        read(b'{"key": "x", "value": ' + b"[" * 500_000)


def test_a_commit_has_a_largest_number_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ndjson, "MAX_LINES", 3)
    assert len(read(HEADER * 3)) == 3
    with pytest.raises(BadRequest, match="at most 3 lines"):
        read(HEADER * 4)


def test_a_long_file_is_never_held_whole() -> None:
    """32 MiB pass through; the largest piece handed on stays near the size of a network read."""
    largest = 0

    async def body() -> AsyncIterator[bytes]:
        yield HEADER + b'{"key": "file", "value": {"content": "'
        for _ in range(512):
            yield b"QUJD" * 2**14
        yield b'", "path": "p", "encoding": "base64"}}\n'

    async def keep(content: AsyncIterator[bytes]) -> int:
        nonlocal largest
        total = 0
        async for piece in content:
            largest = max(largest, len(piece))
            total += len(piece)
        return total

    async def collect() -> list[int | None]:
        return [line.kept async for line in read_lines(body(), keep)]

    assert asyncio.run(collect()) == [None, 512 * 3 * 2**14]
    assert largest <= ndjson.HEAD_BYTES + 2**16


# Cards


def test_front_matter_as_json_values() -> None:
    matter = {
        "date": datetime(2024, 1, 2, tzinfo=UTC).date(),
        "numbers": [float("nan"), 1.5, {"a": b"hi"}],
    }
    assert as_json(matter) == {"date": "2024-01-02", "numbers": ["nan", 1.5, {"a": "hi"}]}


def test_tags_of_a_card() -> None:
    card = {
        "tags": ["x", "x"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": ["a/b"],
        "base_model_relation": "adapter",
        "license": "mit",
        "language": "en",
        "datasets": ["d/e"],
    }
    assert card_tags(card) == [
        "x",
        "diffusers",
        "text-to-image",
        "base_model:a/b",
        "base_model:adapter:a/b",
        "en",
        "license:mit",
        "dataset:d/e",
    ]


def test_dates_end_in_z() -> None:
    moment = datetime(2025, 1, 2, 3, 4, 5, 6789, UTC)
    assert date(moment) == "2025-01-02T03:04:05.006Z"
    assert date(moment.astimezone(timezone(timedelta(hours=5)))) == "2025-01-02T03:04:05.006Z"
