"""Parts -> the tensors, the configuration and the metadata of one dialect.

What a dialect has no key for is refused with the reason (NotExact), never left out.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from merge.families import Family
from merge.formats import dialects
from merge.formats.metadata import DIFFUSERS_CONFIG
from merge.packing import NotExact, Part

_CONFIGURED = ("diffusers", "peft")
_TITLES = {
    "kohya": "kohya's keys",
    "comfy": "ComfyUI's keys",
    "diffusers": "diffusers",
    "peft": "PEFT",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """What to write: `config` is PEFT's adapter_config.json, `metadata` what diffusers wants."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]


def encode(
    parts: Sequence[Part],
    dialect: str,
    family: Family | None,
    options: Mapping[str, Any] | None = None,
) -> Encoded:
    """`parts` are of layers in the dialect's naming; `options` are further fields for PEFT."""
    if family is None and dialect != "peft":
        why = f"it is for a model of no family we know, which {_TITLES[dialect]} cannot name"
        raise NotExact(f"{why}; peft can")
    components = sorted({part.component for part in parts})
    for component in components:
        if family is not None and not dialects.is_named(component, dialect, family):
            raise NotExact(f"{_TITLES[dialect]} has no name for {component}; diffusers has")
    if dialect == "peft" and len(components) > 1:
        why = f"a PEFT adapter is of one model, and this one is of {', '.join(components)}"
        raise NotExact(f"{why}; diffusers, kohya and comfy hold them all")
    if dialect in _CONFIGURED:
        parts = _with_biases_inside(parts)
        parts = [_as_peft(part) for part in parts]
    else:
        parts = [one for part in parts for one in _with_bias_apart(part)]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for role, key in _keys(part, dialect, family).items():
            if key in tensors:
                raise NotExact(f"{part.name}: two parts of it would have the key {key}")
            tensors[key] = part.tensors[role]
    if dialect == "peft":
        return Encoded(tensors, _peft_config(parts) | dict(options or {}), {})
    if dialect == "diffusers":
        return Encoded(tensors, None, {DIFFUSERS_CONFIG: _diffusers_config(parts)})
    return Encoded(tensors, None, {})


def _keys(part: Part, dialect: str, family: Family | None) -> dict[str, str]:
    roles = [role for role in part.tensors if dialect in dialects.HOLDS_ALPHA or role != "alpha"]
    if not dialects.holds(dialect, part.layout, roles):
        raise NotExact(f"{part.name}: {_why_not(part, dialect)}")
    keys = dialects.keys_of(part.component, part.layer.path, part.layout, dialect, family)
    return {role: keys[role] for role in roles}


def _why_not(part: Part, dialect: str) -> str:
    title = _TITLES[dialect]
    if not any(part.layout in held for held in dialects.SUFFIXES.values()):
        way = "--algorithm lora writes plain LoRA" if part.layout in _BECOME_LORA else "bake it"
        return f"{part.layout} factors are read and not written; {way}"
    holders = [
        other
        for other in dialects.WRITABLE_DIALECTS
        if dialects.holds(other, part.layout, part.tensors.keys() - {"up_bias"})
    ]
    instead = [f"{_listed(holders)} can hold it"] if holders else []
    if part.layout in _BECOME_LORA and "dora_scale" not in part.tensors:
        instead.append("--algorithm lora writes the same change as plain LoRA")
    if not instead:
        instead.append("bake it into its base instead")
    what = "a Tucker core" if "mid" in part.tensors else f"{part.layout} factors"
    return f"{title} cannot hold {what}; {', or '.join(instead)}"


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


_BECOME_LORA = frozenset({"lora", "loha", "lokr", "adalora", "vera", "lora-mlx", "lora-torchtune"})


def alpha_tensor(alpha: float, like: Tensor) -> Tensor:
    """alpha as one number of the narrowest dtype that holds it exactly, if it can the factors' own."""
    for dtype in (like.dtype, torch.float32):
        if dtype.is_floating_point and torch.tensor(alpha, dtype=dtype).item() == alpha:
            return torch.tensor(alpha, dtype=dtype)
    return torch.tensor(alpha, dtype=torch.float64)


def _with_bias_apart(part: Part) -> list[Part]:
    """For dialects with keys for alpha, and one for a change of the bias that alpha does not scale."""
    tensors = dict(part.tensors)
    if part.alpha is not None:
        stored = tensors.pop("alpha", None)
        is_kept = stored is not None and float(stored.item()) == part.alpha
        like = next(iter(tensors.values()))
        tensors["alpha"] = (
            stored if is_kept and stored is not None else alpha_tensor(part.alpha, like)
        )
    elif part.layout == "lokr":
        # Two whole factors: readers expect an alpha and make nothing of it.
        tensors.setdefault("alpha", alpha_tensor(float(_lokr_rank(part)), tensors["lokr_w2"]))
    bias = tensors.pop("up_bias", None)
    plain = replace(part, tensors=tensors)
    if bias is None:
        return [plain]
    assert part.alpha is not None
    assert part.rank is not None
    moved = {"diff_b": scaled(bias, part.alpha / part.rank)}
    return [plain, replace(part, layout="full", tensors=moved, alpha=None)]


def _with_biases_inside(parts: Sequence[Part]) -> list[Part]:
    """PEFT has a change of the bias beside `up`, scaled like it."""
    biases: dict[str, Part] = {}
    kept: dict[str, Part] = {}
    for part in parts:
        only_bias = part.layout == "full" and part.tensors.keys() == {"diff_b"}
        if (biases if only_bias else kept).setdefault(part.name, part) is not part:
            raise NotExact(
                f"{part.name} is changed by two kinds of factors; kohya and comfy hold both"
            )
    for name, bias in biases.items():
        beside = kept.get(name)
        if beside is None or beside.layout != "lora" or not beside.alpha:
            raise NotExact(f"{name}: its bias alone is changed; kohya and comfy hold that")
        assert beside.rank is not None
        inside = unscaled(bias.tensors["diff_b"], beside.alpha / beside.rank)
        kept[name] = replace(beside, tensors={**beside.tensors, "up_bias": inside})
    return list(kept.values())


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """tensor * factor in its own dtype where that is exact, else in float32."""
    exact = tensor.double() * factor
    own = exact.to(tensor.dtype)
    return own if torch.equal(own.double(), exact) else exact.float()


def unscaled(tensor: Tensor, factor: float) -> Tensor:
    """The narrowest tensor that `scaled` makes this one of; float32 where there is none."""
    exact = tensor.double() / factor
    for dtype in (torch.float16, torch.bfloat16, tensor.dtype):
        own = exact.to(dtype)
        again = scaled(own, factor)
        if again.dtype == tensor.dtype and torch.equal(again, tensor):
            return own
    return exact.float()


def _as_peft(part: Part) -> Part:
    """Magnitudes of DoRA as PEFT shapes them; scales as its configuration states them."""
    tensors = dict(part.tensors)
    magnitude = tensors.get("dora_scale")
    if magnitude is not None:
        if part.layout != "lora":
            raise NotExact(f"{part.name}: PEFT has DoRA on LoRA only; kohya and comfy hold it")
        out = part.layer.shape[0]
        if magnitude.shape[0] != out:
            why = "its DoRA has a magnitude for each input, PEFT's one for each output"
            raise NotExact(f"{part.name}: {why}; kohya and comfy hold it")
        is_conv = len(part.layer.shape) > 2
        ones = [1] * (len(part.layer.shape) - 2)
        tensors["dora_scale"] = magnitude.reshape((1, out, *ones) if is_conv else (out,))
    return replace(part, tensors=tensors)


def _lora_options(parts: Sequence[Part]) -> dict[str, Any]:
    dora = {"dora_scale" in part.tensors for part in parts}
    if len(dora) > 1:
        why = "some layers have DoRA and some have not, which one configuration cannot say"
        raise NotExact(f"{why}; kohya and comfy hold that")
    bias = any("up_bias" in part.tensors for part in parts)
    return ({"use_dora": True} if dora == {True} else {}) | ({"lora_bias": True} if bias else {})


def _diffusers_config(parts: Sequence[Part]) -> str:
    by_component = defaultdict(list)
    for part in parts:
        by_component[part.component].append(part)
    ranks, alphas = _numbers(parts)
    return dialects.diffusers_config(
        {(p.component, p.layer.path): ranks[p.name] for p in parts},
        {(p.component, p.layer.path): alphas[p.name] for p in parts},
        {component: _lora_options(its) for component, its in by_component.items()},
    )


def _peft_config(parts: Sequence[Part]) -> dict[str, Any]:
    layouts = sorted({part.layout for part in parts})
    if len(layouts) > 1:
        why = f"a PEFT adapter is of one algorithm, and this one is of {', '.join(layouts)}"
        raise NotExact(f"{why}; kohya and comfy hold them all, and --algorithm lora makes them one")
    if layouts == ["lokr"]:
        return _lokr_config(parts)
    ranks, alphas = _numbers(parts)
    more = _lora_options(parts) if layouts == ["lora"] else _loha_options(parts)
    return dialects.peft_config(
        {p.layer.path: ranks[p.name] for p in parts},
        {p.layer.path: alphas[p.name] for p in parts},
        kind=layouts[0].upper(),
        **more,
    )


def _numbers(parts: Sequence[Part]) -> tuple[dict[str, int], dict[str, float]]:
    ranks, alphas = {}, {}
    for part in parts:
        assert part.rank is not None
        assert part.alpha is not None
        ranks[part.name], alphas[part.name] = part.rank, part.alpha
    return ranks, alphas


def _loha_options(parts: Sequence[Part]) -> dict[str, Any]:
    convs = [
        part for part in parts if len(part.layer.shape) > 2 and set(part.layer.shape[2:]) != {1}
    ]
    tucker = {"hada_t1" in part.tensors for part in convs}
    if len(tucker) > 1:
        raise NotExact("some convolutions have a Tucker core and some have not; kohya holds that")
    return {"use_effective_conv2d": tucker == {True}, "init_weights": True}


def _lokr_config(parts: Sequence[Part]) -> dict[str, Any]:
    """PEFT rebuilds the shapes of LoKr's factors from its configuration, so they must be its own."""
    ranks = {part.layer.path: _lokr_rank(part) for part in parts}
    alphas = {}
    for part in parts:
        rank = ranks[part.layer.path]
        # Two full factors have scale 1 in LyCORIS whatever their alpha, and alpha / r in PEFT.
        alphas[part.layer.path] = float(rank) if part.alpha is None else part.alpha
    both = any("lokr_w1_a" in part.tensors for part in parts)
    tucker = any("lokr_t2" in part.tensors for part in parts)
    for factor in _factors_of(parts):
        if all(_fits_peft(part, ranks[part.layer.path], factor, both, tucker) for part in parts):
            return dialects.peft_config(
                ranks,
                alphas,
                kind="LOKR",
                decompose_both=both,
                decompose_factor=factor,
                use_effective_conv2d=tucker,
                init_weights=True,
            )
    why = "PEFT splits layers into other factors than these, and one way for all"
    raise NotExact(f"{why}; kohya and comfy hold them, or --algorithm lora writes plain LoRA")


def _lokr_rank(part: Part) -> int:
    """The rank stored, or one so large that PEFT keeps both factors full."""
    if part.rank is not None:
        return part.rank
    return max(part.tensors["lokr_w2"].shape[:2])


def _factors_of(parts: Sequence[Part]) -> list[int]:
    """The decompose_factors of PEFT that may be meant: none, or the rows of some w1."""
    rows = {_left(part)[0] for part in parts} | {_left(part)[1] for part in parts}
    return [-1, *sorted(rows)]


def _left(part: Part) -> tuple[int, int]:
    tensors = part.tensors
    if "lokr_w1" in tensors:
        return tensors["lokr_w1"].shape[0], tensors["lokr_w1"].shape[1]
    return tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]


def _fits_peft(part: Part, rank: int, factor: int, both: bool, tucker: bool) -> bool:
    out, channels, *kernel = part.layer.shape
    a, b = factorization(out, factor)
    c, d = factorization(channels, factor)
    whole_1 = not (both and rank < max(a, c) / 2)
    whole_2 = rank >= max(b, d) / 2
    has_core = tucker and not whole_2 and bool(kernel) and set(kernel) != {1}
    return (
        _left(part) == (a, c)
        and ("lokr_w1" in part.tensors) == whole_1
        and ("lokr_w2" in part.tensors) == whole_2
        and ("lokr_t2" in part.tensors) == has_core
    )


def factorization(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m * n = size: `factor` if it divides, else the largest m up to it and the root.

    What PEFT 0.21's tuners/lokr/layer.py gives, which follows LyCORIS; -1 is no limit.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = isqrt(size) if factor < 0 else min(factor, isqrt(size))
    m = max(divisor for divisor in range(1, most + 1) if size % divisor == 0)
    return m, size // m
