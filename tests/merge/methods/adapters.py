"""Random adapters for one layer, and what they are when multiplied out."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from merge.algorithms.lora import Factors, delta
from merge.methods.core import Core, core_of
from merge.methods.draws import Draws
from merge.methods.linear import Spectrum, truncate

Array = NDArray[np.float64]

# out, in, ranks; the last is a 3x3 convolution of 5 channels, flattened.
SHAPES = [
    (20, 30, (4,)),
    (20, 30, (4, 7)),
    (30, 20, (3, 3, 5)),
    (24, 24, (1, 1, 1, 1)),
    (40, 9, (4, 5, 6)),  # summed rank above `in`
    (7, 40, (4, 5)),  # summed rank above `out`
    (6, 5, (9, 4, 2)),  # above both, and one rank above the layer's
    (16, 45, (4, 2)),
]
STRENGTHS = (0.7, 1.0, -0.5, 1.6)
SCALES = (1.0, 0.25, 2.0, 1 / 16)


def adapters(
    out: int, inner: int, ranks: Sequence[int], seed: int = 3, shared: float = 0.5
) -> list[Factors]:
    """Factors in float64 with a part in common, so that no pair is orthogonal by chance."""
    random = torch.Generator().manual_seed(seed)
    widest = max(ranks)
    common_up = torch.randn(out, widest, generator=random, dtype=torch.float64)
    common_down = torch.randn(widest, inner, generator=random, dtype=torch.float64)
    return [
        Factors(
            torch.randn(out, rank, generator=random, dtype=torch.float64)
            + shared * common_up[:, :rank],
            torch.randn(rank, inner, generator=random, dtype=torch.float64)
            + shared * common_down[:rank],
            scale,
        )
        for rank, scale in zip(ranks, SCALES, strict=False)
    ]


def core(parts: Sequence[Factors], strengths: Sequence[float] | None = None) -> Core:
    return core_of(parts, strengths or [1.0] * len(parts))


def draws(count: int) -> Draws:
    return Draws(0, "layer", tuple(str(index) for index in range(count)))


def dense(parts: Sequence[Factors], strengths: Sequence[float] | None = None) -> list[Array]:
    """The changes at their strengths, multiplied out."""
    chosen = strengths or [1.0] * len(parts)
    return [s * delta(part).double().numpy() for part, s in zip(parts, chosen, strict=True)]


def whole(spectrum: Spectrum) -> Array:
    """The merged change, multiplied out, through the step that files are written by.

    It must be a spectrum: values that fall, at least one, and orthonormal vectors.
    """
    assert len(spectrum.values) > 0
    assert (spectrum.values.diff() <= 0).all()
    assert (spectrum.values >= 0).all()
    for vectors in (
        spectrum.outer_up @ spectrum.inner_up,
        (spectrum.inner_down @ spectrum.outer_down).mT,
    ):
        away = vectors.mT @ vectors - torch.eye(len(spectrum.values), dtype=vectors.dtype)
        assert away.abs().max() < 100 * torch.finfo(vectors.dtype).eps
    return delta(truncate(spectrum, len(spectrum.values))).double().numpy()


def assert_close(found: Array, wanted: Array, relative: float = 1e-10) -> None:
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - wanted) <= relative * np.linalg.norm(wanted) + 1e-300


def rotations(out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    left = torch.linalg.qr(torch.randn(out, out, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(inner, inner, generator=random, dtype=torch.float64)).Q
    return left, right
