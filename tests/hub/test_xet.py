"""Xet uploads through the hub's routes: who may build what from which xorbs, and what is kept."""

import hashlib
import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from httpx2 import Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, update
from sqlmodel import col, select
from starlette.testclient import TestClient

from hub.app import create_app
from hub.blobs.files import FileBlobStore
from hub.blobs.store import Sha256
from hub.context import Hub, open_hub
from hub.db import now
from hub.errors import Invalid, TooLarge
from hub.hf import xet as routes
from hub.limits import quotas
from hub.repos.models import Blob, Hold, Repo
from hub.upkeep import gc
from hub.upkeep.backup import backup
from hub.upkeep.restore import restore
from hub.upkeep.sweep import sweep
from hub.users import service as users
from hub.users.models import Scope
from hub.users.service import Viewer
from hub.xet import service
from hub.xet.hashes import XetHash
from hub.xet.models import XetCache, Xorb
from tests.fixtures import xet
from tests.fixtures.xet import damages
from tests.hub.conftest import bearer, both_databases, make_user


class Sender:
    """A user's client, with a token for one of their repos."""

    def __init__(self, client: TestClient, token: str, repo: str) -> None:
        self.client, self.auth, self.repo = client, bearer(token), repo
        created = client.post(
            "/api/repos/create", json={"name": repo.split("/")[1]}, headers=self.auth
        )
        assert created.status_code in (200, 409), created.text
        self.renew()

    def renew(self) -> None:
        answer = self.client.get(f"/api/models/{self.repo}/xet-write-token/main", headers=self.auth)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert answer.headers["X-Xet-Access-Token"] == told["accessToken"]
        assert answer.headers["X-Xet-Cas-Url"] == told["casUrl"]
        assert answer.headers["X-Xet-Token-Expiration"] == str(told["exp"])
        self.cas, self.token = told["casUrl"], told["accessToken"]

    def xorb(self, made: xet.XorbMade, name: str | None = None) -> Response:
        address = f"{self.cas}/v1/xorbs/default/{name or made.name}"
        return self.client.post(address, content=made.data, headers=bearer(self.token))

    def shard(self, *files: bytes, path: str = "/v1/shards") -> Response:
        address = self.cas + path
        return self.client.post(
            address, content=xet.make_shard(list(files)), headers=bearer(self.token)
        )

    def commit(self, data: bytes) -> Response:
        oid = hashlib.sha256(data).hexdigest()
        lines = (
            {"key": "header", "value": {"summary": "over Xet"}},
            {"key": "lfsFile", "value": {"path": "a.bin", "oid": oid, "size": len(data)}},
        )
        return self.client.post(
            f"/api/models/{self.repo}/commit/main",
            content="\n".join(map(json.dumps, lines)),
            headers=self.auth,
        )

    def download(self) -> bytes:
        answer = self.client.get(f"/{self.repo}/resolve/main/a.bin", headers=self.auth)
        assert answer.status_code == 200, answer.text
        return answer.content


@pytest.fixture
def ada(hub: Hub, client: TestClient) -> Sender:
    return Sender(client, make_user(hub, "ada")[1], "ada/ink")


@pytest.fixture
def bob(hub: Hub, client: TestClient) -> Sender:
    return Sender(client, make_user(hub, "bob")[1], "bob/ink")


def random_xorb(*sizes: int) -> xet.XorbMade:
    return xet.make_xorb([os.urandom(size) for size in sizes])


def blobs(hub: Hub) -> list[str]:
    return sorted(p.name for p in (hub.settings.data_dir / "store/blobs").rglob("*") if p.is_file())


def refusal(answer: Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"])


def answered(answer: Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


# The way of a file


@both_databases
def test_a_file_is_rebuilt_committed_and_downloaded(hub: Hub, client: TestClient) -> None:
    assert hub.admin_token is not None
    sender = Sender(client, hub.admin_token, "admin/ink")
    first, second = random_xorb(9000, 20_000, 70_000, 131_072), random_xorb(8192, 8193, 1)
    for made in (first, second):
        assert answered(sender.xorb(made)) == {"was_inserted": True}
        assert answered(sender.xorb(made)) == {"was_inserted": False}
    ranges = [(first, 1, 4), (second, 0, 2), (first, 0, 1), (first, 2, 3), (second, 2, 3)]
    data = xet.content(ranges)
    assert answered(sender.shard(xet.file_block(ranges))) == {"result": 1}
    assert answered(sender.commit(data))["success"] is True
    assert sender.download() == data
    assert answered(sender.shard(xet.file_block(ranges))) == {"result": 0}


def test_a_shard_may_come_to_the_address_of_older_clients(ada: Sender) -> None:
    """hf_xet 1.5 knows no version in it."""
    made = random_xorb(9000)
    ada.xorb(made)
    block = xet.file_block([(made, 0, 1)])
    assert answered(ada.shard(block, path="/shards")) == {"result": 1}


def test_a_shard_without_a_sha256_or_proofs_builds_its_files_too(ada: Sender) -> None:
    made = random_xorb(9000, 20_000)
    ada.xorb(made)
    assert answered(ada.shard(xet.file_block([(made, 0, 2)], flags=0))) == {"result": 1}
    answered(ada.commit(xet.content([(made, 0, 2)])))
    assert ada.download() == xet.content([(made, 0, 2)])


def test_a_footer_and_bytes_in_many_pieces_change_nothing(ada: Sender) -> None:
    made = random_xorb(*[100_000] * 25)
    address = f"{ada.cas}/v1/xorbs/default/{made.name}"
    whole = made.data + b"XETBLOB\1" + bytes(3000)
    pieces = (whole[i : i + 7001] for i in range(0, len(whole), 7001))
    answered(ada.client.post(address, content=pieces, headers=bearer(ada.token)))
    answered(ada.shard(xet.file_block([(made, 20, 25), (made, 0, 20)])))
    data = xet.content([(made, 20, 25), (made, 0, 20)])
    answered(ada.commit(data))
    assert ada.download() == data


def test_the_files_before_a_bad_one_need_not_be_sent_again(hub: Hub, ada: Sender) -> None:
    made = random_xorb(9000, 9001)
    ada.xorb(made)
    good = xet.file_block([(made, 0, 1)])
    wrong = xet.file_block([(made, 1, 2)], sha256=bytes(32))
    assert "SHA-256" in refusal(ada.shard(good, wrong))
    assert hashlib.sha256(made.chunks[0]).hexdigest() in blobs(hub)
    assert hashlib.sha256(made.chunks[1]).hexdigest() not in blobs(hub)
    assert answered(ada.shard(good)) == {"result": 0}


# Who may build what


def test_a_hash_of_somebody_elses_xorb_is_nothing(hub: Hub, ada: Sender, bob: Sender) -> None:
    made = random_xorb(9000, 20_000)
    answered(ada.xorb(made))
    answered(ada.shard(xet.file_block([(made, 0, 2)])))
    assert f"does not have the xorb {made.name}" in refusal(
        bob.shard(xet.file_block([(made, 0, 2)]))
    )
    assert "does not exist" in refusal(bob.commit(xet.content([(made, 0, 2)])))
    other = xet.XorbMade(made.chunks, random_xorb(9000).data)
    assert "hash is" in refusal(bob.xorb(other, made.name))
    refusal(bob.shard(xet.file_block([(made, 0, 2)])))
    before = blobs(hub)
    assert answered(bob.xorb(made)) == {"was_inserted": False}
    assert blobs(hub) == before
    answered(bob.shard(xet.file_block([(made, 0, 2)])))
    answered(bob.commit(xet.content([(made, 0, 2)])))


def test_the_same_chunks_packed_otherwise_serve_both(hub: Hub, ada: Sender, bob: Sender) -> None:
    plain = xet.make_xorb([b"ink " * 5000, b"and " * 5000], (0,))
    packed = xet.make_xorb(plain.chunks, (1,))
    assert answered(ada.xorb(plain)) == {"was_inserted": True}
    assert answered(bob.xorb(packed)) == {"was_inserted": False}
    for sender in (ada, bob):
        answered(sender.shard(xet.file_block([(plain, 0, 2)])))


def test_a_token_is_for_its_repo_and_ends(
    hub: Hub, ada: Sender, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = random_xorb(9000)
    assert refusal(client.get(f"/api/models/{ada.repo}/xet-write-token/main"), 401)
    _, reads = make_user(hub, "eve", Scope.READ)
    _, writes = make_user(hub, "mal")
    for token in (reads, writes):
        address = f"/api/models/{ada.repo}/xet-write-token/main"
        refusal(client.get(address, headers=bearer(token)), 403)
    good = ada.token
    for bad in ("", "x", ada.auth["Authorization"][7:], good[:-1], hub.signer.sign("session", 1)):
        ada.token = bad
        refusal(ada.xorb(made), 401)
        refusal(ada.shard(), 401)
    ada.token = good
    monkeypatch.setattr(routes, "TOKEN_S", -1)
    refusal(ada.xorb(made), 401)
    monkeypatch.undo()
    answered(ada.xorb(made))
    with hub.db.write() as session:
        user = users.find_user(session, "ada")
        for token_row in users.tokens(session, user):
            assert token_row.id is not None
            users.revoke_token(session, user, token_row.id)
    refusal(ada.xorb(made), 401)


def test_a_token_for_one_repo_uploads_to_no_other(hub: Hub, ada: Sender) -> None:
    with hub.db.write() as session:
        user = users.find_user(session, "ada")
        confined = bearer(users.issue_token(session, user, "ci", places=["ada/ink"]))
    ada.client.post("/api/repos/create", json={"name": "other"}, headers=ada.auth)
    for repo, status in {"ada/ink": 200, "ada/other": 403}.items():
        answer = ada.client.get(f"/api/models/{repo}/xet-write-token/main", headers=confined)
        assert answer.status_code == status


def test_a_token_ends_with_the_right_it_was_given_for(hub: Hub, ada: Sender) -> None:
    bob, _ = make_user(hub, "bob")
    with hub.db.read() as session:
        repo = session.exec(select(Repo).where(Repo.key == "ada/ink")).one()
    for revision, create_pr, private, status in (
        ("main", "", False, 403),
        ("main", "1", False, 200),
        ("main", "1", True, 404),
    ):
        with hub.db.write() as session:
            session.get_one(Repo, repo.id).private = private
        ada.token = hub.signer.sign(routes.PURPOSE, [bob.token_id, repo.id, revision, create_pr])
        assert ada.xorb(random_xorb(9000)).status_code == status


def test_a_token_ends_with_its_repo(ada: Sender) -> None:
    ada.client.request("DELETE", "/api/repos/delete", json={"name": "ink"}, headers=ada.auth)
    refusal(ada.xorb(random_xorb(9000)), 404)


def test_no_call_tells_whether_a_chunk_is_known(ada: Sender) -> None:
    made = random_xorb(9000)
    ada.xorb(made)
    chunk = xet.printed(xet.chunk_hashes(made.chunks)[0])
    for method, path in (
        ("GET", f"/v1/chunks/default/{chunk}"),
        ("POST", f"/v1/xorb-grants/default/{made.name}"),
        ("POST", "/v2/shards"),
        ("GET", f"/v1/reconstructions/{made.name}"),
        ("HEAD", f"/v1/xorbs/default/{made.name}"),
    ):
        answer = ada.client.request(method, ada.cas + path, headers=bearer(ada.token))
        assert answer.status_code == 404, path


# What is wrong with a shard


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [29_001]}, "are not 29001 bytes"),
        ({"sizes": [0]}, "are not 0 bytes"),
        ({"sha256": b"\1" * 32}, "the bytes have SHA-256"),
        ({"digest": b"\1" * 32}, "do not make the file"),
        ({"proofs": [b"\1" * 32]}, "are not those the shard"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused_and_leaves_nothing(
    hub: Hub,
    ada: Sender,
    changes: dict[str, object],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = random_xorb(9000, 20_000)
    ada.xorb(made)
    before = blobs(hub)
    block = xet.file_block([(made, 0, 2)], **changes)  # type: ignore[arg-type]
    assert message in refusal(ada.shard(block))
    # Clients do not show it.
    assert message in caplog.text
    assert blobs(hub) == before
    assert not list((hub.settings.data_dir / "store/tmp").iterdir())


@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 3), (1, 1), (2, 1), (0, 2**32 - 1)])
def test_chunks_that_a_xorb_does_not_have_are_refused(ada: Sender, start: int, end: int) -> None:
    made = random_xorb(9000, 20_000)
    ada.xorb(made)
    block = xet.file_block([(made, start, end)], proofs=[bytes(32)])
    assert f"has 2 chunks, not {start} to {end}" in refusal(ada.shard(block))


def test_a_file_above_the_limit_is_refused_before_it_is_built(hub: Hub, client: TestClient) -> None:
    _, token = make_user(hub, "ada")
    smaller = hub.settings.model_copy(update={"max_upload_bytes": 1_000_000})
    limited = Hub(smaller, hub.db, hub.store, hub.signer, hub.downloads)
    with TestClient(create_app(smaller, hub=limited), base_url=str(client.base_url)) as small:
        ada = Sender(small, token, "ada/ink")
        made = xet.make_xorb([bytes(100_000)], (1,))
        assert len(made.data) < 1000
        answered(ada.xorb(made))
        message = refusal(ada.shard(xet.file_block([(made, 0, 1)] * 11)), 413)
        assert "at most 1000000 bytes" in message
        answered(ada.shard(xet.file_block([(made, 0, 1)] * 10)))


def test_files_that_the_namespace_may_not_keep_are_not_built(hub: Hub, ada: Sender) -> None:
    made = xet.make_xorb([bytes(100_000)], (1,))
    answered(ada.xorb(made))
    with hub.db.write() as session:
        quotas.set_limit(session, None, "ada", 300_000)
    before = blobs(hub)
    files = [xet.file_block([(made, 0, 1)] * n) for n in (1, 3)]
    assert "ada may keep 300,000 bytes" in refusal(ada.shard(*files), 413)
    assert blobs(hub) == before
    answered(ada.shard(files[0]))
    answered(ada.commit(bytes(100_000)))
    assert answered(ada.shard(files[0])) == {"result": 0}
    refusal(ada.shard(files[1]), 413)


@both_databases
def test_chunks_without_a_commit_are_bounded_and_old_ones_make_room(
    hub: Hub, client: TestClient
) -> None:
    bounded = hub.settings.model_copy(update={"pending_bytes": 100_000})
    other = Hub(bounded, hub.db, hub.store, hub.signer, hub.downloads)
    with TestClient(create_app(bounded, hub=other), base_url=str(client.base_url)) as few:
        ada = Sender(few, make_user(hub, "ada")[1], "ada/ink")
        made = [random_xorb(30_000) for _ in range(4)]
        for xorb in made[:3]:
            answered(ada.xorb(xorb))
        answered(ada.xorb(made[0]))  # again, which is nothing new
        assert "ada has sent 90,0" in refusal(ada.xorb(made[3]), 413)
        assert "ada has sent 90,0" in refusal(ada.shard(xet.file_block([(made[0], 0, 1)])), 413)
        before = ada.cas
        ada.renew()
        assert ada.cas == before
        with hub.db.write() as session:
            unused = update(Hold).values(expires_at=now() + timedelta(days=28))
            session.execute(unused.where(col(Hold.id).in_(select(func.min(Hold.id)))))
        ada.renew()
        # At another address clients send everything again, and nothing is missed.
        assert ada.cas != before
        answered(ada.xorb(made[3]))
        assert "ada has sent" in refusal(ada.xorb(made[0]), 413)


def test_a_file_of_crumbs_is_refused_before_it_is_built(ada: Sender) -> None:
    """Each costs as much as a chunk of the usual size, and a small shard could name milliards."""
    made = xet.make_xorb([b"x"] * 1000, (0,))
    ada.xorb(made)
    assert "2000 chunks are too many" in refusal(ada.shard(xet.file_block([(made, 0, 1000)] * 2)))


def test_bodies_have_limits(hub: Hub, ada: Sender) -> None:
    too_large = {"Content-Length": str(66 * 2**20), **bearer(ada.token)}
    for path in (f"/v1/xorbs/default/{'0' * 64}", "/v1/shards"):
        answer = ada.client.post(ada.cas + path, content=b"", headers=too_large)
        assert answer.status_code == 413, path


def test_a_full_disk_is_an_answer_that_clients_do_not_repeat(hub: Hub, client: TestClient) -> None:
    ada = Sender(client, make_user(hub, "ada")[1], "ada/ink")
    made = random_xorb(9000)
    answered(ada.xorb(made))
    store = FileBlobStore(hub.settings.data_dir / "store", min_free_bytes=2**60)
    full = Hub(hub.settings, hub.db, store, hub.signer, hub.downloads)
    with TestClient(create_app(hub.settings, hub=full), base_url=str(client.base_url)) as other:
        ada.client = other
        assert "disk is full" in refusal(ada.xorb(random_xorb(9000)), 413)
        assert "disk is full" in refusal(ada.shard(xet.file_block([(made, 0, 1)])), 413)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_damaged_shard_makes_anything_but_a_refusal_or_true_files(
    hub: Hub, admin: Viewer, data: st.DataObject
) -> None:
    stored = _with_xorb(hub, admin)
    blocks = [
        xet.file_block([(MADE, 0, 2), (MADE, 1, 4)]),
        xet.file_block([(MADE, 3, 4)], flags=0),
        xet.file_block([(MADE, 2, 3), (MADE, 0, 1)], flags=xet.PROOFS),
    ]
    damaged = data.draw(damages(xet.make_shard(blocks, [MADE])))
    with suppress(Invalid, TooLarge):
        service.register_shard(hub, admin, io.BytesIO(damaged), "admin")
    assert not list((hub.settings.data_dir / "store/tmp").iterdir())
    runs = {
        hashlib.sha256(b"".join(MADE.chunks[a:b] + MADE.chunks[c:d])).hexdigest()
        for a in range(5)
        for b in range(a, 5)
        for c in range(5)
        for d in range(c, 5)
    }
    assert set(blobs(hub)) <= runs | {stored}


MADE = xet.make_xorb([bytes([n]) * size for n, size in enumerate((9000, 8200, 9001, 70))])


def _with_xorb(hub: Hub, user: Viewer) -> str:
    async def receive() -> None:
        async def body() -> AsyncIterator[bytes]:
            yield MADE.data

        await service.receive_xorb(hub, user, XetHash(MADE.name), body(), None)

    anyio.run(receive)
    return hashlib.sha256(MADE.data).hexdigest()


# What is kept


def pass_days(hub: Hub, days: int) -> None:
    """As if the promises had been made earlier."""
    with hub.db.write() as session:
        for held in session.exec(select(Hold)):
            held.expires_at -= timedelta(days=days)
            session.add(held)
    sweep(hub)


@both_databases
def test_xorbs_are_kept_for_as_long_as_clients_refer_to_them(hub: Hub, client: TestClient) -> None:
    assert hub.admin_token is not None
    sender = Sender(client, hub.admin_token, "admin/ink")
    used, unused = random_xorb(9000), random_xorb(9000)
    for made in (used, unused):
        sender.xorb(made)

    def collect() -> set[str]:
        later = now() + timedelta(days=30)
        for moment in (later, later + timedelta(days=3)):
            gc.collect(hub, gc.plan(hub, moment), confirm=9, without_backup=True, moment=moment)
        with hub.db.read() as session:
            xorbs = session.exec(select(Xorb)).all()
        return {xorb.hash for xorb in xorbs if hub.store.size(Sha256(xorb.sha256)) is not None}

    pass_days(hub, 29)
    assert collect() == {used.name, unused.name}
    answered(sender.shard(xet.file_block([(used, 0, 1)])))
    pass_days(hub, 2)
    assert collect() == {used.name}
    assert answered(sender.shard(xet.file_block([(used, 0, 1)], flags=0))) == {"result": 1}
    assert "upload again" in refusal(sender.shard(xet.file_block([(unused, 0, 1)])))
    assert answered(sender.xorb(unused)) == {"was_inserted": True}
    answered(sender.shard(xet.file_block([(unused, 0, 1)])))


def test_a_xorb_goes_with_its_blob(hub: Hub, ada: Sender) -> None:
    made = random_xorb(9000)
    ada.xorb(made)
    with hub.db.write() as session:
        xorb = session.exec(select(Xorb)).one()
        for held in session.exec(select(Hold)):
            session.delete(held)
        session.flush()
        session.delete(session.get_one(Blob, xorb.sha256))
    with hub.db.read() as session:
        assert session.exec(select(Xorb)).first() is None


def test_clients_start_afresh_after_a_xorb_was_lost(hub: Hub, ada: Sender, bob: Sender) -> None:
    """They take it for sent, so only another address makes them send it again."""
    made = random_xorb(9000)
    answered(ada.xorb(made))
    with hub.db.read() as session:
        hub.store.delete(Sha256(session.exec(select(Xorb)).one().sha256))
    before, others = ada.cas, bob.cas
    ada.renew()
    assert ada.cas == before
    assert "upload again" in refusal(ada.shard(xet.file_block([(made, 0, 1)])))
    ada.renew()
    bob.renew()
    assert ada.cas != before
    assert bob.cas == others
    assert answered(ada.xorb(made)) == {"was_inserted": True}
    answered(ada.shard(xet.file_block([(made, 0, 1)])))


def test_every_user_has_an_address_of_their_own(hub: Hub, ada: Sender, bob: Sender) -> None:
    assert ada.cas != bob.cas
    assert ada.cas.startswith("http://127.0.0.1:8470/xet/")
    with hub.db.write() as session:
        service.forget_caches(session, 2)
        service.forget_caches(session, 2)
        assert session.get_one(XetCache, 2).generation == 2


def test_clients_start_afresh_after_a_restore(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    """What they sent since the backup is not there."""
    assert admin.user is not None
    made = backup(hub, tmp_path / "backup")
    restored = hub.settings.model_copy(update={"data_dir": tmp_path / "restored"})
    restore(restored, tmp_path / "backup", made)
    with hub.db.read() as session:
        before = service.cache_name(session, hub, admin.user)
        assert service.cache_name(session, hub, admin.user) == before
    with open_hub(restored) as again, again.db.read() as session:
        assert service.cache_name(session, again, admin.user) != before
