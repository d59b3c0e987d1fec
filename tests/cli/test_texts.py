"""Texts that commands write appear whole or not at all."""

import resource
from pathlib import Path

import pytest

from cli.console import CommandError
from cli.texts import write_text


def test_a_text_that_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    write_text(path, "kind: merge\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CommandError, match=r"recipe.yaml: File too large; it was not written"):
            write_text(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandError, match="folder: Is a directory; it was not written"):
        write_text(tmp_path / "folder", "x")
    assert path.read_text() == "kind: merge\n"
    assert {its.name for its in tmp_path.iterdir()} == {"recipe.yaml", "folder"}
