"""A power cut under a whole hub: its catalogue is what the last COMMIT made of it, which SQLite
promises, and of its blobs any part is there that was not made durable before."""

import random
import shutil
import sqlite3
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from hub.adapters.service import publish
from hub.blobs import durable
from hub.context import Hub, open_hub
from hub.db import now
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.settings import Settings
from hub.upkeep import gc
from hub.upkeep.manifests import write_missing
from hub.users import service as users
from tests.fixtures import forge
from tests.fixtures.forge import ALL, FROM_XET, LARGE, SMALL, sha
from tests.fixtures.malformed import entry, frame
from tests.fixtures.power import Recorder, without_fsync

KEPT, GONE, TAKEN_BACK = frame({"a": entry()}, bytes(16)), b"collected", b"condemned, and wanted"


@dataclass
class Life:
    """What a hub did; `acknowledged` are files of admin/ink, `commits` the catalogue after each."""

    recorder: Recorder
    data: Path
    commits: list[tuple[int, Path]] = field(default_factory=list)
    acknowledged: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def token(self) -> str:
        return (self.data / "admin.token").read_text().strip()

    def save(self, _: Session) -> None:
        """The catalogue as it is now, in a file of its own."""
        copy = self.data.with_name(f"{len(self.commits)}.sqlite3")
        with sqlite3.connect(self.data / "hub.sqlite3") as source, sqlite3.connect(copy) as target:
            source.backup(target)
        source.close()
        target.close()
        self.recorder.mark("commit")
        self.commits.append((self.recorder.clock, copy))

    def acknowledge(self, path: str, content: bytes) -> None:
        self.recorder.mark(path)
        self.acknowledged.append((self.recorder.clock, path, sha(content)))


def settings_of(data: Path) -> Settings:
    return Settings(data_dir=data, min_free_bytes=0, workers=0)


def live(folder: Path, forgotten: str | None = None) -> Life:
    """Uploads of every kind, a merge, and a collection of one of the two blobs it had condemned.

    The hub forgets what is `forgotten` of `hub.blobs.durable` once it has started.
    """
    data = folder / "data"
    store = data / "store"
    store.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patches:
        recorder = Recorder(store, patches)
        life = Life(recorder, data)
        event.listen(Session, "after_commit", life.save)
        try:
            with open_hub(settings_of(data)) as hub:
                if forgotten is not None:
                    patches.setattr(durable, forgotten, lambda _: None)
                act(hub, life)
        finally:
            event.remove(Session, "after_commit", life.save)
    return life


def act(hub: Hub, life: Life) -> None:
    with hub.db.read() as session:
        admin = users.viewer_of(session, life.token)

    def commit(repo: str, path: str, content: bytes) -> None:
        add = Add(path, hub.store.put([content]), lfs=False)
        publish(hub, admin, "admin", repo, operations=[add], message="add")

    for name in ("ink", "gone"):
        with hub.db.write() as session:
            repos.create_repo(session, admin, "admin", name)
    commit("ink", "ink.safetensors", KEPT)
    life.acknowledge("ink.safetensors", KEPT)
    commit("gone", "a", GONE)
    commit("gone", "b", TAKEN_BACK)
    with hub.db.write() as session:
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "admin", "gone"))
    collect(hub, days=10)
    commit("ink", "taken.bin", TAKEN_BACK)
    life.acknowledge("taken.bin", TAKEN_BACK)
    collect(hub, days=12)
    assert forge.upload(hub, life.token)[0] == 200
    life.acknowledge("small.txt", SMALL)
    life.acknowledge("large.bin", LARGE)
    assert forge.xet(hub, life.token)[0] == 200
    life.acknowledge("xet.bin", FROM_XET)
    forge.submit(hub, life.token)
    assert forge.work(hub, life.token) == ["succeeded"]
    write_missing(hub)


def collect(hub: Hub, days: int) -> None:
    moment = now() + timedelta(days=days)
    gc.collect(hub, gc.plan(hub, moment), confirm=ALL, without_backup=True, moment=moment)


def try_cut(life: Life, rng: random.Random, folder: Path, *, goes_on: bool) -> None:
    """One power cut, half of them right after a COMMIT; a new start finds all that was told."""
    first = life.commits[0][0]
    moments = [at for at, _ in life.commits]
    cut_at = rng.choice(moments) if rng.random() < 0.5 else rng.randint(first, life.recorder.clock)
    lost = rng.choice((0.0, 0.5, 0.9, 1.0))

    def keep() -> float:
        return 0.0 if rng.random() < lost else rng.choice((1.0, 1.0, rng.random()))

    data = folder / "data"
    data.mkdir(parents=True)
    life.recorder.image(cut_at, keep).write_to(data / "store")
    catalogue = max(commit for commit in life.commits if commit[0] <= cut_at)[1]
    shutil.copy(catalogue, data / "hub.sqlite3")
    for name in ("secret.key", "admin.token"):
        shutil.copy(life.data / name, data / name)
    with without_fsync(), open_hub(settings_of(data)) as hub:
        told = {path: digest for at, path, digest in life.acknowledged if at <= cut_at}
        require(hub, life.token, told)
        if goes_on and "ink.safetensors" in told:
            assert forge.upload(hub, life.token)[0] == 200
            assert forge.xet(hub, life.token)[0] == 200
            collect(hub, days=20)
            told |= {"small.txt": sha(SMALL), "large.bin": sha(LARGE), "xet.bin": sha(FROM_XET)}
            require(hub, life.token, told)
    shutil.rmtree(folder)


def require(hub: Hub, token: str, told: dict[str, str]) -> None:
    """Every file is there with its bytes, and fsck finds nothing worse than bytes without a row."""
    seen: dict[str, Any] = forge.check(hub, token)
    worse = [f for f in seen["findings"] if f["severity"] == "error" or f["code"] == "lost-orphan"]
    assert worse == []
    assert told.items() <= seen["files"].get("admin/ink", {}).items()
    assert seen["temporary"] == []


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    return live(tmp_path_factory.mktemp("life"))


def test_a_power_cut_leaves_a_hub_with_every_acknowledged_commit(
    life: Life, tmp_path: Path
) -> None:
    rng = random.Random(1)
    for n in range(12):
        try_cut(life, rng, tmp_path / "image", goes_on=n % 4 == 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_power_cuts_leave_a_hub_with_every_acknowledged_commit(
    life: Life, tmp_path: Path
) -> None:
    rng = random.Random(2)
    for n in range(1000):
        try_cut(life, rng, tmp_path / "image", goes_on=n % 4 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["sync_file", "sync_folder"])
def test_the_simulation_finds_a_hub_that_forgets(tmp_path: Path, forgotten: str) -> None:
    life = live(tmp_path / "careless", forgotten)
    rng = random.Random(0)

    def many() -> None:
        for n in range(100):
            try_cut(life, rng, tmp_path / f"{n}", goes_on=False)

    with pytest.raises((AssertionError, FileNotFoundError)):
        many()
