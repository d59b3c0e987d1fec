"""Files by their SHA-256: in folders that were named, then on the hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.connection import connection
from cli.console import CommandError, err, plain
from cli.ranges import Blocks
from cli.refs import fetch, open_source

if TYPE_CHECKING:
    from merge.formats.sources import File
    from merge.leaves import Leaves
    from merge.recipe import Recipe, Source


@dataclass(frozen=True, slots=True)
class Hint:
    """What is known of a file beside its SHA-256: its size, a size that it is about, and whether it
    is a folder.
    """

    size: int | None = None
    near: int | None = None
    is_folder: bool = False


class Finder:
    """Looks for the files that recipes name; remembers what it has hashed.

    Files of another size than a hint's are no candidates. Without one the smallest are hashed
    first, and never more than it takes.
    """

    def __init__(self, places: Sequence[Path], hints: Mapping[str, Hint] | None = None) -> None:
        for place in places:
            if not place.exists():
                raise CommandError(f"--from {place}: there is no such file or folder")
        self._hints = dict(hints or {})
        self._files = list(dict.fromkeys(_files(places)))
        self._folders = list(dict.fromkeys(_folders(places)))
        self._hashed: dict[str, list[Path]] = {}
        self._silence: str | None = None
        self._has_places = bool(places)

    def know(self, sha256: str, path: Path) -> None:
        """Where a file of this SHA-256 is, which need not be looked for."""
        self._hashed.setdefault(sha256, []).append(path)

    def search(
        self,
        recipe: "Recipe",
        parents: "Mapping[str, Recipe]",
        name: str,
        blocks: Blocks | None = None,
    ) -> "Leaves":
        """What a recipe needs; with `blocks` REFs of its own are opened, and read where they are.

        CommandError lists all that is missing and where was looked.
        """
        from merge.errors import MissingSources
        from merge.leaves import search

        adapters = {its.name for its in recipe.inputs}

        def find(source: "Source") -> "File | None":
            if source.ref is not None and blocks is not None:
                return open_source(source.ref, blocks, is_adapter=source.name in adapters)
            return self._here(source) or self._on_hub(source)

        try:
            return search(recipe, parents, find, name)
        except MissingSources as error:
            places = "not under --from" if self._has_places else "give them with --from PATH"
            where = f"{places}; {self._silence or 'not on the hub'}"
            raise CommandError(f"{error} ({where})") from error

    def _here(self, source: "Source") -> Path | None:
        from merge.formats.folders import folder_digest
        from merge.formats.hashes import sha256_file

        digest = source.sha256 or ""
        for path in self._hashed.get(digest, []):
            if _has_config(path, source):
                return path
        hint = self._hints.get(digest, Hint())
        for path in self._candidates(hint):
            is_folder = path in self._folders
            (self._folders if is_folder else self._files).remove(path)
            with err.status(f"hashing {plain(path.name)}"):
                found = folder_digest(path) if is_folder else sha256_file(path)
            self._hashed.setdefault(found, []).append(path)
            if found == digest and _has_config(path, source):
                return path
        return None

    def _candidates(self, hint: Hint) -> list[Path]:
        if hint.is_folder:
            return list(self._folders)
        sizes = {path: path.stat().st_size for path in self._files}
        if hint.size is not None:
            return [path for path, size in sizes.items() if size == hint.size]
        near = hint.near or 0
        return [*sorted(sizes, key=lambda path: abs(sizes[path] - near)), *self._folders]

    def _on_hub(self, source: "Source") -> Path | None:
        from merge.formats.hashes import sha256_file

        if self._silence is not None:
            return None
        try:
            answer = connection().find(f"/api/hashes/{source.sha256}")
        except CommandError as error:
            self._silence = str(error)
            return None
        for match in () if answer is None else answer["items"]:
            if match["kind"] == "sha256":
                path = fetch(f"{match['item']['repo']}:{match['item']['file']}")
                # The repo may have changed since, and a hub may be wrong.
                found = sha256_file(path)
                self._hashed.setdefault(found, []).append(path)
                if found == source.sha256 and _has_config(path, source):
                    return path
        return None


def _has_config(path: Path, source: "Source") -> bool:
    """Whether the adapter_config.json beside a PEFT file is the one that the recipe names."""
    from merge.formats.adapters import CONFIG_NAME
    from merge.formats.hashes import sha256_file

    if source.config_sha256 is None:
        return True
    config = path.with_name(CONFIG_NAME)
    return config.is_file() and sha256_file(config) == source.config_sha256


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_file():
            yield place
        else:
            yield from (path for path in sorted(place.rglob("*.safetensors")) if path.is_file())


def _folders(places: Sequence[Path]) -> Iterator[Path]:
    """Pipelines and models that are a base as a whole."""
    from merge.formats.folders import files_of_base

    for place in places:
        if not place.is_dir():
            continue
        waiting = [place]
        while waiting:
            folder = waiting.pop()
            inside = sorted(folder.iterdir())
            if files_of_base(path.name for path in inside) is not None:
                yield folder
            else:
                folders = (path for path in inside if path.is_dir() and not path.is_symlink())
                waiting += [path for path in folders if path.name[0] != "."]
