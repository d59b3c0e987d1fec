"""What a commit may ask for, applied to the entries of its parent."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hub.blobs.store import Stored, lfs_pointer_oid
from hub.errors import BadPath, BadUpload, EntryNotFound
from hub.repos.models import Commit, CommitEntry
from hub.repos.paths import check_path


@dataclass(frozen=True, slots=True)
class Add:
    """Put bytes the store holds at a path, over what is there."""

    path: str
    stored: Stored
    lfs: bool


@dataclass(frozen=True, slots=True)
class Delete:
    path: str


@dataclass(frozen=True, slots=True)
class DeleteFolder:
    """Everything below a path; a final slash is allowed."""

    path: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A file, or everything in a folder, from a revision of the same repo (None: the parent)."""

    from_path: str
    to_path: str
    from_revision: str | None = None


Operation = Add | Delete | DeleteFolder | Copy


@dataclass(frozen=True, slots=True)
class File:
    """The part of an entry that a commit decides; `git_oid` of an LFS file is its pointer's."""

    sha256: str
    git_oid: str
    size: int
    lfs: bool


Files = dict[str, File]


def files_of(entries: Iterable[CommitEntry]) -> Files:
    return {e.path: File(e.sha256, e.git_oid, e.size, e.lfs) for e in entries}


def apply(
    files: Mapping[str, File],
    operations: Sequence[Operation],
    files_at: Callable[[str], Mapping[str, File]],
) -> Files:
    """The files after all operations in order; BadPath, BadUpload, EntryNotFound.

    `files_at` gives the files of another revision.
    """
    after = dict(files)
    for operation in operations:
        match operation:
            case Add(path, stored, lfs):
                after[check_path(path)] = _file(path, stored, lfs)
            case Delete(path):
                # Clients that do not know which it is name a folder like a file.
                if after.pop(path, None) is None:
                    for inner in _inside(after, path, "file"):
                        del after[inner]
            case DeleteFolder(path):
                for inner in _inside(after, path):
                    del after[inner]
            case Copy(from_path, to_path, revision):
                source = files if revision is None else files_at(revision)
                after.update(_copies(source, from_path, to_path))
    _check_no_file_is_a_folder(after)
    return after


def commit_id(commit: Commit, files: Mapping[str, File], *, repo: str, branch: str) -> str:
    """SHA-1 of the canonical record of a commit: everything that was asked for and its result."""
    record = {
        "repo": repo,
        "branch": branch,
        "parent": commit.parent_id,
        "author": commit.author,
        "message": commit.message,
        "description": commit.description,
        "created_at": commit.created_at.isoformat(),
        "files": [[p, f.sha256, f.git_oid, f.size, f.lfs] for p, f in sorted(files.items())],
    }
    canonical = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha1(canonical.encode(), usedforsecurity=False).hexdigest()


def _file(path: str, stored: Stored, lfs: bool) -> File:
    if lfs:
        git_oid = lfs_pointer_oid(stored.sha256, stored.size)
    elif stored.git_oid is None:
        raise BadUpload(f"{path}: a file of {stored.size} bytes has to be sent over LFS", "path")
    else:
        git_oid = stored.git_oid
    return File(stored.sha256, git_oid, stored.size, lfs)


def _inside(files: Mapping[str, File], folder: str, what: str = "folder") -> list[str]:
    prefix = folder.rstrip("/") + "/"
    inner = [path for path in files if path.startswith(prefix)]
    if not inner:
        raise EntryNotFound(f"A {what} with this name doesn't exist: {folder}", "path")
    return inner


def _copies(source: Mapping[str, File], from_path: str, to_path: str) -> Files:
    if from_path in source:
        return {check_path(to_path): replace(source[from_path])}
    start = len(from_path.rstrip("/"))
    return {
        check_path(to_path.rstrip("/") + path[start:]): source[path]
        for path in _inside(source, from_path)
    }


def _check_no_file_is_a_folder(files: Mapping[str, File]) -> None:
    for path in files:
        parts = path.split("/")
        for n in range(1, len(parts)):
            if (folder := "/".join(parts[:n])) in files:
                raise BadPath(f"{folder} would be both a file and a folder", "path")
