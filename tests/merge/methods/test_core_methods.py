"""Methods of the core against dense float64 references, and the laws that need no numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge.algorithms.lora import Factors
from merge.method_parameters import Cart, Ctm, IsoC, IsoCts, Part, Svc, Tsv
from merge.methods.core import core_of
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import part_of
from merge.methods.rules import CORE
from tests.merge.methods.adapters import (
    SHAPES,
    STRENGTHS,
    Array,
    adapters,
    assert_close,
    core,
    dense,
    draws,
    rotations,
    whole,
)
from tests.oracles import cart, ctm, iso, svc, tsv

CASES: list[tuple[Any, Callable[[list[Array]], Array]]] = [
    (Svc(name="svc"), lambda d: svc.merged(d, 1.0)),
    (Svc(name="svc", floor=0.2), lambda d: svc.merged(d, 0.2)),
    (Cart(name="cart"), lambda d: cart.merged(d, 0.5, 1.0)),
    (Cart(name="cart", keep=0.3, scale=1.7), lambda d: cart.merged(d, 0.3, 1.7)),
    (Tsv(name="tsv"), lambda d: tsv.merged(d, 1.0)),
    (Tsv(name="tsv", keep=0.4, scale=0.6), lambda d: 0.6 * tsv.merged(d, 0.4)),
    (IsoC(name="iso_c"), lambda d: iso.common(d, iso.span(d))),
    (IsoC(name="iso_c", scale=-0.5), lambda d: -0.5 * iso.common(d, iso.span(d))),
    (IsoCts(name="iso_cts"), lambda d: iso.common_and_specific(d, 0.8, iso.span(d))),
    (IsoCts(name="iso_cts", common=0.5), lambda d: iso.common_and_specific(d, 0.5, iso.span(d))),
    (Ctm(name="ctm"), lambda d: ctm.merged(d, None, 1.0)),
    (Ctm(name="ctm", rank=3, balance=0.25), lambda d: ctm.merged(d, 3, 0.25)),
]
NAMED = [pytest.param(*case, id=repr(case[0])) for case in CASES]
METHODS = [pytest.param(case[0], id=repr(case[0])) for case in CASES]


def _merged(parameters: Any, parts: list[Factors], strengths: list[float] | None = None) -> Array:
    return whole(_spectrum(parameters, parts, strengths))


def _spectrum(
    parameters: Any, parts: list[Factors], strengths: list[float] | None = None
) -> Spectrum:
    return CORE[parameters.name](core(parts, strengths), parameters, draws(len(parts)))


@pytest.mark.parametrize(("out", "inner", "ranks"), SHAPES)
@pytest.mark.parametrize(("parameters", "oracle"), NAMED)
def test_a_method_gives_what_its_paper_gives_on_dense_changes(
    parameters: Part, oracle: Callable[[list[Array]], Array], out: int, inner: int, ranks: Any
) -> None:
    parts, strengths = adapters(out, inner, ranks), list(STRENGTHS[: len(ranks)])
    wanted = oracle(dense(parts, strengths))
    assert_close(_merged(parameters, parts, strengths), wanted)


@st.composite
def _layers(draw: st.DrawFn) -> tuple[list[Factors], list[float]]:
    """A layer of any shape with one to four adapters, some of which repeat, do nothing or oppose."""
    out, inner = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    parts = adapters(out, inner, ranks, seed=draw(st.integers(0, 10**6)))
    strengths = [draw(st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0])) for _ in parts]
    degenerate = draw(st.sampled_from(["none", "none", "twice", "zero", "opposite", "dead"]))
    if degenerate == "twice":
        parts, strengths = [*parts, parts[0]], [*strengths, 1.0]
    elif degenerate == "opposite":
        parts, strengths = [*parts, parts[0]], [*strengths, -strengths[0]]
    elif degenerate == "zero":
        parts[0] = Factors(torch.zeros_like(parts[0].up), parts[0].down)
    elif degenerate == "dead":
        parts[0].up[:, 0] = 0
    return parts, strengths


@pytest.mark.parametrize("parameters", METHODS)
@settings(max_examples=30, deadline=None)
@given(layer=_layers())
def test_laws_hold_for_any_layer(parameters: Any, layer: tuple[list[Factors], list[float]]) -> None:
    """Finite; the order does not matter; scaled changes give the scaled result, in both signs."""
    parts, strengths = layer
    found = _merged(parameters, parts, strengths)
    size = max(np.linalg.norm(change) for change in dense(parts, strengths))
    assert np.isfinite(found).all()
    assert np.linalg.norm(found) <= 20 * size * len(parts)
    larger = _merged(parameters, parts, [-4 * strength for strength in strengths])
    assert np.linalg.norm(larger + 4 * found) <= 1e-7 * size
    assert _span_holds(found, dense(parts, strengths), size)


def _span_holds(found: Array, changes: list[Array], size: float) -> bool:
    """Nothing points where no adapter points."""
    columns = np.linalg.svd(np.hstack(changes), full_matrices=False)
    u = columns[0][:, columns[1] > 1e-9 * size]
    return bool(np.linalg.norm(found - u @ u.T @ found) <= 1e-7 * max(size, 1e-300))


@pytest.mark.parametrize("parameters", METHODS)
@pytest.mark.parametrize(("out", "inner", "ranks"), SHAPES)
def test_order_and_rotation_do_not_matter(
    parameters: Any, out: int, inner: int, ranks: Any
) -> None:
    parts, strengths = adapters(out, inner, ranks), list(STRENGTHS[: len(ranks)])
    found = _merged(parameters, parts, strengths)
    assert_close(_merged(parameters, parts[::-1], strengths[::-1]), found, 1e-9)
    left, right = rotations(out, inner)
    turned = [Factors(left @ part.up, part.down @ right, part.scale) for part in parts]
    assert_close(_merged(parameters, turned, strengths), left.numpy() @ found @ right.numpy(), 1e-9)


@pytest.mark.parametrize("name", ["svc", "cart", "tsv", "ctm"])
def test_one_adapter_is_itself_also_beside_one_that_does_nothing(name: str) -> None:
    (part,) = adapters(20, 30, (4,))
    nothing = Factors(torch.zeros_like(part.up), part.down)
    parameters: Any = {"svc": Svc, "cart": Cart, "tsv": Tsv, "ctm": Ctm}[name](name=name)
    (wanted,) = dense([part])
    assert_close(_merged(parameters, [part], [1.0]), wanted)
    assert_close(_merged(parameters, [part], [-0.5]), -0.5 * wanted)
    assert_close(_merged(parameters, [nothing, part], [1.0, 1.0]), wanted)
    assert_close(_merged(parameters, [part, part], [1.0, 0.0]), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["svc", "cart", "tsv"])
def test_one_adapter_twice_counts_once(name: str, dtype: torch.dtype) -> None:
    (part,) = [_as(part, dtype) for part in adapters(20, 30, (4,))]
    parameters: Any = {"svc": Svc, "cart": Cart, "tsv": Tsv}[name](name=name)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert_close(_merged(parameters, [part, part]), dense([part])[0], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parameters", METHODS)
def test_opposite_changes_leave_the_third_adapters_directions_alone(
    parameters: Any, dtype: torch.dtype
) -> None:
    """What is left of the two is rounding, and no method may make it as strong as the rest."""
    first, third = (_as(part, dtype) for part in adapters(20, 30, (4, 3)))
    both = _merged(parameters, [first, first, third], [1.0, -1.0, 1.0])
    exactly = adapters(20, 30, (4, 3))
    wanted = _merged(parameters, [exactly[0], exactly[0], exactly[1]], [1.0, -1.0, 1.0])
    assert_close(both, wanted, 1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("parameters", METHODS)
def test_a_change_and_its_opposite_cancel(parameters: Any, rank: int) -> None:
    (part,) = adapters(20, 30, (rank,))
    found = _merged(parameters, [part, part], [1.0, -1.0])
    assert np.linalg.norm(found) < 1e-12 * np.linalg.norm(dense([part])[0])


@pytest.mark.parametrize("parameters", METHODS)
def test_float32_gives_the_same_to_its_precision(parameters: Any) -> None:
    parts, strengths = adapters(40, 64, (6, 8)), [0.7, 1.0]
    found = _merged(parameters, [_as(part, torch.float32) for part in parts], strengths)
    assert_close(found, _merged(parameters, parts, strengths), 1e-4)


def test_svc_leaves_what_only_one_adapter_has_and_keeps_once_what_all_have() -> None:
    """Orthogonal changes are the sum at floor 1, and N / (1 + (N - 1) floor) times that below."""
    apart = [_block(0, 2.0), _block(1, 1.0), _block(2, 0.5)]
    total = sum(dense(apart))
    assert_close(_merged(Svc(name="svc"), apart), total)
    assert_close(_merged(Svc(name="svc", floor=0.25), apart), total * 3 / 1.5)
    shared = [_block(0, 2.0), _block(0, 2.0), _block(2, 0.5)]
    once = dense(shared)[0] * 3 * 2 / (2 + 2 + 1) + dense(shared)[2]  # eq. 8 by hand: s = 2, 2, 1
    assert_close(_merged(Svc(name="svc"), shared), once)


def test_cart_of_two_is_their_average_whatever_is_kept() -> None:
    parts = adapters(20, 30, (4, 7))
    average = sum(dense(parts)) / 2
    for keep in (0.1, 0.5, 1.0):
        assert_close(_merged(Cart(name="cart", keep=keep, scale=3.0), parts), average)


def test_tsv_of_unrelated_adapters_is_their_sum() -> None:
    apart = [_block(0, 2.0), _block(1, 1.0), _block(2, 0.5)]
    assert_close(_merged(Tsv(name="tsv"), apart), sum(dense(apart)))


def test_tsv_is_what_is_published_when_the_rank_is_what_the_published_code_keeps() -> None:
    """min(12, 18) / 2 directions of two adapters of rank 6: AntoAndGar/task_singular_vectors."""
    parts = adapters(12, 18, (6, 6))
    assert_close(_merged(Tsv(name="tsv"), parts), tsv.as_published(dense(parts)))


def test_the_published_tsv_is_turned_by_directions_that_no_adapter_has() -> None:
    """And depends on what the linear algebra library put into the null space; ours does not."""
    parts = adapters(24, 24, (2, 2))
    ours, theirs = _merged(Tsv(name="tsv"), parts), tsv.as_published(dense(parts))
    assert np.linalg.norm(ours - theirs) > 0.1 * np.linalg.norm(ours)
    assert not _span_holds(theirs, dense(parts), 1.0)


def test_iso_is_what_is_published_when_the_adapters_span_the_layer() -> None:
    """danielm1405/iso-merging at min(out, in) dimensions, which the two ranks add up to here."""
    parts = adapters(12, 18, (5, 7))
    changes = dense(parts)
    assert_close(_merged(IsoC(name="iso_c"), parts), iso.common(changes, 12))
    published = iso.common_and_specific(changes, 0.8, 12)
    assert_close(_merged(IsoCts(name="iso_cts"), parts), published)


def test_the_published_iso_c_is_mostly_directions_that_no_adapter_has() -> None:
    parts = adapters(24, 24, (2, 2))
    changes = dense(parts)
    published = iso.common(changes, 24)
    u = np.linalg.svd(np.hstack(changes))[0][:, :4]
    outside = np.linalg.norm(published - u @ u.T @ published) ** 2
    assert outside > 0.8 * np.linalg.norm(published) ** 2
    assert _span_holds(_merged(IsoC(name="iso_c"), parts), changes, 1.0)


def test_a_lower_rank_of_iso_keeps_what_is_strongest_in_the_sum() -> None:
    """All values are equal, so only their order says which to keep."""
    parts = adapters(20, 30, (4, 7))
    u = np.linalg.svd(sum(dense(parts)))[0]
    for parameters in (IsoC(name="iso_c"), IsoCts(name="iso_cts")):
        spectrum = _spectrum(parameters, parts)
        left = (spectrum.outer_up @ spectrum.inner_up).numpy()
        assert spectrum.values[0] == spectrum.values[-1] > 0
        assert abs(left[:, 0] @ u[:, 0]) > 0.8
        assert abs(left[:, -1] @ u[:, 0]) < 0.5


def test_iso_cts_is_iso_c_where_everything_is_common() -> None:
    parts = adapters(20, 30, (4, 7))
    common = _merged(IsoCts(name="iso_cts", common=1.0), parts)
    assert_close(common, _merged(IsoC(name="iso_c"), parts))


def test_iso_cts_never_promises_more_directions_than_there_are() -> None:
    """3 for two adapters: the paper's rounding would give each 2 and leave -1 in common."""
    parts = adapters(20, 30, (1, 2))
    without = _merged(IsoCts(name="iso_cts", common=0.0), parts)
    assert_close(without, _merged(IsoCts(name="iso_cts", common=0.5), parts))
    assert np.linalg.matrix_rank(without) == 3


def test_ctm_has_the_rank_that_was_asked_and_keeps_more_than_any_other_basis() -> None:
    parts = adapters(20, 30, (4, 7))
    changes = dense(parts)
    found = _merged(Ctm(name="ctm", rank=3, balance=0.0), parts)
    assert np.linalg.matrix_rank(found) == 3
    u, v = ctm.basis(changes, 3)
    best, random = ctm.kept(changes, u, v), np.random.default_rng(0)
    for size in (1e-2, 1e-1, 1.0):
        for _ in range(20):
            other_u = np.linalg.qr(u + size * random.standard_normal(u.shape))[0]
            other_v = np.linalg.qr(v + size * random.standard_normal(v.shape))[0]
            assert ctm.kept(changes, other_u, other_v) < best
    assert len(_spectrum(Ctm(name="ctm"), parts).values) == 7
    assert len(_spectrum(Ctm(name="ctm", rank=99), parts).values) == 11


def test_ctm_balances_a_faint_adapter_against_a_loud_one() -> None:
    parts = [_block(0, 100.0), _block(1, 1.0)]
    loud = Ctm(name="ctm", rank=2, balance=0.0)
    even = Ctm(name="ctm", rank=2)
    parts = [
        Factors(torch.eye(8, 3, dtype=torch.float64) * 100, torch.eye(3, 9).double()),
        parts[1],
    ]
    faint = dense(parts)[1]
    assert np.linalg.norm(_merged(loud, parts) * (faint != 0)) < 1e-6
    assert np.linalg.norm(_merged(even, parts) * (faint != 0)) > 0.9


def test_a_share_of_a_rank_is_rounded_up_from_the_decimal_that_was_asked() -> None:
    assert [part_of(25, share) for share in (0.28, 0.5, 0.04, 1.0)] == [7, 13, 1, 25]
    assert part_of(0, 0.5) == 0


def test_all_adapters_doing_nothing_give_nothing() -> None:
    nothing = Factors(torch.zeros(5, 2), torch.ones(2, 6))
    for parameters, _ in CASES:
        spectrum = CORE[parameters.name](core_of([nothing] * 2, [1.0, 1.0]), parameters, draws(2))
        assert np.array_equal(whole(spectrum), np.zeros((5, 6)))


def _as(part: Factors, dtype: torch.dtype) -> Factors:
    return Factors(part.up.to(dtype), part.down.to(dtype), part.scale)


def _block(index: int, strength: float) -> Factors:
    """A change in two rows and two columns of its own."""
    up, down = torch.zeros(8, 2, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.float64)
    up[2 * index : 2 * index + 2] = torch.tensor([[1.0, 0.0], [0.0, 0.5]]) * strength
    down[:, 3 * index : 3 * index + 2] = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    return Factors(up, down)
