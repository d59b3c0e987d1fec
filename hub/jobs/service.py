"""Jobs as their requesters see them: submitted, read, listed, cancelled."""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, and_, col, func, or_, select

from hub.blobs.store import Sha256
from hub.context import Hub
from hub.errors import (
    BadField,
    Forbidden,
    JobNotFound,
    KeyReused,
    RecipeNotFound,
    RepoNotFound,
    TooLarge,
    TooMany,
)
from hub.failpoints import reach
from hub.jobs import inputs, lineage, queue
from hub.jobs.inputs import Resolved
from hub.jobs.models import TERMINAL, Edge, Job, JobKind, JobState
from hub.jobs.models import Recipe as RecipeRow
from hub.jobs.schemas import JobRequest, Publish
from hub.jobs.scratch import Input, lay_out
from hub.repos import service as repos
from hub.repos.paths import check_path
from hub.users import service as users
from hub.users.names import check_name, check_namespace
from hub.users.service import Viewer
from merge.errors import BadRecipe
from merge.plan import Plan, plan
from merge.recipe import Recipe

MAX_UNFINISHED = 100  # of one user; beyond that they are a flood and not a wish


def submit(
    hub: Hub,
    viewer: Viewer,
    kinds: Sequence[JobKind],
    request: JobRequest,
    idempotency_key: str | None = None,
) -> Job:
    """Plan `request` from headers and queue it; nothing is written when it is impossible, or when
    its recipe is of none of `kinds`.

    A repeat of an idempotency key answers the first job; with another request it is KeyReused.
    BadRecipe and the other MergeErrors say what is wrong with the recipe.
    """
    user = viewer.require_write()
    assert user.id is not None
    user_id = user.id
    request_digest = _request_digest(request)
    recipe = Recipe.parse(request.recipe)
    if recipe.kind not in kinds:
        what = f"is {recipe.kind}, but this address takes {' or '.join(kinds)}"
        raise BadRecipe("kind", what)
    with hub.db.read() as session:
        earlier = _earlier(session, user_id, idempotency_key, request_digest)
        if earlier is not None:
            return earlier
        resolved = inputs.resolve(session, hub.store, viewer, recipe)
        _check_target(session, viewer, request.publish, resolved)
    recipe = inputs.pin(recipe, resolved)
    planned = plan_on(hub, recipe, resolved)
    _check_shape(request.publish, makes_folder=planned.writes_folder)
    resources = _resources(hub, planned)

    def write() -> Job:
        with hub.db.write() as session:
            earlier = _earlier(session, user_id, idempotency_key, request_digest)
            if earlier is not None:
                return earlier
            _check_flood(session, user_id)
            job = enqueue(session, user_id, recipe, resolved, request.publish, resources)
            job.idempotency_key, job.request_digest = idempotency_key, request_digest
        return job

    try:
        return write()
    except IntegrityError:
        # Another request wrote the same recipe or key at this moment; now its rows are there.
        return write()


def enqueue(
    session: Session,
    user_id: int,
    recipe: Recipe,
    resolved: Sequence[Resolved],
    publish: Publish,
    resources: dict[str, Any],
) -> Job:
    """Rows of a pinned recipe and of a job that runs it."""
    moment = queue.now(session)
    digest = recipe.digest()
    if session.get(RecipeRow, digest) is None:
        canonical = recipe.canonical_json()
        session.add(RecipeRow(digest=digest, canonical=canonical, created_at=moment))
        session.flush()
    job = Job(
        id=uuid.uuid4().hex,
        kind=recipe.kind,
        requester_id=user_id,
        request={
            "recipe": recipe.model_dump_json(by_alias=True, exclude_none=True),
            "inputs": [item.to_json() for item in resolved],
            "publish": publish.model_dump(),
        },
        recipe_digest=digest,
        resources=resources,
        created_at=moment,
    )
    session.add(job)
    reach("J1")
    return job


def read(session: Session, viewer: Viewer, job_id: str) -> Job:
    """One's own job, or any for an administrator; JobNotFound otherwise."""
    user = viewer.require_user()
    job = session.get(Job, job_id)
    if job is None or (job.requester_id != user.id and not viewer.is_admin):
        raise JobNotFound(f"you have no job {job_id!r}")
    return job


def page(
    session: Session,
    viewer: Viewer,
    *,
    state: JobState | None,
    kind: JobKind | None,
    limit: int,
    cursor: str | None,
) -> tuple[list[Job], str | None]:
    """The viewer's jobs, newest first, and the cursor of the next page."""
    user = viewer.require_user()
    query = select(Job).where(Job.requester_id == user.id)
    if state is not None:
        query = query.where(Job.state == state)
    if kind is not None:
        query = query.where(Job.kind == kind)
    if cursor is not None:
        last = session.get(Job, cursor)
        if last is None or last.requester_id != user.id:
            raise BadField("the cursor is not one that this list gave", "cursor")
        query = query.where(
            or_(
                col(Job.created_at) < last.created_at,
                and_(col(Job.created_at) == last.created_at, col(Job.id) < last.id),
            )
        )
    ordered = query.order_by(col(Job.created_at).desc(), col(Job.id).desc())
    jobs = list(session.exec(ordered.limit(limit + 1)))
    return jobs[:limit], jobs[limit - 1].id if len(jobs) > limit else None


def cancel(hub: Hub, viewer: Viewer, job_id: str) -> Job:
    """Ask a job to stop; one that is over stays as it is."""
    viewer.require_write()
    with hub.db.write() as session:
        read(session, viewer, job_id)
        job = session.exec(select(Job).where(Job.id == job_id).with_for_update()).one()
        queue.request_cancel(session, job)
    return job


def read_recipe(session: Session, viewer: Viewer, digest: str) -> RecipeRow:
    """A recipe that made a file the viewer may read, or that the viewer asked for."""
    row = session.get(RecipeRow, digest)
    if row is None or not _may_read_recipe(session, viewer, digest):
        raise RecipeNotFound(f"there is no recipe {digest!r}")
    return row


def _earlier(session: Session, user_id: int, key: str | None, digest: str) -> Job | None:
    if key is None:
        return None
    job = session.exec(
        select(Job).where(Job.requester_id == user_id, Job.idempotency_key == key)
    ).first()
    if job is not None and job.request_digest != digest:
        raise KeyReused(f"the Idempotency-Key {key!r} belongs to another request of yours")
    return job


def _request_digest(request: JobRequest) -> str:
    text = json.dumps(request.model_dump(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_target(
    session: Session, viewer: Viewer, publish: Publish, resolved: Sequence[Resolved]
) -> None:
    """That the viewer may publish there, and that it would not show what is private."""
    secret = next((item.repo for item in resolved if item.private), None)
    namespace, _, name = publish.repo.partition("/")
    check_namespace(namespace, "publish.repo")
    check_name(name, "publish.repo")
    user = viewer.require_write()
    if not users.may_write(session, viewer, namespace, name):
        raise Forbidden(f"{user.name} may not write to {namespace}", "publish.repo")
    try:
        target = repos.get_repo(session, viewer, namespace, name)
    except RepoNotFound:
        users.require_namespace(session, user, namespace, "publish.repo")
        private = publish.private
    else:
        private = target.private
        if publish.private and not target.private:
            raise Forbidden(
                f"{publish.repo} is public already; publish a private result elsewhere",
                "publish.private",
            )
    if secret is not None and private is False:
        raise Forbidden(
            f"{secret} is not open to all, so its result must be private: publish to a private repo",
            "publish.private" if publish.private is False else "publish.repo",
        )


def _check_shape(publish: Publish, *, makes_folder: bool) -> None:
    if makes_folder and publish.path is not None:
        raise BadField(
            "a folder is published at the repo's root; leave the path out", "publish.path"
        )
    if not makes_folder:
        if publish.path is None or not publish.path.endswith(".safetensors"):
            raise BadField("a result is one file and its path ends in .safetensors", "publish.path")
        check_path(publish.path, "publish.path")


def _check_flood(session: Session, user_id: int) -> None:
    waiting = session.exec(
        select(func.count())
        .select_from(Job)
        .where(Job.requester_id == user_id, col(Job.state).not_in(TERMINAL))
    ).one()
    if waiting >= MAX_UNFINISHED:
        raise TooMany(f"{waiting} of your jobs are not finished; wait for some or cancel them")


def plan_on(hub: Hub, recipe: Recipe, resolved: Sequence[Resolved]) -> Plan:
    """What the engine would do, from headers alone; a MergeError where it would refuse."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="plan-", dir=hub.scratch))
        files = {
            sha256: stack.enter_context(hub.store.local(Sha256(sha256)))
            for item in resolved
            for sha256 in item.files.values()
        }
        laid = [
            Input(ref=item.ref, main=item.main, files={p: files[s] for p, s in item.files.items()})
            for item in resolved
        ]
        return plan(recipe, lay_out(Path(folder), laid))


def _resources(hub: Hub, planned: Plan) -> dict[str, Any]:
    settings = hub.settings
    if planned.cost.memory_bytes > settings.job_memory_bytes:
        raise TooLarge(
            f"this needs about {planned.cost.memory_bytes:,} bytes of memory, and a job may take"
            f" {settings.job_memory_bytes:,} (GRAFT_JOB_MEMORY_BYTES)",
            "recipe",
        )
    return {
        "output_bytes": planned.cost.bytes_to_write,
        # A header is not in the estimate; beyond this the plan was wrong and nothing is right.
        "file_bytes": planned.cost.bytes_to_write * 5 // 4 + 64 * 2**20,
        "memory_bytes": settings.job_memory_bytes,
        "threads": max(1, (os.cpu_count() or 1) // max(1, settings.workers)),
    }


def _may_read_recipe(session: Session, viewer: Viewer, digest: str) -> bool:
    if viewer.user is not None and (
        session.exec(
            select(Job.id).where(Job.recipe_digest == digest, Job.requester_id == viewer.user.id)
        ).first()
    ):
        return True
    children = session.exec(
        select(Edge.child_repo_id).where(Edge.recipe_digest == digest).distinct()
    )
    return any(lineage.may_read(session, viewer, repo_id) for repo_id in children)
