"""Answers of the protocol, built from rows; nothing here asks the database or the store."""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from hub.hf.cards import card_tags
from hub.repos.models import Commit, CommitEntry, Repo, RepoType

Json = dict[str, Any]


def date(moment: datetime) -> str:
    """With a Z: huggingface_hub's date parser refuses +00:00."""
    return (
        moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"
    )


def repo_url(base: str, repo: Repo) -> str:
    """Where people see it; clients parse the repo's id out of this."""
    return f"{base}/{'datasets/' if repo.type == RepoType.DATASET else ''}{repo.full_name}"


def repo_summary(repo: Repo, tags: Sequence[str]) -> Json:
    """What a listing says of each repo."""
    return {
        "_id": f"{repo.id:024x}",
        "id": repo.full_name,
        "modelId": repo.full_name,
        "author": repo.namespace,
        "sha": repo.head,
        "createdAt": date(repo.created_at),
        "lastModified": date(repo.last_modified),
        "private": repo.private,
        "gated": repo.gated or False,
        "disabled": False,
        "downloads": repo.downloads,
        "downloadsAllTime": repo.downloads,
        "likes": repo.likes,
        "trendingScore": repo.downloads,
        "tags": list(tags),
    }


def repo_info(
    repo: Repo,
    commit: Commit,
    entries: Iterable[CommitEntry],
    card: Json | None,
    *,
    blobs: bool,
) -> Json:
    """A repo at a commit; siblings stay sorted, because diffusers takes the first that fits."""
    entries = list(entries)
    answer = repo_summary(repo, card_tags(card or {}))
    answer |= {
        "sha": commit.id,
        "lastModified": date(commit.created_at),
        "siblings": [_sibling(entry, blobs=blobs) for entry in entries],
        "usedStorage": sum(entry.size for entry in entries),
        "spaces": [],
    }
    if card is not None:
        answer["cardData"] = card
        for name in ("library_name", "pipeline_tag"):
            if isinstance(card.get(name), str):
                answer[name] = card[name]
    return answer


def _sibling(entry: CommitEntry, *, blobs: bool) -> Json:
    answer: Json = {"rfilename": entry.path}
    if blobs:
        answer |= {"size": entry.size, "blobId": entry.git_oid}
        if entry.lfs:
            answer["lfs"] = {"sha256": entry.sha256, **_lfs_sizes(entry)}
    return answer


def tree(
    entries: Iterable[CommitEntry],
    under: str = "",
    *,
    recursive: bool,
    last: dict[str, Commit] | None = None,
) -> list[Json]:
    """Files and folders below `under`, by path; `last` are commits by id for `lastCommit`."""
    prefix = f"{under}/" if under else ""
    files: list[Json] = []
    folders: dict[str, list[CommitEntry]] = {}
    for entry in entries:
        parts = entry.path[len(prefix) :].split("/")
        depth = len(parts) - 1
        for n in range(1, (depth if recursive else min(depth, 1)) + 1):
            folders.setdefault(prefix + "/".join(parts[:n]), []).append(entry)
        if recursive or depth == 0:
            files.append(file_item(entry, last))
    found = [*files, *(folder_item(path, inner, last) for path, inner in folders.items())]
    return sorted(found, key=lambda item: str(item["path"]))


def file_item(entry: CommitEntry, last: dict[str, Commit] | None = None) -> Json:
    answer: Json = {
        "type": "file",
        "oid": entry.git_oid,
        "size": entry.size,
        "path": entry.path,
    }
    if entry.lfs:
        answer["lfs"] = {"oid": entry.sha256, **_lfs_sizes(entry)}
    if last is not None:
        answer["lastCommit"] = _last_commit(last[entry.last_commit_id])
        # Nothing scans files here, so nothing is claimed about them.
        answer["securityFileStatus"] = None
    return answer


def folder_item(
    path: str, inner: Sequence[CommitEntry], last: dict[str, Commit] | None = None
) -> Json:
    """`oid` names the folder's content; it is not the id of a git tree."""
    content = "".join(f"{entry.path}\0{entry.git_oid}\n" for entry in inner)
    oid = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
    answer: Json = {"type": "directory", "oid": oid, "size": 0, "path": path}
    if last is not None:
        commits = [last[entry.last_commit_id] for entry in inner]
        answer["lastCommit"] = _last_commit(max(commits, key=lambda c: (c.created_at, c.id)))
    return answer


def _last_commit(commit: Commit) -> Json:
    return {"id": commit.id, "title": commit.message, "date": date(commit.created_at)}


def commit_item(commit: Commit, *, is_formatted: bool) -> Json:
    """`formatted` would be HTML; texts are given as they are, for clients to escape."""
    answer: Json = {
        "id": commit.id,
        "title": commit.message,
        "message": commit.description,
        "date": date(commit.created_at),
        "authors": [{"user": commit.author}],
    }
    if is_formatted:
        answer["formatted"] = {"title": commit.message, "message": commit.description}
    return answer


def _lfs_sizes(entry: CommitEntry) -> Json:
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry.sha256}\n"
        f"size {entry.size}\n"
    )
    return {"size": entry.size, "pointerSize": len(pointer)}
