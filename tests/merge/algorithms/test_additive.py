"""Every additive layout against its oracle: the whole, its rows, its factors, and strengths."""

import numpy as np
import pytest
import torch

from merge.algorithms import (
    LAYOUTS,
    experts,
    full,
    locon,
    loha,
    lokr,
    lora,
    read_change,
    replacement,
    spellings,
)
from merge.algorithms.change import Change, Needs
from tests.merge.algorithms.cases import CASES, Case, Maker, old_bias

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _read(case: Case, dtype: torch.dtype = torch.float64) -> Change:
    tensors = {
        role: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for role, tensor in case.tensors.items()
    }
    return read_change(case.layout, tensors, case.shape, case.facts)


def _base(case: Case) -> torch.Tensor:
    random = Maker(9)(*case.shape).reshape(case.shape[0], -1)
    return random if case.base is None else case.base


def _weight(
    change: Change, base: torch.Tensor, first: int = 0, rows: int | None = None
) -> torch.Tensor:
    """f(W) - W for some rows, all from `first` on by default, with no more of W than it needs."""
    rows = len(base) - first if rows is None else rows
    given = base[first : first + rows] if change.needs is Needs.ROWS else None
    return change.weight(first, rows, given)


@every_case
def test_the_change_is_the_oracles(case: Case) -> None:
    whole = _weight(_read(case), _base(case)).reshape(case.shape)
    np.testing.assert_allclose(whole.numpy(), case.delta, rtol=1e-12, atol=1e-12)


@every_case
def test_float32_is_as_near_as_float32_is(case: Case) -> None:
    whole = _weight(_read(case, torch.float32), _base(case).float())
    assert whole.dtype == torch.float32
    size = max(float(np.abs(case.delta).max()), 1.0)
    np.testing.assert_allclose(whole.reshape(case.shape).numpy(), case.delta, atol=4e-6 * size)


@every_case
def test_rows_are_the_rows_of_the_whole(case: Case) -> None:
    change, base = _read(case), _base(case)
    whole = _weight(change, base)
    for rows in (1, 2, 5):
        for first in range(case.shape[0] - rows + 1):
            some = _weight(change, base, first, rows)
            assert some.shape == (rows, base.shape[1])
            torch.testing.assert_close(some, whole[first : first + rows], rtol=0, atol=1e-13)


@every_case
def test_factors_are_exact_at_their_rank_or_there_are_none(case: Case) -> None:
    change = _read(case)
    factors = change.factors()
    assert (factors and factors.rank) == case.rank
    assert factors is not None or not change.is_product
    if factors is not None:
        dense = lora.delta(factors).reshape(case.shape)
        np.testing.assert_allclose(dense.numpy(), case.delta, rtol=1e-12, atol=1e-12)


@every_case
def test_the_bias_changes_as_the_oracle_says(case: Case) -> None:
    change, base = _read(case), _base(case)
    found = change.bias(old_bias(case.shape[0]), None if change.needs == "nothing" else base)
    if case.bias is None:
        assert found is None
    else:
        assert found is not None
        np.testing.assert_allclose(found.numpy(), case.bias, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize("strength", [0.0, 1.0, 0.5, -0.7])
def test_a_strength_scales_the_way_from_the_base(case: Case, strength: float) -> None:
    base = _base(case)
    found = base + strength * _weight(_read(case), base)
    expected = base.numpy() + strength * case.delta.reshape(base.shape)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    if strength == 0:
        assert torch.equal(found, base)


def test_every_layout_has_a_case() -> None:
    modules = {m.__name__ for m in (locon, spellings, experts, loha, lokr, full, replacement)}
    additive = {name for name, (read, _) in LAYOUTS.items() if read.__module__ in modules}
    assert {case.layout for case in CASES} == additive


def test_names_of_cases_are_different() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_role_no_reader_knows_is_refused() -> None:
    tensors = {"down": torch.ones(1, 3), "up": torch.ones(2, 1), "hada_t1": torch.ones(1)}
    with pytest.raises(ValueError, match="lora factors with hada_t1, which it does not have"):
        read_change("lora", tensors, (2, 3), {})


def test_a_layer_without_a_bias_gets_the_one_that_replaces_it() -> None:
    bias = torch.tensor([1.0, 2.0])
    change = read_change("replacement", {"bias": bias}, (2, 3), {})
    assert torch.equal(change.bias(None, None), bias)
