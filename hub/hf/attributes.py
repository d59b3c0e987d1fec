"""What `.gitignore` and `.gitattributes` say of the files of an upload."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pathspec import GitIgnoreSpec
from pathspec.patterns.gitignore import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from hub.blobs.store import BlobStore, Sha256
from hub.errors import BadRequest
from hub.repos.models import CommitEntry

MAX_BYTES = 2**18
MAX_LINES = 1000
# Each more of them multiplies the time that a regular expression can take for a hostile name.
MAX_STARS = 3
# Files that other clients expect to be Git LFS objects, so that they see and check the SHA-256.
LFS_SUFFIXES = (
    *(".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gguf", ".gz", ".h5", ".joblib"),
    *(".model", ".msgpack", ".npy", ".npz", ".onnx", ".ot", ".parquet", ".pb", ".pickle", ".pkl"),
    *(".pt", ".pth", ".rar", ".safetensors", ".tar", ".tflite", ".tgz", ".wasm", ".xz", ".zip"),
    ".zst",
)
LFS_BYTES = 10 * 2**20
# Such a file is written into new repos where a setting asks for it.
GITATTRIBUTES = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES)


@dataclass(frozen=True, slots=True)
class LFSRule:
    """Which files of a repo are shown as Git LFS objects, however they arrive."""

    tracked: GitIgnoreSpec

    def covers(self, path: str, size: int) -> bool:
        if size == 0:
            return False
        is_known = path.lower().endswith(LFS_SUFFIXES)
        return size > LFS_BYTES or is_known or self.tracked.match_file(path)


def lfs_rule(store: BlobStore, entries: Mapping[str, CommitEntry]) -> LFSRule:
    """Our own rule and the `filter=lfs` lines of the repo's `.gitattributes`."""
    lines = _text(store, entries.get(".gitattributes")).splitlines()[:MAX_LINES]
    tracked = [
        words[0]
        for words in (line.split() for line in lines)
        if "filter=lfs" in words[1:] and not words[0].startswith("#")
    ]
    return LFSRule(_spec(tracked))


def ignored(
    store: BlobStore, entries: Mapping[str, CommitEntry], sent: str | None
) -> GitIgnoreSpec:
    """What `.gitignore` excludes: the one in the upload, else the repo's."""
    text = sent if sent is not None else _text(store, entries.get(".gitignore"))
    return _spec(text.splitlines()[:MAX_LINES])


def _spec(patterns: Iterable[str]) -> GitIgnoreSpec:
    """Lines that are no pattern match nothing, as in git; BadRequest for one that costs too much."""
    found: list[GitIgnoreSpecPattern] = []
    for pattern in patterns:
        if any(part.count("*") > MAX_STARS for part in pattern.split("/")):
            raise BadRequest(
                f"{pattern[:100]!r}: a part of a pattern has at most {MAX_STARS} stars"
            )
        try:
            found.append(GitIgnoreSpecPattern(pattern))
        except GitIgnorePatternError:
            continue
    return GitIgnoreSpec(found)


def _text(store: BlobStore, entry: CommitEntry | None) -> str:
    if entry is None:
        return ""
    return b"".join(store.open(Sha256(entry.sha256), 0, MAX_BYTES)).decode("utf-8", "replace")
