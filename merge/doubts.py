"""What is odd about a file that can be read: warnings of `graft inspect`, each with a stable code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from merge.errors import BadAdapter, counted
from merge.formats.grammar import counts_alpha
from merge.formats.hashes import Hashes
from merge.formats.header import Header
from merge.formats.keys import Survey
from merge.formats.metadata import (
    DATA_HASH,
    NETWORK_ARGS,
    NETWORK_DIM,
    NETWORK_MODULE,
    read_json,
)

_MOST_KEYS = 20


@dataclass(frozen=True, slots=True)
class Doubt:
    """One warning; `keys` are the tensors or modules it is about, at most a few of them."""

    code: str
    message: str
    keys: tuple[str, ...]


OPEN_FAMILY = Doubt(
    "open_family",
    "its modules are of no family we know, so only the base in hand can say whether it fits",
    (),
)


def of_container(header: Header, hashes: Hashes | None) -> list[Doubt]:
    """Doubts about any safetensors file."""
    found = []
    if header.leading_spaces:
        message = f"the header begins with {header.leading_spaces} blanks; some readers refuse that"
        found.append(Doubt("leading_spaces", message, ()))
    stated = header.metadata.get(DATA_HASH, "").lower().removeprefix("0x")
    is_hash = re.fullmatch("[0-9a-f]{64}", stated) is not None
    if hashes is not None and is_hash and stated != hashes.data_sha256:
        message = f"{DATA_HASH} in its metadata is not the hash of its tensors"
        found.append(Doubt("wrong_stated_hash", message, ()))
    return found


def of_refusal(error: BadAdapter, name: str) -> Doubt:
    """Why merging or baking would refuse this adapter, in the words it would use."""
    keys = getattr(error, "keys", None) or getattr(error, "modules", None) or ()
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", error.code).lower()
    return _doubt(code, str(error).removeprefix(f"{name}: "), keys)


def of_adapter(
    header: Header,
    found: Survey,
    alphas: Mapping[str, float],
    ranks: Sequence[int],
    refusal: Doubt | None,
) -> list[Doubt]:
    """Doubts about an adapter's keys, scales and ranks, beside the reason it is refused for."""
    doubts = [
        *_of_unknown(found, refusal),
        *_of_alphas(_of_scales(found, alphas)),
        *_of_missing_alphas(found),
        *_of_unused_alphas(found, alphas),
        *_of_training(header.metadata),
        *_of_magnitudes(header, found),
        *_of_attention(found),
        *_of_dialects(found),
    ]
    if any(0 in info.shape for info in header.tensors.values()):
        empty = [key for key, info in header.tensors.items() if 0 in info.shape]
        message = f"{len(empty)} tensors are empty: it was saved without gathering its parts"
        doubts.append(_doubt("empty_tensors", message, empty))
    stated = header.metadata.get(NETWORK_DIM, "")
    if stated.isdecimal() and ranks and int(stated) not in ranks:
        message = f"{NETWORK_DIM} says rank {stated}, its tensors have {_range(ranks)}"
        doubts.append(_doubt("rank_differs", message, ()))
    return doubts


def _of_unknown(found: Survey, refusal: Doubt | None) -> Iterator[Doubt]:
    if found.unknown and (refusal is None or refusal.code != "unknown_keys"):
        what = counted(found.unknown, "key belongs", "keys belong")
        message = f"{what} to no known algorithm"
        yield _doubt("unknown_keys", message, found.unknown)


def _of_scales(found: Survey, alphas: Mapping[str, float]) -> dict[str, float]:
    """The alphas that scale: Diag-OFT's and BOFT's in LyCORIS is a limit, and 0 is none."""
    limits = {
        group.keys.get("alpha")
        for group in found.groups
        if group.match.layout in ("oft", "oft-legacy") and not group.location.is_oft
    }
    return {key: alpha for key, alpha in alphas.items() if key not in limits}


def _of_alphas(alphas: Mapping[str, float]) -> list[Doubt]:
    kinds = (
        ("alpha_not_finite", "an alpha of NaN or Inf", lambda a: not isfinite(a)),
        ("alpha_zero", "alpha 0: no effect here, alpha = rank for some trainers",
         lambda a: a == 0),
        ("alpha_negative", "a negative alpha", lambda a: a < 0),
    )  # fmt: skip
    doubts = []
    for code, what, is_so in kinds:
        keys = [key for key, alpha in alphas.items() if is_so(alpha)]
        if keys:
            has = "module has" if len(keys) == 1 else "modules have"
            doubts.append(_doubt(code, f"{len(keys)} {has} {what}", keys))
    return doubts


def _of_missing_alphas(found: Survey) -> list[Doubt]:
    factors = [group for group in found.groups if {"down", "up"} <= group.keys.keys()]
    without = [group.location.path for group in factors if "alpha" not in group.keys]
    if without and len(without) < len(factors):
        message = (
            f"{len(without)} of {len(factors)} modules have no alpha; "
            "they count as scale 1 here, and otherwise in diffusers"
        )
        return [_doubt("alpha_partial", message, without)]
    return []


def _of_unused_alphas(found: Survey, alphas: Mapping[str, float]) -> Iterator[Doubt]:
    """LyCORIS stores an alpha beside two whole factors of a Kronecker product and ignores it."""
    whole = [
        g.keys["alpha"] for g in found.groups if "alpha" in g.keys and not counts_alpha(g.keys)
    ]
    if any(alphas.get(key, 1.0) != 1.0 for key in whole):
        message = (
            f"{len(whole)} LoKr modules have whole factors, whose alpha counts for nothing here "
            "and in LyCORIS; a tool that divides it by a rank scales them wrongly"
        )
        yield _doubt("alpha_unused", message, whole)


_SPLIT_TRAINERS = ("networks.lora_flux", "networks.lora_sd3", "networks.lora_lumina")


def _of_training(metadata: Mapping[str, str]) -> Iterator[Doubt]:
    """What a trainer's settings say about scales that the file's own alphas do not."""
    arguments = read_json(metadata, NETWORK_ARGS)
    if not isinstance(arguments, dict):
        return
    stated = {name: str(value).strip().lower() for name, value in arguments.items()}
    if stated.get("split_qkv") == "true" and metadata.get(NETWORK_MODULE) in _SPLIT_TRAINERS:
        message = (
            "it was trained with split_qkv, after which sd-scripts stores packed projections with "
            "the alpha of one part: they act 3 to 4 times too weakly wherever alpha / rank counts"
        )
        yield _doubt("split_qkv", message, ())
    algorithm = stated.get("algo")
    if algorithm == "dylora" and stated.get("block_size", "1") not in ("1", "0"):
        message = "DyLoRA was trained with a larger scale than alpha / rank, by its block_size"
        yield _doubt("dylora_scale", message, ())
    if algorithm == "glora" and stated.get("rs_lora") == "true":
        message = "GLoRA was trained with rs_lora, whose factor its alpha leaves out"
        yield _doubt("rslora_lost", message, ())


def _of_magnitudes(header: Header, found: Survey) -> Iterator[Doubt]:
    """A plain vector of magnitudes on a square layer may be one per output or one per input."""
    unclear = []
    for group in found.groups:
        key = group.keys.get("dora_scale")
        if key is None or "magnitude_vector" in key or not {"down", "up"} <= group.keys.keys():
            continue
        out, inner = (header.tensors[group.keys[r]].shape[n] for r, n in (("up", 0), ("down", 1)))
        if len(header.tensors[key].shape) == 1 and out == inner:
            unclear.append(key)
    if unclear:
        message = (
            f"{len(unclear)} square layers have DoRA magnitudes that do not say whether they are "
            "one per output or one per input; they count per output here"
        )
        yield _doubt("dora_axis", message, unclear)


def _of_attention(found: Survey) -> Iterator[Doubt]:
    doubled = [
        group.keys["up"]
        for group in found.groups
        if group.location.wraps and group.location.path.endswith(".out_proj") and "up" in group.keys
    ]
    if doubled:
        message = (
            f"{len(doubled)} output projections of nn.MultiheadAttention were trained with twice "
            "their change, as PEFT 0.21 and before apply it; here they count once"
        )
        yield _doubt("attention_twice", message, doubled)


def _of_dialects(found: Survey) -> Iterator[Doubt]:
    # diffusers' own training scripts still write some keys in its older spelling.
    dialects = {group.location.dialect.removesuffix("_old") for group in found.groups}
    if len(dialects) > 1:
        names = ", ".join(sorted(dialects))
        message = f"its keys are spelled in several dialects ({names}); other tools may drop some"
        yield _doubt("mixed_dialects", message, ())


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _doubt(code: str, message: str, keys: Sequence[str]) -> Doubt:
    return Doubt(code, message, tuple(keys[:_MOST_KEYS]))
