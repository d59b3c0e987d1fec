"""What merge asks of a place for bytes, of a disk and of an S3 store alike."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from cli import ranges, s3
from cli.ranges import Blocks
from cli.refs import open_ref, place_of
from merge.blocks import Options, write_blocks
from merge.errors import BadFile
from merge.formats.header import read_header
from merge.formats.sources import File, beside, fill, opened, read_bytes
from merge.formats.targets import Disk, Target
from merge.threads import Cancelled
from tests.fixtures.s3 import S3Server, serve_s3


@dataclass(frozen=True)
class Place:
    """Where tests keep files, and what it has in it besides."""

    put: Callable[[str, bytes], None]
    get: Callable[[str], bytes | None]
    file: Callable[[str], File]
    target: Callable[[str], Target]
    leftovers: Callable[[], list[str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["disk", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    if request.param == "disk":
        yield _disk(tmp_path)
        return
    # Small enough that a few kB are many requests.
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(ranges, "KEPT", 5)
    monkeypatch.setattr(s3, "HEAD_BYTES", 100)
    monkeypatch.setattr(s3, "_PART_BYTES", 700)
    server: S3Server = request.getfixturevalue("server")
    server.use(monkeypatch)
    with Blocks() as blocks:
        yield _s3(server, f"bucket-{tmp_path.name[-40:].strip('_').replace('_', '-')}", blocks)


def _disk(folder: Path) -> Place:
    def put(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)

    def get(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.exists() else None

    return Place(
        put=put,
        get=get,
        file=lambda name: folder / name,
        target=lambda name: Disk(folder / name),
        leftovers=lambda: [p.name for p in folder.iterdir() if p.name.startswith(".")],
    )


def _s3(server: S3Server, bucket: str, blocks: Blocks) -> Place:
    client = server.client()
    client.create_bucket(Bucket=bucket)

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=bucket, Key=name, Body=data)

    def get(name: str) -> bytes | None:
        held = [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", [])]
        return client.get_object(Bucket=bucket, Key=name)["Body"].read() if name in held else None

    def target(name: str) -> Target:
        place = place_of(f"s3://{bucket}/{name}", force=True)
        assert not isinstance(place, Path)
        return place

    return Place(
        put=put,
        get=get,
        file=lambda name: open_ref(f"s3://{bucket}/{name}", blocks),
        target=target,
        leftovers=lambda: [
            upload["Key"]
            for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        ],
    )


DATA = bytes(Random(0).randbytes(12_345))


def test_any_range_is_read_and_the_end_is_short(place: Place) -> None:
    place.put("f", DATA)
    with opened(place.file("f")) as source:
        assert source.size == len(DATA)
        for offset, size in [
            (0, 10),
            (95, 10),
            (990, 20),
            (3000, 5000),
            (12_000, 345),
            (0, 12_345),
        ]:
            assert read_bytes(source, offset, size) == DATA[offset : offset + size]
        buffer = memoryview(bytearray(100))
        assert source.read_at(buffer, 12_300) == 45
        assert buffer[:45] == DATA[12_300:]
        assert source.read_at(buffer, 12_345) == 0
        with pytest.raises(BadFile, match="st_short_read"):
            fill(source, buffer, 12_300)


def test_an_empty_file_is_read(place: Place) -> None:
    place.put("f", b"")
    with opened(place.file("f")) as source:
        assert (source.size, source.read_at(memoryview(bytearray(3)), 0)) == (0, 0)
    with pytest.raises(BadFile, match="st_too_small"):
        read_header(place.file("f"))


def test_several_threads_read_at_once(place: Place) -> None:
    place.put("f", DATA)
    random = Random(1)
    spans = [
        (begin := random.randrange(12_000), random.randrange(12_345 - begin)) for _ in range(99)
    ]
    with opened(place.file("f")) as source, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda span: read_bytes(source, *span), spans))
    assert found == [DATA[begin : begin + size] for begin, size in spans]


def test_what_lies_beside_is_found(place: Place) -> None:
    for name in ("f", "g"):
        place.put(name, name.encode())
    found = beside(place.file("f"), "g")
    assert found is not None
    with opened(found) as source:
        assert read_bytes(source, 0, source.size) == b"g"
    assert beside(place.file("f"), "nothing") is None


def test_blocks_in_any_order_from_several_threads_are_one_file(place: Place) -> None:
    place.put("f", b"old")
    target = place.target("f")
    with target.create(len(DATA), 1000) as output:

        def write(offset: int) -> None:
            n = min(1000, len(DATA) - offset)
            buffer = bytearray(4096)
            buffer[:n] = DATA[offset : offset + n]
            output.write(memoryview(buffer), n, offset)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, reversed(range(0, len(DATA), 1000))))
        assert place.get("f") == b"old"
    assert place.get("f") == DATA
    assert place.leftovers() == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_output_that_fails_changes_nothing(
    place: Place, error: type[BaseException], before: bytes | None
) -> None:
    if before is not None:
        place.put("f", before)

    def half(target: Target) -> None:
        with target.create(2000, 1000) as output:
            output.write(memoryview(bytearray(4096)), 1000, 0)
            raise error

    with pytest.raises(error):
        half(place.target("f"))
    assert place.get("f") == before
    assert place.leftovers() == []


def test_blocks_are_filled_and_hashed_on_the_way(place: Place) -> None:
    seen: list[int] = []

    def copy(buffer: memoryview, offset: int) -> None:
        buffer[:] = DATA[offset : offset + len(buffer)]

    options = Options(3, True, seen.append, lambda: False)
    assert write_blocks(place.target("f"), len(DATA), copy, options) == (
        hashlib.sha256(DATA).hexdigest()
    )
    assert (place.get("f"), sum(seen)) == (DATA, len(DATA))


def test_a_cancelled_output_leaves_nothing(place: Place) -> None:
    asked = threading.Event()

    def cancelled() -> bool:
        was = asked.is_set()
        asked.set()
        return was

    options = Options(1, True, lambda size: None, cancelled, block=1000)
    with pytest.raises(Cancelled):
        write_blocks(place.target("f"), len(DATA), lambda buffer, offset: None, options)
    assert place.get("f") is None
    assert place.leftovers() == []
