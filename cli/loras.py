"""Adapters by the names that other tools call them: those of files in a folder."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cli.console import CommandError, err, plain
from cli.refs import adapter_in

if TYPE_CHECKING:
    from merge.imports import Named, Wanted

_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
_MOST_SHOWN = 5


class Loras:
    """Files of a folder and of all in it: by stem or path, then by what a trainer called them."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and not folder.is_dir():
            raise CommandError(f"--loras {folder}: there is no such folder")
        self._folder = folder

    def resolve(self, wanted: "Wanted") -> "Named":
        """The file that a name means; BadRecipe with candidates where none or several have it."""
        from merge.errors import BadRecipe
        from merge.imports import Named

        if wanted.what == "base":
            return Named(_place(wanted))
        found = self._by_sha256(wanted) if wanted.sha256 else self._by_name(wanted)
        if len(found) > 1:
            some = ", ".join(str(path) for path in found[:_MOST_SHOWN])
            raise BadRecipe(wanted.param, f"{wanted.name} could be any of {some}")
        if found:
            return _described(found[0], wanted)
        if wanted.sha256 is not None:
            return Named(None, wanted.sha256)
        path = Path(wanted.name).expanduser()
        if path.exists():
            return _described(adapter_in(path, wanted.name), wanted)
        if "/" in wanted.name:
            return Named(_place(wanted))
        raise BadRecipe(wanted.param, self._unknown(wanted.name))

    def _by_name(self, wanted: "Wanted") -> list[Path]:
        name = wanted.name.replace("\\", "/").removesuffix(".safetensors")
        stems = [path for path, names in self._stems.items() if name in names]
        return stems or [path for path, alias in self._aliases.items() if alias == name]

    def _by_sha256(self, wanted: "Wanted") -> list[Path]:
        """The file with these bytes, the ones of that name first."""
        from merge.formats.hashes import sha256_file

        named = self._by_name(wanted)
        for path in [*named, *(path for path in self._stems if path not in named)]:
            with err.status(f"hashing {plain(path.name)}"):
                if sha256_file(path) == wanted.sha256:
                    return [path]
        return []

    def _unknown(self, name: str) -> str:
        if self._folder is None:
            return f"{name} is a name without a place: say --loras FOLDER"
        known = {names[0] for names in self._stems.values()} | set(self._aliases.values())
        near = get_close_matches(name, known, _MOST_SHOWN)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        return f"no file in {self._folder} is called {name}{hint}"

    @cached_property
    def _stems(self) -> dict[Path, list[str]]:
        """Names of every file: its stem (of a PEFT adapter its folder's) and its path."""
        from merge.formats.sources import GENERIC_NAMES

        found = {}
        for path in self._files():
            inside = path.relative_to(self._folder or path).with_suffix("")
            is_generic = path.name in GENERIC_NAMES and len(inside.parts) > 1
            inside = inside.parent if is_generic else inside
            found[path] = [inside.name, inside.as_posix()]
        return found

    @cached_property
    def _aliases(self) -> dict[Path, str]:
        """What a trainer called each file; epochs of one training share it."""
        from merge.errors import BadFile
        from merge.formats.header import read_header
        from merge.formats.metadata import OUTPUT_NAME

        found = {}
        for path in self._stems:
            try:
                alias = read_header(path).metadata.get(OUTPUT_NAME)
            except BadFile:  # it may be anything, and nobody has asked for it
                continue
            if alias:
                found[path] = alias
        return found

    def _files(self) -> Iterator[Path]:
        if self._folder is not None:
            yield from (p for p in sorted(self._folder.rglob("*.safetensors")) if p.is_file())


def _place(wanted: "Wanted") -> str:
    """A path, or a repo on the Hugging Face Hub, which is what mergekit and PEFT mean by a name."""
    from merge.errors import BadRecipe

    if Path(wanted.name).expanduser().exists():
        return wanted.name
    if _REPO.fullmatch(wanted.name):
        return f"hf://{wanted.name}"
    raise BadRecipe(wanted.param, f"{wanted.name} is neither a path here nor a repo")


def _described(path: Path, wanted: "Wanted") -> "Named":
    from merge.formats.adapters import read_config, read_layout
    from merge.formats.header import read_header
    from merge.formats.sources import shown_name
    from merge.imports import Named

    layout = read_layout(read_header(path), name=shown_name(path), config=read_config(path))
    modules = dict.fromkeys(
        f"{entry.component}.{run.module}" for entry in layout.entries for run in entry.layer.runs
    )
    ranks = [entry.rank for entry in layout.entries if entry.rank is not None]
    return Named(str(path), wanted.sha256, tuple(modules), max(ranks, default=None))
