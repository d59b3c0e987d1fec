"""TIES, DARE, DELLA, magnitude pruning and breadcrumbs against dense references, and their laws."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from merge.method_parameters import Breadcrumbs, Dare, Della, Magnitude, Parameters, Ties
from merge.methods import elements
from merge.methods.draws import Draws
from merge.methods.elements import Delta, Dense
from merge.methods.rules import ELEMENTS
from tests.merge.methods.changes import SHAPES, Product, draws, random_changes, whole
from tests.oracles import elementwise as oracle

Oracle = Callable[[list[np.ndarray], Any, list[np.ndarray]], np.ndarray]


def _ties(changes: list[np.ndarray], its: Ties, drawn: list[np.ndarray]) -> np.ndarray:
    return its.scale * oracle.ties(changes, its.density, its.vote, its.combine)


def _dare(changes: list[np.ndarray], its: Dare, drawn: list[np.ndarray]) -> np.ndarray:
    chances = [np.full_like(change, its.density) for change in changes]
    sparse = [oracle.dropped(*one) for one in zip(changes, drawn, chances, strict=True)]
    return its.scale * _combined(sparse, its)


def _della(changes: list[np.ndarray], its: Della, drawn: list[np.ndarray]) -> np.ndarray:
    chances = [oracle.della_probabilities(x, its.density, its.epsilon) for x in changes]
    sparse = [oracle.dropped(*one) for one in zip(changes, drawn, chances, strict=True)]
    return its.scale * _combined(sparse, its)


def _combined(sparse: list[np.ndarray], its: Dare | Della | Breadcrumbs) -> np.ndarray:
    return oracle.elected(sparse, combine=its.combine) if its.elect else oracle.added(sparse)


def _magnitude(changes: list[np.ndarray], its: Magnitude, drawn: list[np.ndarray]) -> np.ndarray:
    return its.scale * oracle.added([oracle.trimmed(x, its.density) for x in changes])


def _breadcrumbs(
    changes: list[np.ndarray], its: Breadcrumbs, drawn: list[np.ndarray]
) -> np.ndarray:
    sparse = [oracle.without_tails(x, its.density, its.gamma) for x in changes]
    return its.scale * _combined(sparse, its)


CASES: list[tuple[Parameters, Oracle]] = [
    (Ties(name="ties"), _ties),
    (Ties(name="ties", density=0.01, vote="count", scale=-0.5), _ties),
    (Ties(name="ties", density=0.7, combine="sum"), _ties),
    (Ties(name="ties", density=1.0, vote="count", combine="sum"), _ties),
    (Dare(name="dare"), _dare),
    (Dare(name="dare", density=0.1, elect=True, scale=2.0), _dare),
    (Dare(name="dare", density=0.4, elect=True, combine="sum"), _dare),
    (Della(name="della"), _della),
    (Della(name="della", combine="sum"), _della),
    (Della(name="della", density=0.3, epsilon=0.2, elect=False, scale=0.3), _della),
    (Della(name="della", density=0.9, epsilon=0.1), _della),
    (Magnitude(name="magnitude"), _magnitude),
    (Magnitude(name="magnitude", density=0.05, scale=1.5), _magnitude),
    (Breadcrumbs(name="breadcrumbs"), _breadcrumbs),
    (Breadcrumbs(name="breadcrumbs", density=0.4, gamma=0.3, elect=True), _breadcrumbs),
    (Breadcrumbs(name="breadcrumbs", elect=True, combine="sum"), _breadcrumbs),
    (Breadcrumbs(name="breadcrumbs", density=0.5, gamma=0.5, scale=0.1), _breadcrumbs),
]
EACH = pytest.mark.parametrize(
    "parameters", [its for its, _ in CASES], ids=lambda its: its.model_dump_json(exclude_unset=True)
)
SMALL = [(20, 30), (7, 11), (1, 9), (9, 1), (1, 1), (40, 6)]


def merge(parameters: Any, changes: Sequence[Delta], drawn: Draws | None = None) -> Delta:
    return ELEMENTS[parameters.name](changes, parameters, drawn or draws(len(changes)))


def _uniform(drawn: Draws, shape: tuple[int, int], count: int) -> list[np.ndarray]:
    n = shape[0] * shape[1]
    return [drawn.uniform(i, 0, n).numpy().reshape(shape) for i in range(count)]


@pytest.mark.parametrize(("parameters", "reference"), CASES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", SMALL)
def test_each_method_is_its_dense_reference(
    shape: tuple[int, int], count: int, parameters: Parameters, reference: Oracle
) -> None:
    changes, drawn = random_changes(shape, count), draws(count)
    expected = reference([x.dense() for x in changes], parameters, _uniform(drawn, shape, count))
    np.testing.assert_allclose(whole(merge(parameters, changes, drawn)), expected, atol=1e-10)


@pytest.mark.parametrize(("parameters", "reference"), CASES)
def test_each_tile_is_its_part_of_the_dense_reference(
    parameters: Parameters, reference: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elements, "TILE_ELEMENTS", 100)  # three rows
    changes, drawn = random_changes((20, 30), 3), draws(3)
    expected = reference(
        [change.dense() for change in changes], parameters, _uniform(drawn, (20, 30), 3)
    )
    np.testing.assert_allclose(whole(merge(parameters, changes, drawn)), expected, atol=1e-10)


@pytest.mark.parametrize(("parameters", "reference"), CASES)
def test_each_method_defines_zeros_and_equal_magnitudes(
    parameters: Parameters, reference: Oracle
) -> None:
    shape = (5, 8)
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(-1, 2, shape, generator=generator).double()  # zeros among them
    changes = [torch.zeros(shape).double(), 0.5 * torch.ones(shape).double(), signs, -signs.abs()]
    drawn = draws(4)
    expected = reference([x.numpy() for x in changes], parameters, _uniform(drawn, shape, 4))
    found = whole(merge(parameters, [Dense(x) for x in changes], drawn))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]])
def test_rows_are_the_same_numbers_however_they_are_asked_for(
    shape: tuple[int, int], dtype: torch.dtype, parameters: Parameters
) -> None:
    merged = merge(parameters, random_changes(shape, 2, dtype))
    rows = whole(merged)
    for first, count in [(0, 1), (shape[0] - 1, 1), (261, 2), (1, shape[0] - 1), (200, 300)]:
        if first + count <= shape[0]:
            found = merged.rows(first, count).double().numpy()
            np.testing.assert_array_equal(found, rows[first : first + count])
    np.testing.assert_array_equal(whole(merged), rows)


@EACH
def test_what_was_asked_for_is_the_callers_to_change(parameters: Parameters) -> None:
    merged = merge(parameters, random_changes((600, 1000), 2))
    for first, count in [(0, 262), (3, 2)]:
        before = merged.rows(first, count).clone()
        merged.rows(first, count).zero_()
        assert torch.equal(merged.rows(first, count), before)


@EACH
def test_the_order_of_adapters_does_not_matter(parameters: Parameters) -> None:
    changes, drawn = random_changes((13, 17), 3), draws(3)
    turned = Draws(drawn.seed, drawn.module, (drawn.adapters[2], *drawn.adapters[:2]))
    found = whole(merge(parameters, [changes[2], *changes[:2]], turned))
    np.testing.assert_allclose(found, whole(merge(parameters, changes, drawn)), atol=1e-12)


@EACH
def test_an_adapter_and_its_opposite_cancel(parameters: Parameters) -> None:
    (change,) = random_changes((13, 17), 1)
    drawn = Draws(0, "unet.q", ("sha", "sha"))
    found = whole(merge(parameters, [change, Product(-change.up, change.down)], drawn))
    assert not found.any()


@EACH
def test_opposite_inputs_give_the_opposite_result(parameters: Parameters) -> None:
    changes = random_changes((13, 17), 3)
    opposite = [Product(-change.up, change.down) for change in changes]
    found = whole(merge(parameters, opposite))
    np.testing.assert_array_equal(found, -whole(merge(parameters, changes)))


@EACH
def test_larger_inputs_give_the_larger_result(parameters: Parameters) -> None:
    changes = random_changes((13, 17), 3)
    larger = [Product(4 * change.up, change.down) for change in changes]
    np.testing.assert_array_equal(
        whole(merge(parameters, larger)), 4 * whole(merge(parameters, changes))
    )


@pytest.mark.parametrize(
    "parameters",
    [
        Ties(name="ties", density=1.0),
        Ties(name="ties", density=1.0, vote="count", combine="sum"),
        Dare(name="dare", density=1.0),
        Dare(name="dare", density=1.0, elect=True),
        Della(name="della", density=1.0, epsilon=0.0),
        Magnitude(name="magnitude", density=1.0),
        Breadcrumbs(name="breadcrumbs", density=1.0, gamma=0.0),
    ],
)
@pytest.mark.parametrize("shape", [(13, 17), (9, 1), (1, 1)])
def test_one_adapter_of_which_all_is_kept_is_itself(
    shape: tuple[int, int], parameters: Parameters
) -> None:
    (change,) = random_changes(shape, 1)
    np.testing.assert_array_equal(whole(merge(parameters, [change])), change.dense())


@pytest.mark.parametrize(
    "parameters",
    [Dare(name="dare", density=0.3), Della(name="della", density=0.4, epsilon=0.3, elect=False)],
)
def test_the_expectation_of_a_random_method_is_the_sum(parameters: Parameters) -> None:
    changes = random_changes((13, 17), 2)
    runs = 400
    mean = sum(whole(merge(parameters, changes, draws(2, seed))) for seed in range(runs)) / runs
    exact = sum(change.dense() for change in changes)
    # No element is kept with a probability p below 0.1, and its variance is (1 / p - 1) x^2.
    deviation = np.sqrt(sum(9 * change.dense() ** 2 for change in changes) / runs)
    assert (np.abs(mean - exact) < 5 * deviation + 1e-12).all()


@pytest.mark.parametrize("parameters", [Dare(name="dare"), Della(name="della")])
def test_draws_follow_the_seed_the_module_and_the_adapter(parameters: Parameters) -> None:
    changes = random_changes((13, 17), 2)
    first = whole(merge(parameters, changes, draws(2)))
    assert np.array_equal(whole(merge(parameters, changes, draws(2))), first)
    for other in (draws(2, seed=1), draws(2, module="unet.k"), Draws(0, "unet.q", ("x", "y"))):
        assert not np.array_equal(whole(merge(parameters, changes, other)), first)


def test_breadcrumbs_keep_a_layer_so_small_that_no_outlier_is_left_out() -> None:
    """64 elements, of which gamma is less than half of one: mergekit keeps nothing of it."""
    (change,) = random_changes((8, 8), 1)
    parameters = Breadcrumbs(name="breadcrumbs", density=0.9, gamma=0.005)
    found = whole(merge(parameters, [change]))
    assert np.count_nonzero(found) == 58
    np.testing.assert_array_equal(found, oracle.trimmed(change.dense(), 0.9))


@EACH
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_trimmed_away(value: float, parameters: Parameters) -> None:
    """So that whoever writes the result can refuse it, as after a linear merge."""
    changes = [Dense(torch.from_numpy(change.dense())) for change in random_changes((5, 8), 3)]
    broken = torch.ones(5, 8, dtype=torch.float64)
    broken[1, 3] = value
    assert not np.isfinite(whole(merge(parameters, [*changes, Dense(broken)]))).all()


def test_a_vote_is_a_draw_where_only_rounding_is_left_of_it() -> None:
    changes = [Dense(torch.tensor([row])) for row in ([1.0, 3.0, 1.0], [-1.0 - 1e-7, -2.0, 1e-30])]
    found = whole(merge(Ties(name="ties", density=1.0), changes))
    np.testing.assert_array_equal(found, [[0.0, 3.0, np.float32(0.5)]])


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"name": "della", "density": 0.1, "epsilon": 0.1}, "density - epsilon must be above 0"),
        ({"name": "della", "density": 0.95, "epsilon": 0.1}, "density + epsilon at most 1"),
        (
            {"name": "breadcrumbs", "density": 0.9, "gamma": 0.2},
            "density + gamma must be at most 1",
        ),
    ],
)
def test_impossible_shares_are_refused_with_the_recipe(document: dict[str, Any], says: str) -> None:
    kind = {"della": Della, "breadcrumbs": Breadcrumbs}[document["name"]]
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        kind.model_validate(document)
