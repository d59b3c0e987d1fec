"""c, the number an algorithm multiplies its product with: alpha / rank unless something says more."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def scale_of(tensors: Mapping[str, Tensor], rank: int, facts: Mapping[str, Any]) -> float:
    """facts["scale"], else the role scale, else alpha / rank, else 1; times `scalar` if there is one.

    A configuration decides before the tensors (rsLoRA, PEFT's patterns). `scale` in place of
    alpha / rank is A1111's reading; `scalar` is the learned factor LyCORIS (use_scalar) puts before
    its product. Without an alpha the scale is 1, as in kohya's trainer and ComfyUI.
    """
    scalar = one_number(tensors, "scalar") if "scalar" in tensors else 1.0
    if "scale" in facts:
        return scalar * float(facts["scale"])
    if "scale" in tensors:
        return scalar * one_number(tensors, "scale")
    if "alpha" in tensors:
        return scalar * one_number(tensors, "alpha") / rank
    return scalar


def stated_scale(layout: str, facts: Mapping[str, Any]) -> float:
    """facts["scale"], for layouts whose files cannot say it and whose default is not 1."""
    if "scale" not in facts:
        raise ValueError(f"the scale of {layout} factors is in a configuration, and there is none")
    return float(facts["scale"])


def one_number(tensors: Mapping[str, Tensor], role: str) -> float:
    """The value of a tensor that must hold exactly one."""
    if tensors[role].numel() != 1:
        raise ValueError(f"{role} is {tuple(tensors[role].shape)}, which is not one number")
    return float(tensors[role].item())
