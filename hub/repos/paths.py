"""The one rule for file paths in repos and for names of branches and tags.

A path must be usable on every system it is downloaded to, so POSIX and Windows rules hold
everywhere.
"""

import re
import unicodedata

from hub.errors import BadName, BadPath

MAX_PATH_BYTES = 1024
MAX_SEGMENT_BYTES = 255

_WINDOWS = frozenset('\\:*?"<>|')
_DOS = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_COMMIT_ID = re.compile(r"[0-9a-fA-F]{40}")
_REF = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/+-]{0,253}[A-Za-z0-9_+-])?")


def check_path(path: str, param: str = "path") -> str:
    """`path` if a file may have it; BadPath names the rule it breaks."""

    def bad(why: str) -> BadPath:
        return BadPath(f"{path[:200]!r}: {why}", param)

    if not path:
        raise BadPath("a path is empty", param)
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise bad("a path is valid Unicode") from None
    if len(encoded) > MAX_PATH_BYTES:
        raise bad(f"a path has at most {MAX_PATH_BYTES} bytes")
    if not unicodedata.is_normalized("NFC", path):
        raise bad("a path is in Unicode normalisation form NFC")
    # Refuses control characters, bidirectional marks, line breaks and every space but " ".
    if not path.isprintable():
        raise bad("a path has no control or invisible characters")
    if any(c in _WINDOWS for c in path):
        raise bad('a path has none of \\ : * ? " < > |, which Windows refuses')
    for segment in path.split("/"):
        if segment in ("", ".", ".."):
            raise bad("a path is relative, without empty parts, . and ..")
        if segment[-1] in ". " or segment[0] == " ":
            raise bad("no part of a path ends in a dot or has a space at its ends")
        if len(segment.encode()) > MAX_SEGMENT_BYTES:
            raise bad(f"each part of a path has at most {MAX_SEGMENT_BYTES} bytes")
        if _DOS.fullmatch(segment):
            raise bad("no part of a path is a device name of Windows")
        if segment.lower() == ".git":
            raise bad("no part of a path is .git")
    return path


def check_ref_name(name: str, param: str) -> str:
    """`name` if a branch or tag may have it (a subset of git-check-ref-format(1)); BadName."""
    if not _REF.fullmatch(name) or any(
        part in ("", ".") or part.startswith(".") or part.endswith((".lock", "."))
        for part in name.split("/")
    ):
        raise BadName(f"Invalid reference for a branch or tag: {name[:200]!r}", param)
    if ".." in name or name.startswith("refs/"):
        raise BadName(f"Invalid reference for a branch or tag: {name[:200]!r}", param)
    if _COMMIT_ID.fullmatch(name):
        raise BadName(f"{name!r} looks like a commit", param)
    return name
