"""Mirrored repos: in namespaces of their own, which nobody but the mirror writes to."""

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

from sqlmodel import Session, col, select

from hub.adapters.service import publish
from hub.blobs.store import Sha256
from hub.context import Hub
from hub.errors import BadField, Busy, DigestMismatch, NameTaken, RepoNotFound
from hub.mirror.upstream import RemoteFile, Upstream
from hub.repos import commits, holds, refs
from hub.repos import operations as ops
from hub.repos import service as repos
from hub.repos.models import Commit, CommitEntry, Repo
from hub.repos.paths import check_path
from hub.users import service as users
from hub.users.models import Scope, User
from hub.users.names import check_name, check_namespace, key_of
from hub.users.service import Viewer

# The user that owns all mirrored repos and namespaces; it has no token and no password.
MIRROR = "mirror"
FULL_NAME = "Repos of another hub"
# Clients wait this long for the first byte of an answer; they ask again when told to.
PATIENCE_S = 20.0
AT_ONCE = 2
# The upstream is not asked again so soon for what it did not have.
MISSING_S = 60.0
MAX_MISSING = 10_000

log = logging.getLogger(__name__)


class Mirror:
    """One per process; `close` ends what is being fetched."""

    def __init__(self, hub: Hub, upstream: Upstream) -> None:
        self.upstream = upstream
        self._hub = hub
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mirror")
        self._lock = threading.Lock()
        self._running: dict[str, Future[Commit]] = {}
        self._compared: dict[str, float] = {}
        self._missing: dict[str, float] = {}
        self._stopping = threading.Event()

    def close(self) -> None:
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def bring(self, viewer: Viewer, namespace: str, name: str) -> None:
        """Fetch a repo that is not here because a user asked for it; RepoNotFound, Busy.

        Strangers cannot make the hub fetch anything, and names of this hub's own people stay
        theirs.
        """
        if viewer.user is None or not self._is_ours_to_fill(namespace):
            raise RepoNotFound("Repository not found")
        key = key_of(f"{namespace}/{name}")
        if time.monotonic() - self._missing.get(key, float("-inf")) < MISSING_S:
            raise RepoNotFound("Repository not found")
        try:
            self._wait(self._fetch(f"{namespace}/{name}"), PATIENCE_S)
        except RepoNotFound:
            if len(self._missing) >= MAX_MISSING:
                self._missing.clear()
            self._missing[key] = time.monotonic()
            raise

    def refresh(self, repo: Repo) -> None:
        """Compare a mirrored repo with its upstream behind the caller's back, if it is time to."""
        key, hours = key_of(repo.full_name), self._hub.settings.mirror_hours
        if time.monotonic() - self._compared.get(key, float("-inf")) <= hours * 3600:
            return
        self._compared[key] = time.monotonic()
        if self._is_mirrored(repo):
            self._fetch(repo.full_name).add_done_callback(_told)

    def fetch(self, viewer: Viewer, full_name: str) -> Commit:
        """Fetch now and wait for it: RepoNotFound, UpstreamFailed, NameTaken, BadField."""
        viewer.require_admin()
        namespace, slash, name = full_name.partition("/")
        if not slash:
            raise BadField(f"{full_name} is not a repo: write namespace/name", "repo")
        check_namespace(namespace)
        check_name(name, "name")
        if not self._is_ours_to_fill(namespace):
            raise NameTaken(f"{namespace} is a user or organisation of this hub", "repo")
        return self._wait(self._fetch(full_name), None)

    def _wait(self, future: "Future[Commit]", timeout: float | None) -> Commit:
        if not wait([future], timeout).done:
            raise Busy("the repo is being fetched from another hub: try again in a minute")
        return future.result()

    def _fetch(self, full_name: str) -> "Future[Commit]":
        """One at a time of each repo, however many ask."""
        key = key_of(full_name)
        with self._lock:
            running = self._running.get(key)
            if running is None:
                running = self._pool.submit(self._fetch_now, full_name)
                self._running[key] = running
                running.add_done_callback(lambda _: self._running.pop(key, None))
            return running

    def _fetch_now(self, full_name: str) -> Commit:
        remote = self.upstream.info(full_name)
        self._compared[key_of(full_name)] = time.monotonic()
        message = f"Mirror of {self.upstream.url}/{full_name} at {remote.commit}"
        with self._hub.db.read() as session:
            head, present = _here(session, full_name)
        if head is not None and head.message == message:
            return head
        files = self.upstream.files(full_name, remote.commit)
        added = [f for f in files if not _is_same(f, present.get(check_path(f.path)))]
        viewer = self._viewer()
        operations: list[ops.Operation] = [
            self._kept(viewer, full_name, remote.commit, file) for file in added
        ]
        operations += [ops.Delete(path) for path in sorted(set(present) - {f.path for f in files})]
        namespace, _, name = full_name.partition("/")
        with self._hub.db.write() as session:
            user = viewer.require_write()
            if users.canonical_namespace(session, namespace) is None:
                users.create_organization(session, namespace, user, full_name=FULL_NAME)
            repo = repos.create_repo(
                session, viewer, namespace, name, private=remote.is_private, exist_ok=True
            )
            if remote.is_private and not repo.private:
                repos.update_settings(session, viewer, repo, private=True)
        if not operations and head is not None:
            return head
        return publish(self._hub, viewer, namespace, name, operations=operations, message=message)

    def _kept(self, viewer: Viewer, full_name: str, commit: str, file: RemoteFile) -> ops.Add:
        """Download a file; DigestMismatch unless it is what the upstream's listing promised."""
        expected = Sha256(file.sha256) if file.sha256 is not None else None
        with self.upstream.download(full_name, commit, file, self._stopping.is_set) as chunks:
            stored = self._hub.store.put(chunks, expected=expected, size=file.size)
        if expected is None and stored.git_oid != file.git_oid:
            raise DigestMismatch(f"{full_name}: {file.path} arrived damaged")
        with self._hub.db.write() as session:
            holds.hold(session, viewer, stored)
        return ops.Add(file.path, stored, lfs=expected is not None)

    def _viewer(self) -> Viewer:
        with self._hub.db.write() as session:
            user = _mirror_user(session)
            if user is None:
                user = users.create_user(session, MIRROR, full_name=FULL_NAME)
            elif user.full_name != FULL_NAME:
                raise NameTaken(f"the name {MIRROR} is a person's: nothing can be mirrored")
        return Viewer(user, Scope.WRITE)

    def _is_ours_to_fill(self, namespace: str) -> bool:
        """Whether the namespace is nobody's yet, or the mirror's."""
        with self._hub.db.read() as session:
            if users.canonical_namespace(session, namespace) is None:
                return True
            user = _mirror_user(session)
            return user is not None and users.may_write(
                session, Viewer(user, Scope.WRITE), namespace
            )

    def _is_mirrored(self, repo: Repo) -> bool:
        with self._hub.db.read() as session:
            user = _mirror_user(session)
        return user is not None and repo.owner_id == user.id


def _mirror_user(session: Session) -> User | None:
    return session.exec(select(User).where(col(User.key) == MIRROR)).first()


def _here(session: Session, full_name: str) -> tuple[Commit | None, Mapping[str, CommitEntry]]:
    query = select(Repo).where(Repo.type == "model", Repo.key == key_of(full_name))
    repo = session.exec(query).first()
    if repo is None:
        return None, {}
    head = refs.resolve(session, repo)
    return head, {entry.path: entry for entry in commits.entries(session, head)}


def _is_same(file: RemoteFile, present: CommitEntry | None) -> bool:
    if present is None or present.lfs != (file.sha256 is not None):
        return False
    if file.sha256 is not None:
        return present.sha256 == file.sha256
    return present.git_oid == file.git_oid


def _told(future: "Future[Commit]") -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.warning("a mirrored repo is served as it was: %s", error)
