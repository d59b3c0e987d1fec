"""Whatever a power cut leaves of files that were not made durable: no acknowledged blob is lost,
and none is ever seen with other bytes."""

import hashlib
import random
import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import pytest

from hub.blobs import durable
from hub.blobs.files import FileBlobStore
from hub.blobs.store import Sha256
from tests.fixtures.power import Recorder, without_fsync

CONTENTS = [b"first" * 3000, b"second" * 1000, b"third", b"fourth" * 200, b"fifth!" * 2000]
HALF = len(CONTENTS[-1]) // 2


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record(root: Path) -> Recorder:
    """Uploads of every kind into a new store, one of them twice, one of them collected."""
    (root / "disk").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patches:
        recorder = Recorder(root / "disk", patches)
        store = FileBlobStore(root / "disk" / "store")
        recorder.mark(f"id {store.id}")
        first, second, third, fourth, fifth = CONTENTS
        store.put([first[:7000], first[7000:]])
        recorder.mark(f"has {sha(first)}")
        store.put([second], size=len(second))
        recorder.mark(f"has {sha(second)}")
        store.put([first])
        store.put([third])
        recorder.mark(f"has {sha(third)}")
        recorder.mark(f"may lose {sha(second)}")
        store.trash(Sha256(sha(second)))
        recorder.mark(f"lacks {sha(second)}")
        made = store.put([fourth])
        recorder.mark(f"has {made.sha256}")
        handle = store.parts.begin()
        for number in (2, 1):
            offset = (number - 1) * HALF
            part = arriving(fifth[offset:][:HALF])
            anyio.run(partial(store.parts.put, handle, number, offset, HALF, part))
            recorder.mark(f"part {offset} of {handle}")
        recorder.mark(f"may lose {handle}")
        store.parts.finish(handle, [], Sha256(sha(fifth)), len(fifth))
        recorder.mark(f"has {sha(fifth)}")
    return recorder


async def arriving(content: bytes) -> AsyncIterator[bytes]:
    yield content


def check(recorder: Recorder, cut_at: int, image: Path) -> None:
    said = [mark for at, mark in recorder.marks if at <= cut_at]
    wanted = {mark.removeprefix("has ") for mark in said if mark.startswith("has ")}
    wanted -= {mark.split()[-1] for mark in said if "lose" in mark}
    if any(mark.startswith("id ") for mark in said):
        assert (image / "store" / "STORE_ID").read_text().strip() == said[0].removeprefix("id ")
    (image / "store").mkdir(exist_ok=True)
    store = FileBlobStore(image / "store")
    for visible, _, _ in store.inventory():
        assert sha(b"".join(store.open(visible))) == visible
    for sha256 in wanted:
        assert store.size(Sha256(sha256)) is not None, f"{sha256} was acknowledged"
    for _, offset, _, handle in (mark.split() for mark in said if mark.startswith("part ")):
        if f"may lose {handle}" not in said:
            arrived = (image / "store" / "parts" / handle).read_bytes()[int(offset) :][:HALF]
            assert arrived == CONTENTS[-1][int(offset) :][:HALF]
    if f"lacks {sha(CONTENTS[1])}" in said:
        assert store.size(Sha256(sha(CONTENTS[1]))) is None
        assert (image / "store" / "trash" / sha(CONTENTS[1])).read_bytes() == CONTENTS[1]
    for content in CONTENTS:
        store.put([content])
        assert b"".join(store.open(Sha256(sha(content)))) == content
    store.sweep(0)
    assert not list((image / "store" / "tmp").iterdir())


def try_cut(recorder: Recorder, folder: Path, rng: random.Random) -> None:
    """One power cut at a random moment with a random rest."""
    cut_at = rng.randrange(recorder.clock + 1)
    sure = rng.choice((0.0, 0.5, 0.9))

    def keep() -> float:
        return 0.0 if rng.random() < sure else rng.choice((1.0, 1.0, rng.random()))

    recorder.image(cut_at, keep).write_to(folder)
    with without_fsync():
        check(recorder, cut_at, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return record(tmp_path_factory.mktemp("power"))


def test_a_power_cut_loses_nothing_that_was_acknowledged(
    recorder: Recorder, tmp_path: Path
) -> None:
    rng = random.Random(1)
    for _ in range(100):
        try_cut(recorder, tmp_path / "image", rng)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_thousand_power_cuts_lose_nothing_that_was_acknowledged(
    recorder: Recorder, tmp_path: Path
) -> None:
    rng = random.Random(2)
    for _ in range(5000):
        try_cut(recorder, tmp_path / "image", rng)


@pytest.mark.parametrize("forgotten", ["sync_file", "sync_folder"])
def test_the_simulation_finds_a_store_that_forgets_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    monkeypatch.setattr(durable, forgotten, lambda _: None)
    recorder = record(tmp_path / "careless")
    monkeypatch.undo()
    rng = random.Random(0)

    def many() -> None:
        for _ in range(200):
            try_cut(recorder, tmp_path / "image", rng)

    with pytest.raises((AssertionError, FileNotFoundError)):
        many()
