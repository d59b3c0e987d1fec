"""What the API says of an adapter: small in lists, everything on request."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict
from sqlalchemy import func
from sqlmodel import Session, col, select

from hub.adapters import pictures
from hub.adapters.models import Adapter, Fact, Identification, Kind, Preview, Tag, Trigger
from hub.errors import EntryNotFound
from hub.repos.models import Repo
from merge.families import FAMILIES

MAX_LISTED_WORDS = 12
KIND_TITLES = {
    Kind.ADAPTER: "Adapter",
    Kind.CHECKPOINT: "Checkpoint",
    Kind.EMBEDDING: "Embedding",
    Kind.OTHER: "Other tensors",
    Kind.UNREADABLE: "Not readable",
}


# As people write them where there is little room.
SHORT_FAMILIES = {"sd15": "SD 1.5", "sdxl": "SDXL", "tiny-sd": "Tiny SD"}


class _Item(BaseModel):
    model_config = ConfigDict(frozen=True)


class PreviewItem(_Item):
    """A picture; `width` and `height` are the original's, so that nothing jumps while it loads."""

    path: str
    sha256: str
    width: int
    height: int
    prompt: str | None
    negative_prompt: str | None

    def thumb(self, target: int) -> str:
        """Address of a thumbnail; it never changes for the same picture."""
        return f"/static/thumbs/{self.sha256}-{target}.webp"

    @property
    def srcset(self) -> str:
        return ", ".join(
            f"{self.thumb(target)} {pictures.thumbnail_size(self.width, self.height, target)[0]}w"
            for target in pictures.WIDTHS[:3]
        )

    @property
    def shape(self) -> str:
        """How a portrait card shows it: a square whole with the words below, a panorama whole,
        all others cropped to fill.
        """
        if self.width > 1.5 * self.height:
            return "wide"
        return "square" if 0.9 <= self.width / self.height <= 1.15 else "filling"


class AdapterItem(_Item):
    """One file in a list."""

    repo: str
    file: str
    title: str
    author: str
    kind: str
    algorithm: str | None
    family: str | None
    dialect: str | None
    rank_min: int | None
    rank_max: int | None
    parameters: int
    size_bytes: int
    sha256: str
    trigger_words: list[str]
    tags: list[str]
    downloads: int
    likes: int
    private: bool
    created_at: datetime
    updated_at: datetime
    previews: list[PreviewItem]
    files: int  # with tensors in this repo
    problem: str | None
    url: str
    download_url: str
    pattern_url: str

    @property
    def preview(self) -> PreviewItem | None:
        return self.previews[0] if self.previews else None

    @property
    def second(self) -> PreviewItem | None:
        return self.previews[1] if len(self.previews) > 1 else None

    @property
    def bench_url(self) -> str:
        """What puts it on the bench."""
        return f"/bench/add?ref={quote(f'{self.repo}:{self.file}')}"

    @property
    def kind_title(self) -> str:
        return KIND_TITLES[Kind(self.kind)]

    @property
    def family_badge(self) -> str | None:
        return SHORT_FAMILIES.get(self.family or "", self.family_title)

    @property
    def family_title(self) -> str | None:
        return family_title(self.family)


class FactItem(_Item):
    """One thing known, and where it comes from."""

    name: str
    value: Any
    source: str
    confidence: float


class TriggerItem(_Item):
    word: str
    source: str
    confidence: float


class AdapterDetails(AdapterItem):
    """Everything known of one file."""

    facts: list[FactItem]
    triggers: list[TriggerItem]
    hashes: dict[str, str | None]
    metadata: dict[str, str]
    warnings: list[dict[str, Any]]


class HashMatch(_Item):
    """A file that has a hash, and which kind of hash it was."""

    kind: str
    item: AdapterItem


def family_title(name: str | None) -> str | None:
    """How people call a family; its own name if it is not in our tables."""
    return FAMILIES[name].title if name in FAMILIES else name


def items(session: Session, rows: Sequence[tuple[Adapter, Repo]]) -> list[AdapterItem]:
    """In the order of the rows; three queries however many there are."""
    repo_ids = {adapter.repo_id for adapter, _ in rows}
    words = _words(session, [adapter.id for adapter, _ in rows])
    tags: dict[int, list[str]] = defaultdict(list)
    named = select(Tag.repo_id, Tag.name).where(col(Tag.repo_id).in_(repo_ids))
    for repo_id, name in session.exec(named.order_by(Tag.name)):
        tags[repo_id].append(name)
    shown: dict[int, list[PreviewItem]] = defaultdict(list)
    for preview in session.exec(_pictures(repo_ids)):
        if len(shown[preview.repo_id]) < 2:
            shown[preview.repo_id].append(_preview(preview))
    counts = select(Adapter.repo_id, func.count()).where(col(Adapter.repo_id).in_(repo_ids))
    files = dict(session.exec(counts.group_by(col(Adapter.repo_id))).all())
    return [
        AdapterItem(
            **_own(adapter, repo),
            trigger_words=words[adapter.id][:MAX_LISTED_WORDS],
            tags=tags[adapter.repo_id][:MAX_LISTED_WORDS],
            previews=shown[adapter.repo_id],
            files=files[adapter.repo_id],
        )
        for adapter, repo in rows
    ]


def details(session: Session, repo: Repo, path: str) -> AdapterDetails:
    """EntryNotFound if the repo's `main` has no such file, or it holds no tensors."""
    found = session.exec(
        select(Adapter).where(Adapter.repo_id == repo.id, Adapter.path == path)
    ).first()
    if found is None:
        raise EntryNotFound(f"there is no safetensors file {path[:200]} on main", "file")
    item = items(session, [(found, repo)])[0]
    identification = session.get(Identification, (found.sha256, found.config_sha256))
    document = json.loads(identification.document) if identification is not None else {}
    triggers = session.exec(
        select(Trigger).where(Trigger.adapter_id == found.id).order_by(col(Trigger.position))
    )
    facts = session.exec(select(Fact).where(Fact.adapter_id == found.id).order_by(Fact.name))
    return AdapterDetails(
        **item.model_dump(exclude={"previews"}),
        previews=previews(session, repo),
        facts=[_fact(fact) for fact in facts],
        triggers=[TriggerItem.model_validate(t, from_attributes=True) for t in triggers],
        hashes=document.get("hashes") or {"sha256": found.sha256},
        metadata=document.get("metadata") or {},
        warnings=document.get("warnings") or [],
    )


def of_repo(session: Session, repo: Repo) -> list[AdapterItem]:
    """Every file with tensors at `main`, the one that speaks for the repo first."""
    rows = session.exec(
        select(Adapter).where(Adapter.repo_id == repo.id).order_by(col(Adapter.position))
    )
    return items(session, [(adapter, repo) for adapter in rows])


def previews(session: Session, repo: Repo) -> list[PreviewItem]:
    """Pictures of a repo that can be shown, in order."""
    return [_preview(row) for row in session.exec(_pictures({repo.id}))]


def _pictures(repo_ids: Iterable[int | None]) -> Any:
    return (
        select(Preview)
        .where(col(Preview.repo_id).in_(repo_ids), col(Preview.problem).is_(None))
        .order_by(col(Preview.repo_id), col(Preview.position))
    )


def _own(adapter: Adapter, repo: Repo) -> dict[str, Any]:
    place = f"/{repo.full_name}"
    first = adapter.position == 0
    return {
        "repo": repo.full_name,
        "file": adapter.path,
        "title": adapter.title,
        "author": repo.namespace,
        "kind": adapter.kind,
        "algorithm": adapter.algorithm,
        "family": adapter.family,
        "dialect": adapter.dialect,
        "rank_min": adapter.rank_min,
        "rank_max": adapter.rank_max,
        "parameters": adapter.parameters,
        "size_bytes": adapter.size,
        "sha256": adapter.sha256,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "private": repo.private,
        "created_at": repo.created_at,
        "updated_at": repo.last_modified,
        "problem": adapter.problem,
        "url": place if first else f"{place}?file={quote(adapter.path)}",
        "download_url": f"{place}/resolve/main/{quote(adapter.path)}",
        "pattern_url": f"/static/patterns/{adapter.profile}-{adapter.sha256[:8]}.svg",
    }


def _words(session: Session, ids: Sequence[int | None]) -> dict[int | None, list[str]]:
    words: dict[int | None, list[str]] = defaultdict(list)
    query = select(Trigger.adapter_id, Trigger.word).where(col(Trigger.adapter_id).in_(ids))
    for adapter_id, word in session.exec(query.order_by(col(Trigger.position))):
        words[adapter_id].append(word)
    return words


def _preview(row: Preview) -> PreviewItem:
    return PreviewItem.model_validate(row, from_attributes=True)


def _fact(row: Fact) -> FactItem:
    is_json = row.value[:1] in ("[", "{") or row.value.isdecimal()
    value = json.loads(row.value) if is_json and row.source == "tensors" else row.value
    return FactItem(name=row.name, value=value, source=row.source, confidence=row.confidence)
