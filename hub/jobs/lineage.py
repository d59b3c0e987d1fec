"""Which file was made from which."""

from collections.abc import Iterator, Sequence

from sqlmodel import Session, col, select

from hub.jobs.inputs import Resolved
from hub.jobs.models import Edge, Relation
from hub.repos import permissions
from hub.repos.models import Repo
from hub.users.service import Viewer
from merge.recipe import Recipe


def write(
    session: Session,
    child: tuple[int, str, str, str],
    recipe: Recipe,
    recipe_digest: str,
    resolved: Sequence[Resolved],
) -> None:
    """Edges to everything `recipe` names; `child` is repo id, commit, path and SHA-256.

    An identical result makes no new commit, and its lineage is there already.
    """
    repo_id, commit, path, sha256 = child
    if _edges(session, repo_id, commit, path):
        return
    for parent, relation, strength in _parents(recipe, resolved):
        session.add(
            Edge(
                child_repo_id=repo_id,
                child_commit=commit,
                child_path=path,
                child_sha256=sha256,
                parent_repo_id=parent.repo_id if session.get(Repo, parent.repo_id) else None,
                parent_commit=parent.commit,
                parent_path=parent.main or "",
                parent_sha256=parent.digest,
                relation=relation,
                strength=strength,
                recipe_digest=recipe_digest,
            )
        )


def parents(session: Session, viewer: Viewer, repo: Repo, commit: str, path: str) -> list[Edge]:
    """What a file was made from, as far as the viewer may read it."""
    assert repo.id is not None
    return [
        edge
        for edge in _edges(session, repo.id, commit, path)
        if edge.parent_repo_id is not None and may_read(session, viewer, edge.parent_repo_id)
    ]


def children(session: Session, viewer: Viewer, sha256: str) -> list[Edge]:
    """What was made from a file, newest first, as far as the viewer may read it."""
    query = select(Edge).where(Edge.parent_sha256 == sha256).order_by(col(Edge.id).desc())
    return [edge for edge in session.exec(query) if may_read(session, viewer, edge.child_repo_id)]


def may_read(session: Session, viewer: Viewer, repo_id: int) -> bool:
    """False also for a repo that is gone."""
    repo = session.get(Repo, repo_id)
    return repo is not None and permissions.may_read(session, viewer, repo)


def _edges(session: Session, repo_id: int, commit: str, path: str) -> Sequence[Edge]:
    query = select(Edge).where(
        Edge.child_repo_id == repo_id, Edge.child_commit == commit, Edge.child_path == path
    )
    return session.exec(query.order_by(col(Edge.id))).all()


def _parents(
    recipe: Recipe, resolved: Sequence[Resolved]
) -> Iterator[tuple[Resolved, Relation, float | None]]:
    by_name = {item.ref: item for item in resolved}
    if recipe.base is not None:
        yield by_name[recipe.base.name], Relation.BASE, None
    if recipe.tuned is not None:
        yield by_name[recipe.tuned.name], Relation.TUNED, None
    for source in recipe.inputs:
        yield by_name[source.name], Relation.INPUT, source.strength
        if source.vectors is not None:
            yield by_name[source.vectors.name], Relation.VECTORS, None
