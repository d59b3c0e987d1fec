"""Factors that do not fit are refused in one sentence; tiles of what no memory holds are computed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from merge.algorithms import read_change
from tests.merge.algorithms.cases import Maker


def _ones(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {role: torch.ones(shape) for role, shape in shapes.items()}


LOHA = _ones(hada_w1_a=(6, 3), hada_w1_b=(3, 4), hada_w2_a=(6, 2), hada_w2_b=(2, 4))
LOKR = _ones(lokr_w1=(2, 2), lokr_w2_a=(3, 1), lokr_w2_b=(1, 2))
VERA = _ones(vera_lambda_b=(6,), vera_lambda_d=(3,), vera_A=(3, 9), vera_B=(9, 3))
MLX = _ones(mlx_down=(4, 3), mlx_up=(3, 6))
TUNE = _ones(torchtune_down=(3, 4), torchtune_up=(6, 3))
EXPERTS = _ones(down=(6, 4), up=(5, 6))
HALF = {"scale": 0.5}


@pytest.mark.parametrize(
    ("layout", "tensors", "shape", "facts", "message"),
    [
        ("loha", {**LOHA, **_ones(hada_w2_a=(6, 3))}, (6, 4), {}, "w_a has rank 3 and w_b has ran"),
        ("loha", LOHA, (6, 5), {}, r"delta is \(6, 4\), base weight is \(6, 5\)"),
        (
            "loha",
            {**LOHA, **_ones(hada_t1=(3, 2, 3, 3))},
            (6, 4, 3, 3),
            {},
            r"the Tucker core is \(3, 2, 3, 3\), its factor is \(3, 4\)",
        ),
        ("lokr", {**LOKR, **_ones(lokr_w2_a=(3, 2))}, (6, 4), {}, "w_a has rank 2 and w_b has ran"),
        ("lokr", LOKR, (6, 5), {}, r"delta is \(6, 4\), base weight is \(6, 5\)"),
        ("vera", VERA, (6, 10), {}, "are too small for rank 3"),
        ("vera", {**VERA, **_ones(vera_lambda_d=(2,))}, (6, 4), {}, "are too small for rank 2"),
        ("vera", VERA, (7, 4), {}, r"delta is \(6, 4\), base weight is \(7, 4\)"),
        ("lora-mlx", MLX, (6, 4), {}, "the scale of lora-mlx factors is in a configuration"),
        ("lora-mlx", MLX, (4, 6), HALF, r"delta is \(6, 4\), base weight is \(4, 6\)"),
        ("lora-torchtune", TUNE, (6, 4), HALF, "by head; how many heads is not said"),
        ("lora-torchtune", TUNE, (6, 4), {"rope_heads": 3}, "the scale of lora-torchtune factors"),
        (
            "lora-torchtune",
            TUNE,
            (6, 4),
            {**HALF, "rope_heads": 2},
            "6 rows are no 2 heads of pairs",
        ),
        (
            "lora-embedding",
            _ones(embedding_down=(3, 9), embedding_up=(4, 2)),
            (9, 4),
            {},
            "up has rank 3 and down has rank 2",
        ),
        ("lora-experts", EXPERTS, (4, 5, 4), {}, r"for 4 experts in \(4, 5, 4\)"),
        (
            "lora-experts",
            _ones(down=(6, 4), up=(4, 6)),
            (3, 4, 4),
            {},
            r"may be stored \(in, out\) or \(out, in\)",
        ),
        ("lora-experts", EXPERTS, (3, 5, 6), {}, r"delta is \(3, 5, 4\), base weight is \(3, 5, 6"),
        (
            "adalora",
            _ones(down=(3, 4), up=(6, 3), lora_E=(2, 1)),
            (6, 4),
            HALF,
            "lora_E holds 2 values for rank 3",
        ),
        (
            "adalora",
            _ones(down=(3, 4), up=(6, 3), lora_E=(3, 1)),
            (6, 4),
            {},
            "the scale of adalora factors is in a configuration",
        ),
        ("full", _ones(diff=(6, 5)), (6, 4), {}, r"delta is \(6, 5\), base weight is \(6, 4\)"),
        ("full", _ones(diff_b=(5,)), (6, 4), {}, "5 values for the bias of a layer with 6 outputs"),
        ("norm", _ones(w_norm=(6,), b_norm=(5,)), (6,), {}, "5 values for the bias of a layer"),
        ("replacement", _ones(weight=(4, 6)), (6, 4), {}, r"delta is \(4, 6\), base weight"),
        ("replacement", _ones(bias=(4,)), (6, 4), {}, "4 values for the bias"),
        (
            "replacement",
            _ones(weight=(6, 4), set_weight=(6, 4)),
            (6, 4),
            {},
            "weight and set_weight both replace",
        ),
        (
            "tokens",
            _ones(trainable_tokens_delta=(2, 4)),
            (9, 4),
            {},
            "which rows are replaced is in a configuration",
        ),
        (
            "tokens",
            _ones(trainable_tokens_delta=(2, 4)),
            (9, 4),
            {"token_ids": [1]},
            r"\(2, 4\) rows for 1 tokens of \(9, 4\)",
        ),
        (
            "tokens",
            _ones(trainable_tokens_delta=(2, 4)),
            (9, 4),
            {"token_ids": [3, 3]},
            "a token is replaced twice",
        ),
        (
            "tokens",
            _ones(trainable_tokens_delta=(2, 4)),
            (9, 4),
            {"token_ids": [3, 9]},
            "tokens 3 to 9, of an embedding with 9",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    layout: str,
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, ...],
    facts: Mapping[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        read_change(layout, tensors, shape, facts)


N = 1 << 18  # a square of it is 512 GiB in float64


@pytest.mark.parametrize("layout", ["lora", "vera", "loha", "lokr whole", "lokr cut"])
def test_rows_are_computed_where_the_whole_would_not_fit(layout: str) -> None:
    make = Maker(21)
    a, b, c, d = make(N, 1), make(1, N), make(N, 1), make(1, N)
    small, other = make(512, 512), make(512, 512)
    row = 300 * 512 + 7
    if layout == "lora":
        tensors, expected = {"up": a, "down": b}, a[row] * b[0]
    elif layout == "vera":
        shared = {"vera_A": b, "vera_B": a}
        tensors = {"vera_lambda_b": c[:, 0], "vera_lambda_d": torch.ones(1).double(), **shared}
        expected = c[row] * a[row] * b[0]
    elif layout == "loha":
        tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        expected = a[row] * b[0] * c[row] * d[0]
    else:
        tensors = {"lokr_w1": small, "lokr_w2": other}
        if layout == "lokr cut":
            tensors = {"lokr_w1": small, "lokr_w2_a": other[:, :1], "lokr_w2_b": other[:1]}
            other = torch.outer(other[:, 0], other[0])
        expected = torch.outer(small[300], other[7]).flatten()
    found = read_change(layout.split()[0], tensors, (N, N), {}).weight(row, 3, None)
    assert found.shape == (3, N)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


def test_torchtunes_queries_meet_keys_as_those_of_hugging_face() -> None:
    """The same attention scores, with neighbours rotated there and halves here.

    Su et al. 2021, arXiv:2104.09864, eq. 34: both rotate pairs by position times the same angles.
    """
    heads, width, inner = 3, 8, 5
    make = Maker(22)
    weights = [make(heads * width, 1) @ make(1, inner) for _ in range(2)]
    x = make(inner, 2)  # two positions
    angles = 10000.0 ** (-np.arange(0, width, 2) / width)

    def rotated(vector: np.ndarray, position: int, *, are_neighbours: bool) -> np.ndarray:
        pairs = vector.reshape(-1, 2) if are_neighbours else vector.reshape(2, -1).T
        turned = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * position * angles)
        both = np.stack([turned.real, turned.imag], 1)
        return both.ravel() if are_neighbours else both.T.ravel()

    def scores(q: torch.Tensor, k: torch.Tensor, *, are_neighbours: bool) -> list[float]:
        found = []
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            one = rotated((q @ x)[rows, 0].numpy(), 3, are_neighbours=are_neighbours)
            two = rotated((k @ x)[rows, 1].numpy(), 8, are_neighbours=are_neighbours)
            found.append(float(one @ two))
        return found

    moved = []
    for weight in weights:
        factors = {"torchtune_up": weight, "torchtune_down": torch.eye(inner).double()}
        facts = {"scale": 1.0, "rope_heads": heads}
        change = read_change("lora-torchtune", factors, tuple(weight.shape), facts)
        moved.append(change.weight(0, heads * width, None))
    before = scores(*weights, are_neighbours=True)
    np.testing.assert_allclose(scores(*moved, are_neighbours=False), before, rtol=1e-12)
    assert not np.allclose(scores(*weights, are_neighbours=False), before)


def test_torchtunes_magnitudes_go_with_their_rows() -> None:
    make = Maker(23)
    tensors = {"torchtune_down": make(2, 3), "torchtune_up": make(4, 2)}
    magnitudes = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    facts = {"scale": 1.0, "rope_heads": 1}
    change = read_change("lora-torchtune", {**tensors, "dora_scale": magnitudes}, (4, 3), facts)
    base = make(4, 3)
    norms = torch.linalg.norm(base + change.weight(0, 4, base), dim=1)
    assert norms.tolist() == pytest.approx([1.0, 3.0, 2.0, 4.0])
