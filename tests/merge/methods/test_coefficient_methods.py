"""Methods of coefficients against dense float64 references, and what each does at its limits."""

from typing import Any

import numpy as np
import pytest
import torch

from merge.algorithms.lora import Factors
from merge.method_parameters import Karcher, ModelStock, Slerp
from merge.methods.core import gram
from merge.methods.rules import COEFFICIENTS
from tests.merge.methods.adapters import (
    SHAPES,
    STRENGTHS,
    Array,
    adapters,
    assert_close,
    dense,
    rotations,
)
from tests.oracles import karcher, model_stock, slerp

SLERP, KARCHER, STOCK = Slerp(name="slerp"), Karcher(name="karcher"), ModelStock(name="model_stock")
SHARES = (0.7, 1.0, 0.5, 1.6)
PAIRS = [shape for shape in SHAPES if len(shape[2]) == 2]


def _coefficients(parameters: Any, parts: list[Factors], strengths: Any) -> list[float]:
    return COEFFICIENTS[parameters.name](gram(parts), list(strengths), parameters)


def _merged(parameters: Any, parts: list[Factors], strengths: Any) -> Array:
    found = _coefficients(parameters, parts, strengths)
    return sum(c * d for c, d in zip(found, dense(parts), strict=True))


@pytest.mark.parametrize(("out", "inner", "ranks"), PAIRS)
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.2, 0.6), (7.0, 3.0)])
def test_slerp_is_the_point_on_the_arc(out: int, inner: int, ranks: Any, strengths: Any) -> None:
    parts = adapters(out, inner, ranks)
    wanted = slerp.merged(*dense(parts), strengths[1] / sum(strengths))
    assert_close(_merged(SLERP, parts, strengths), wanted)


@pytest.mark.parametrize(("out", "inner", "ranks"), SHAPES)
def test_karcher_is_the_centre_on_the_sphere(out: int, inner: int, ranks: Any) -> None:
    parts, shares = adapters(out, inner, ranks), list(SHARES[: len(ranks)])
    found = _merged(KARCHER, parts, shares)
    assert_close(found, karcher.merged(dense(parts), shares))
    norms = [np.linalg.norm(change) for change in dense(parts)]
    assert np.linalg.norm(found) == pytest.approx(np.average(norms, weights=shares), rel=1e-12)


def test_karcher_is_nearer_to_all_than_any_neighbour() -> None:
    parts, shares = adapters(20, 30, (3, 4, 5)), [1.0, 2.0, 0.5]
    found, random = _merged(KARCHER, parts, shares), np.random.default_rng(0)
    least = karcher.spread(found, dense(parts), shares)
    for size in (1e-1, 1e-3):
        for _ in range(20):
            aside = size * np.linalg.norm(found) / 25 * random.standard_normal(found.shape)
            assert karcher.spread(found + aside, dense(parts), shares) > least


@pytest.mark.parametrize(("out", "inner", "ranks"), SHAPES)
@pytest.mark.parametrize("least", [0.0, 0.9])
def test_model_stock_is_the_papers_ratio(out: int, inner: int, ranks: Any, least: float) -> None:
    parts, strengths = adapters(out, inner, ranks), list(STRENGTHS[: len(ranks)])
    parameters = ModelStock(name="model_stock", least=least)
    wanted = model_stock.merged(dense(parts, strengths), least if len(ranks) > 1 else 0.0)
    assert_close(_merged(parameters, parts, strengths), wanted)


def test_karcher_of_two_is_slerp_when_their_norms_are_equal() -> None:
    first, second = adapters(20, 30, (4, 4))
    norms = gram([first, second]).diagonal().sqrt()
    second = Factors(second.up, second.down, second.scale * float(norms[0] / norms[1]))
    for shares in [(1.0, 1.0), (0.3, 0.9)]:
        arc = _coefficients(SLERP, [first, second], shares)
        assert _coefficients(KARCHER, [first, second], shares) == pytest.approx(arc, rel=1e-9)


@pytest.mark.parametrize("parameters", [SLERP, KARCHER])
def test_unrelated_changes_keep_their_norm(parameters: Any) -> None:
    """Where the straight line between two of norm 1 would be 0.71 long."""
    parts = [_unit(0), _unit(1)]
    assert np.linalg.norm(_merged(parameters, parts, (1.0, 1.0))) == pytest.approx(1.0)


@pytest.mark.parametrize("parameters", [SLERP, KARCHER])
def test_a_change_that_is_alone_comes_back_whole(parameters: Any) -> None:
    (part,) = adapters(20, 30, (4,))
    nothing = Factors(torch.zeros_like(part.up), part.down)
    assert _coefficients(parameters, [part], [0.3]) == [1.0]
    assert _coefficients(parameters, [part, nothing], [0.3, 0.9])[0] == 1.0
    assert _coefficients(parameters, [nothing, part], [0.3, 0.9])[1] == 1.0
    assert np.isfinite(_coefficients(parameters, [nothing, nothing], [0.3, 0.9])).all()


@pytest.mark.parametrize("parameters", [SLERP, KARCHER])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_direction_twice_is_the_mean_of_both(parameters: Any, scale: float) -> None:
    (part,) = adapters(20, 30, (4,))
    other = Factors(part.up, part.down, scale * part.scale)
    wanted = (0.75 + 0.25 * scale) * dense([part])[0]
    assert_close(_merged(parameters, [part, other], (0.3, 0.1)), wanted, 1e-7)


@pytest.mark.parametrize("parameters", [SLERP, KARCHER])
def test_opposite_changes_are_refused(parameters: Any) -> None:
    (part,) = adapters(20, 30, (4,))
    opposite = Factors(part.up, part.down, -part.scale)
    with pytest.raises(ValueError, match=r"opposite|too far apart"):
        _coefficients(parameters, [part, opposite], [1.0, 1.0])


def test_karcher_refuses_changes_that_surround_the_centre() -> None:
    around = [_unit(0, 2), _unit(0, 2, 120), _unit(0, 2, 240)]
    with pytest.raises(ValueError, match="too far apart"):
        _coefficients(KARCHER, around, [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [_unit(0), _unit(0), _unit(0, 2, 180)],  # one lies opposite to the centre
        lambda: [_unit(0, 2), _unit(0, 2, 180 - 1e-5)],  # the centre is anywhere around them
    ],
)
def test_karcher_refuses_what_has_a_centre_by_rounding_only(parts: Any) -> None:
    with pytest.raises(ValueError, match="too far apart"):
        _coefficients(KARCHER, parts(), [1.0] * len(parts()))


def test_karcher_takes_directions_that_repeat() -> None:
    first, second = adapters(20, 30, (4, 6))
    parts, shares = [first, second, first, second, first], [1.0, 0.5, 1.0, 0.5, 1.0]
    found = _merged(KARCHER, parts, shares)
    assert_close(found, _merged(KARCHER, [first, second], [3.0, 1.0]), 1e-7)


def test_slerp_refuses_three() -> None:
    parts = adapters(20, 30, (4, 4, 4))
    with pytest.raises(ValueError, match="takes two adapters, not 3"):
        _coefficients(SLERP, parts, [1.0, 1.0, 1.0])


def test_model_stock_erases_unrelated_changes_unless_told_otherwise() -> None:
    unrelated = [_unit(0), _unit(1), _unit(2)]
    assert _coefficients(STOCK, unrelated, [1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    kept = _coefficients(ModelStock(name="model_stock", least=0.6), unrelated, [1.0, 1.0, 0.5])
    assert kept == pytest.approx([0.2, 0.2, 0.1])


def test_model_stock_of_changes_that_disagree_is_nothing_and_not_turned_around() -> None:
    around = [_unit(0, 2), _unit(0, 2, 120), _unit(0, 2, 240)]  # mean cosine -1/2: 1 + 2 cos = 0
    assert _coefficients(STOCK, around, [1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]


def test_model_stock_of_equal_changes_is_one_of_them_and_counts_those_present() -> None:
    (part,) = adapters(20, 30, (4,))
    nothing = Factors(torch.zeros_like(part.up), part.down)
    assert _merged(STOCK, [part, part, part], [1.0, 1.0, 1.0]) == pytest.approx(dense([part])[0])
    assert _merged(STOCK, [part, nothing], [0.7, 1.0]) == pytest.approx(0.7 * dense([part])[0])
    assert _merged(STOCK, [part, part], [0.7, 0.0]) == pytest.approx(0.7 * dense([part])[0])


@pytest.mark.parametrize("parameters", [SLERP, KARCHER, STOCK])
def test_order_scale_and_rotation_do_not_matter(parameters: Any) -> None:
    parts = adapters(20, 30, (4, 6) if parameters is SLERP else (4, 6, 2))
    strengths = list(SHARES[: len(parts)])
    found = _merged(parameters, parts, strengths)
    assert_close(_merged(parameters, parts[::-1], strengths[::-1]), found)
    larger = [Factors(part.up, part.down, -8 * part.scale) for part in parts]
    assert_close(_merged(parameters, larger, strengths), -8 * found)
    left, right = rotations(20, 30)
    turned = [Factors(left @ part.up, part.down @ right, part.scale) for part in parts]
    assert_close(_merged(parameters, turned, strengths), left.numpy() @ found @ right.numpy())


def _unit(row: int, other: int | None = None, degrees: float = 0.0) -> Factors:
    """A change of norm 1: one entry, or turned from there towards another row's."""
    angle = np.radians(degrees)
    up = torch.zeros(4, 1, dtype=torch.float64)
    up[row] = np.cos(angle)
    if other is not None:
        up[other] = np.sin(angle)
    return Factors(up, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
