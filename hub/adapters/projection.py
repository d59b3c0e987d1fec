"""Reads what the files at a repo's `main` say and writes it into the catalogue's rows.

Reading, which may take seconds for a large file, happens outside of any transaction;
rows are written only while the head is still the one that was read.
A file that cannot be understood gets a row with the reason: it never fails a commit.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, SQLModel, col, select

from hub.adapters import pictures, text
from hub.adapters.card import MAX_CARD_BYTES, ParsedCard, parse_card
from hub.adapters.models import (
    Adapter,
    Card,
    Fact,
    HashAlias,
    Identification,
    Kind,
    Preview,
    Source,
    Tag,
    Trigger,
)
from hub.adapters.profile import FLAT, profile_of
from hub.blobs.store import Sha256
from hub.context import Hub
from hub.db import now
from hub.repos import commits
from hub.repos.models import Commit, CommitEntry, Event, Repo
from merge.errors import MergeError
from merge.formats import metadata as keys
from merge.formats.adapters import CONFIG_NAME, takes_config
from merge.formats.hashes import hash_file
from merge.formats.reader import TensorFile
from merge.identify import identify_file

CARD_PATH = "README.md"
MAX_PREVIEWS = 60
MAX_CONFIG_BYTES = 1024 * 1024
MAX_METADATA_VALUE = 4096
# The hash of nothing: a broken trainer once wrote it into thousands of unrelated files.
_EMPTY = hashlib.sha256().hexdigest()

Key = tuple[str, str]  # sha256 of the file and of the adapter_config.json beside it, or ""
Row = TypeVar("Row", bound=SQLModel)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Everything that was read of one commit."""

    commit: Commit
    entries: Sequence[CommitEntry]
    identified: Mapping[Key, Identification]
    card: ParsedCard
    previews: Sequence[Preview]


def project(hub: Hub, repo_id: int) -> None:
    """Make the rows of one repo those of its `main` as it is now."""
    while True:
        with hub.db.read() as session:
            repo = session.get(Repo, repo_id)
            head = session.get(Commit, repo.head) if repo is not None and repo.head else None
            entries = commits.entries(session, head) if head is not None else []
            known = _known(session, entries)
        reading = _read(hub, repo_id, head, entries, known) if head is not None else None
        with hub.db.write() as session:
            if _write(session, repo_id, reading):
                return


def pending(session: Session) -> list[int]:
    """Ids of repos with events that no projection has seen."""
    query = select(Event.repo_id).where(col(Event.done_at).is_(None)).distinct()
    return sorted(session.exec(query))


def forget(session: Session) -> None:
    """Drop what was remembered of blobs, so that projections read every byte again."""
    session.execute(delete(HashAlias))
    session.execute(delete(Identification))


# Reading


def _known(session: Session, entries: Iterable[CommitEntry]) -> dict[Key, Identification]:
    digests = {entry.sha256 for entry in entries if _is_tensors(entry.path)}
    rows = session.exec(select(Identification).where(col(Identification.sha256).in_(digests)))
    return {(row.sha256, row.config_sha256): row for row in rows}


def _read(
    hub: Hub,
    repo_id: int,
    head: Commit,
    entries: Sequence[CommitEntry],
    known: Mapping[Key, Identification],
) -> _Reading:
    by_path = {entry.path: entry for entry in entries}
    identified = dict(known)
    for entry in entries:
        key = _key(entry, by_path)
        if _is_tensors(entry.path) and key not in identified:
            config = by_path[_config_path(entry.path)] if key[1] else None
            identified[key] = _identify(hub, entry, config)
    card = ParsedCard()
    if CARD_PATH in by_path:
        card = parse_card(_head_of(hub, by_path[CARD_PATH].sha256, MAX_CARD_BYTES))
    return _Reading(head, entries, identified, card, _previews(hub, repo_id, by_path, card))


def _identify(hub: Hub, entry: CommitEntry, config: CommitEntry | None) -> Identification:
    """The answer about one file; what is wrong with a file is part of the answer."""
    document: dict[str, Any] = {}
    problem = None
    try:
        with (
            hub.store.local(Sha256(entry.sha256)) as path,
            TensorFile(path, name=entry.path) as file,
        ):
            hashes = hash_file(path, file.header.data_offset, name=entry.path)
            stated = _config(hub, config) if takes_config(file.header) else None
            answer = identify_file(file, hashes=hashes, config=stated)
            # All 64 digits: AutoV3 is its first 12, and trainers write the whole of it.
            aliases = hashes.to_json() | {"autov3": hashes.data_sha256}
            document = answer.to_json() | {"aliases": aliases, "profile": profile_of(file)}
    except MergeError as error:
        # The same bytes may have another name elsewhere.
        problem = str(error).removeprefix(f"{entry.path}: ")
    except FileNotFoundError:
        problem = "the blob store has lost its bytes"
    return Identification(
        sha256=entry.sha256,
        config_sha256=config.sha256 if config is not None else "",
        document=json.dumps(document),
        problem=problem,
    )


def _config(hub: Hub, entry: CommitEntry | None) -> dict[str, Any] | None:
    if entry is None or entry.size > MAX_CONFIG_BYTES:
        return None
    try:
        value = json.loads(_head_of(hub, entry.sha256, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _previews(
    hub: Hub, repo_id: int, by_path: Mapping[str, CommitEntry], card: ParsedCard
) -> list[Preview]:
    """Widget pictures in the card's order, then samples, then the rest by name."""
    widgets = {widget.path: widget for widget in card.widgets}
    rest = sorted(
        (path for path in by_path if path.lower().endswith(pictures.SUFFIXES)),
        key=lambda path: (not path.startswith("samples/"), path),
    )
    paths = [path for path in dict.fromkeys((*widgets, *rest)) if path in by_path]
    made = []
    for position, path in enumerate(paths[:MAX_PREVIEWS]):
        entry, widget = by_path[path], widgets.get(path)
        preview = Preview(repo_id=repo_id, position=position, path=path, sha256=entry.sha256)
        try:
            with hub.store.local(Sha256(entry.sha256)) as file:
                facts = pictures.read_facts(file)
                # Decoding it once shows whether it can be shown, and the gallery has it at hand.
                pictures.cached_thumbnail(hub.thumbs, entry.sha256, file, pictures.CARD_WIDTH)
        except pictures.BadPicture as error:
            preview.problem = str(error)
        except FileNotFoundError:
            preview.problem = "the blob store has lost its bytes"
        else:
            preview.width, preview.height = facts.width, facts.height
            preview.prompt, preview.negative_prompt = facts.prompt, facts.negative_prompt
        if widget is not None and widget.prompt:
            preview.prompt, preview.negative_prompt = widget.prompt, widget.negative_prompt
        made.append(preview)
    return made


def _head_of(hub: Hub, sha256: str, limit: int) -> bytes:
    return b"".join(hub.store.open(Sha256(sha256), 0, limit))


def _is_tensors(path: str) -> bool:
    return path.lower().endswith(".safetensors")


def _config_path(path: str) -> str:
    return str(PurePosixPath(path).with_name(CONFIG_NAME))


def _key(entry: CommitEntry, by_path: Mapping[str, CommitEntry]) -> Key:
    config = by_path.get(_config_path(entry.path))
    return entry.sha256, config.sha256 if config is not None else ""


# Writing


def _write(session: Session, repo_id: int, reading: _Reading | None) -> bool:
    """Replace the rows of a repo; False if its head has moved since it was read."""
    repo = session.exec(select(Repo).where(Repo.id == repo_id).with_for_update()).first()
    if (repo.head if repo is not None else None) != (reading.commit.id if reading else None):
        return False
    if repo is None:
        text.sweep(session)
    else:
        text.forget(session, repo_id)
    for table in (Adapter, Card, Tag, Preview):
        session.execute(delete(table).where(col(table.repo_id) == repo_id))
    if repo is not None and reading is not None:
        _insert(session, repo, reading)
    events = select(Event).where(Event.repo_id == repo_id, col(Event.done_at).is_(None))
    for event in session.exec(events):
        event.done_at = now()
        session.add(event)
    return True


def _insert(session: Session, repo: Repo, reading: _Reading) -> None:
    assert repo.id is not None
    card = reading.card
    session.add(
        _storable(
            Card(
                repo_id=repo.id,
                commit_id=reading.commit.id,
                title=card.title,
                summary=card.summary,
                license=card.license,
                base_model=card.base_model,
                problem=card.problem,
            )
        )
    )
    session.add_all(_storable(Tag(repo_id=repo.id, name=tag)) for tag in card.tags)
    session.add_all(map(_storable, reading.previews))
    by_path = {entry.path: entry for entry in reading.entries}
    tensors = {e.path: _key(e, by_path) for e in reading.entries if _is_tensors(e.path)}
    # In one order for all repos, or two with the same files would wait for each other's rows.
    documents = {
        key: _remember(session, _storable(reading.identified[key]))
        for key in sorted(set(tensors.values()))
    }
    found = [
        (by_path[path], reading.identified[key], documents[key]) for path, key in tensors.items()
    ]
    found.sort(key=lambda item: _rank(item[0], item[2]))
    for position, (entry, identification, document) in enumerate(found):
        # The card speaks for the repo: its title is the title of the file that does so too.
        shown = card if position == 0 else replace(card, title=None)
        _insert_adapter(session, repo, position, entry, identification, document, shown)


def _remember(session: Session, identification: Identification) -> dict[str, Any]:
    """What was read of a file, kept with its hashes for every repo that has the file."""
    _insert_missing(session, Identification, [identification.model_dump()])
    document: dict[str, Any] = json.loads(identification.document)
    aliases = [
        {"kind": kind, "value": value, "sha256": identification.sha256}
        for kind, value in (document.get("aliases") or {}).items()
        if value and not _EMPTY.startswith(value[:8])
    ]
    _insert_missing(session, HashAlias, aliases)
    return document


_SPEAKS = {kind: n for n, kind in enumerate((Kind.ADAPTER, Kind.CHECKPOINT, Kind.EMBEDDING))}


def _rank(entry: CommitEntry, document: Mapping[str, Any]) -> tuple[Any, ...]:
    """Smallest first: which file speaks for a repo. Adapters before all else, finals before steps."""
    kind = document.get("kind", Kind.UNREADABLE)
    is_step = re.search(r"[-_](?:\d{3,}|step\d+|epoch\d+)$", PurePosixPath(entry.path).stem)
    return (
        _SPEAKS.get(kind, len(_SPEAKS)),
        is_step is not None,
        entry.path.count("/"),
        -entry.size if kind == Kind.CHECKPOINT else 0,
        entry.path,
    )


def _insert_adapter(
    session: Session,
    repo: Repo,
    position: int,
    entry: CommitEntry,
    identification: Identification,
    document: Mapping[str, Any],
    card: ParsedCard,
) -> None:
    assert repo.id is not None
    families = document.get("families") or []
    algorithms = document.get("algorithms") or []
    ranks = document.get("ranks") or {}
    metadata = document.get("metadata") or {}
    problem = identification.problem
    adapter = Adapter(
        repo_id=repo.id,
        path=entry.path,
        position=position,
        sha256=entry.sha256,
        config_sha256=identification.config_sha256,
        size=entry.size,
        title=card.title or _title(repo, entry.path, metadata, position),
        kind=document.get("kind", Kind.UNREADABLE),
        algorithm=algorithms[0] if algorithms else None,
        family=families[0]["name"] if families else None,
        dialect=document.get("dialect"),
        rank_min=ranks.get("min"),
        rank_max=ranks.get("max"),
        parameters=document.get("parameters") or 0,
        profile=document.get("profile") or FLAT,
        problem=problem and f"{entry.path}: {problem}",
    )
    session.add(_storable(adapter))
    session.flush()
    assert adapter.id is not None
    triggers = _triggers(adapter.id, metadata, card)
    session.add_all(map(_storable, triggers))
    session.add_all(map(_storable, _facts(adapter.id, document, card)))
    words = [trigger.word for trigger in triggers]
    text.put(
        session,
        adapter.id,
        {
            "name": f"{adapter.title} {repo.full_name} {entry.path}",
            "words": " ".join(words),
            "tags": " ".join(card.tags),
            "body": f"{card.base_model or ''} {card.body}",
        },
    )


def _title(repo: Repo, path: str, metadata: Mapping[str, str], position: int) -> str:
    stated = metadata.get(keys.TITLE, "").strip()
    if stated:
        return stated[:200]
    return repo.name if position == 0 else PurePosixPath(path).stem


def _triggers(adapter_id: int, metadata: Mapping[str, str], card: ParsedCard) -> list[Trigger]:
    found = [(t.word, Source.METADATA, t.confidence) for t in keys.triggers(metadata)]
    found += [(word, Source.CARD, 0.9) for word in card.trigger_words]
    found.sort(key=lambda item: -item[2])
    best: dict[str, Trigger] = {}
    for word, source, confidence in found:
        if word.lower() not in best:
            best[word.lower()] = Trigger(
                adapter_id=adapter_id,
                position=len(best),
                word=word[:200],
                source=source,
                confidence=confidence,
            )
    return list(best.values())[:40]


def _facts(adapter_id: int, document: Mapping[str, Any], card: ParsedCard) -> list[Fact]:
    """What is known, each with its source; structured values are JSON."""
    families = document.get("families") or []
    found: list[tuple[str, Any, Source, float]] = [
        (name, document[name], Source.TENSORS, 1.0)
        for name in ("kind", "algorithms", "dialect", "modules", "components", "ranks", "alphas",
                     "targets", "dtypes", "parameters", "size_bytes")
        if document.get(name) not in (None, [], {})
    ]  # fmt: skip
    if families:
        found.append(("family", families[0]["name"], Source.TENSORS, families[0]["confidence"]))
        found.append(("families", families, Source.TENSORS, families[0]["confidence"]))
    metadata = document.get("metadata") or {}
    stated = (("base_version", keys.BASE_VERSION), ("architecture", keys.ARCHITECTURE),
              ("usage_hint", keys.USAGE_HINT), ("recipe_digest", keys.GRAFT_RECIPE_DIGEST),
              ("output_name", keys.OUTPUT_NAME))  # fmt: skip
    found += [
        (name, metadata[key][:MAX_METADATA_VALUE], Source.METADATA, 0.8)
        for name, key in stated
        if metadata.get(key)
    ]
    for name, value in (("license", card.license), ("base_model", card.base_model)):
        if value:
            found.append((name, value, Source.CARD, 0.9))
    return [
        Fact(
            adapter_id=adapter_id,
            name=name,
            source=source,
            value=value if isinstance(value, str) else json.dumps(value),
            confidence=confidence,
        )
        for name, value, source, confidence in found
    ]


def _insert_missing(
    session: Session, table: type[SQLModel], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Rows that belong to a blob: another repo with the same bytes may write them at this moment."""
    if rows:
        on = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
        session.execute(on.insert(table).values(list(rows)).on_conflict_do_nothing())


def _storable(row: Row) -> Row:
    """`row` without NUL characters, which PostgreSQL cannot store."""
    for name in type(row).model_fields:
        value = getattr(row, name)
        if isinstance(value, str) and "\0" in value:
            setattr(row, name, value.replace("\0", "\N{REPLACEMENT CHARACTER}"))
    return row
