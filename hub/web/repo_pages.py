"""The pages of one repo: card and facts, files, one file, versions."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlmodel import Session, col, select

from hub.adapters import items as catalogue
from hub.adapters.card import MAX_CARD_BYTES, ParsedCard, parse_card
from hub.adapters.items import AdapterDetails
from hub.adapters.models import Adapter, Card, Kind, Source, Tag
from hub.adapters.projection import CARD_PATH
from hub.adapters.search import is_tool_tag
from hub.blobs.store import Sha256
from hub.context import Hub
from hub.deps import HubDep, ReadSession, ViewerDep, WriterDep, WriteSession, public_url
from hub.errors import RepoNotFound
from hub.repos import access, commits, permissions, refs
from hub.repos import service as repos
from hub.repos.models import Commit, CommitEntry, Repo
from hub.users import service as users
from hub.users.models import Organization, User
from hub.users.names import key_of
from hub.users.service import Viewer
from hub.web import curation_pages, facts
from hub.web import origin as origins
from hub.web.collection_pages import lines
from hub.web.markdown import card_html
from hub.web.render import page
from hub.web.repo_head import RepoDep, head_of, url_of
from hub.web.snippets import ways_to_use
from merge.formats.folders import files_of_base

router = APIRouter(include_in_schema=False, tags=["web"])

PAGE_OF_COMMITS = 50
MAX_TEXT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a folder: a file, or a folder with the sum of its files."""

    name: str
    url: str
    is_folder: bool
    size: int
    message: str | None = None
    moment: datetime | None = None
    download_url: str | None = None


@router.get("/{namespace}")
def show_namespace(
    request: Request, namespace: str, session: ReadSession, viewer: ViewerDep
) -> Response:
    """Every repo of a user or organisation that the viewer may see."""
    canonical = users.canonical_namespace(session, namespace)
    if canonical is None:
        raise RepoNotFound(f"there is no user or organisation {namespace[:96]}")
    found = repos.list_repos(session, viewer, namespace=canonical, limit=500)
    cards = select(Card).where(col(Card.repo_id).in_([repo.id for repo in found]))
    titles = {card.repo_id: card.title or card.summary for card in session.exec(cards)}
    rows = [
        {
            "name": repo.name,
            "url": url_of(repo),
            "private": repo.private,
            "gated": repo.gated,
            "title": titles.get(repo.id or 0),
            "downloads": repo.downloads,
            "last_modified": repo.last_modified,
        }
        for repo in found
    ]
    return page(
        request,
        "namespace.html",
        viewer,
        namespace=canonical,
        **_owner(session, viewer, canonical),
        repos=rows,
        collections=lines(session, viewer, canonical),
    )


def _owner(session: Session, viewer: Viewer, namespace: str) -> dict[str, Any]:
    """Who a namespace belongs to, and what the viewer may do there."""
    key = key_of(namespace)
    organization = session.exec(select(Organization).where(Organization.key == key)).first()
    user = session.exec(select(User).where(User.key == key)).first()
    owner = organization or user
    return {
        "full_name": owner.full_name if owner is not None else "",
        "is_organization": organization is not None,
        "may_see_members": organization is not None
        and users.may_read_private(session, viewer, namespace),
        "may_publish": users.may_write(session, viewer, namespace),
    }


@router.get("/{namespace}/{name}")
@router.get("/datasets/{namespace}/{name}")
def show_repo(
    request: Request,
    repo: RepoDep,
    hub: HubDep,
    session: ReadSession,
    viewer: ViewerDep,
    file: Annotated[str | None, Query(max_length=1024)] = None,
) -> Response:
    """Pictures, what to do with it, the card, and the facts of one file."""
    commit = refs.resolve(session, repo)
    entries = commits.entries(session, commit)
    files = catalogue.of_repo(session, repo)
    chosen = file or (files[0].file if files else None)
    adapter = catalogue.details(session, repo, chosen) if chosen is not None else None
    pictures = catalogue.previews(session, repo)
    card = _card(hub, entries)
    return page(
        request,
        "repo.html",
        viewer,
        **head_of(session, viewer, repo, commit, entries, tab="card"),
        previews=pictures,
        adapter=adapter,
        files=files,
        tags=_tags(session, repo),
        is_pipeline=any(entry.path == "model_index.json" for entry in entries),
        ways=ways_to_use(
            adapter,
            repo.full_name,
            [entry.path for entry in entries],
            card.base_model,
            public_url(request),
        ),
        origin=_origin(session, viewer, adapter, entries),
        card_html=card_html(card.body, url_of(repo), {p.path: p for p in pictures}),
        card_problem=card.problem,
        **curation_pages.for_repo(session, viewer, repo),
        **_gate(session, viewer, repo),
        **_facts(session, viewer, adapter),
    )


def _gate(session: Session, viewer: Viewer, repo: Repo) -> dict[str, Any]:
    """What stands between the viewer and the files, and why; None where nothing does."""
    if permissions.may_read_files(session, viewer, repo):
        return {"gate": None, "gate_reason": None}
    if viewer.user is None:
        return {"gate": "sign in", "gate_reason": None}
    asked = access.own(session, viewer, repo)
    if asked is None:
        return {"gate": "ask", "gate_reason": None}
    return {"gate": asked.state, "gate_reason": asked.reason}


@router.get("/{namespace}/{name}/tree/{place:path}")
@router.get("/datasets/{namespace}/{name}/tree/{place:path}")
def show_tree(
    request: Request, repo: RepoDep, place: str, session: ReadSession, viewer: ViewerDep
) -> Response:
    """The files of one folder at a revision."""
    revision, folder = _split(session, repo, place)
    commit = refs.resolve(session, repo, revision)
    entries = commits.entries(session, commit, folder)
    return page(
        request,
        "tree.html",
        viewer,
        **head_of(session, viewer, repo, commit, None, tab="files", revision=revision),
        rows=_rows(
            session,
            repo,
            revision,
            folder,
            entries,
            is_closed=not permissions.may_read_files(session, viewer, repo),
        ),
        path_parts=_parts(repo, revision, folder, "tree"),
        total_size=sum(entry.size for entry in entries),
        n_here=len(entries),
    )


@router.get("/{namespace}/{name}/blob/{place:path}")
@router.get("/datasets/{namespace}/{name}/blob/{place:path}")
def show_file(
    request: Request,
    repo: RepoDep,
    place: str,
    hub: HubDep,
    session: ReadSession,
    viewer: ViewerDep,
) -> Response:
    """One file at a revision: text as text, pictures as pictures."""
    revision, path = _split(session, repo, place)
    commit = refs.resolve(session, repo, revision)
    entry = commits.entry(session, commit, path)
    is_closed = not permissions.may_read_files(session, viewer, repo)
    text = None if is_closed else _text(hub, entry)
    preview = next((p for p in catalogue.previews(session, repo) if p.sha256 == entry.sha256), None)
    adapter = session.exec(
        select(Adapter).where(Adapter.repo_id == repo.id, Adapter.sha256 == entry.sha256)
    ).first()
    link = f"{url_of(repo)}/resolve/{quote(revision, safe='')}/{quote(path)}?download=true"
    return page(
        request,
        "blob.html",
        viewer,
        **head_of(session, viewer, repo, commit, None, tab="files", revision=revision),
        path_parts=_parts(repo, revision, path, "blob"),
        size=entry.size,
        sha256=entry.sha256,
        download_url=None if is_closed else link,
        text=text,
        preview=preview,
        why_not=_why_not(adapter, is_closed),
        file_url=f"{url_of(repo)}?file={quote(adapter.path)}" if adapter else None,
    )


def _why_not(adapter: Adapter | None, is_closed: bool) -> str:
    if is_closed:
        return "This repo is gated: ask for access on its page."
    return "This file holds tensors." if adapter else "This file is not text."


@router.post("/{namespace}/{name}/ask-access")
@router.post("/datasets/{namespace}/{name}/ask-access")
def ask_access(viewer: WriterDep, repo: RepoDep, session: WriteSession) -> Response:
    """The button of a gated repo's page."""
    access.ask(session, viewer, repo)
    return RedirectResponse(url_of(repo), HTTPStatus.SEE_OTHER)


@router.get("/{namespace}/{name}/commits/{revision:path}")
@router.get("/datasets/{namespace}/{name}/commits/{revision:path}")
def show_commits(
    request: Request,
    repo: RepoDep,
    revision: str,
    session: ReadSession,
    viewer: ViewerDep,
    after: Annotated[str | None, Query(max_length=40)] = None,
) -> Response:
    """The history of a revision, newest first."""
    commit = refs.resolve(session, repo, revision)
    found, cursor = commits.history(session, repo, commit, PAGE_OF_COMMITS, after)
    here = f"{url_of(repo)}/commits/{quote(revision)}"
    return page(
        request,
        "commits.html",
        viewer,
        **head_of(session, viewer, repo, commit, None, tab="versions", revision=revision),
        commits=found,
        more_url=f"{here}?after={cursor}" if cursor else None,
    )


# Inside


def _tags(session: Session, repo: Repo) -> list[str]:
    names = session.exec(select(Tag.name).where(Tag.repo_id == repo.id).order_by(Tag.name))
    return [name for name in names if not is_tool_tag(name)]


def _card(hub: Hub, entries: Sequence[CommitEntry]) -> ParsedCard:
    entry = next((entry for entry in entries if entry.path == CARD_PATH), None)
    if entry is None:
        return ParsedCard()
    return parse_card(b"".join(hub.store.open(Sha256(entry.sha256), 0, MAX_CARD_BYTES)))


def _origin(
    session: Session,
    viewer: users.Viewer,
    adapter: AdapterDetails | None,
    entries: Sequence[CommitEntry],
) -> origins.Origin | None:
    if adapter is None:
        return None
    parts = files_of_base([entry.path for entry in entries]) or ()
    is_part = adapter.kind != Kind.ADAPTER and adapter.file in parts
    return origins.origin(session, viewer, adapter, is_part=is_part)


def _facts(
    session: Session, viewer: users.Viewer, adapter: AdapterDetails | None
) -> dict[str, Any]:
    if adapter is None:
        return {"rows": [], "hashes": [], "metadata": [], "warnings": [], "trigger_source": None}

    def is_here(name: str) -> bool:
        namespace, _, rest = name.partition("/")
        try:
            repos.get_repo(session, viewer, namespace, rest)
        except RepoNotFound:
            return False
        return True

    triggers = adapter.triggers
    return {
        "rows": facts.rows(adapter, is_here),
        "hashes": facts.hashes(adapter),
        "metadata": facts.metadata(adapter),
        "warnings": [str(warning.get("message", "")) for warning in adapter.warnings],
        "trigger_source": facts.SOURCES[Source(triggers[0].source)] if triggers else None,
    }


def _split(session: Session, repo: Repo, place: str) -> tuple[str, str]:
    """Revision and path: names of branches may have slashes, so the longest that fits is meant."""
    named = refs.of_repo(session, repo)
    pulls = [f"refs/pr/{number}" for number in named.pulls]
    for name in sorted((*named.branches, *named.tags, *pulls), key=len, reverse=True):
        if place == name or place.startswith(f"{name}/"):
            return name, place[len(name) + 1 :]
    revision, _, path = place.partition("/")
    return revision, path


def _parts(repo: Repo, revision: str, path: str, last: str) -> list[tuple[str, str]]:
    names = [name for name in path.split("/") if name]
    base = f"{url_of(repo)}/{{kind}}/{quote(revision)}"
    parts = []
    for n, name in enumerate(names):
        kind = last if n == len(names) - 1 else "tree"
        parts.append((name, f"{base.format(kind=kind)}/{quote('/'.join(names[: n + 1]))}"))
    return parts


def _rows(
    session: Session,
    repo: Repo,
    revision: str,
    folder: str,
    entries: Sequence[CommitEntry],
    *,
    is_closed: bool,
) -> list[Row]:
    """Folders first, each with the sum of what is in it."""
    place, at = url_of(repo), quote(revision)
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    folders: dict[str, int] = {}
    files = []
    for entry in entries:
        name, slash, _ = entry.path.removeprefix(prefix).partition("/")
        if slash:
            folders[name] = folders.get(name, 0) + entry.size
        else:
            files.append((name, entry))
    ids = {entry.last_commit_id for _, entry in files}
    changed = {c.id: c for c in session.exec(select(Commit).where(col(Commit.id).in_(ids)))}
    rows = [
        Row(name, f"{place}/tree/{at}/{quote(prefix + name)}", True, total)
        for name, total in folders.items()
    ]
    for name, entry in files:
        path, last = quote(entry.path), changed.get(entry.last_commit_id)
        link = f"{place}/resolve/{quote(revision, safe='')}/{path}?download=true"
        rows.append(
            Row(
                name,
                f"{place}/blob/{at}/{path}",
                False,
                entry.size,
                last.message if last else None,
                last.created_at if last else None,
                None if is_closed else link,
            )
        )
    return rows


def _text(hub: Hub, entry: CommitEntry) -> str | None:
    if entry.size > MAX_TEXT_BYTES or PurePosixPath(entry.path).suffix == ".safetensors":
        return None
    try:
        text = b"".join(hub.store.open(Sha256(entry.sha256))).decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text
