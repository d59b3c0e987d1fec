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
    # What is still to be looked at, and what is a step once all that it is made of was.
    waiting: list[tuple[Source, bool]] = [(its, False) for _, its in reversed(recipe.sources())]
    within: set[str] = set()
    while waiting:
        source, is_done = waiting.pop()
        digest = source.sha256 or ""
        if is_done:
            within.remove(digest)
            steps[source.name] = source, parents[digest]
        elif source.name in found or source.name in steps or digest in missing:
            continue
        elif (file := find(source)) is not None:
            found[source.name] = file
        elif digest not in parents or digest in within:
            missing[digest] = None
        else:
            within.add(digest)
            waiting.append((source, True))
            waiting += [(its, False) for _, its in reversed(parents[digest].sources())]
    if missing:
        raise MissingSources(name, list(missing))
    return Leaves(found, tuple(steps.values()))
