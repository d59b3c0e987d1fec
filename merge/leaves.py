"""What is needed to make again what a recipe describes: files at hand, and what is made of them first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from merge.errors import MissingSources
from merge.formats.sources import File
from merge.recipe import Recipe, Source

Find = Callable[[Source], File | None]


@dataclass(frozen=True, slots=True)
class Leaves:
    """`files` by the names that `merge.plan` asks for; `steps` are sources that have to be made again
    with the recipe of each, in an order in which that can be done.
    """

    files: Mapping[str, File]
    steps: tuple[tuple[Source, Recipe], ...]


def search(recipe: Recipe, parents: Mapping[str, Recipe], find: Find, name: str) -> Leaves:
    """Every file that a recipe needs, by asking `find` once for each; MissingSources lists all that
    is neither found nor among `parents`, the recipes of files by SHA-256.
    """
    found: dict[str, File] = {}
    missing: dict[str, None] = {}
    steps: dict[str, tuple[Source, Recipe]] = {}

    def look(source: Source, within: tuple[str, ...]) -> None:
        digest = source.sha256 or ""
        if source.name in found or source.name in steps or digest in missing:
            return
        file = find(source)
        if file is not None:
            found[source.name] = file
        elif digest not in parents or digest in within:
            missing[digest] = None
        else:
            for _, its in parents[digest].sources():
                look(its, (*within, digest))
            steps[source.name] = source, parents[digest]

    for _, source in recipe.sources():
        look(source, ())
    if missing:
        raise MissingSources(name, list(missing))
    return Leaves(found, tuple(steps.values()))
