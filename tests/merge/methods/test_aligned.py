"""KnOTS and Core Space against their authors' algorithms on dense matrices, and their laws."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from merge.algorithms.lora import Factors
from merge.method_parameters import CoreDare, CoreTies, KnotsDare, KnotsTies
from merge.methods.core import core_of
from merge.methods.draws import Draws
from merge.methods.rules import CORE
from tests.merge.methods.adapters import (
    SHAPES,
    STRENGTHS,
    Array,
    adapters,
    assert_close,
    dense,
    draws,
    rotations,
    whole,
)
from tests.oracles import aligned, elementwise

METHODS = [
    KnotsTies(name="knots_ties"),
    KnotsTies(name="knots_ties", density=0.6, scale=-1.5),
    KnotsDare(name="knots_dare"),
    KnotsDare(name="knots_dare", density=0.3, elect=True),
    CoreTies(name="core_ties"),
    CoreTies(name="core_ties", density=0.6, scale=0.7),
    CoreDare(name="core_dare"),
    CoreDare(name="core_dare", density=0.8, elect=True, scale=2.0),
]
EACH = pytest.mark.parametrize("parameters", METHODS, ids=repr)


def merged(
    parameters: Any,
    parts: Sequence[Factors],
    strengths: Sequence[float] | None = None,
    drawn: Draws | None = None,
) -> Array:
    core = core_of(parts, strengths or [1.0] * len(parts))
    return whole(CORE[parameters.name](core, parameters, drawn or draws(len(parts))))


def _rule(parameters: Any, count: int) -> Callable[[list[Array]], Array]:
    """The dense reference of the rule, on whatever matrices it is given."""

    def rule(changes: list[Array]) -> Array:
        if parameters.name.endswith("ties"):
            return parameters.scale * elementwise.ties(changes, parameters.density)
        drawn = draws(count)
        chance = np.full_like(changes[0], parameters.density)
        sparse = [
            elementwise.dropped(
                change, drawn.uniform(i, 0, change.size).numpy().reshape(change.shape), chance
            )
            for i, change in enumerate(changes)
        ]
        combined = elementwise.elected(sparse) if parameters.elect else elementwise.added(sparse)
        return parameters.scale * combined

    return rule


def _reference(parameters: Any, changes: list[Array], ranks: Sequence[int]) -> Array:
    rule = _rule(parameters, len(changes))
    if parameters.name.startswith("knots"):
        return aligned.knots(changes, rule)
    halves = [aligned.balanced(x, min(r, *x.shape)) for x, r in zip(changes, ranks, strict=True)]
    return aligned.core_space([up for up, _ in halves], [down for _, down in halves], rule)


@EACH
@pytest.mark.parametrize(("out", "inner", "ranks"), SHAPES)
def test_each_method_is_its_dense_reference(
    out: int, inner: int, ranks: tuple[int, ...], parameters: Any
) -> None:
    parts, strengths = adapters(out, inner, ranks), list(STRENGTHS[: len(ranks)])
    expected = _reference(parameters, dense(parts, strengths), ranks)
    assert_close(merged(parameters, parts, strengths), expected)


@EACH
def test_an_adapter_given_twice_adds_no_directions(parameters: Any) -> None:
    """Half of the stacked factors then say nothing new, and rules see none of it."""
    one, other = adapters(20, 30, (4, 3))
    parts, ranks = [one, other, one], (4, 3, 4)
    assert_close(merged(parameters, parts), _reference(parameters, dense(parts), ranks))


@EACH
def test_an_adapter_and_its_opposite_cancel(parameters: Any) -> None:
    (part,) = adapters(20, 30, (4,))
    found = merged(parameters, [part, part], [0.8, -0.8], Draws(0, "layer", ("sha", "sha")))
    assert np.linalg.norm(found) < 1e-12


@EACH
def test_nothing_merges_to_nothing(parameters: Any) -> None:
    (part,) = adapters(20, 30, (4,))
    zero = Factors(torch.zeros_like(part.up), part.down)
    assert not merged(parameters, [zero, zero]).any()
    assert_close(merged(parameters, [part, zero]), merged(parameters, [part]))


@EACH
def test_the_order_of_adapters_does_not_matter(parameters: Any) -> None:
    parts, drawn = adapters(20, 30, (4, 7, 3)), draws(3)
    turned = Draws(drawn.seed, drawn.module, (drawn.adapters[2], *drawn.adapters[:2]))
    found = merged(parameters, [parts[2], *parts[:2]], drawn=turned)
    assert_close(found, merged(parameters, parts, drawn=drawn))


@EACH
def test_a_result_depends_on_the_changes_and_not_on_their_factors(parameters: Any) -> None:
    """B G and G^-1 A are the same change as B and A, and so is what a resize to its rank stores."""
    parts = adapters(20, 30, (4, 7))
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    other = [
        Factors(parts[0].up @ mixing, torch.linalg.inv(mixing) @ parts[0].down, parts[0].scale),
        Factors(1000 * parts[1].up, parts[1].down / 1000, parts[1].scale),
    ]
    assert_close(merged(parameters, other), merged(parameters, parts), 1e-9)


@EACH
def test_turned_outputs_turn_the_result(parameters: Any) -> None:
    """Of Core Space also turned inputs; so no sign of a singular vector matters either."""
    parts = adapters(20, 30, (4, 7))
    left, right = rotations(20, 30)
    turns_inputs = parameters.name.startswith("core")
    turned = [
        Factors(left @ its.up, its.down @ right if turns_inputs else its.down, its.scale)
        for its in parts
    ]
    expected = left.numpy() @ merged(parameters, parts)
    if turns_inputs:
        expected = expected @ right.numpy()
    assert_close(merged(parameters, turned), expected, 1e-9)


@pytest.mark.parametrize(
    "parameters",
    [
        KnotsTies(name="knots_ties", density=1.0),
        KnotsDare(name="knots_dare", density=1.0, elect=True),
        CoreTies(name="core_ties", density=1.0),
        CoreDare(name="core_dare", density=1.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("out", "inner", "rank"), [(20, 30, 4), (30, 5, 9), (1, 9, 2), (1, 1, 1)])
def test_one_adapter_of_which_all_is_kept_is_itself(
    out: int, inner: int, rank: int, parameters: Any
) -> None:
    (part,) = adapters(out, inner, (rank,))
    assert_close(merged(parameters, [part], [0.7]), dense([part], [0.7])[0])


@pytest.mark.parametrize(
    "parameters", [KnotsDare(name="knots_dare"), CoreDare(name="core_dare")], ids=repr
)
def test_the_expectation_of_dare_is_the_sum(parameters: Any) -> None:
    parts, runs = adapters(8, 9, (2, 3)), 150
    drawn = [Draws(seed, "layer", ("one", "other")) for seed in range(runs)]
    found = np.stack([merged(parameters, parts, drawn=its) for its in drawn])
    deviation = found.std(axis=0) / np.sqrt(runs)
    assert (np.abs(found.mean(axis=0) - sum(dense(parts))) < 5 * deviation + 1e-12).all()


def test_the_published_core_space_depends_on_how_a_change_is_factored() -> None:
    """Why ours splits every change evenly first: B / 10 and 10 A are no other adapter."""
    parts = adapters(20, 30, (4, 4))
    parameters = CoreTies(name="core_ties")
    halves = [aligned.balanced(change, 4) for change in dense(parts)]
    ups, downs = [up for up, _ in halves], [down for _, down in halves]
    rule = _rule(parameters, 2)
    even = aligned.core_space(ups, downs, rule)
    uneven = aligned.core_space([ups[0] / 10, ups[1]], [10 * downs[0], downs[1]], rule)
    assert np.linalg.norm(uneven - even) > 0.1 * np.linalg.norm(even)
    assert_close(merged(parameters, parts), even)


@EACH
def test_float32_says_the_same_as_float64(parameters: Any) -> None:
    """To what rounding leaves: a rule may keep another one of two nearly equal elements."""
    parts = adapters(40, 50, (4, 7))
    single = [Factors(its.up.float(), its.down.float(), its.scale) for its in parts]
    doubled = [Factors(its.up.double(), its.down.double(), its.scale) for its in single]
    assert_close(merged(parameters, single), merged(parameters, doubled), 1e-4)
