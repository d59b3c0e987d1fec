"""What the measurements speak for: strengths, method and rank, each with its reason.

The choice of a method is the first row of METHODS that applies; benchmarks/merge_quality.py compares
methods on trained adapters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge import methods
from merge.method_parameters import Space
from merge.reports.report import Choice, Group, Ranks, Report, Suggestion

# Shares of the energy that the inputs have apart.
_SEPARATE = 0.05  # of an input that lies where another works at all
_LITTLE = 0.1  # that the sum may win or lose
_MUCH = 0.25
# How many times larger than the others one input may be.
_LOUDEST = 2.0
# Of svc: with 1, its default, nothing that the adapters cancel comes back (merge/methods/svc.py).
_FLOOR = 0.5
# The error that is worth no more bytes, and how many more bytes the exact sum may cost.
_ERROR = 0.01
_WORTH = 1.15


@dataclass(frozen=True, slots=True)
class _Row:
    applies: Callable[[Report], bool]
    method: dict[str, Any]
    reason: Callable[[Report], str]


def suggest(report: Report) -> Suggestion | None:
    """None where something was not measured, or nothing is changed. Method and rank are for the strengths that were measured."""
    if report.total.apart == 0 or any(its.unmeasured for its in report.inputs):
        return None
    strengths, why_strengths = _strengths(report)
    row = next(row for row in METHODS if row.applies(report))
    rank, why_rank = suggest_rank(report, row.method["name"])
    reasons = [why_strengths, f"method {_named(row.method)}: {row.reason(report)}", why_rank]
    return Suggestion(strengths, row.method, rank, (*reasons, *_storage(report)))


def _named(method: dict[str, Any]) -> str:
    options = [f"{name} {value}" for name, value in method.items() if name != "name"]
    return " ".join((method["name"], *options))


METHODS: Sequence[_Row] = (
    _Row(
        lambda report: _working(report) < 2,
        {"name": "linear"},
        lambda report: "there is nothing to combine it with",
    ),
    _Row(
        lambda report: all(leak.shared < _SEPARATE for leak in report.leaks),
        {"name": "linear"},
        lambda report: "the adapters work in different layers, so their sum keeps each whole",
    ),
    _Row(
        lambda report: report.total.scale is None,
        {"name": "linear"},
        lambda report: "they are opposites: their sum is nothing, and no method can hold both",
    ),
    _Row(
        lambda report: _cancelled(report.total) > _LITTLE and _is_subtraction(report),
        {"name": "linear"},
        lambda report: (
            f"{_percent(_cancelled(report.total))} of the energy cancels, which is what a negative "
            "strength is for"
        ),
    ),
    _Row(
        lambda report: _cancelled(report.total) > _LITTLE and _has_factors(report),
        {"name": "svc", "floor": _FLOOR},
        lambda report: (
            f"{_percent(_cancelled(report.total))} of the energy cancels in a plain sum; svc with "
            "this floor raises most what is weakened there, and damps what would count twice"
        ),
    ),
    _Row(
        lambda report: _change(report.total) > _MUCH,
        {"name": "linear", "normalise": "energy"},
        lambda report: (
            f"they point the same way, and a plain sum would have {1 + _change(report.total):.2f} "
            "times the energy that they have apart; every layer is scaled back to that"
        ),
    ),
    _Row(
        lambda report: True,
        {"name": "linear"},
        lambda report: (
            f"they are close to orthogonal (the sum has {_percent(1 + _change(report.total))} of "
            "the energy that they have apart), so a plain sum keeps each of them"
        ),
    ),
)


def _working(report: Report) -> int:
    return sum(norm > 0 for norm in report.total.norms)


def _change(group: Group) -> float:
    return group.norm**2 / group.apart - 1


def _cancelled(group: Group) -> float:
    return -group.cancels / group.apart


def _is_subtraction(report: Report) -> bool:
    signs = {its.strength > 0 for its in report.inputs if its.strength != 0}
    return len(signs) == 2


def _strengths(report: Report) -> tuple[tuple[float, ...], str]:
    """As they were chosen; where all are 1, lower for an input that would drown the others."""
    chosen = tuple(its.strength for its in report.inputs)
    norms = report.total.norms
    if any(strength != 1 for strength in chosen):
        return chosen, "strengths: as you chose them"
    strengths, lowered = [], []
    for i, (its, norm) in enumerate(zip(report.inputs, norms, strict=True)):
        next_one = max((other for j, other in enumerate(norms) if j != i), default=0.0) or norm
        factor = _LOUDEST * next_one / norm if norm > 1.25 * _LOUDEST * next_one else 1.0
        strengths.append(float(f"{factor:.2g}"))
        if factor < 1:
            lowered.append(f"{_short(its.name)} is {norm / next_one:.1f} times")
    if not lowered:
        return tuple(strengths), "strengths 1: no adapter drowns another"
    why = (
        f"strengths: {' and '.join(lowered)} as large as the next one; {_LOUDEST:g} times is enough"
    )
    return tuple(strengths), why


def _short(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")


def suggest_rank(report: Report, method: str) -> tuple[dict[str, Any], str]:
    """For the result of any method, with the reason."""
    ranks = report.ranks
    if _is_elementwise(method):
        return {"energy": _ENERGY}, f"rank energy {_ENERGY:g}: what {method} gives has full rank"
    if not _has_factors(report):
        return {"energy": _ENERGY}, f"rank energy {_ENERGY:g}: the sum has full rank" + _cost(ranks)
    if ranks is None or report.total.scale is None:
        return {"exact": True}, "rank: there is nothing to choose"
    if method != "linear":
        # Its singular values are not those of the sum, of which sizes and errors are known.
        rank = {"energy": 1 - _ERROR**2}
        return rank, f"rank energy {rank['energy']:g}: 1 % of error, of what {method} gives"
    small = next((choice for choice in ranks.least if choice.error <= _ERROR), None)
    if small is None or small.size_bytes * _WORTH >= ranks.exact.size_bytes:
        why = f"rank exact: it takes {_size(ranks.exact)}, and a loss of 1 % would save little"
        return {"exact": True}, why
    if "bias" in {place.kind for place in report.places} and report.dialect in _BIASES_BESIDE:
        rank = {"energy": 1 - _ERROR**2}
        return rank, f"rank energy {rank['energy']:g}: 1 % of error, from {_size(ranks.exact)}"
    why = (
        f"rank shared {small.value:g}: {_size(small)} instead of {_size(ranks.exact)}, for "
        f"{_percent(small.error, 1)} of error"
    )
    return {"shared": int(small.value)}, why


def _cost(ranks: Ranks | None) -> str:
    found = [choice for choice in ranks.energy if choice.value == _ENERGY] if ranks else []
    return "".join(
        f"; this takes {_size(choice)} and loses {_percent(choice.error, 1)}" for choice in found
    )


def least_loss(method: str) -> dict[str, Any]:
    """The rank of a recipe that says none: exact, or where nothing is, next to it."""
    return {"energy": _ENERGY} if _is_elementwise(method) else {"exact": True}


# They keep biases beside factors, which sharing may drop: merge.plan refuses it.
_BIASES_BESIDE = ("diffusers", "peft")
_ENERGY = 0.99


def _is_elementwise(method: str) -> bool:
    """Whether its results have full rank, which nothing can hold exactly."""
    row = methods.METHODS.get(method)
    return row is not None and row.parameters.space is Space.ELEMENTS


def _has_factors(report: Report) -> bool:
    """Whether every change of a weight is a product, as methods of the core want them."""
    return all(place.kind != "dense" or place.shape[1] == 1 for place in report.places)


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _size(choice: Choice) -> str:
    size = choice.size_bytes
    return f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"


def _storage(report: Report) -> list[str]:
    found = []
    stored = report.storage
    for its in () if stored is None else stored.factors:
        if its.is_asked and its.overflows:
            found.append(f"dtype: {its.dtype} cannot hold the factors; bfloat16 or float32 can")
    for loss in () if stored is None else stored.bake:
        if loss.is_base and loss.overflows:
            found.append(f"base: its {loss.dtype} cannot hold the sum; a wider dtype may")
        elif loss.is_base and loss.gain < 0.9:
            found.append(
                f"base: baked into its {loss.dtype}, {_percent(loss.gain)} of the change arrives; take a "
                "base in float16 or bfloat16, or load the adapter beside it"
            )
    return found


def with_suggestion(report: Report) -> Report:
    return replace(report, suggestion=suggest(report))
