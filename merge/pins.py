"""The SHA-256 of what lies somewhere, as recipes name it."""

from pathlib import Path

from merge.formats.adapters import config_beside
from merge.formats.folders import folder_digest
from merge.formats.hashes import sha256_file
from merge.formats.sources import File
from merge.recipe import Pinned


def pin(file: File) -> Pinned:
    """Of a folder its digest, of a PEFT file also the SHA-256 of the configuration beside it."""
    if isinstance(file, Path) and file.is_dir():
        return Pinned(sha256=folder_digest(file))
    config = config_beside(file)
    return Pinned(sha256=sha256_file(file), config_sha256=sha256_file(config) if config else None)
