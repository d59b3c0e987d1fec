"""Texts that a command writes beside or in place of tensors: recipes and pages."""

import secrets
from pathlib import Path

from cli.console import CommandError


def write_text(path: Path, text: str) -> None:
    """The text at `path`, whole or not at all; CommandError names the path."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CommandError(f"{path}: {error.strerror}; it was not written") from error
        raise
