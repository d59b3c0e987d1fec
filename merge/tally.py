"""What a bake did to the values that it touched: the numbers of its certificate."""

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from merge import provenance
from merge.errors import BadRecipe
from merge.plan import BakePlan

# Below this share of the change an fp8 output is refused unless the recipe allows it.
_LEAST_GAIN = 0.9


class Tally:
    """What happened to the elements that were touched, by parameter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, Touched] = defaultdict(Touched)

    def add(self, name: str, found: "Touched") -> None:
        with self._lock:
            self._found[name].add(found)

    @property
    def gain(self) -> float | None:
        """The share of the change that 8-bit weights keep; None where there are none."""
        wanted = sum(touched.wanted for touched in self._found.values())
        if not any(touched.is_fp8 for touched in self._found.values()):
            return None
        return sum(touched.kept for touched in self._found.values()) / wanted if wanted else 1.0

    def check(self, plan: BakePlan) -> None:
        """Refuse an output that has lost most of what it was made for."""
        gain = self.gain
        if gain is not None and gain < _LEAST_GAIN and not plan.recipe.output.allow_loss:
            detail = (
                f"{gain:.0%} of the change survives rounding to the base's 8-bit weights; take the "
                "base in float16 or bfloat16, or say true to write it all the same"
            )
            raise BadRecipe("output.allow_loss", detail)

    def certificate(
        self, plan: BakePlan, coefficients: Mapping[str, Mapping[int, float]]
    ) -> dict[str, Any]:
        """`coefficients` are those that a method has found, by module and adapter."""
        elements = sum(touched.elements for touched in self._found.values())
        unchanged = sum(touched.unchanged for touched in self._found.values())
        return {
            "kind": "bake",
            **provenance.facts(plan.recipe, plan.adapters),
            "numerics": plan.recipe.numerics,
            "elements": elements,
            "unchanged": unchanged / elements if elements else 0.0,
            **({} if self.gain is None else {"gain": _digits(self.gain)}),
            "left_out": list(plan.left_out),
            "notes": list(plan.notes),
            "modules": {
                name: touched.described() | _found(name, plan, coefficients)
                for name, touched in sorted(self._found.items())
            },
        }


def _found(
    name: str, plan: BakePlan, coefficients: Mapping[str, Mapping[int, float]]
) -> dict[str, Any]:
    if name not in coefficients:
        return {}
    return {"coefficients": provenance.by_input(plan, coefficients[name])}


@dataclass(slots=True)
class Touched:
    """Elements of one parameter; `squared` is the change's squared norm. For fp8 also sums over
    them of the change squared (`wanted`), and of the change times what became of it (`kept`).
    """

    elements: int = 0
    unchanged: int = 0
    squared: float = 0.0
    is_fp8: bool = False
    wanted: float = 0.0
    kept: float = 0.0

    def add(self, other: "Touched") -> None:
        self.elements += other.elements
        self.unchanged += other.unchanged
        self.squared += other.squared
        self.is_fp8 |= other.is_fp8
        self.wanted += other.wanted
        self.kept += other.kept

    def described(self) -> dict[str, float]:
        found = {
            "norm": _digits(sqrt(self.squared)),
            "unchanged": _digits(self.unchanged / self.elements),
        }
        if self.is_fp8:
            found["gain"] = _digits(self.kept / self.wanted if self.wanted else 1.0)
        return found


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
