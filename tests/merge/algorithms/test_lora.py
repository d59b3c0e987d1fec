"""LoRA's factors and their change against the paper, over shapes, ranks, scales and kernels."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from merge.algorithms import lora
from tests.oracles import lora as oracle

SHAPES = [
    (8, 12, (), 4),
    (12, 8, (), 1),
    (6, 5, (1, 1), 3),
    (7, 4, (3, 3), 5),
    (3, 2, (3, 3), 16),  # rank above both sides
]


def _tensors(
    out: int, inner: int, kernel: tuple[int, ...], rank: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inner, *kernel, generator=generator, dtype=torch.float64)
    up = torch.randn(out, rank, *[1] * len(kernel), generator=generator, dtype=torch.float64)
    return down, up


@pytest.mark.parametrize(("out", "inner", "kernel", "rank"), SHAPES)
@pytest.mark.parametrize("alpha", [None, 1.0, 7.5, 0.0, -2.0])
def test_delta_is_the_papers(
    out: int, inner: int, kernel: tuple[int, ...], rank: int, alpha: float | None
) -> None:
    down, up = _tensors(out, inner, kernel, rank)
    scale = 1.0 if alpha is None else alpha / rank
    change = lora.delta(lora.parse(down, up, scale)).reshape(out, inner, *kernel)
    expected = oracle.delta(down.numpy(), up.numpy(), alpha)
    np.testing.assert_allclose(change.numpy(), expected, rtol=1e-13, atol=1e-13)


def test_a_convolutions_delta_acts_like_its_two_convolutions() -> None:
    down, up = _tensors(7, 4, (3, 3), 5)
    x = np.random.default_rng(1).standard_normal((4, 6, 5))
    two = oracle.convolution(oracle.convolution(x, down.numpy()), up.numpy())
    change = lora.delta(lora.parse(down, up, 1.0)).reshape(7, 4, 3, 3)
    np.testing.assert_allclose(oracle.convolution(x, change.numpy()), two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("out", "inner", "kernel", "rank"), SHAPES)
def test_write_gives_back_what_was_parsed(
    out: int, inner: int, kernel: tuple[int, ...], rank: int
) -> None:
    down, up = _tensors(out, inner, kernel, rank)
    tensors = lora.write(lora.parse(down, up, 0.5), kernel)
    assert torch.equal(tensors["down"], down)
    assert torch.equal(tensors["up"], up)
    assert tensors["alpha"].item() == 0.5 * rank


def test_alpha_is_exact_where_bfloat16_would_round_it() -> None:
    up, down = torch.ones(2, 257, dtype=torch.bfloat16), torch.ones(257, 3, dtype=torch.bfloat16)
    assert lora.write(lora.Factors(up, down))["alpha"].item() == 257


@pytest.mark.parametrize(("out", "inner", "kernel", "rank"), SHAPES)
def test_norm_is_that_of_the_dense_change(
    out: int, inner: int, kernel: tuple[int, ...], rank: int
) -> None:
    factors = lora.parse(*_tensors(out, inner, kernel, rank), -0.3)
    assert lora.norm(factors) == pytest.approx(torch.linalg.norm(lora.delta(factors)).item())


def test_norm_of_parts_that_cancel_is_zero_and_not_the_root_of_a_negative() -> None:
    down, up = _tensors(8, 12, (), 4)
    both = lora.Factors(torch.cat([up, -up], 1), torch.cat([down, down], 0))
    assert lora.norm(both) < 1e-6 * lora.norm(lora.parse(down, up, 1.0))


def test_transposed_is_the_transpose_of_the_change() -> None:
    factors = lora.parse(*_tensors(8, 12, (), 4), 0.7)
    torch.testing.assert_close(lora.delta(lora.transposed(factors)), lora.delta(factors).mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_distance_is_what_rounding_changed(dtype: torch.dtype) -> None:
    factors = lora.parse(*_tensors(7, 4, (3, 3), 5), 0.3)
    stored = {
        "up": (factors.up * factors.scale).to(dtype),
        "down": factors.down.to(dtype),
    }
    changed = stored["up"].double() @ stored["down"].double() - lora.delta(factors)
    measured = lora.distance(factors, stored)
    assert measured > 0
    assert measured == pytest.approx(torch.linalg.norm(changed).item(), rel=1e-6)


def test_shapes_in_signatures_are_checked() -> None:
    down, up = _tensors(8, 12, (), 4)
    with pytest.raises(TypeCheckError):
        lora.Factors(up[:, :3], down)
