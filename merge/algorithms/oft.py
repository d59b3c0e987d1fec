"""OFT: a weight is rotated, block by block. Four formats, on either side of the weight.

Qiu et al. 2023, arXiv:2306.07280. With Q skew-symmetric, R = (I + Q)(I - Q)^-1 is a rotation
(section 3.2, Cayley). What is kept here is R - I, which is small and loses nothing beside 1.

- LyCORIS 4.1.3 (Diag-OFT): blocks of rows, W'[n] = R[n]^T W[n]. Q = B - B^T is clamped where the
  norm over all blocks passes alpha * out; alpha 0 is no clamp. `rescale` multiplies the rows after.
- kohya's networks/oft.py and oft_flux.py: as above, clamped always, also by alpha 0; oft_flux has
  `oft_blocks.0` to `oft_blocks.3` for the parts of a fused layer, each clamped for itself.
- LyCORIS before 2.1: `oft_diag` holds R with any rescale in it (version 1.9 held R - I).
- PEFT 0.16 and later, OneTrainer: blocks of columns, W' = W R^T (of an embedding: W R), R from the
  upper triangle of Q; five terms of the Neumann series by default, and then no exact rotation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lowrank import extent
from merge.algorithms.scale import one_number

ROLES = "oft_blocks alpha rescale"
KOHYA_ROLES = "oft_blocks oft_blocks.0 oft_blocks.1 oft_blocks.2 oft_blocks.3 alpha"
LEGACY_ROLES = "oft_diag alpha"
PEFT_ROLES = "oft_R oft_embedding_R scaled_oft"


@dataclass(frozen=True, slots=True)
class RowRotation(Change):
    """Blocks of rows turned by R^T, given as R - I; each part of `turns` has one block size."""

    turns: tuple[Float[Tensor, "_ _ _"], ...]
    rescale: Float[Tensor, " out"] | None = None

    # A block may cross the edge of any range of rows.
    needs = Needs.WHOLE

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        pieces, begin = [], 0
        for turn in self.turns:
            end = begin + turn.shape[0] * turn.shape[1]
            low, high = max(first, begin), min(first + rows, end)
            if low < high:
                pieces.append(_turned(turn, base[begin:end], low - begin, high - begin))
            begin = end
        change = torch.cat(pieces)
        if self.rescale is None:
            return change
        here = slice(first, first + rows)
        factor = self.rescale[here, None]
        return factor * change + (factor - 1) * base[here]


def _turned(turn: Tensor, base: Tensor, low: int, high: int) -> Tensor:
    """Rows low to high of (R - I)^T W, from the blocks that hold them."""
    size = turn.shape[1]
    one, last = low // size, -(-high // size)
    blocks = base[one * size : last * size].reshape(-1, size, base.shape[1])
    change = (turn[one:last].mT @ blocks).flatten(0, 1)
    return change[low - one * size : high - one * size]


@dataclass(frozen=True, slots=True)
class ColumnRotation(Change):
    """Blocks of columns turned by R^T, given as R - I; one block is for all of them."""

    turn: Float[Tensor, "blocks size size"]

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        blocks = base.reshape(len(base), -1, self.turn.shape[1]).transpose(0, 1)
        return (blocks @ self.turn.mT).transpose(0, 1).flatten(1)


def read(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> RowRotation:
    blocks = tensors["oft_blocks"]
    _check_blocks(blocks, 3)
    turn = cayley(skew(blocks) * shrinkage(blocks, limit_of(tensors, shape[0])))
    return _of_rows((turn,), shape, rescale_of(tensors, shape))


def read_kohya(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> RowRotation:
    if "alpha" not in tensors:
        raise ValueError("kohya's OFT without alpha, which is the limit of its rotations")
    alpha, turns = one_number(tensors, "alpha"), []
    for role in sorted(tensors.keys() - {"alpha"}):
        _check_blocks(tensors[role], 3)
        rows = tensors[role].shape[0] * tensors[role].shape[1]
        shrunk = skew(tensors[role]) * kohya_shrinkage(tensors[role], alpha * rows)
        turns.append(cayley(shrunk))
    return _of_rows(tuple(turns), shape, None)


def read_legacy(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> RowRotation:
    """alpha, where there is one, was applied before R was saved."""
    _check_blocks(tensors["oft_diag"], 3)
    return _of_rows((legacy_turn(tensors["oft_diag"]),), shape, None)


def legacy_turn(stored: Float[Tensor, "*n size size"]) -> Float[Tensor, "*n size size"]:
    """R - I from `oft_diag`: rows of R have norm 1, those of R - I 0.5 where R turns by 29 degrees."""
    if torch.linalg.vector_norm(stored, dim=-1).mean() < 0.5:
        return stored
    return stored - _identity(stored)


def read_peft(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> ColumnRotation:
    """facts: use_cayley_neumann (true), num_cayley_neumann_terms (5), coft_eps (none)."""
    is_embedding = "oft_embedding_R" in tensors
    vectors = tensors["oft_embedding_R" if is_embedding else "oft_R"]
    width = extent(shape)[1]
    if vectors.ndim != 2:
        raise ValueError(f"oft_R is {tuple(vectors.shape)}, not one row for each block")
    size = (1 + isqrt(1 + 8 * vectors.shape[1])) // 2
    if size * (size - 1) // 2 != vectors.shape[1]:
        raise ValueError(f"{vectors.shape[1]} entries are no upper triangle of a block")
    blocks = len(vectors)
    if blocks * size != width and (blocks != 1 or width % size):
        raise ValueError(f"{blocks} blocks of {size} columns do not make the {width} of {shape}")
    if "scaled_oft" in tensors and size > 1:
        vectors = vectors / (2 * (size - 1) ** 0.5)
    upper = vectors.new_zeros(blocks, size, size)
    upper[:, *torch.triu_indices(size, size, 1)] = vectors
    turned = skew(upper)
    if "coft_eps" in facts:
        limit = float(facts["coft_eps"]) / blocks**0.5
        norm = torch.linalg.matrix_norm(turned, keepdim=True)
        turned = torch.where(norm <= limit, turned, turned * (limit / norm))
    if facts.get("use_cayley_neumann", True):
        turn = neumann(turned, int(facts.get("num_cayley_neumann_terms", 5)))
    else:
        turn = cayley(-turned)  # PEFT's exact form is the inverse of the one it approximates
    return ColumnRotation(turn.mT if is_embedding else turn)


def skew(blocks: Float[Tensor, "*n size size"]) -> Float[Tensor, "*n size size"]:
    return blocks - blocks.mT


def limit_of(tensors: Mapping[str, Tensor], rows: int) -> float:
    """LyCORIS' limit for the norm of Q over all blocks; 0 is none."""
    return one_number(tensors, "alpha") * rows if "alpha" in tensors else 0.0


def shrinkage(blocks: Float[Tensor, "*n size size"], limit: float) -> float:
    """What Q is multiplied with, to have a norm of at most `limit`: LyCORIS' get_r."""
    norm = float(torch.linalg.vector_norm(skew(blocks))) + 1e-8
    return limit / norm if 0 < limit < norm else 1.0


def kohya_shrinkage(blocks: Float[Tensor, "n size size"], limit: float) -> float:
    """The same in kohya's OFT, whose limit may be 0."""
    norm = float(torch.linalg.vector_norm(skew(blocks)))
    return (min(norm, limit) + 1e-8) / (norm + 1e-8)


def cayley(turned: Float[Tensor, "*n size size"]) -> Float[Tensor, "*n size size"]:
    """R - I = 2 Q (I - Q)^-1 for R = (I + Q)(I - Q)^-1; I - Q has an inverse for every skew Q."""
    found: Tensor = torch.linalg.solve(_identity(turned) - turned, 2 * turned, left=False)
    return found


def neumann(turned: Float[Tensor, "n size size"], terms: int) -> Float[Tensor, "n size size"]:
    """PEFT's series for R - I: 2Q + 2Q^2 + 2Q^3 + Q^4 for 5 terms; 3 and 4 terms both end in Q^3."""
    total = torch.zeros_like(turned)
    if terms > 1:
        total = 2 * turned
    if terms > 2:
        power = turned @ turned
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ turned
            total = total + 2 * power
        total = total + power @ turned
    return total


def rescale_of(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """LyCORIS' factor for each row, (out, 1, ...) or (out,)."""
    rescale = tensors.get("rescale")
    if rescale is not None and rescale.numel() != shape[0]:
        raise ValueError(f"rescale is {tuple(rescale.shape)}, base weight is {shape}")
    return None if rescale is None else rescale.flatten()


def _of_rows(
    turns: tuple[Tensor, ...], shape: tuple[int, ...], rescale: Tensor | None
) -> RowRotation:
    rows = sum(turn.shape[0] * turn.shape[1] for turn in turns)
    if rows != shape[0]:
        raise ValueError(f"the blocks turn {rows} rows, base weight is {shape}")
    return RowRotation(turns, rescale)


def _check_blocks(blocks: Tensor, dimensions: int) -> None:
    if blocks.ndim != dimensions or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"the blocks are {tuple(blocks.shape)}, which are no square blocks")


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
