"""What a pull request changes, file by file, and what that means for the adapters among them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlmodel import Session, select

from hub.adapters.models import Identification
from hub.blobs.store import Sha256
from hub.context import Hub
from hub.repos.operations import File
from hub.repos.pulls import Change
from hub.web import facts
from merge.errors import MergeError
from merge.formats.header import PREFIX_BYTES, header_length
from merge.formats.reader import TensorFile
from merge.identify import identify_file

MAX_FILES = 500
# Of the headers that are read for a page: what a mebibyte of small tensors means takes a second or
# two to say, and anybody may ask.
MAX_HEADER_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class ChangedFile:
    """A line of the list: `what` is added, removed or changed; sizes are None where it is not.

    `facts` are (name, before, after), of tensor files only.
    """

    path: str
    what: str
    before: int | None
    after: int | None
    url: str
    facts: Sequence[tuple[str, str, str]]
    is_conflict: bool


def changed_files(
    hub: Hub,
    session: Session,
    changes: Sequence[Change],
    conflicts: Sequence[str],
    revision_url: str,
) -> list[ChangedFile]:
    """`revision_url` is the address of the pull request's files, which removed ones lack."""
    found = []
    headers = _Headers(hub, session)
    for change in changes[:MAX_FILES]:
        stated: list[tuple[str, str, str]] = []
        if change.path.lower().endswith(".safetensors"):
            before = headers.said(change.path, change.before)
            after = headers.said(change.path, change.after)
            if before is not None and after is not None:
                stated = list(_differences(before, after))
        found.append(
            ChangedFile(
                path=change.path,
                what=_what(change),
                before=change.before.size if change.before is not None else None,
                after=change.after.size if change.after is not None else None,
                url=f"{revision_url}/{quote(change.path)}" if change.after is not None else "",
                facts=stated,
                is_conflict=change.path in conflicts,
            )
        )
    return found


def _what(change: Change) -> str:
    if change.before is None:
        return "added"
    return "removed" if change.after is None else "changed"


def _differences(
    before: Mapping[str, str], after: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield name, before.get(name, ""), after.get(name, "")


class _Headers:
    """What tensor files say: from the catalogue, or from headers of files on this machine."""

    def __init__(self, hub: Hub, session: Session) -> None:
        self._hub = hub
        self._session = session
        self._left = MAX_HEADER_BYTES

    def said(self, path: str, file: File | None) -> Mapping[str, str] | None:
        """Nothing where there is no file; None where its header is elsewhere, or too much."""
        if file is None:
            return {}
        query = select(Identification).where(Identification.sha256 == file.sha256)
        known = self._session.exec(query.order_by(Identification.config_sha256)).first()
        if known is not None:
            return {"Problem": known.problem} if known.problem else facts.brief(_parsed(known))
        local = self._hub.store.path(Sha256(file.sha256))
        if local is None:
            return None
        try:
            with local.open("rb") as opened:
                self._left -= header_length(opened.read(PREFIX_BYTES), file.size, path)
            return _read(local, path) if self._left >= 0 else None
        except MergeError as error:
            return {"Problem": str(error).removeprefix(f"{path}: ")}


@lru_cache(maxsize=256)
def _read(blob: Path, path: str) -> Mapping[str, str]:
    """A blob never changes, so what it says is kept for the next who looks."""
    with TensorFile(blob, name=path) as opened:
        return facts.brief(identify_file(opened).to_json())


def _parsed(known: Identification) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(known.document)
    return document
