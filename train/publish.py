"""Bring the folder of a finished run to a hub or to object storage, whole and verified.

validated    every file of the folder is what its manifest says
staged       known which files the target lacks
uploaded     the old manifest is gone and those files are there
verified     the target holds the right bytes of every file
registered   the manifest is written, last: a target with a manifest is complete

Any state may be the last one of a broken attempt; the next attempt starts over and sends only what
is still missing, so publishing twice changes nothing.
No torch here: publishing needs no tensor.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from train.errors import CannotPublish
from train.manifest import MANIFEST, Entry, read_manifest


class State(StrEnum):
    """How far a publication has come."""

    VALIDATED = "validated"
    STAGED = "staged"
    UPLOADED = "uploaded"
    VERIFIED = "verified"
    REGISTERED = "registered"


class Target(Protocol):
    """Somewhere files can be kept under their paths. Every error is CannotPublish, one sentence,
    or one of the hub client's own, which the command line explains.
    """

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Raise unless the credentials are good for writing here; asked before a training run."""

    def manifest(self) -> str | None:
        """The manifest of what is published here, None if nothing complete is."""

    def held(self, folder: Path, files: Mapping[str, Entry]) -> set[str]:
        """Those paths under which the target has exactly the folder's bytes."""

    def send(self, folder: Path, paths: list[str]) -> None:
        """Store these files of the folder; from here on no manifest says the target is complete."""

    def register(self, manifest: str, stale: list[str]) -> None:
        """Write the manifest, then remove the paths that only the previous one named."""


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it; `sent` is empty if the target already had everything."""

    target: str
    sent: tuple[str, ...]
    bytes_sent: int


def publish(
    folder: Path,
    target: Target,
    notify: Callable[[State, str], None] = lambda state, detail: None,
) -> Published:
    """Publish the folder; raises BadResult, or CannotPublish with nothing registered."""
    manifest = read_manifest(folder)
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    files = manifest.files
    notify(State.VALIDATED, f"{len(files)} files")

    previous = target.manifest()
    missing = sorted(set(files) - target.held(folder, files))
    if previous == text and not missing:
        notify(State.REGISTERED, "it was already there")
        return Published(target.name, (), 0)
    n_bytes = sum(files[path].size for path in missing)
    notify(State.STAGED, f"{len(missing)} files, {n_bytes:,} bytes to send")

    if missing:
        target.send(folder, missing)
    notify(State.UPLOADED, f"{n_bytes:,} bytes")

    _require_all(target, folder, files)
    notify(State.VERIFIED, f"{len(files)} files")

    stale = sorted(_paths(previous) - set(files) - {MANIFEST})
    target.register(text, stale)
    notify(State.REGISTERED, target.name)
    return Published(target.name, tuple(missing), n_bytes)


def _require_all(target: Target, folder: Path, files: Mapping[str, Entry]) -> None:
    wrong = sorted(set(files) - target.held(folder, files))
    if wrong:
        raise CannotPublish(
            target.name, f"{wrong[0]} does not have the bytes that were sent; nothing is registered"
        )


def _paths(manifest: str | None) -> set[str]:
    """The paths a published manifest names; a manifest of another tool names none of ours."""
    if manifest is None:
        return set()
    try:
        return set(json.loads(manifest)["files"])
    except (ValueError, KeyError, TypeError):
        return set()
