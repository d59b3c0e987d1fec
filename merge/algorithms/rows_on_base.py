"""Rows taken out of, and joined into, stored factors whose change depends on the base.

merge.algorithms.rows does the same for the others and says what is promised. A rotation of rows moves
in whole blocks; whatever acts on the inputs is the same for all rows, and joins only with its equal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merge.algorithms import glora, glora_paper, ia3, oft
from merge.algorithms.parts import Part, take
from merge.algorithms.scale import one_number

_OTHERWISE = "with the base the dense difference can hold them"


def taken(
    layout: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    index: Sequence[int],
    facts: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The tensors by role of the layer that has these rows of a layer of `shape`."""
    if layout == "glora":
        shapes = [tuple(tensors[role].shape) for role in ("a1", "a2", "b1", "b2")]
        role = "b2" if glora.is_old(shapes, shape) else "b1"
        return {**tensors, role: take(tensors[role], index, 0)}
    if layout == "glora-paper":
        parts = glora_paper.in_peft_roles(tensors, facts)
        return {role: _of_path(role, tensor, shape[0], index) for role, tensor in parts.items()}
    if layout in ("ia3", "ia3-peft"):
        if _is_on_inputs(layout, tensors, shape, facts):
            return dict(tensors)
        role = "weight" if layout == "ia3" else "ia3_l"
        axis = tensors[role].shape.index(shape[0])
        return {**tensors, role: take(tensors[role], index, axis)}
    if layout == "boft-peft":  # boft_s is (out, 1), or (1, out) of a convolution
        axis = tensors["boft_s"].shape.index(shape[0])
        return {**tensors, "boft_s": take(tensors["boft_s"], index, axis)}
    if layout == "oft":
        return _oft_rows(tensors, index)
    if layout == "oft-kohya":
        return _kohya_rows(tensors, index)
    assert layout == "oft-legacy"
    blocks = tensors["oft_diag"]
    return {**tensors, "oft_diag": take(blocks, _whole_blocks(index, blocks.shape[1]), 0)}


TAKES = frozenset(
    {"boft-peft", "glora", "glora-paper", "ia3", "ia3-peft", "oft", "oft-kohya", "oft-legacy"}
)


def fused(layout: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors by role of the layer whose rows are those of all parts."""
    if layout in ("ia3", "ia3-peft"):
        return _fuse_factors(layout, parts)
    if layout == "oft":
        return _fuse_blocks(parts)
    if layout == "oft-kohya":
        return _fuse_kohya(parts)
    roles = {role for part in parts for role in part.tensors or ()} - {"boft_s"}
    if not all(_are_equal(parts, role) for role in roles):
        raise ValueError(
            f"{layout} factors are of the inputs, and the joined layers have different ones; "
            f"{_OTHERWISE}"
        )
    joined = dict(parts[0].tensors or {})
    if layout == "boft-peft":
        axis = 0 if joined["boft_s"].shape[0] == parts[0].rows else 1
        joined["boft_s"] = torch.cat([(part.tensors or {})["boft_s"] for part in parts], axis)
    return joined


FUSES = frozenset({"ia3", "ia3-peft", "oft", "oft-kohya", "oft-peft", "boft-peft", "hra"})


# Of the paper's GLoRA. Single numbers are for all rows, and so are C and the inner factors.
_ROW_ROLES = frozenset(
    [f"glora_{path}.{part}" for path in "AB" for part in ("Xd", "X", "zeros")]
    + [f"glora_{path}.{part}" for path in "DE" for part in ("X", "zeros")]
)


def _of_path(role: str, tensor: Tensor, out: int, index: Sequence[int]) -> Tensor:
    return take(tensor, index, 0) if role in _ROW_ROLES and len(tensor) == out else tensor


def _is_on_inputs(
    layout: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> bool:
    if layout == "ia3":
        return bool(one_number(tensors, "on_input"))
    return ia3.is_on_inputs(tensors["ia3_l"], shape, facts)


def _oft_rows(tensors: Mapping[str, Tensor], index: Sequence[int]) -> dict[str, Tensor]:
    blocks = _unclamped(tensors)
    found = {**tensors, "oft_blocks": take(blocks, _whole_blocks(index, blocks.shape[1]), 0)}
    if "rescale" in tensors:
        found["rescale"] = take(tensors["rescale"], index, 0)
    if "alpha" in tensors:
        found["alpha"] = torch.zeros_like(tensors["alpha"])
    return found


def _unclamped(tensors: Mapping[str, Tensor]) -> Tensor:
    """LyCORIS' blocks as they act, so that no limit over all of a layer's blocks is left to keep."""
    blocks = tensors["oft_blocks"]
    rows = blocks.shape[0] * blocks.shape[1]
    return _scaled(blocks, oft.shrinkage(blocks.double(), oft.limit_of(tensors, rows)))


def _kohya_rows(tensors: Mapping[str, Tensor], index: Sequence[int]) -> dict[str, Tensor]:
    """Every part of a packed layer has its own limit, alpha times its rows: whole parts keep it."""
    alpha, at = one_number(tensors, "alpha"), 0
    alphas, found = set(), []
    for role in sorted(tensors.keys() - {"alpha"}):
        blocks = tensors[role]
        rows = blocks.shape[0] * blocks.shape[1]
        here = [row - at for row in index if at <= row < at + rows]
        if here:
            kept = _whole_blocks(here, blocks.shape[1])
            if len(kept) != len(blocks):
                blocks = _scaled(blocks, oft.kohya_shrinkage(blocks.double(), alpha * rows))
            found.append((at, rows, take(blocks, kept, 0)))
            alphas.add(alpha * rows / len(here))
        at += rows
    order = [next(a for a, rows, _ in found if a <= row < a + rows) for row in index]
    if order != sorted(order) or len(alphas) > 1:
        raise ValueError(f"these rows mix the parts of a packed OFT; {_OTHERWISE}")
    parts = [blocks for _, _, blocks in found]
    limit = tensors["alpha"] if alphas == {alpha} else _number(alphas.pop())
    return {**_numbered(parts), "alpha": limit}


def _numbered(parts: Sequence[Tensor]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return {"oft_blocks": parts[0]}
    return {f"oft_blocks.{number}": part for number, part in enumerate(parts)}


def _whole_blocks(index: Sequence[int], size: int) -> list[int]:
    """The blocks of `size` rows that the index is made of."""
    blocks = [row // size for row in index[::size]]
    if [block * size + row for block in blocks for row in range(size)] != list(index):
        raise ValueError(f"OFT turns rows in blocks of {size}, which these rows cut; {_OTHERWISE}")
    return blocks


def _fuse_factors(layout: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    role, untouched = ("weight", 0.0) if layout == "ia3" else ("ia3_l", 1.0)
    given = [part for part in parts if part.tensors is not None]
    like = (given[0].tensors or {})[role]
    sides = {_side(layout, part) for part in given}
    if sides == {"inputs"} and len(given) == len(parts) and _are_equal(parts, role):
        return dict(given[0].tensors or {})
    if sides != {"outputs"}:
        raise ValueError(f"IA3 on inputs joins only with its equal; {_OTHERWISE}")
    factors = [
        torch.full((part.rows,), untouched, dtype=like.dtype)
        if part.tensors is None
        else part.tensors[role].flatten()
        for part in parts
    ]
    form = [-1 if size == like.numel() else 1 for size in like.shape]
    return {**(given[0].tensors or {}), role: torch.cat(factors).reshape(form)}


def _side(layout: str, part: Part) -> str:
    """Of a joined layer only the rows are known here, so IA3 of PEFT goes by what facts or (out, 1) say."""
    tensors = part.tensors or {}
    if layout == "ia3":
        return "inputs" if one_number(tensors, "on_input") else "outputs"
    factor = tensors["ia3_l"]
    said = part.facts.get("is_feedforward")
    if said is None and factor.ndim > 2 and factor.numel() == part.rows:
        raise ValueError("whether ia3_l is on the inputs is in a configuration that is not there")
    is_on_inputs = said if said is not None else factor.shape[0] == 1
    return "inputs" if is_on_inputs else "outputs"


def _fuse_blocks(parts: Sequence[Part]) -> dict[str, Tensor]:
    given = [part.tensors for part in parts if part.tensors is not None]
    size = given[0]["oft_blocks"].shape[1]
    blocks = []
    for part in parts:
        if part.tensors is None and part.rows % size == 0:
            blocks.append(given[0]["oft_blocks"].new_zeros(part.rows // size, size, size))
        elif part.tensors is None or part.tensors["oft_blocks"].shape[1] != size:
            raise ValueError(f"the joined layers have OFT blocks of different sizes; {_OTHERWISE}")
        else:
            blocks.append(_unclamped(part.tensors))
    joined = {"oft_blocks": torch.cat(blocks)}
    if any("alpha" in tensors for tensors in given):
        joined["alpha"] = _number(0.0)
    if rescales := [tensors["rescale"] for tensors in given if "rescale" in tensors]:
        like = rescales[0]
        joined["rescale"] = torch.cat(
            [
                (part.tensors or {}).get("rescale", like.new_ones(part.rows, *like.shape[1:]))
                for part in parts
            ]
        )
    return joined


def _fuse_kohya(parts: Sequence[Part]) -> dict[str, Tensor]:
    """One numbered part for each layer, as kohya's oft_flux has it: limits stay as they are."""
    given = [part.tensors for part in parts if part.tensors is not None]
    alphas = [one_number(tensors, "alpha") for tensors in given]
    count = given[0].get("oft_blocks", torch.empty(0)).shape[0]
    if any("oft_blocks" not in tensors for tensors in given) or len(parts) > 4:
        raise ValueError(f"a packed OFT of kohya has four parts at most; {_OTHERWISE}")
    if len(set(alphas)) > 1:
        raise ValueError(f"the joined layers limit their rotations differently; {_OTHERWISE}")
    blocks = []
    for part in parts:
        if part.tensors is not None:
            blocks.append(part.tensors["oft_blocks"])
        elif part.rows % count:
            raise ValueError(f"{part.rows} rows do not come in {count} OFT blocks; {_OTHERWISE}")
        else:
            size = part.rows // count
            blocks.append(given[0]["oft_blocks"].new_zeros(count, size, size))
    return {**_numbered(blocks), "alpha": given[0]["alpha"]}


def _are_equal(parts: Sequence[Part], role: str) -> bool:
    found = [(part.tensors or {}).get(role) for part in parts]
    return all(
        tensor is not None and found[0] is not None and torch.equal(tensor, found[0])
        for tensor in found
    )


def _scaled(blocks: Tensor, factor: float) -> Tensor:
    """In float32 at least where it is not 1: a narrower dtype would round away what was trained."""
    if factor == 1:
        return blocks
    return blocks.to(torch.promote_types(blocks.dtype, torch.float32)) * factor


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
