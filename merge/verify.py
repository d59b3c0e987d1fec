"""Whether a file is what its recipe says: make it again and compare.

The proof needs the recipe in the file, and the recipe's inputs by SHA-256; it trusts nothing else
that the file says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.compare import Comparison, Verdict, compare
from merge.execute import execute
from merge.leaves import Leaves
from merge.lineage import History
from merge.plan import plan
from merge.provenance import ENGINE
from merge.rebuild import Progress, Remade, rebuild

__all__ = ["Proof", "Verdict", "verify"]


# Methods that act on elements in a basis which equal singular values leave open.
_WITHOUT_BASIS = ("knots_", "core_")


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found; `remade` are inputs that had to be made again first."""

    history: History
    comparison: Comparison
    remade: tuple[Remade, ...]

    @property
    def verdict(self) -> Verdict:
        return self.comparison.verdict

    @property
    def notes(self) -> list[str]:
        found = []
        if self.history.engine != ENGINE:
            found.append(
                f"it was made by version {self.history.engine or 'unknown'} of the engine; "
                f"this is version {ENGINE}, which may give other bytes"
            )
        found += [
            f"sha256:{its.sha256} was made again as sha256:{its.found_sha256}, which is not the same"
            for its in self.remade
            if not its.is_same
        ]
        method = self.history.recipe.method.name
        if method.startswith(_WITHOUT_BASIS) and self.verdict is Verdict.DIFFERS:
            found.append(
                f"what {method} makes of directions of equal strength is a machine's choice"
            )
        return found + list(self.comparison.notes)

    def to_json(self) -> dict[str, Any]:
        recipe = self.history.recipe
        made_again = {its.sha256 for its in self.remade}
        return {
            "verdict": self.verdict.value,
            "recipe_digest": recipe.digest(),
            "engine": {"file": self.history.engine, "here": ENGINE},
            "inputs": [
                {"sha256": sha256, "made_again": sha256 in made_again}
                for sha256 in dict.fromkeys(its.sha256 for _, its in recipe.sources())
            ],
            "tensors": self.comparison.tensors,
            "same": self.comparison.same,
            "differences": [its.to_json() for its in self.comparison.differences],
            "wrong": list(self.comparison.wrong),
            "notes": self.notes,
        }


def verify(
    path: Path, history: History, leaves: Leaves, scratch: Path, progress: Progress
) -> Proof:
    """Make `path` again in the empty folder `scratch`, from what its recipe needs, and compare."""
    recipe = history.recipe
    sources = rebuild(leaves, scratch, progress)
    planned = plan(recipe, sources.files)
    made = scratch / ("again" if planned.writes_folder else "again.safetensors")
    execute(planned, made, lambda done, total: progress(planned, done, total), digest=False)
    may_round = recipe.numerics == "fast" or not all(its.is_same for its in sources.remade)
    return Proof(history, compare(made, path, may_round=may_round), sources.remade)
