"""Any sequence of what people do to a hub leaves what a dict of it would hold.

Users, repos, commits, branches, moves, deletions, uploads without a commit, and the collection of
what nothing refers to, as the clock goes on.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr
from sqlmodel import col, delete

from hub.adapters.service import publish
from hub.blobs.store import Sha256
from hub.context import Hub, open_hub
from hub.db import now
from hub.errors import Forbidden, HubError, NameTaken, RefExists, RepoExists, RevisionNotFound
from hub.repos import commits, holds, refs
from hub.repos import service as repos
from hub.repos.models import Hold
from hub.repos.operations import Add, Delete, Operation
from hub.settings import Settings
from hub.upkeep import gc
from hub.upkeep.fsck import fsck, is_sound
from hub.users import service as users
from hub.users.service import ANONYMOUS
from tests.fixtures.postgres import PostgresServer
from tests.hub.conftest import make_user

NAMESPACES = ["ada", "Bob"]
VIEWERS = ["ada", "admin", "Bob"]
# Most of what people do is theirs to do.
SOME_VIEWER = st.sampled_from(["ada", "ada", "ada", "admin", "Bob"])
SOME_NAMESPACE = st.sampled_from(["ada", "ada", "ada", "Bob"])
NAMES = ["ink", "INK", "Paint"]  # Of two repos: names are told apart without their case.
BRANCHES = ["main", "dev"]
PATHS = ["a", "b/c", "b/d"]
CONTENTS = [b"1", b"2", b"3"]

MakeHub = Callable[[], AbstractContextManager[Hub]]
Files = dict[str, bytes]


@dataclass
class ModelRepo:
    """`ever` is what any commit of it has held: all of them stay readable."""

    name: str
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    ever: set[bytes] = field(default_factory=set)


def digest(content: bytes) -> Sha256:
    return Sha256(hashlib.sha256(content).hexdigest())


def key_of(namespace: str, name: str) -> str:
    return f"{namespace}/{name}".lower()


class Machine(RuleBasedStateMachine):
    """Every rule does one thing to the hub and to the model, which says whether it is refused."""

    make_hub: ClassVar[MakeHub]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.hub = self.stack.enter_context(type(self).make_hub())
        token = (self.hub.settings.data_dir / "admin.token").read_text().strip()
        with self.hub.db.read() as session:
            self.viewers = {"admin": users.viewer_of(session, token)}
        for name in NAMESPACES:
            self.viewers[name], _ = make_user(self.hub, name)
        self.repos: dict[str, ModelRepo] = {}
        self.graves: dict[str, str] = {}  # A name that was given up, and who gave it up.
        self.redirects: dict[str, ModelRepo] = {}
        self.held: dict[tuple[str, bytes], Any] = {}
        self.moment = now()

    def teardown(self) -> None:
        with self.stack:
            findings = list(fsck(self.hub, full=True))
            assert is_sound(findings), findings

    # What people do

    @rule(name=st.sampled_from(["ADA", "bob", "Admin"]))
    def a_name_is_given_once(self, name: str) -> None:
        with pytest.raises(NameTaken), self.hub.db.write() as session:
            users.create_user(session, name)

    @rule(
        by=SOME_VIEWER,
        namespace=SOME_NAMESPACE,
        name=st.sampled_from(NAMES),
    )
    def create(self, by: str, namespace: str, name: str) -> None:
        key = key_of(namespace, name)
        refusal = self._refusal(
            by, namespace, taken=key in self.repos or not self._may_take(by, key)
        )
        with self._refused(refusal), self.hub.db.write() as session:
            repos.create_repo(session, self.viewers[by], namespace, name)
        if refusal is None:
            self._take(key)
            self.repos[key] = ModelRepo(f"{namespace}/{name}")

    @precondition(lambda self: self.repos)
    @rule(
        by=SOME_VIEWER, namespace=SOME_NAMESPACE,
        name=st.sampled_from(NAMES), data=st.data(),
    )  # fmt: skip
    def move(self, by: str, namespace: str, name: str, data: st.DataObject) -> None:
        old, new = self._any_repo(data), key_of(namespace, name)
        repo = self.repos[old]
        comes_back = self.redirects.get(new) is repo
        may_take = new == old or comes_back or self._may_take(by, new)
        refusal = self._refusal(by, old.split("/")[0]) or self._refusal(
            by, namespace, taken=new != old and (new in self.repos or not may_take)
        )
        with self._refused(refusal), self.hub.db.write() as session:
            there = repos.get_repo(session, ANONYMOUS, *repo.name.split("/"))
            repos.move_repo(session, self.viewers[by], there, namespace, name)
        if refusal is None:
            if new != old:
                self._take(new)
                self.repos[new] = self.repos.pop(old)
                self.graves[old], self.redirects[old] = by, repo
            repo.name = f"{namespace}/{name}"

    @precondition(lambda self: self.repos)
    @rule(by=SOME_VIEWER, data=st.data())
    def delete(self, by: str, data: st.DataObject) -> None:
        key = self._any_repo(data)
        refusal = self._refusal(by, key.split("/")[0])
        with self._refused(refusal), self.hub.db.write() as session:
            repos.delete_repo(session, self.viewers[by], self._real(session, key))
        if refusal is None:
            repo = self.repos.pop(key)
            self.redirects = {old: to for old, to in self.redirects.items() if to is not repo}
            self.graves[key] = by

    @precondition(lambda self: self.repos)
    @rule(
        by=SOME_VIEWER, branch=st.sampled_from(BRANCHES), data=st.data(),
        wanted=st.dictionaries(st.sampled_from(PATHS), st.sampled_from([*CONTENTS, None]), min_size=1),
    )  # fmt: skip
    def commit(
        self, by: str, branch: str, data: st.DataObject, wanted: dict[str, bytes | None]
    ) -> None:
        key = self._any_repo(data)
        repo = self.repos[key]
        present = repo.branches.get(branch, {})
        operations: list[Operation] = []
        after = dict(present)
        for path, content in wanted.items():
            if content is not None:
                stored = self.hub.store.put([content], size=len(content))
                operations.append(Add(path, stored, lfs=False))
                after[path] = content
            elif path in present:
                operations.append(Delete(path))
                del after[path]
        refusal = self._refusal(by, key.split("/")[0])
        if refusal is None and branch not in repo.branches:
            refusal = RevisionNotFound
        with self._refused(refusal):
            publish(
                self.hub, self.viewers[by], *repo.name.split("/"),
                branch=branch, operations=operations, message="m",
            )  # fmt: skip
        if refusal is None:
            repo.branches[branch] = after
            repo.ever |= set(after.values())

    @precondition(lambda self: self.repos)
    @rule(data=st.data())
    def branch_or_unbranch(self, data: st.DataObject) -> None:
        repo = self.repos[self._any_repo(data)]
        if "dev" in repo.branches:
            # Made once more first, which is refused and changes nothing.
            with self._refused(RefExists), self.hub.db.write() as session:
                there = self._real(session, repo.name)
                refs.create_branch(session, self.viewers["admin"], there, "dev")
        with self.hub.db.write() as session:
            there = self._real(session, repo.name)
            if "dev" in repo.branches:
                refs.delete_branch(session, self.viewers["admin"], there, "dev")
                del repo.branches["dev"]
            else:
                refs.create_branch(session, self.viewers["admin"], there, "dev")
                repo.branches["dev"] = dict(repo.branches["main"])

    @rule(by=SOME_VIEWER, content=st.sampled_from(CONTENTS))
    def upload(self, by: str, content: bytes) -> None:
        stored = self.hub.store.put([content], size=len(content))
        with self.hub.db.write() as session:
            # The clock of the model is ahead of the hub's.
            keep = self.moment - now() + holds.HOLD_FOR
            holds.hold(session, self.viewers[by], stored, keep)
        self.held[by, content] = self.moment + holds.HOLD_FOR

    @precondition(lambda self: self.repos)
    @rule(by=SOME_VIEWER, content=st.sampled_from(CONTENTS), data=st.data())
    def commit_by_digest(self, by: str, content: bytes, data: st.DataObject) -> None:
        """What a client does that was told it need not send the bytes again."""
        key = self._any_repo(data)
        with self.hub.db.read() as session:
            stored = holds.known(session, self.viewers[by], digest(content))
        is_mine = (by, content) in self.held
        assert (stored is not None) == (
            is_mine or any(content in r.ever for r in self.repos.values())
        )
        if stored is not None and self._refusal(by, key.split("/")[0]) is None:
            repo = self.repos[key]
            # As an LFS file: of bytes that a collection had found, nobody knows the hash git has.
            add = Add("a", stored, lfs=True)
            viewer = self.viewers[by]
            publish(self.hub, viewer, *repo.name.split("/"), operations=[add], message="m")
            repo.branches["main"]["a"] = content
            repo.ever.add(content)

    # What time does

    @rule(days=st.sampled_from([1, 8]))
    def time_passes(self, days: int) -> None:
        self.moment += timedelta(days=days)
        with self.hub.db.write() as session:
            session.exec(delete(Hold).where(col(Hold.expires_at) < self.moment))
        self.held = {what: until for what, until in self.held.items() if until >= self.moment}

    @precondition(lambda self: self.repos)
    @rule()
    def collect_a_day_later(self) -> None:
        self.collect()
        self.time_passes(1)
        self.moment += timedelta(seconds=1)
        self.collect()

    @precondition(lambda self: self.repos)
    @rule()
    def collect(self) -> None:
        planned = gc.plan(self.hub, self.moment)
        gc.collect(self.hub, planned, confirm=10**6, without_backup=True, moment=self.moment)

    @precondition(lambda self: self.repos)
    @rule()
    def collect_until_nothing_is_left(self) -> None:
        for _ in range(2):
            self.time_passes(8)
            self.collect()
        for content in CONTENTS:
            if not self._is_kept(content):
                assert self.hub.store.size(digest(content)) is None

    # What always holds

    @invariant()
    def every_repo_is_what_the_model_says(self) -> None:
        with self.hub.db.read() as session:
            listed = [repo.full_name for repo in repos.list_repos(session, ANONYMOUS)]
            assert sorted(listed) == sorted(repo.name for repo in self.repos.values())
            for repo in self.repos.values():
                there = self._real(session, repo.name)
                named = refs.of_repo(session, there)
                found = {}
                for name in named.branches:
                    head = refs.resolve(session, there, f"refs/heads/{name}")
                    found[name] = {e.path: e.sha256 for e in commits.entries(session, head)}
                assert there.head == named.branches["main"]
                assert found == {
                    name: {path: digest(content) for path, content in files.items()}
                    for name, files in repo.branches.items()
                }

    @invariant()
    def an_old_name_leads_to_its_repo(self) -> None:
        with self.hub.db.read() as session:
            for old, repo in self.redirects.items():
                there = repos.moved_to(session, ANONYMOUS, *old.split("/"))
                assert there is not None
                assert there.full_name == repo.name

    @invariant()
    def what_is_kept_is_there(self) -> None:
        for content in CONTENTS:
            if self._is_kept(content):
                assert b"".join(self.hub.store.open(digest(content))) == content

    # Inside

    def _is_kept(self, content: bytes) -> bool:
        is_held = any(held == content for _, held in self.held)
        return is_held or any(content in repo.ever for repo in self.repos.values())

    def _any_repo(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.repos)))

    def _real(self, session: Any, name: str) -> Any:
        return repos.get_repo(session, ANONYMOUS, *name.split("/"))

    def _may_take(self, by: str, key: str) -> bool:
        return by == "admin" or self.graves.get(key, by) == by

    def _take(self, key: str) -> None:
        self.graves.pop(key, None)
        self.redirects.pop(key, None)

    def _refusal(self, by: str, namespace: str, taken: bool = False) -> type[HubError] | None:
        if by not in ("admin", *(n for n in NAMESPACES if n.lower() == namespace.lower())):
            return Forbidden
        return RepoExists if taken else None

    def _refused(self, refusal: type[HubError] | None) -> AbstractContextManager[Any]:
        return pytest.raises(refusal) if refusal is not None else ExitStack()


@pytest.fixture(params=["sqlite", "postgresql"])
def make_hub(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, first_start: Path
) -> MakeHub:
    """A hub after its first start, another one for every example."""

    @contextmanager
    def make() -> Any:
        with ExitStack() as stack:
            data = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "data"
            url, begun = None, first_start
            if request.param == "postgresql":
                server: PostgresServer = request.getfixturevalue("postgres_server")
                template, begun = server.first_start(tmp_path_factory.getbasetemp())
                url = SecretStr(stack.enter_context(server.fresh(template)))
            shutil.copytree(begun, data)
            made = Settings(data_dir=data, database_url=url, min_free_bytes=0)
            yield stack.enter_context(open_hub(made))

    return make


def check(make_hub: MakeHub, examples: int, steps: int, *, derandomize: bool) -> None:
    machine = type("Model", (Machine,), {"make_hub": staticmethod(make_hub)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            # Making a failure small takes minutes, which a person has and every run has not.
            phases=[Phase.generate] if derandomize else list(Phase),
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_hub_does_what_a_dict_would(make_hub: MakeHub, request: pytest.FixtureRequest) -> None:
    is_sqlite = "sqlite" in request.node.name
    check(make_hub, examples=20 if is_sqlite else 6, steps=40, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hub_does_what_a_dict_would_for_long(make_hub: MakeHub) -> None:
    check(make_hub, examples=300, steps=50, derandomize=False)
