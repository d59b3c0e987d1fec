"""Make again, in a scratch folder, the inputs of a recipe that are nowhere but have recipes themselves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge.errors import BadRecipe
from merge.execute import execute
from merge.formats.sources import GENERIC_NAMES, File
from merge.leaves import Leaves
from merge.pins import pin
from merge.plan import Plan, plan
from merge.recipe import Recipe

Progress = Callable[[Plan, int, int], None]


@dataclass(frozen=True, slots=True)
class Remade:
    """A file that was made again; `is_same` says whether it has the bytes that the recipe names."""

    sha256: str
    found_sha256: str
    file: Path

    @property
    def is_same(self) -> bool:
        return self.sha256 == self.found_sha256


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a recipe by the names that `merge.plan` asks for, and which were made again."""

    files: Mapping[str, File]
    remade: tuple[Remade, ...]


def rebuild(leaves: Leaves, scratch: Path, progress: Progress) -> Sources:
    """Every file that the recipe of `leaves` names; what is made again goes into `scratch`."""
    files = dict(leaves.files)
    remade = []
    for source, recipe in leaves.steps:
        digest = source.sha256 or ""
        file = _make(recipe, files, scratch / digest, progress)
        remade.append(Remade(digest, pin(file).sha256, file))
        files[source.name] = file
    return Sources(files, tuple(remade))


def _make(recipe: Recipe, files: Mapping[str, File], place: Path, progress: Progress) -> Path:
    planned = plan(recipe, {source.name: files[source.name] for _, source in recipe.sources()})
    out = place if planned.writes_folder else place.with_suffix(".safetensors")
    execute(planned, out, lambda done, total: progress(planned, done, total))
    inside = [out / name for name in GENERIC_NAMES if (out / name).is_file()]
    return inside[0] if inside else out


def require_same(remade: tuple[Remade, ...]) -> None:
    """BadRecipe where a file that was made again is not the one that the recipe names."""
    for its in remade:
        if not its.is_same:
            detail = f"sha256:{its.sha256} was made again as sha256:{its.found_sha256}"
            raise BadRecipe("inputs", f"{detail}: another engine or machine made the first")
