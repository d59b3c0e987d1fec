"""What an importer asks about names, and what it gives."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from merge.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file as another tool names it; `param` is where in its recipe. `sha256` where it says so."""

    name: str
    param: str
    sha256: str | None = None
    what: Literal["adapter", "base"] = "adapter"


@dataclass(frozen=True, slots=True)
class Named:
    """The file that was meant: a REF, unless only its SHA-256 is known, and what its header says.

    `modules` are `component.module` of all that it changes; None where the file is not at hand.
    """

    ref: str | None
    sha256: str | None = None
    modules: tuple[str, ...] | None = None
    rank: int | None = None

    @property
    def components(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in self.modules or ())

    def source(self) -> dict[str, Any]:
        """As a source of a recipe."""
        found = {"ref": self.ref, "sha256": self.sha256}
        return {field: value for field, value in found.items() if value is not None}


# Raises BadRecipe, with the candidates, where a name is nothing or several things.
Resolve = Callable[[Wanted], Named]


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe of ours, the tool it came from, and every way in which it is not the same."""

    recipe: Recipe
    tool: str
    notes: tuple[str, ...]


def merged(inputs: Iterable[dict[str, Any]], **fields: Any) -> Recipe:
    """A merge of these inputs, checked."""
    return Recipe.parse({"kind": "merge", "inputs": list(inputs), **fields})
