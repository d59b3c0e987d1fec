"""GLoRA as in its paper: W + W * A + B, elementwise, and b + b * D + E + W @ C for the bias.

Chavan et al. 2023, arXiv:2306.07967, eq. 9 and 10; its released code and PEFT 0.21 multiply by A
and D elementwise. A and B are (out, in) of low rank, or one entry per row, or one number; C is one
entry per input channel; D and E are one entry per row or one number. What is missing is zero, and
so is the bias of a layer without one. Everything is taken at the original W, as PEFT does (the
paper's fork merges C with the changed W, which its own training never saw).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lowrank import check_extent, extent

_PEFT = [
    *(f"glora_{letter}.{part}" for letter in "ABC" for part in ("Xd", "Xu", "X", "zeros")),
    *(f"glora_{letter}.{part}" for letter in "DE" for part in ("X", "zeros")),
]
_FORK = [f"glora_{path}" for path in ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")]
ROLES = " ".join([*_PEFT, *_FORK])
EVAL_CONFIG = "eval_config"  # the fact that says which part of the paper's supernet counts


@dataclass(frozen=True, slots=True)
class Path:
    """A or B: up @ down, or with `down` None one entry per row, or with one row a single number."""

    up: Float[Tensor, "n rank"]
    down: Float[Tensor, "rank in"] | None = None

    def rows(self, first: int, rows: int) -> Tensor:
        up = self.up if self.down is None and len(self.up) == 1 else self.up[first : first + rows]
        return up if self.down is None else up @ self.down


@dataclass(frozen=True, slots=True)
class PaperGLoRA(Change):
    """`c` has one entry per column of W; `d` and `e` have one per row, or a single one."""

    a: Path | None
    b: Path | None
    c: Float[Tensor, " in"] | None
    d: Float[Tensor, " n"] | None
    e: Float[Tensor, " m"] | None

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        change = torch.zeros_like(base)
        if self.a is not None:
            change = base * self.a.rows(first, rows)
        if self.b is not None:
            change = change + self.b.rows(first, rows)
        return change

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        if self.c is None and self.d is None and self.e is None:
            return None
        assert base is not None
        change = base @ self.c if self.c is not None else base.new_zeros(len(base))
        if self.d is not None and bias is not None:
            change = change + bias * self.d
        return change if self.e is None else change + self.e


def read(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> PaperGLoRA:
    """From PEFT's roles (glora_A.Xd, .Xu, .X and so on) or the paper's fork's (glora_Ad and so on).

    The fork saves its whole supernet, and the fact `eval_config` says which part of it counts:
    {"A": "LoRA_4" | "vector" | "constant" | "none", ... "E": ...}.
    """
    parts = in_peft_roles(tensors, facts)
    # PEFT saves the zeros of a path that does nothing.
    parts = {role: tensor for role, tensor in parts.items() if not role.endswith(".zeros")}
    out, width = extent(shape)
    c = _column(parts, shape[1])
    change = PaperGLoRA(
        _path(parts, "A", shape),
        _path(parts, "B", shape),
        None if c is None else c.repeat_interleave(width // shape[1]),
        _vector(parts, "D", out),
        _vector(parts, "E", out),
    )
    if parts:
        raise ValueError(f"{', '.join(sorted(parts))} belong to no path of this GLoRA")
    return change


def _path(parts: dict[str, Tensor], letter: str, shape: tuple[int, ...]) -> Path | None:
    up, down = parts.pop(f"glora_{letter}.Xd", None), parts.pop(f"glora_{letter}.Xu", None)
    if up is not None and down is not None:
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"the factors of {letter} are {_is(up)} and {_is(down)}")
        check_extent((up.shape[0], down.shape[1]), shape)
        return Path(up, down)
    if up is not None or down is not None:
        raise ValueError(f"{letter} has one of its two factors")
    vector = _vector(parts, letter, shape[0])
    return None if vector is None else Path(vector[:, None])


def _vector(parts: dict[str, Tensor], letter: str, out: int) -> Tensor | None:
    vector = parts.pop(f"glora_{letter}.X", None)
    if vector is not None and vector.numel() not in (1, out):
        raise ValueError(f"{letter} is {_is(vector)}, the weight has {out} rows")
    return None if vector is None else vector.flatten()


def _column(parts: dict[str, Tensor], channels: int) -> Tensor | None:
    if "glora_C.Xd" in parts and "glora_C.Xu" in parts:
        column = parts.pop("glora_C.Xd") @ parts.pop("glora_C.Xu")  # (in, rank) @ (rank, 1)
    elif "glora_C.X" in parts:
        column = parts.pop("glora_C.X")
    else:
        return None
    if column.numel() != channels:
        raise ValueError(f"C is {_is(column)}, the weight has {channels} input channels")
    return column.flatten()


def in_peft_roles(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """PEFT's tensors as they are, and of the fork's what its configuration chooses, in PEFT's roles."""
    if all("." in role for role in tensors):
        return dict(tensors)
    if EVAL_CONFIG not in facts:
        raise ValueError(
            "the file holds a GLoRA supernet; which part of it counts is in its eval_config, "
            "which is not beside it"
        )
    left, parts = dict(tensors), dict[str, Tensor]()
    for letter in "ABCDE":
        name = f"glora_{letter}"
        chosen = facts[EVAL_CONFIG].get(letter)
        choice, _, rank = str(chosen).partition("_")
        up = left.pop(f"{name}d" if letter in "ABC" else name, None)
        down = left.pop(f"{name}u", None)
        if choice == "none":
            continue
        if up is None:
            raise ValueError(
                f"eval_config chooses {chosen!r} for {letter}, which is not in the file"
            )
        if choice == "LoRA" and down is not None:
            kept = int(rank) if rank else len(down)
            parts |= {f"{name}.Xd": up[:, :kept], f"{name}.Xu": down[:kept]}
        elif choice == "vector":
            parts[f"{name}.X"] = up if down is None else up[:, 0]
        elif choice == "constant":
            parts[f"{name}.X"] = up.flatten()[:1]
        else:
            raise ValueError(f"eval_config chooses {chosen!r} for {letter}")
    if left:
        raise ValueError(f"{', '.join(sorted(left))} belong to no path of this GLoRA")
    return parts


def _is(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
