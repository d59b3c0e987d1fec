"""Rows of a layer's output taken out of stored factors, reordered, and several layers' rows joined.

Packed projections (q, k and v in one matrix) and halves that a naming swaps differ from their parts in
rows only. Here that is done on the tensors as they are stored and by role, so nothing is rounded. Where
an algorithm's factors do not allow it, ValueError says why, and in which form it can be done exactly.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from merge.algorithms import dora, rows_on_base
from merge.algorithms.parts import Part, take
from merge.algorithms.scale import scale_of

# By layout: the roles that have a row (or, of axis 1, a column) for each row of the weight. All other
# roles act on the input or on all rows alike, and every part keeps them.
_AXES: dict[str, dict[str, int]] = {
    "lora": {"up": 0, "up_bias": 0},
    "lora-mha": {"up": 0, "up_bias": 0},
    "lora-mlx": {"mlx_up": 1},
    "adalora": {"up": 0},
    "loha": {"hada_w1_a": 0, "hada_w2_a": 0},
    "lokr": {},
    "full": {"diff": 0, "diff_b": 0},
    "norm": {"w_norm": 0, "b_norm": 0},
    "replacement": {"weight": 0, "set_weight": 0, "bias": 0},
    "hira": {"hira_B": 0},
    "hra": {},
    "oft-peft": {},
}


def take_rows(
    layout: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    index: Sequence[int],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Factors of the layer made of these rows, in this order, of a layer of `shape`.

    A range is a slice of a packed layer; a permutation reorders its halves or heads.
    """
    if layout in rows_on_base.TAKES:
        taken = rows_on_base.taken(layout, tensors, shape, index, facts)
    elif layout in _AXES:
        taken = _stored_rows(layout, tensors, shape, index)
    else:
        raise ValueError(
            f"the rows of {layout} factors do not come apart; those of LoRA at their exact rank, or "
            "of the dense difference, do"
        )
    if "dora_scale" in tensors:
        taken["dora_scale"] = _magnitudes(tensors["dora_scale"], shape, index, facts)
    return taken


def _stored_rows(
    layout: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], index: Sequence[int]
) -> dict[str, Tensor]:
    axes = dict(_AXES[layout])
    if "hada_t1" in tensors:
        axes = {"hada_w1_a": 1, "hada_w2_a": 1}  # Tucker: (rank, out)
    taken = {
        role: take(tensor, index, axes[role]) if role in axes else tensor
        for role, tensor in tensors.items()
    }
    if layout == "lokr":
        taken |= _lokr_blocks(tensors, shape[0], index)
    if "bias_values" in tensors:
        taken |= _residual_rows(tensors, shape[0], index)
    return taken


def _lokr_blocks(
    tensors: Mapping[str, Tensor], out: int, index: Sequence[int]
) -> dict[str, Tensor]:
    """A row of w1 for each run of the index that is one whole block of w2's rows."""
    role = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
    left = tensors[role]
    n = out // left.shape[0]
    blocks = [row // n for row in index[::n]]
    if [block * n + p for block in blocks for p in range(n)] != list(index):
        raise ValueError(
            f"rows of this LoKr move in blocks of {n}, and these rows cut a block; "
            "LoRA at its exact rank or the dense difference can hold them"
        )
    return {role: take(left, blocks, 0)}


def _magnitudes(
    scale: Tensor, shape: tuple[int, ...], index: Sequence[int], facts: Mapping[str, Any]
) -> Tensor:
    """DoRA's magnitudes: one for each row, or one for each input, whose norms run over all rows."""
    if dora.axis_of(scale, shape, facts) is dora.Axis.OUTPUT:
        return take(scale, index, list(scale.shape).index(shape[0]))
    if sorted(index) != list(range(shape[0])):
        raise ValueError(
            "DoRA over inputs takes its norms over all rows, so they do not come apart; "
            "with the base the dense difference does"
        )
    return scale


def _residual_rows(
    tensors: Mapping[str, Tensor], out: int, index: Sequence[int]
) -> dict[str, Tensor]:
    size = tensors["bias_size"].tolist()
    if size[0] != out:
        raise ValueError(f"a residual of {tuple(size)} has no rows of a layer with {out}")
    new_row = torch.full((out,), -1, dtype=torch.long)
    new_row[torch.tensor(index)] = torch.arange(len(index))
    rows = new_row[tensors["bias_indices"][0].long()]
    kept = rows >= 0
    indices = tensors["bias_indices"][:, kept].clone()
    indices[0] = rows[kept].to(indices.dtype)
    return {
        "bias_indices": indices,
        "bias_values": tensors["bias_values"][kept],
        "bias_size": torch.tensor([len(index), *size[1:]], dtype=tensors["bias_size"].dtype),
    }


def fuse_rows(layout: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Factors of the layer whose rows are those of all parts, one after the other.

    LoRA and LoHa: products of parts that share their inner factors are joined as they are, others side
    by side, and the ranks add up. The scale is in `alpha` of the result, whatever it was in before; if
    scales differ they go into the outer factors, which become float32.
    """
    given = [part.tensors for part in parts if part.tensors is not None]
    if not given:
        raise ValueError("none of the parts changes anything")
    if layout in ("lora", "lora-mha"):
        return _fuse_products(parts, (("up", "down"),))
    if layout == "loha":
        return _fuse_products(parts, (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")))
    if layout == "hira":
        joined = _fuse_products(parts, (("hira_B", "hira_A"),))
        return {role: joined[role] for role in ("hira_B", "hira_A")}
    if layout in rows_on_base.FUSES:
        return rows_on_base.fused(layout, parts)
    if layout in ("full", "norm"):
        return _stack(parts, is_zero_allowed=True)
    if layout == "replacement":
        return _stack(parts, is_zero_allowed=False)
    raise ValueError(
        f"{layout} factors of several layers are not those of one; "
        "LoRA at their exact rank or the dense difference can hold them"
    )


def _fuse_products(parts: Sequence[Part], pairs: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    known = {role for pair in pairs for role in pair} | {"alpha", "scale", "scalar", "dora_scale"}
    for part in parts:
        if part.tensors is not None and (other := part.tensors.keys() - known - {"up_bias"}):
            raise ValueError(
                f"factors with {', '.join(sorted(other))} are not joined as they are; LoRA at their "
                "exact rank can be"
            )
    first = next(part.tensors for part in parts if part.tensors is not None)
    inner = [[p.tensors[down] for p in parts if p.tensors is not None] for _, down in pairs]
    is_shared = all(_all_equal(tensors) for tensors in inner)
    scales = [
        1.0
        if part.tensors is None
        else scale_of(part.tensors, part.tensors[pairs[0][1]].shape[0], part.facts)
        for part in parts
    ]
    stated = {scale for scale, part in zip(scales, parts, strict=True) if part.tensors is not None}
    common = stated.pop() if len(stated) == 1 else None
    fused: dict[str, Tensor] = {}
    for number, (up, down) in enumerate(pairs):
        blocks = []
        for part, scale in zip(parts, scales, strict=True):
            if part.tensors is None:
                width = first[up].shape[1] if is_shared else 0
                blocks.append(first[up].new_zeros(part.rows, width, *first[up].shape[2:]))
            elif common is None and number == 0:
                blocks.append(_scaled(part.tensors[up], scale))
            else:
                blocks.append(part.tensors[up])
        fused[up] = torch.cat(blocks) if is_shared else _block_diagonal(blocks)
        fused[down] = inner[number][0] if is_shared else torch.cat(inner[number])
    rank = fused[pairs[0][1]].shape[0]
    fused["alpha"] = torch.tensor((1.0 if common is None else common) * rank, dtype=torch.float32)
    return fused | _fused_vectors(parts, scales, common)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """In float32 at least: a narrower dtype would round away what was trained."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale


def _all_equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    trailing = blocks[0].shape[2:]  # ones, of a convolution's up
    matrix: Tensor = torch.block_diag(*(block.flatten(1) for block in blocks))  # type: ignore[no-untyped-call]
    return matrix.reshape(*matrix.shape, *trailing)


def _fused_vectors(
    parts: Sequence[Part], scales: Sequence[float], common: float | None
) -> dict[str, Tensor]:
    """up_bias (scaled like up) and DoRA's magnitudes of rows."""
    fused = {}
    held = [part.tensors or {} for part in parts]
    if any("dora_scale" in tensors for tensors in held):
        magnitudes = [tensors.get("dora_scale") for tensors in held]
        if any(
            m is None or m.numel() != p.rows or m.shape[0] != p.rows
            for m, p in zip(magnitudes, parts, strict=True)
        ):
            raise ValueError(
                "DoRA is joined where every part has one magnitude for each of its rows; "
                "with the base the dense differences can be joined"
            )
        fused["dora_scale"] = torch.cat([m for m in magnitudes if m is not None])
    biases = [tensors.get("up_bias") for tensors in held]
    if some := [bias for bias in biases if bias is not None]:
        fused["up_bias"] = torch.cat(
            [
                some[0].new_zeros(part.rows)
                if bias is None
                else bias
                if common is not None
                else _scaled(bias, scale)
                for bias, part, scale in zip(biases, parts, scales, strict=True)
            ]
        )
    return fused


def _stack(parts: Sequence[Part], *, is_zero_allowed: bool) -> dict[str, Tensor]:
    held = [part.tensors or {} for part in parts]
    roles = sorted({role for tensors in held for role in tensors} - {"alpha"})
    fused = {}
    for role in roles:
        like = next(tensors[role] for tensors in held if role in tensors)
        if not is_zero_allowed and any(role not in tensors for tensors in held):
            raise ValueError(f"{role} is replaced in some of the joined layers and not in others")
        fused[role] = torch.cat(
            [
                tensors[role] if role in tensors else like.new_zeros(part.rows, *like.shape[1:])
                for tensors, part in zip(held, parts, strict=True)
            ]
        )
    return fused


def without_idle_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """LoRA factors less the ranks that `up` has only zeros for; None if it has nothing else.

    The rows of one part of a LoRA that was fused use its own ranks alone: this undoes `fuse_rows`.
    alpha falls with the rank, so that the scale stays.
    """
    used = tensors["up"].flatten(2).squeeze(2) if tensors["up"].ndim > 2 else tensors["up"]
    keep = (used.float() != 0).any(0).nonzero().flatten().tolist()
    if not keep:
        return None
    rank = tensors["down"].shape[0]
    trimmed = dict(tensors)
    trimmed["up"], trimmed["down"] = take(tensors["up"], keep, 1), take(tensors["down"], keep, 0)
    if "alpha" in tensors:
        alpha = tensors["alpha"]
        trimmed["alpha"] = (alpha.double() * len(keep) / rank).to(torch.float32)
    return trimmed
