"""Writing files that survive a power cut; what only some systems have is behind one function."""

import os
import sys
from pathlib import Path


def create_exclusive(path: Path) -> int:
    """A descriptor of a new file with mode 0600 that no link can redirect."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o600)


def reserve(descriptor: int, size: int) -> None:
    """Take the space now, where the file system can, so that a full disk is known at the start."""
    if size > 0 and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def sync_file(descriptor: int) -> None:
    """Never retried by callers: after a failed fsync the data may be gone and a second one lies."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Make names in a folder durable; Windows has no such call and does it with the rename."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path, root: Path) -> None:
    """Create `path` below `root`, each new name made durable in its parent."""
    if path == root or path.is_dir():
        return
    make_folders(path.parent, root)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)
