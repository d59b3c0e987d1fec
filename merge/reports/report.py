"""The answer of `merge.reports.measure`: values, and the JSON document that docs/reports.md explains.

Everything is about the weighted sum of the inputs, whatever method the recipe names. Norms are
Frobenius norms of strength * delta, energies their squares. Pairs are of indices into `inputs`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Gram = NDArray[np.float64]  # (inputs, inputs): inner products of the changes at their strengths
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far two subspaces of a space of `dimension` coincide.

    `shared` is the sum of the squared cosines of their principal angles, between 0 and the smaller
    of the two ranks; two random subspaces have rank * rank / dimension.
    """

    shared: float
    ranks: tuple[int, int]
    dimension: int

    @property
    def expected(self) -> float:
        return self.ranks[0] * self.ranks[1] / self.dimension

    @property
    def most(self) -> int:
        return min(self.ranks)


@dataclass(frozen=True, slots=True)
class Place:
    """One weight or bias that at least one input changes.

    `ranks` holds 0 where an input does not touch it and None where its change is no product.
    `values` are the singular values of the sum, largest first, None where they are not measured;
    `overlaps` the (output, input) subspaces of the pairs that both are products here.
    """

    component: str
    module: str
    block: str
    kind: str  # product | dense | bias
    shape: tuple[int, int]
    ranks: tuple[int | None, ...]
    touched: tuple[bool, ...]
    gram: Gram
    values: NDArray[np.float64] | None
    overlaps: dict[Pair, tuple[Overlap, Overlap]]

    @property
    def name(self) -> str:
        suffix = ".bias" if self.kind == "bias" else ""
        return f"{self.component}.{self.module}{suffix}"


@dataclass(frozen=True, slots=True)
class PairIn:
    """Two inputs in some places: their cosine, what their sum gains or loses by it, their overlap.

    `adds` and `cancels` are twice the inner products of the places where those are positive and
    negative. `output` and `input` are overlaps with the chance level taken out: 0 is what random
    subspaces have, 1 is one inside the other; None where nothing can be compared.
    """

    pair: Pair
    modules: int  # that both touch
    cosine: float | None
    adds: float
    cancels: float
    output: float | None
    input: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """Some places: all, those of a component, or those of a block (`block` "" for more than one)."""

    component: str
    block: str
    modules: int
    touched: tuple[int, ...]  # modules, by input
    alone: tuple[int, ...]  # modules that no other input touches
    norms: tuple[float, ...]
    norm: float  # of the sum
    adds: float
    cancels: float  # not positive
    pairs: tuple[PairIn, ...]

    @property
    def apart(self) -> float:
        """The energy that the inputs have one by one."""
        return sum(norm * norm for norm in self.norms)

    @property
    def scale(self) -> float | None:
        """lambda: what gives the sum the energy that the inputs have apart; None if they cancel."""
        is_left = self.norm > 1e-6 * sqrt(self.apart)
        return sqrt(self.apart) / self.norm if is_left else None


@dataclass(frozen=True, slots=True)
class Leak:
    """How much of one input (`of`) lies where another (`into`) works.

    `shared` is the share of its energy in modules that the other touches, `core` that in the fewest
    modules that hold CORE_SHARE of the other's energy.
    """

    of: int
    into: int
    shared: float
    core: float


CORE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class InputReport:
    """One input; `unmeasured` names the modules whose change needs a base that was not given."""

    name: str
    sha256: str | None
    strength: float
    dialect: str
    algorithms: tuple[str, ...]
    rank: tuple[int, int] | None
    unmeasured: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """What one choice of ranks gives: `name` and `value` are those of a recipe's `rank`.

    `error` is the truncation error as a share of the exact sum's norm, `ranks` (least, most) of the
    modules that keep any, `dropped` how many keep none.
    """

    name: str
    value: float
    size_bytes: int
    error: float
    ranks: tuple[int, int]
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Ranks:
    """Size against error. `asked` is the recipe's own choice; sizes are those of the tensors.

    `least` are the smallest shared ranks with at most 10, 5, 2, 1 and 0.1 % of error, where there are
    any. `frontier` has the least error that any ranks reach at a size: points (bytes, error).
    """

    asked: Choice
    exact: Choice
    fixed: tuple[Choice, ...]
    energy: tuple[Choice, ...]
    shared: tuple[Choice, ...]
    least: tuple[Choice, ...]
    frontier: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Rounding:
    """Predicted rounding error of the asked factors in a dtype, as a share of the sum's norm."""

    dtype: str
    error: float
    is_asked: bool
    overflows: bool


@dataclass(frozen=True, slots=True)
class BakeLoss:
    """What a bake in a dtype does to the change, predicted from samples.

    `gain` is the share of the change that arrives (the projection of what became of it), `error` the
    norm of what is wrong with it, as a share of its own, `unchanged` the share of the values that
    stay what they were. Weights that do not fit the dtype count in none of them: it `overflows`.
    """

    dtype: str
    gain: float
    error: float
    unchanged: float
    is_base: bool
    overflows: bool


@dataclass(frozen=True, slots=True)
class Storage:
    """`modules` were sampled for `factors`, `values` of the base's weights for `bake`."""

    factors: tuple[Rounding, ...]
    modules: int
    bake: tuple[BakeLoss, ...] = ()
    values: int = 0
    relative_change: float | None = None  # |change| / |base| over the sampled values


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A recipe that the measurements speak for: strengths by input, `method` and `rank` as a recipe
    has them, and one reason for each, in this order.
    """

    strengths: tuple[float, ...]
    method: dict[str, Any]
    rank: dict[str, Any]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured. `dialect` and `dtype` are those that the merge would be written
    in, None where no adapter can hold it; `base` is the name of one that the inputs depend on.
    """

    method: str
    family: str | None
    dialect: str | None
    dtype: str | None
    base: str | None
    inputs: tuple[InputReport, ...]
    total: Group
    components: tuple[Group, ...]
    blocks: tuple[Group, ...]
    leaks: tuple[Leak, ...]
    ranks: Ranks | None
    storage: Storage | None
    places: tuple[Place, ...]
    notes: tuple[str, ...]
    suggestion: Suggestion | None = None

    def to_json(self) -> dict[str, Any]:
        """One document of plain numbers, rounded to what a reader can use."""
        return {
            "schema": 1,
            "method": self.method,
            "family": self.family,
            "dialect": self.dialect,
            "dtype": self.dtype,
            "base": self.base,
            "inputs": [asdict(its) for its in self.inputs],
            "total": group_json(self.total),
            "components": [group_json(group) for group in self.components],
            "blocks": [group_json(group) for group in self.blocks],
            "leaks": [_rounded(asdict(leak)) for leak in self.leaks],
            "ranks": None if self.ranks is None else _rounded(asdict(self.ranks)),
            "storage": None if self.storage is None else _rounded(asdict(self.storage)),
            "modules": [_place_json(place) for place in self.places],
            "notes": list(self.notes),
            "suggestion": None if self.suggestion is None else asdict(self.suggestion),
        }


def group_json(group: Group) -> dict[str, Any]:
    found = asdict(group) | {"apart": group.apart, "scale": group.scale}
    result: dict[str, Any] = _rounded(found)
    return result


def _place_json(place: Place) -> dict[str, Any]:
    norms = np.sqrt(np.diagonal(place.gram))
    return {
        "name": place.name,
        "component": place.component,
        "block": place.block,
        "kind": place.kind,
        "shape": list(place.shape),
        "ranks": list(place.ranks),
        "norms": _rounded(norms.tolist()),
        "norm": _rounded(sqrt(max(place.gram.sum(), 0.0))),
        "pairs": [_rounded(asdict(pair)) for pair in pairs_in([place], len(place.touched))],
        "values": None if place.values is None else _rounded(place.values.tolist()),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(its) for its in value]
    return value


def group(component: str, block: str, places: Sequence[Place], n: int) -> Group:
    """The sums over some places, of `n` inputs."""
    gram = sum((place.gram for place in places), np.zeros((n, n)))
    modules = {(place.component, place.module): [False] * n for place in places}
    for place in places:
        known = modules[place.component, place.module]
        modules[place.component, place.module] = [
            one or other for one, other in zip(known, place.touched, strict=True)
        ]
    touched = np.array(list(modules.values()), dtype=bool).reshape(-1, n)
    alone = touched & (touched.sum(1, keepdims=True) == 1)
    pairs = pairs_in(places, n)
    return Group(
        component,
        block,
        len(modules),
        tuple(touched.sum(0).tolist()),
        tuple(alone.sum(0).tolist()),
        tuple(np.sqrt(np.diagonal(gram)).tolist()),
        sqrt(max(gram.sum(), 0.0)),
        sum(pair.adds for pair in pairs),
        sum(pair.cancels for pair in pairs),
        pairs,
    )


def pairs_in(places: Sequence[Place], n: int) -> tuple[PairIn, ...]:
    """Every pair of the `n` inputs over some places."""
    return tuple(_pair(places, (i, j)) for i in range(n) for j in range(i + 1, n))


def _pair(places: Sequence[Place], pair: Pair) -> PairIn:
    i, j = pair
    both = [place for place in places if place.touched[i] and place.touched[j]]
    inner = np.array([place.gram[i, j] for place in both])
    norms = [sqrt(sum(float(place.gram[k, k]) for place in places)) for k in pair]
    overlaps = [place.overlaps[pair] for place in both if pair in place.overlaps]
    cosine = float(inner.sum()) / (norms[0] * norms[1]) if both and all(norms) else None
    return PairIn(
        pair,
        len({(place.component, place.module) for place in both}),
        cosine,
        2 * float(inner[inner > 0].sum()),
        2 * float(inner[inner < 0].sum()),
        above_chance([its[0] for its in overlaps]),
        above_chance([its[1] for its in overlaps]),
    )


def above_chance(overlaps: Sequence[Overlap]) -> float | None:
    """(shared - expected) / (most - expected), summed over layers before dividing.

    None without layers, or where chance alone gives everything: a subspace that is the whole space.
    """
    expected = sum(overlap.expected for overlap in overlaps)
    room = sum(overlap.most for overlap in overlaps) - expected
    return (sum(its.shared for its in overlaps) - expected) / room if room > 1e-9 else None


def leaks(places: Sequence[Place], n: int) -> tuple[Leak, ...]:
    """Of every input into every other one."""
    energies = np.array([np.diagonal(place.gram) for place in places]).reshape(-1, n)
    touched = np.array([place.touched for place in places], dtype=bool).reshape(-1, n)
    total = energies.sum(0)
    found = []
    for of in range(n):
        for into in range(n):
            if of != into and total[of] > 0 and total[into] > 0:
                core = _core(energies[:, into])
                shared = energies[touched[:, into], of].sum() / total[of]
                found.append(
                    Leak(of, into, float(shared), float(energies[core, of].sum() / total[of]))
                )
    return tuple(found)


def _core(energies: NDArray[np.float64]) -> NDArray[np.intp]:
    """The fewest places that hold CORE_SHARE of the energy."""
    order = np.argsort(-energies, kind="stable")
    reached = np.cumsum(energies[order]) >= CORE_SHARE * energies.sum()
    return order[: int(np.argmax(reached)) + 1]
