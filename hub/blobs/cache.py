"""Copies of blobs for programs that need a file, at most so many bytes of them.

Each use has a link of its own to a copy, so that the cache may drop what others still read, in
this process or another; the bytes go with the last link.
"""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hub.blobs.spool import removed_on_failure, sweep_folder
from hub.blobs.store import Sha256

Fetch = Callable[[Sha256, Path], None]
# What a file system says that has no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class Cache:
    """The copies used last, in `folder`."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._kept, self._uses = folder / "kept", folder / "uses"
        self._most_bytes = most_bytes
        for path in (self._kept, self._uses):
            path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def file(self, sha256: Sha256, fetch: Fetch) -> Iterator[Path]:
        """A file with the blob's bytes, which `fetch` makes at a new path if none is here."""
        use = self._uses / uuid.uuid4().hex
        if not _link(self._kept / sha256, use):
            fetch(sha256, use)
            self._keep(use, sha256)
        try:
            yield use
        finally:
            use.unlink(missing_ok=True)

    def forget(self, sha256: Sha256) -> None:
        (self._kept / sha256).unlink(missing_ok=True)

    def sweep(self, older_than_s: float) -> int:
        """Remove the links of uses that ended without a chance to."""
        return sweep_folder(self._uses, older_than_s)

    def _keep(self, use: Path, sha256: Sha256) -> None:
        with removed_on_failure(use):
            if use.stat().st_size > self._most_bytes:
                return
            _link(use, self._kept / sha256)
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        kept = []
        for path in self._kept.iterdir():
            try:
                found = path.stat()
            except FileNotFoundError:  # another process drops too
                continue
            kept.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self._most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _link(existing: Path, new: Path) -> bool:
    """Whether there is such a file and the file system has hard links."""
    try:
        os.link(existing, new)
        os.utime(new)  # used now; the sweep and `_drop_oldest` count from here
    except FileExistsError:  # another process was faster with the same bytes
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True
