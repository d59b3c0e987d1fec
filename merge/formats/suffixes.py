"""The right end of a key: which tensor of its module it is, and whose spelling.

A key is `<component prefix><module path><suffix>`; `split_key` takes the suffix off.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Suffix(NamedTuple):
    """What the right end of a key says: the tensor's role, and whose spelling it is."""

    role: str
    spelling: str


class SplitKey(NamedTuple):
    """A key without its suffix. `adapter` is the name PEFT puts in keys when it saves several."""

    stem: str
    role: str
    spelling: str
    adapter: str | None = None


KOHYA, PEFT, OLD, MLX, TORCHTUNE, XLABS, OTHER = (
    *("kohya", "peft", "old", "mlx", "torchtune", "xlabs"),
    "other",
)

_SUFFIXES: dict[str, Suffix] = {
    # LoRA
    ".lora_down.weight": Suffix("down", KOHYA),
    ".lora_up.weight": Suffix("up", KOHYA),
    ".lora_mid.weight": Suffix("mid", KOHYA),
    ".lora_A.weight": Suffix("down", PEFT),
    ".lora_B.weight": Suffix("up", PEFT),
    ".lora_A": Suffix("down", PEFT),
    ".lora_B": Suffix("up", PEFT),
    ".lora_A.bias": Suffix("down_bias", PEFT),
    ".lora_B.bias": Suffix("up_bias", PEFT),
    ".lora_E": Suffix("lora_E", PEFT),
    ".ranknum": Suffix("ranknum", PEFT),
    ".lora_embedding_A": Suffix("embedding_down", PEFT),
    ".lora_embedding_B": Suffix("embedding_up", PEFT),
    ".lora.down.weight": Suffix("down", OLD),
    ".lora.up.weight": Suffix("up", OLD),
    ".lora_linear_layer.down.weight": Suffix("down", OLD),
    ".lora_linear_layer.up.weight": Suffix("up", OLD),
    ".lora_a": Suffix("mlx_down", MLX),
    ".lora_b": Suffix("mlx_up", MLX),
    ".lora_a.weight": Suffix("torchtune_down", TORCHTUNE),
    ".lora_b.weight": Suffix("torchtune_up", TORCHTUNE),
    ".alpha": Suffix("alpha", OTHER),
    ".scale": Suffix("scale", OTHER),
    ".dora_scale": Suffix("dora_scale", OTHER),
    ".lora_magnitude_vector": Suffix("dora_scale", PEFT),
    ".lora_magnitude_vector.weight": Suffix("dora_scale", PEFT),
    ".magnitude": Suffix("dora_scale", OTHER),
    ".dora_magnitude": Suffix("dora_scale", OTHER),
    ".m": Suffix("dora_scale", MLX),
    ".bias_indices": Suffix("bias_indices", KOHYA),
    ".bias_values": Suffix("bias_values", KOHYA),
    ".bias_size": Suffix("bias_size", KOHYA),
    # full differences and replacements
    ".diff": Suffix("diff", OTHER),
    ".diff_b": Suffix("diff_b", OTHER),
    ".w_norm": Suffix("w_norm", OTHER),
    ".b_norm": Suffix("b_norm", OTHER),
    ".set_weight": Suffix("set_weight", OTHER),
    ".reshape_weight": Suffix("reshape_weight", OTHER),
    ".weight": Suffix("weight", OTHER),
    ".bias": Suffix("bias", OTHER),
    ".ln_tuning_layers.weight": Suffix("ln_tuning_weight", PEFT),
    ".ln_tuning_layers.bias": Suffix("ln_tuning_bias", PEFT),
    ".token_adapter.trainable_tokens_delta": Suffix("trainable_tokens_delta", PEFT),
    ".trainable_tokens_delta": Suffix("trainable_tokens_delta", PEFT),
    # LyCORIS
    **{
        f".{role}": Suffix(role, KOHYA)
        for role in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_t2"),
            *("lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            *("oft_blocks", "oft_diag", "rescale", "scalar", "on_input", "lambda_layer"),
        )
    },
    **{
        f".{role}.weight": Suffix(role, KOHYA)
        for role in ("a1", "a2", "b1", "b2", "bm", "q_layer", "p_layer")
    },
    # PEFT's other methods
    **{
        f".{role}": Suffix(role, PEFT)
        for role in (
            *("ia3_l", "vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
            *("hra_u", "hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
            *("boft_R", "boft_s", "oft_r"),
            *("glora_Ad", "glora_Au", "glora_Bd", "glora_Bu", "glora_Cd", "glora_Cu"),
            *("glora_D", "glora_E"),
        )
    },
    ".oft_R.weight": Suffix("oft_R", PEFT),
    ".oft_R.scaled_oft": Suffix("scaled_oft", PEFT),
    ".oft_embedding_R.weight": Suffix("oft_embedding_R", PEFT),
    **{
        f".glora_{letter}.{part}": Suffix(f"glora_{letter}.{part}", PEFT)
        for letter in "ABCDE"
        for part in (("Xd", "Xu", "X", "zeros") if letter in "ABC" else ("X", "zeros"))
    },
    # Stability's Control-LoRA
    ".down": Suffix("control_down", OTHER),
    ".up": Suffix("control_up", OTHER),
}
SUFFIXES: Mapping[str, Suffix] = MappingProxyType(_SUFFIXES)

# An adapter's name inside a key: a file that PEFT's own saving would have taken it out of.
_NAMED = re.compile(
    r"\.(lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|ranknum|ia3_l|vera_lambda_[bd]|vera_[AB]"
    r"|hada_\w+|lokr_\w+|oft_R|oft_embedding_R|boft_[Rs]|hra_u|hira_[AB]|hira_embedding_[AB]|trainable_tokens_delta|ln_tuning_layers"
    r"|modules_to_save)\.([^.]+)(\.weight|\.bias)?$"
)
_NOT_NAMES = {"weight", "bias", "scaled_oft"}
_NUMBERED_OFT = re.compile(r"\.(oft_blocks\.\d+)$")
# "to_q_lora.down.weight": attention processors of diffusers before 0.22, and of XLabs.
_PROCESSOR = re.compile(r"_lora(\d?)\.(down|up)\.weight$")
# Methods that are recognised and not read, by the beginnings of their parameters' names in PEFT.
_RECOGNISED = re.compile(
    r"(?:^|\.)(vblora|randlora|gralora|delora|fourierft|c3a|shira|road|miss|waveft|lily|adamss|beft"
    r"|pvera|unilora|tinylora|psoft|peanut|deft|frod|poly|osf|supertuning|prompt|adaption)"
    r"_([a-zA-Z]\w*(?:\.\w+){0,3})$"
)
# Their other words are names of modules too: a "prompt_embedder" is a layer.
_PROMPTS = re.compile(r"embeddings|encoder\.|gate$|prompt$|task_")
# Tensors that stand for a whole file rather than for a module.
_BUNDLED = re.compile(r"^bundle_emb\.")


def is_bundled(key: str) -> bool:
    """Whether the tensor is a word vector that OneTrainer packs into an adapter's file."""
    return _BUNDLED.match(key) is not None


def split_key(key: str) -> SplitKey | None:
    """Take the longest known suffix off `key`; None if its right end is of no known spelling."""
    if is_bundled(key):
        return None
    named = _NAMED.search(key)
    if named is not None and named[2] not in _NOT_NAMES:
        return _split_named(key, named)
    for n in (3, 2, 1):
        pieces = key.rsplit(".", n)
        if len(pieces) <= n:
            continue
        suffix = SUFFIXES.get(key[len(pieces[0]) :])
        if suffix is not None and pieces[0]:
            return SplitKey(pieces[0], *suffix) if n > 1 else _split_short(key, pieces[0])
    if found := _NUMBERED_OFT.search(key):
        return SplitKey(key[: found.start()], found[1], KOHYA)
    return _split_recognised(key)


def _split_named(key: str, found: re.Match[str]) -> SplitKey | None:
    what, name, end = found[1], found[2], found[3] or ""
    stem = key[: found.start()]
    if what == "modules_to_save":
        return SplitKey(stem, end[1:], PEFT, name) if end else None
    if what == "trainable_tokens_delta":
        return SplitKey(stem.removesuffix(".token_adapter"), what, PEFT, name)
    suffix = SUFFIXES.get(f".{what}{end}") or SUFFIXES.get(f".{what}")
    return None if suffix is None else SplitKey(stem, *suffix, name)


def _split_short(key: str, stem: str) -> SplitKey:
    """A suffix of one piece, which may be the end of an older spelling of two."""
    if found := _PROCESSOR.search(key):
        is_xlabs = re.search(r"\.(qkv|proj)_lora\d?\.", key) is not None
        stem = f"{key[: found.start()]}_lora{found[1]}"
        return SplitKey(stem, found[2], XLABS if is_xlabs else OLD)
    if recognised := _split_recognised(key):
        return recognised
    return SplitKey(stem, *SUFFIXES[key[len(stem) :]])


def _split_recognised(key: str) -> SplitKey | None:
    found = _RECOGNISED.search(key)
    if found is None or (found[1] in ("prompt", "adaption") and not _PROMPTS.match(found[2])):
        return None
    return SplitKey(key[: found.start()], f"{found[1]}:{found[2]}", PEFT)
