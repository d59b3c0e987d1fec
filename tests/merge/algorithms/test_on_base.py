"""Every layout that depends on the base against its oracle: the whole, rows, strengths, the bias."""

import numpy as np
import pytest
import torch

from merge.algorithms import LAYOUTS, boft, glora, glora_paper, hira, hra, ia3, oft, read_change
from merge.algorithms.change import Change, Needs
from tests.merge.algorithms.cases_on_base import ON_BASE, OnBase

every_case = pytest.mark.parametrize("case", ON_BASE, ids=lambda case: case.name)


def _read(case: OnBase, dtype: torch.dtype = torch.float64) -> Change:
    tensors = {
        role: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for role, tensor in case.tensors.items()
    }
    return read_change(case.layout, tensors, case.weight.shape, case.facts)


def _base(case: OnBase, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """W as a matrix."""
    return torch.from_numpy(case.weight).reshape(len(case.weight), -1).to(dtype)


def _weight(
    change: Change, base: torch.Tensor, first: int = 0, rows: int | None = None
) -> torch.Tensor:
    """f(W) - W for some rows, all of them by default, with no more of W than it needs."""
    rows = len(base) if rows is None else rows
    given = base if change.needs is Needs.WHOLE else base[first : first + rows]
    return change.weight(first, rows, given)


@every_case
def test_the_changed_weight_is_the_oracles(case: OnBase) -> None:
    change, base = _read(case), _base(case)
    assert change.needs is case.needs
    before = base.clone()
    changed = (base + _weight(change, base)).reshape(case.weight.shape)
    np.testing.assert_allclose(changed.numpy(), case.changed, rtol=1e-12, atol=1e-12)
    assert torch.equal(base, before)


@every_case
def test_float32_is_as_near_as_float32_is(case: OnBase) -> None:
    change, base = _read(case, torch.float32), _base(case, torch.float32)
    difference = _weight(change, base)
    assert difference.dtype == torch.float32
    changed = (base + difference).reshape(case.weight.shape).numpy()
    size = max(float(np.abs(case.changed).max()), 1.0)
    np.testing.assert_allclose(changed, case.changed, rtol=0, atol=1e-5 * size)


@every_case
def test_rows_are_the_rows_of_the_whole(case: OnBase) -> None:
    change, base = _read(case), _base(case)
    whole = _weight(change, base)
    for rows in (1, 3, len(base) - 1):
        for first in range(len(base) - rows + 1):
            some = _weight(change, base, first, rows)
            assert some.shape == (rows, base.shape[1])
            torch.testing.assert_close(some, whole[first : first + rows], rtol=0, atol=1e-12)


@every_case
@pytest.mark.parametrize("strength", [0.0, 1.0, 0.5, -0.7])
def test_a_strength_scales_the_way_from_the_base(case: OnBase, strength: float) -> None:
    base = _base(case)
    found = (base + strength * _weight(_read(case), base)).reshape(case.weight.shape)
    expected = case.weight + strength * (case.changed - case.weight)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    if strength == 0:
        assert np.array_equal(found.numpy(), case.weight)


@every_case
def test_the_bias_changes_as_the_oracle_says(case: OnBase) -> None:
    change, base = _read(case), _base(case)
    bias = np.ones(len(base)) if case.bias is None else case.bias
    for old, expected in (
        (torch.from_numpy(bias), case.bias_change),
        (None, case.no_bias_change),
    ):
        found = change.bias(old, base)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@every_case
def test_no_product_is_exact_without_the_base(case: OnBase) -> None:
    assert _read(case).factors() is None


def test_every_layout_has_a_case() -> None:
    modules = {m.__name__ for m in (boft, glora, glora_paper, hira, hra, ia3, oft)}
    on_base = {name for name, (read, _) in LAYOUTS.items() if read.__module__ in modules}
    assert {case.layout for case in ON_BASE if "dora_scale" not in case.tensors} == on_base


def test_names_of_cases_are_different() -> None:
    assert len({case.name for case in ON_BASE}) == len(ON_BASE)
