"""Scratch folders: the inputs of a recipe as links to blobs, under the names their readers need.

A PEFT adapter is read with the configuration beside it and a diffusers base by its folder layout,
while blobs are named by digest.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict


class Input(BaseModel):
    """Files behind one REF of a recipe: relative path -> local blob.

    `main` is the path of the file the REF names, or None when it names the whole folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: str
    files: dict[str, Path]
    main: str | None


def lay_out(folder: Path, inputs: Sequence[Input]) -> dict[str, Path]:
    """Make `folder` with one sub-folder of links per input; REF -> the path that stands for it."""
    places: dict[str, Path] = {}
    for number, item in enumerate(inputs):
        root = folder / str(number)
        for name, blob in item.files.items():
            target = root / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(blob, target)
        places[item.ref] = root if item.main is None else root / PurePosixPath(item.main)
    return places


def _link(blob: Path, target: Path) -> None:
    # A hard link needs one file system, a symbolic link a right that Windows does not give to all.
    for way in (os.link, os.symlink, shutil.copyfile):
        try:
            way(blob, target)
        except OSError:
            if way is shutil.copyfile:
                raise
        else:
            return
