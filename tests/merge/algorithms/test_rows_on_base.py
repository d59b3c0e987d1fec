"""Rows taken from, and joined into, factors that depend on the base: f of some rows, and of all."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from merge.algorithms import read_change
from merge.algorithms.change import Needs
from merge.algorithms.rows import Part, fuse_rows, take_rows
from merge.algorithms.rows_on_base import FUSES, TAKES
from tests.merge.algorithms.cases import Maker
from tests.merge.algorithms.cases_on_base import ON_BASE, OnBase

Tensors = Mapping[str, torch.Tensor]
INPUT_SIDE = {"hira", "hra", "oft-peft", "boft-peft"}
TAKEN = [
    case
    for case in ON_BASE
    if (case.layout in TAKES | INPUT_SIDE or "dora_scale" in case.tensors)
    and "embedding" not in case.name
    and not (case.needs is Needs.WHOLE and "dora_scale" in case.tensors)
    and case.layout != "loha"
]


def _base(case: OnBase) -> torch.Tensor:
    return torch.from_numpy(case.weight).flatten(1)


def _change(case: OnBase, tensors: Tensors, base: torch.Tensor) -> torch.Tensor:
    shape = (len(base), *case.weight.shape[1:])
    return read_change(case.layout, tensors, shape, case.facts).weight(0, len(base), base)


def _indexes(case: OnBase) -> list[list[int]]:
    """A slice, a permutation and one piece, in whole blocks where the layout turns blocks of rows."""
    blocks = [t for role, t in case.tensors.items() if role.startswith(("oft_blocks", "oft_diag"))]
    rows = list(range(len(case.weight)))
    if len(blocks) > 1:  # the parts of a packed layer, of one size each
        return [rows[:4], rows[4:12], rows[-blocks[-1].shape[1] :]]
    size = blocks[0].shape[1] if blocks else 1
    return [rows[size : 2 * size], rows[-size:], rows[size:] + rows[:size], rows[:-size]]


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_taken_rows_change_as_they_did(case: OnBase) -> None:
    base = _base(case)
    whole = _change(case, case.tensors, base)
    for index in _indexes(case):
        taken = take_rows(case.layout, case.tensors, case.weight.shape, index, case.facts)
        found = _change(case, taken, base[index])
        # A limit of all blocks together is applied before they come apart: once, in float64 here.
        torch.testing.assert_close(found, whole[index], rtol=1e-7, atol=1e-7)
        if case.bias is not None:
            old, shape = torch.from_numpy(case.bias), (len(index), *case.weight.shape[1:])
            part = read_change(case.layout, taken, shape, case.facts).bias(old[index], base[index])
            all_of_it = read_change(case.layout, case.tensors, case.weight.shape, case.facts)
            expected = all_of_it.bias(old, base)
            assert (part is None) is (expected is None)
            if part is not None and expected is not None:
                torch.testing.assert_close(part, expected[index], rtol=1e-12, atol=1e-12)


def test_factors_without_a_limit_to_keep_are_not_rounded() -> None:
    blocks = Maker(1)(4, 2, 2).half()
    for layout, alpha in (("oft", 0.0), ("oft", 100.0), ("oft-kohya", 100.0)):
        tensors = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
        taken = take_rows(layout, tensors, (8, 3), range(2, 6))
        assert torch.equal(taken["oft_blocks"], blocks[1:3])
    parts = {f"oft_blocks.{i}": Maker(i)(2, 2, 2).half() for i in range(3)}
    for i in range(3):
        tensors = {**parts, "alpha": torch.tensor(0.1)}
        taken = take_rows("oft-kohya", tensors, (12, 3), range(4 * i, 4 * i + 4))
        assert taken.keys() == {"oft_blocks", "alpha"}
        assert torch.equal(taken["oft_blocks"], parts[f"oft_blocks.{i}"])
        assert torch.equal(taken["alpha"], tensors["alpha"])


@pytest.mark.parametrize(
    ("layout", "tensors", "index", "message"),
    [
        (
            "oft",
            {"oft_blocks": torch.ones(2, 4, 4)},
            [0, 1],
            "in blocks of 4, which these rows cut",
        ),
        ("oft-legacy", {"oft_diag": torch.ones(2, 4, 4)}, [4, 5, 6, 7, 1, 0, 2, 3], "in blocks"),
        ("boft", {"oft_blocks": torch.ones(2, 2, 4, 4)}, [0], "boft factors do not come apart"),
        (
            "oft-kohya",
            {
                "oft_blocks.0": torch.ones(2, 2, 2),
                "oft_blocks.1": torch.ones(2, 2, 2),
                "alpha": torch.tensor(1.0),
            },
            [4, 5, 0, 1],
            "mix the parts of a packed OFT",
        ),
        (
            "glora",
            {
                "a1": torch.ones(3, 1),
                "a2": torch.ones(1, 3),
                "b1": torch.ones(8, 1),
                "b2": torch.ones(1, 3),
                "dora_scale": torch.ones(1, 3),
            },
            [0, 1],
            "norms over all rows",
        ),
    ],
)
def test_rows_that_do_not_come_apart_are_refused(
    layout: str, tensors: Tensors, index: Sequence[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        take_rows(layout, tensors, (8, 3), index)


def test_magnitudes_of_a_square_layer_go_by_what_the_file_says() -> None:
    plain = {"down": torch.ones(1, 4), "up": torch.ones(4, 1)}
    scale = torch.arange(4.0).reshape(1, 4, 1, 1)
    rows = {**plain, "dora_scale": scale}
    taken = take_rows("lora", rows, (4, 4, 1, 1), [2, 0], {"dora_axis": "output"})
    assert taken["dora_scale"].flatten().tolist() == [2, 0]
    with pytest.raises(ValueError, match="norms over all rows"):
        take_rows("lora", rows, (4, 4, 1, 1), [2, 0])


JOINED = [
    case
    for case in ON_BASE
    if case.layout in FUSES | {"hira"}
    and "dora_scale" not in case.tensors
    and "embedding" not in case.name
    and "oft_blocks.0" not in case.tensors
    and not ("by shape conv" in case.name)
]


@pytest.mark.parametrize("case", JOINED, ids=lambda case: case.name)
def test_rows_that_came_apart_join_to_the_same_change(case: OnBase) -> None:
    base = _base(case)
    whole = _change(case, case.tensors, base)
    half = len(base) // 2 if len(base) == 8 else 4
    ranges = [range(half), range(half, len(base))]
    parts = [
        Part(len(rows), take_rows(case.layout, case.tensors, case.weight.shape, rows, case.facts),
             case.facts)
        for rows in ranges
    ]  # fmt: skip
    if case.layout == "oft-kohya" and len(base) != 8 and case.tensors["alpha"] != 0:
        with pytest.raises(ValueError, match="limit their rotations differently"):
            fuse_rows(case.layout, parts)
        return
    fused = fuse_rows(case.layout, parts)
    torch.testing.assert_close(_change(case, fused, base), whole, rtol=1e-7, atol=1e-7)


def test_layers_nothing_changes_stay_as_they_are_in_the_joined_one() -> None:
    make = Maker(3)
    base = make(8, 6)
    given = {
        "oft": {"oft_blocks": make(2, 2, 2), "rescale": make(4, 1)},
        "oft-kohya": {"oft_blocks": make(2, 2, 2), "alpha": torch.tensor(0.1)},
        "ia3": {"weight": make(4), "on_input": torch.tensor(False)},
        "ia3-peft": {"ia3_l": make(4, 1)},
        "hira": {"hira_A": make(2, 6), "hira_B": make(4, 2)},
    }
    for layout, tensors in given.items():
        fused = fuse_rows(layout, [Part(4, None), Part(4, tensors)])
        change = read_change(layout, fused, (8, 6), {}).weight(0, 8, base)
        assert not change[:4].any()
        alone = read_change(layout, tensors, (4, 6), {}).weight(0, 4, base[4:])
        torch.testing.assert_close(change[4:], alone, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("layout", "one", "two", "message"),
    [
        ("hra", {"hra_u": torch.ones(6, 1)}, {"hra_u": torch.zeros(6, 1)}, "different ones"),
        ("oft-peft", {"oft_R": torch.ones(3, 1)}, None, "different ones"),
        (
            "oft",
            {"oft_blocks": torch.ones(2, 2, 2)},
            {"oft_blocks": torch.ones(1, 4, 4)},
            "blocks of different sizes",
        ),
        (
            "ia3",
            {"weight": torch.ones(6), "on_input": torch.tensor(1)},
            {"weight": torch.zeros(6), "on_input": torch.tensor(1)},
            "joins only with its equal",
        ),
        (
            "ia3-peft",
            {"ia3_l": torch.ones(1, 4, 1, 1)},
            {"ia3_l": torch.ones(1, 4, 1, 1)},
            "in a configuration that is not there",
        ),
        (
            "oft-kohya",
            {"oft_blocks": torch.ones(2, 2, 2), "alpha": torch.tensor(0.1)},
            {"oft_blocks": torch.ones(2, 2, 2), "alpha": torch.tensor(0.2)},
            "limit their rotations differently",
        ),
        ("glora", {"a1": torch.ones(1)}, {"a1": torch.ones(1)}, "are not those of one"),
    ],
)
def test_layers_that_do_not_join_are_refused(
    layout: str, one: Tensors, two: Tensors | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_rows(layout, [Part(4, one), Part(4, two)])
