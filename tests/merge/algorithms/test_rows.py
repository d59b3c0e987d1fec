"""Rows taken from factors, and joined, are the rows of the changes: exactly, in every layout."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from merge.algorithms import read_change
from merge.algorithms.lowrank import to_lora
from merge.algorithms.rows import Part, fuse_rows, take_rows, without_idle_ranks
from tests.merge.algorithms.cases import CASES, Case, Maker, old_bias

Tensors = Mapping[str, torch.Tensor]

# VeRA shares B from its first row on, torchtune's rows are in another order, embeddings and experts
# have no layer's rows.
TAKEN = {
    *("lora", "lora-mha", "lora-mlx", "adalora", "loha", "full", "norm", "replacement"),
}
INDEXES = {"slice": [2, 3, 4], "permutation": [3, 4, 5, 0, 1, 2], "one": [5]}


def _dense(layout: str, tensors: Tensors, shape: tuple[int, ...], case: Case) -> torch.Tensor:
    change = read_change(layout, tensors, shape, case.facts)
    return change.weight(0, shape[0], None if change.needs == "nothing" else _zeros(shape))


def _zeros(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64).reshape(shape[0], -1)


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.layout in TAKEN and c.shape[0] >= 6],
    ids=lambda case: case.name,
)
def test_taken_rows_are_the_rows_of_the_change(case: Case, index: Sequence[int]) -> None:
    if len(index) == 6:
        index = [*index, *range(6, case.shape[0])]
    whole = read_change(case.layout, case.tensors, case.shape, case.facts)
    taken = take_rows(case.layout, case.tensors, case.shape, index)
    shape = (len(index), *case.shape[1:])
    found = _dense(case.layout, taken, shape, case)
    expected = _dense(case.layout, case.tensors, case.shape, case)[index]
    assert torch.equal(found, expected) or torch.allclose(found, expected, rtol=1e-14, atol=1e-15)
    if case.bias is not None:
        old = old_bias(case.shape[0])
        before, part = whole.bias(old, None), read_change(case.layout, taken, shape, case.facts)
        after = part.bias(old[index], None)
        assert before is not None
        assert after is not None
        assert torch.equal(before[index], after)


@pytest.mark.parametrize("kind", ["whole cut", "cut cut", "whole whole", "cut whole"])
def test_rows_of_lokr_move_in_whole_blocks(kind: str) -> None:
    case = next(c for c in CASES if c.name.startswith(f"lokr () {kind}"))
    expected = _dense("lokr", case.tensors, case.shape, case)
    for index in ([4, 5, 6, 7], [4, 5, 6, 7, 0, 1, 2, 3]):
        taken = take_rows("lokr", case.tensors, case.shape, index)
        found = _dense("lokr", taken, (len(index), case.shape[1]), case)
        assert torch.equal(found, expected[index])
    for cut in ([0, 1], [2, 3, 4, 5], [1, 0, 2, 3]):
        with pytest.raises(ValueError, match="move in blocks of 4"):
            take_rows("lokr", case.tensors, case.shape, cut)


def test_layouts_whose_rows_do_not_come_apart_name_the_way() -> None:
    case = next(c for c in CASES if c.layout == "vera")
    with pytest.raises(ValueError, match="rows of vera factors do not come apart; those of LoRA"):
        take_rows("vera", case.tensors, case.shape, [0])


def test_magnitudes_of_rows_go_with_their_rows_and_those_of_inputs_stay() -> None:
    plain = {"down": torch.ones(1, 3), "up": torch.ones(4, 1)}
    for scale in (torch.arange(4.0), torch.arange(4.0)[:, None]):
        taken = take_rows("lora", {**plain, "dora_scale": scale}, (4, 3), [2, 0])
        assert torch.equal(taken["dora_scale"], scale[[2, 0]])
    conv = torch.arange(4.0).reshape(1, 4, 1, 1)
    taken = take_rows("lora", {**plain, "dora_scale": conv}, (4, 3, 1, 1), [2, 0])
    assert taken["dora_scale"].flatten().tolist() == [2, 0]
    inputs = {**plain, "dora_scale": torch.arange(3.0)[None]}
    swapped = take_rows("lora", inputs, (4, 3), [2, 3, 0, 1])
    assert torch.equal(swapped["dora_scale"], inputs["dora_scale"])
    with pytest.raises(ValueError, match="norms over all rows, so they do not come apart"):
        take_rows("lora", inputs, (4, 3), [0, 1])


def _lora(
    make: Maker, out: int, rank: int, alpha: float | None = None, kernel: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    ones = [1] * len(kernel)
    tensors = {"down": make(rank, 4, *kernel), "up": make(out, rank, *ones)}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    return tensors


def _change(tensors: Tensors, out: int, layout: str = "lora", inner: int = 4) -> torch.Tensor:
    return read_change(layout, tensors, (out, inner), {}).weight(0, out, None)


def test_parts_of_equal_scale_are_joined_without_rounding_and_come_apart_again() -> None:
    make = Maker(11)
    parts = [_lora(make, 5, 2, 1.0), _lora(make, 3, 4, 2.0), _lora(make, 2, 6, 3.0)]
    fused = fuse_rows("lora", [Part(len(p["up"]), p) for p in parts])
    assert fused["up"].shape == (10, 12)
    expected = torch.cat([_change(p, len(p["up"])) for p in parts])
    torch.testing.assert_close(_change(fused, 10), expected, rtol=0, atol=1e-14)
    first = 0
    for part in parts:
        rows = len(part["up"])
        taken = take_rows("lora", fused, (10, 4), range(first, first + rows))
        again = without_idle_ranks(taken)
        assert again is not None
        assert again.keys() == part.keys()
        assert all(torch.equal(again[role], part[role]) for role in part)
        first += rows


def test_parts_of_one_slice_are_joined_to_what_they_were() -> None:
    whole = _lora(Maker(12), 9, 3, 2.0)
    parts = [
        Part(rows, take_rows("lora", whole, (9, 4), range(first, first + rows)))
        for first, rows in ((0, 4), (4, 2), (6, 3))
    ]
    fused = fuse_rows("lora", parts)
    assert all(torch.equal(fused[role], whole[role]) for role in whole)


def test_scales_that_differ_go_into_the_outer_factors() -> None:
    make = Maker(13)
    parts = [_lora(make, 5, 2, 1.0), _lora(make, 3, 4)]
    parts[0]["up_bias"], parts[1]["scale"] = make(5), torch.tensor(0.3, dtype=torch.float64)
    fused = fuse_rows("lora", [Part(5, parts[0]), Part(3, parts[1]), Part(2, None)])
    assert "scale" not in fused
    expected = torch.cat([_change(parts[0], 5), _change(parts[1], 3), torch.zeros(2, 4)])
    torch.testing.assert_close(_change(fused, 10), expected, rtol=0, atol=1e-14)
    bias = read_change("lora", fused, (10, 4), {}).bias(None, None)
    assert bias is not None
    torch.testing.assert_close(bias[:5], 0.5 * parts[0]["up_bias"], rtol=0, atol=1e-14)
    assert not bias[5:].any()
    half = [{role: tensor.half() for role, tensor in part.items()} for part in parts]
    assert fuse_rows("lora", [Part(5, half[0]), Part(3, half[1])])["up"].dtype == torch.float32


def test_a_scale_from_a_configuration_counts_in_a_fuse() -> None:
    make = Maker(14)
    one, other = _lora(make, 2, 3), _lora(make, 2, 1)
    fused = fuse_rows("lora", [Part(2, one, {"scale": 0.5}), Part(2, other, {"scale": 0.5})])
    expected = torch.cat([0.5 * _change(one, 2), 0.5 * _change(other, 2)])
    torch.testing.assert_close(_change(fused, 4), expected, rtol=0, atol=1e-14)


def test_convolutions_keep_their_shapes_in_a_fuse() -> None:
    make = Maker(15)
    parts = [_lora(make, 5, 2, 1.0, (3, 3)), _lora(make, 3, 2, 1.0, (3, 3))]
    fused = fuse_rows("lora", [Part(5, parts[0]), Part(3, parts[1])])
    assert (fused["up"].shape, fused["down"].shape) == ((8, 4, 1, 1), (4, 4, 3, 3))
    changes = [
        read_change("lora", p, (len(p["up"]), 4, 3, 3), {}).weight(0, len(p["up"]), None)
        for p in (*parts, fused)
    ]
    torch.testing.assert_close(changes[2], torch.cat(changes[:2]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("is_shared", [False, True])
def test_loha_is_joined_block_by_block(is_shared: bool) -> None:
    make = Maker(16)
    inner = [make(2, 4), make(3, 4)]
    parts = []
    for rows in (5, 3):
        b1, b2 = inner if is_shared else [make(2, 4), make(3, 4)]
        parts.append(
            {
                "hada_w1_a": make(rows, 2),
                "hada_w1_b": b1,
                "hada_w2_a": make(rows, 3),
                "hada_w2_b": b2,
                "alpha": torch.tensor(1.0),
            }
        )
    fused = fuse_rows("loha", [Part(5, parts[0]), Part(3, parts[1]), Part(1, None)])
    assert fused["hada_w1_b"].shape[0] == (2 if is_shared else 4)
    expected = torch.cat(
        [_change(parts[0], 5, "loha"), _change(parts[1], 3, "loha"), torch.zeros(1, 4)]
    )
    torch.testing.assert_close(_change(fused, 9, "loha"), expected, rtol=0, atol=1e-14)


def test_stored_differences_stack_and_a_missing_one_is_zero() -> None:
    make = Maker(17)
    one = {"diff": make(2, 4), "diff_b": make(2)}
    fused = fuse_rows("full", [Part(2, one), Part(3, None), Part(1, {"diff": make(1, 4)})])
    assert fused["diff"].shape == (6, 4)
    assert torch.equal(fused["diff"][:2], one["diff"])
    assert not fused["diff"][2:5].any()
    assert fused["diff_b"].tolist() == [*one["diff_b"].tolist(), 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("layout", "parts", "message"),
    [
        ("lora", [Part(2, None)], "none of the parts changes anything"),
        ("lokr", [Part(2, {"lokr_w1": torch.ones(1, 1)})], "lokr factors of several layers"),
        (
            "lora",
            [Part(2, {**_lora(Maker(1), 2, 1), "mid": torch.ones(1, 1, 3, 3)})],
            "factors with mid are not joined",
        ),
        (
            "lora",
            [Part(2, {**_lora(Maker(1), 2, 1), "dora_scale": torch.ones(2, 1)}), Part(2, None)],
            "one magnitude for each of its rows",
        ),
        (
            "replacement",
            [Part(2, {"weight": torch.ones(2, 4)}), Part(2, None)],
            "weight is replaced in some of the joined layers",
        ),
    ],
)
def test_what_cannot_be_joined_says_why(layout: str, parts: list[Part], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_rows(layout, parts)


def test_magnitudes_of_rows_are_joined() -> None:
    make = Maker(18)
    parts = [{**_lora(make, rows, 2, 1.0), "dora_scale": make(rows, 1)} for rows in (2, 3)]
    fused = fuse_rows("lora", [Part(2, parts[0]), Part(3, parts[1])])
    assert torch.equal(fused["dora_scale"], torch.cat([p["dora_scale"] for p in parts]))


def test_a_part_that_no_rank_reaches_is_none() -> None:
    tensors = {**_lora(Maker(19), 3, 2), "up": torch.zeros(3, 2)}
    assert without_idle_ranks(tensors) is None


def test_only_a_product_becomes_lora() -> None:
    change = read_change("full", {"diff": torch.ones(2, 3)}, (2, 3), {})
    with pytest.raises(ValueError, match="the full difference is exact"):
        to_lora(change)
    plain = read_change("lora", _lora(Maker(20), 5, 2), (5, 4), {})
    assert to_lora(plain).rank == 2
