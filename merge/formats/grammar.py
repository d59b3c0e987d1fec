"""Which suffixes make which algorithm, and the shape rules of its factors. No torch.

A key is `<component prefix><module path><suffix>`. `split_key` takes the suffix off the right end,
`algorithm_of` names what a module's set of roles is. A new algorithm is new rows here, a module in
merge.algorithms and a page in docs/formats.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
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
    adapter: str | None


KOHYA, PEFT, OLD, OTHER = "kohya", "peft", "old", "other"

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
    ".lora_a": Suffix("mlx_down", OTHER),
    ".lora_b": Suffix("mlx_up", OTHER),
    ".lora_a.weight": Suffix("torchtune_down", OTHER),
    ".lora_b.weight": Suffix("torchtune_up", OTHER),
    ".alpha": Suffix("alpha", OTHER),
    ".scale": Suffix("scale", OTHER),
    ".dora_scale": Suffix("dora_scale", KOHYA),
    ".lora_magnitude_vector": Suffix("dora_scale", PEFT),
    ".lora_magnitude_vector.weight": Suffix("dora_scale", PEFT),
    ".bias_indices": Suffix("bias_indices", KOHYA),
    ".bias_values": Suffix("bias_values", KOHYA),
    ".bias_size": Suffix("bias_size", KOHYA),
    # full differences and replacements
    ".diff": Suffix("diff", KOHYA),
    ".diff_b": Suffix("diff_b", KOHYA),
    ".w_norm": Suffix("w_norm", KOHYA),
    ".b_norm": Suffix("b_norm", KOHYA),
    ".set_weight": Suffix("set_weight", OTHER),
    ".reshape_weight": Suffix("reshape_weight", OTHER),
    ".weight": Suffix("weight", OTHER),
    ".bias": Suffix("bias", OTHER),
    ".ln_tuning_layers.weight": Suffix("ln_tuning_weight", PEFT),
    ".ln_tuning_layers.bias": Suffix("ln_tuning_bias", PEFT),
    ".token_adapter.trainable_tokens_delta": Suffix("trainable_tokens_delta", PEFT),
    # LyCORIS
    **{
        f".{role}": Suffix(role, KOHYA)
        for role in (
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_t2"),
            *("lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            *("oft_blocks", "oft_diag", "rescale", "scalar", "on_input"),
        )
    },
    **{f".{role}.weight": Suffix(role, KOHYA) for role in ("a1", "a2", "b1", "b2", "bm")},
    **{
        f".{role}.weight": Suffix(role, KOHYA)
        for role in ("q_layer", "p_layer")
    },
    ".lambda_layer": Suffix("lambda_layer", KOHYA),
    # PEFT's other methods
    **{
        f".{role}": Suffix(role, PEFT)
        for role in (
            *("ia3_l", "vera_lambda_b", "vera_lambda_d", "hra_u", "hira_A", "hira_B"),
            *("boft_R", "boft_s", "oft_r", "miss_block", "c3a_kernel", "fourierft_spectrum"),
            *("randlora_lambda", "randlora_gamma", "shira_weight", "road_theta", "road_alpha"),
            *("glora_Ad", "glora_Au", "glora_Bd", "glora_Bu", "glora_Cd", "glora_Cu"),
            *("glora_D", "glora_E"),
        )
    },
    ".oft_R.weight": Suffix("oft_R", PEFT),
    ".oft_R.scaled_oft": Suffix("scaled_oft", PEFT),
    **{
        f".glora_{letter}.{part}": Suffix(f"glora_{letter}.{part}", PEFT)
        for letter in "ABCDE"
        for part in ("Xd", "Xu", "X")
    },
}  # fmt: skip
SUFFIXES: Mapping[str, Suffix] = MappingProxyType(_SUFFIXES)

_NAMED = re.compile(r"\.(lora_A|lora_B)\.([^.]+)\.weight$")
_NAMED_MAGNITUDE = re.compile(r"\.lora_magnitude_vector\.([^.]+)(\.weight)?$")
_NUMBERED_OFT = re.compile(r"\.oft_blocks\.\d+$")
# "to_q_lora.down.weight": attention processors of diffusers before 0.22.
_PROCESSOR = re.compile(r"_lora\.(down|up)\.weight$")
# Tensors that stand for a whole file rather than for a module.
_BUNDLED = re.compile(r"^bundle_emb\.")


def split_key(key: str) -> SplitKey | None:
    """Take the longest known suffix off `key`; None if its right end is of no known spelling."""
    if _BUNDLED.match(key):
        return None
    if found := _NAMED.search(key):
        role = "down" if found[1] == "lora_A" else "up"
        return SplitKey(key[: found.start()], role, PEFT, found[2])
    for n in (3, 2, 1):
        pieces = key.rsplit(".", n)
        if len(pieces) <= n:
            continue
        suffix = SUFFIXES.get(key[len(pieces[0]) :])
        if suffix is not None and pieces[0]:
            return SplitKey(pieces[0], *suffix, None) if n > 1 else _split_short(key, pieces[0])
    if found := _NAMED_MAGNITUDE.search(key):
        return SplitKey(key[: found.start()], "dora_scale", PEFT, found[1])
    if found := _NUMBERED_OFT.search(key):
        return SplitKey(key[: found.start()], "oft_blocks", KOHYA, None)
    return None


def _split_short(key: str, stem: str) -> SplitKey:
    """A suffix of one piece, which may be the end of an older spelling of two."""
    if found := _PROCESSOR.search(key):
        return SplitKey(key[: found.start()] + "_lora", found[1], OLD, None)
    return SplitKey(stem, *SUFFIXES[key[len(stem) :]], None)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row: a module's roles must hold all of `required` and nothing outside `allowed`."""

    name: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    is_supported: bool = False  # merges and bakes know its mathematics

    @property
    def allowed(self) -> frozenset[str]:
        return self.required | self.optional


def _row(name: str, required: str, optional: str = "", *, is_supported: bool = False) -> Algorithm:
    return Algorithm(
        name, frozenset(required.split()), frozenset(optional.split()), is_supported=is_supported
    )


# Ordered: the first row that fits names the module.
ALGORITHMS: tuple[Algorithm, ...] = (
    _row("lora", "down up", "alpha", is_supported=True),
    _row("lora-scaled", "down up scale", "alpha"),
    _row("lora-bias", "down up", "alpha up_bias down_bias bias_indices bias_values bias_size bias"),
    _row("lora-tucker", "down up mid", "alpha scale"),
    _row("dora", "down up dora_scale", "alpha mid"),
    _row("adalora", "down up lora_E", "ranknum"),
    _row("lora-embedding", "embedding_down embedding_up", "alpha"),
    _row("lora-mlx", "mlx_down mlx_up"),
    _row("lora-torchtune", "torchtune_down torchtune_up"),
    _row(
        "loha", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2 alpha dora_scale scalar"
    ),
    _row("lokr", "lokr_w1 lokr_w2", "alpha dora_scale scalar"),
    _row("lokr", "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_t2 alpha dora_scale"),
    _row("lokr", "lokr_w1_a lokr_w1_b lokr_w2", "lokr_t1 alpha dora_scale"),
    _row("lokr", "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b", "lokr_t1 lokr_t2 alpha dora_scale"),
    _row("glora", "a1 a2 b1 b2", "bm alpha"),
    *(
        _row(
            "glora-paper",
            f"glora_{letter}.{part}",
            " ".join(f"glora_{other}.{p}" for other in "ABCDE" for p in ("Xd", "Xu", "X")),
        )
        for letter in "ABCDE"
        for part in ("Xd", "X")
    ),
    _row("glora-paper", "glora_Ad", "glora_Au glora_Bd glora_Bu glora_Cd glora_Cu glora_D glora_E"),
    _row("oft", "oft_blocks", "alpha rescale"),
    _row("oft", "oft_diag", "alpha"),
    _row("oft", "oft_R", "scaled_oft"),
    _row("oft", "oft_r"),
    _row("boft", "boft_R boft_s"),
    _row("ia3", "weight on_input", "alpha"),
    _row("ia3", "ia3_l"),
    _row("vera", "vera_lambda_b vera_lambda_d"),
    _row("hra", "hra_u"),
    _row("hira", "hira_A hira_B"),
    _row("tlora", "q_layer p_layer lambda_layer", "alpha"),
    _row("randlora", "randlora_lambda randlora_gamma"),
    _row("miss", "miss_block"),
    _row("c3a", "c3a_kernel"),
    _row("fourierft", "fourierft_spectrum"),
    _row("shira", "shira_weight"),
    _row("road", "road_theta road_alpha"),
    _row("ln-tuning", "ln_tuning_weight", "ln_tuning_bias"),
    _row("trainable-tokens", "trainable_tokens_delta"),
    _row("full", "diff", "diff_b alpha"),
    _row("full", "diff_b", "alpha"),
    _row("norm", "w_norm", "b_norm"),
    _row("norm", "b_norm"),
    _row("replacement", "set_weight", "reshape_weight"),
    _row("replacement", "weight", "bias"),
    _row("replacement", "bias"),
    _row("replacement", "scale"),
)

SUPPORTED = frozenset(row.name for row in ALGORITHMS if row.is_supported)
# Roles that also occur in checkpoints, and so make no file an adapter.
PLAIN_ROLES = frozenset({"weight", "bias", "scale"})


@dataclass(frozen=True, slots=True)
class Match:
    """The algorithm of a module; `missing` roles make it incomplete, `extra` ones belong to none."""

    name: str
    missing: frozenset[str] = frozenset()
    extra: frozenset[str] = frozenset()

    @property
    def is_whole(self) -> bool:
        return not self.missing and not self.extra


def algorithm_of(roles: frozenset[str]) -> Match:
    """The row that fits `roles`, or the nearest one with what is missing or too much."""
    for row in ALGORITHMS:
        if row.required <= roles <= row.allowed:
            return Match(row.name)
    nearest = max(ALGORITHMS, key=lambda row: _likeness(row, roles))
    if not nearest.required & roles:
        nearest = ALGORITHMS[0]  # an alpha or the like, alone
    return Match(nearest.name, nearest.required - roles, roles - nearest.allowed)


def _likeness(row: Algorithm, roles: frozenset[str]) -> tuple[int, int]:
    return len(row.required & roles), len(row.allowed & roles) - len(row.required - roles)


@dataclass(frozen=True, slots=True)
class Dims:
    """What a module's factors say about the weight they change."""

    rank: int
    out_features: int
    in_features: int
    kernel: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, int]:
        """(out, in * kernel): the delta as a matrix."""
        return self.out_features, self.in_features * prod(self.kernel)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the delta has as many elements, in the same order, as a weight of `shape`.

        A 1x1 convolution and a linear layer hold the same numbers: SD 1's proj_in is the one,
        SD 2's the other.
        """
        same_kernel = self.kernel == shape[2:] or prod(self.kernel) == prod(shape[2:]) == 1
        return (self.out_features, self.in_features) == shape[:2] and same_kernel


def lora_dims(shapes: Mapping[str, tuple[int, ...]]) -> Dims:
    """Rank and dimensions from the shapes of `down` and `up`; ValueError says what does not fit.

    down is (rank, in, *kernel) and up is (out, rank), for convolutions with ones behind it.
    """
    down, up = shapes["down"], shapes["up"]
    if 0 in down or 0 in up:
        raise ValueError("an empty factor; training saved it without gathering its parts")
    if len(down) < 2 or len(up) < 2:
        raise ValueError(f"down is {down} and up is {up}, which are no matrices")
    if up[1] != down[0]:
        raise ValueError(f"up has rank {up[1]} and down has rank {down[0]}")
    if any(n != 1 for n in up[2:]):
        raise ValueError(f"up is {up}; the kernel belongs to down")
    return Dims(down[0], up[0], down[1], down[2:])


def extent_of(algorithm: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(out, in * kernel) of the weight a module's factors change, where the factors alone say it."""
    try:
        return _EXTENTS[algorithm](shapes)
    except (KeyError, IndexError):
        return None


def _lora_extent(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    down, kernel = shapes["down"], shapes.get("mid", shapes["down"])[2:]
    return shapes["up"][0], down[1] * prod(kernel)


def _loha_extent(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    if "hada_t1" in shapes:  # Tucker: the a factors are (rank, out)
        kernel = shapes["hada_t1"][2:]
        return shapes["hada_w1_a"][1], shapes["hada_w1_b"][1] * prod(kernel)
    return shapes["hada_w1_a"][0], prod(shapes["hada_w1_b"][1:])


def _lokr_extent(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    left = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    if "lokr_w2" in shapes:
        right = shapes["lokr_w2"][0], prod(shapes["lokr_w2"][1:])
    elif "lokr_t2" in shapes:
        kernel = shapes["lokr_t2"][2:]
        right = shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1] * prod(kernel)
    else:
        right = shapes["lokr_w2_a"][0], prod(shapes["lokr_w2_b"][1:])
    return left[0] * right[0], left[1] * right[1]


def _full_extent(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    return shapes["diff"][0], prod(shapes["diff"][1:])


_EXTENTS = {
    **dict.fromkeys(
        ("lora", "lora-scaled", "lora-bias", "lora-tucker", "dora", "adalora"), _lora_extent
    ),
    "loha": _loha_extent,
    "lokr": _lokr_extent,
    "full": _full_extent,
}


def rank_of(algorithm: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The inner dimension of a module's factors; None for algorithms without one."""
    for role in _RANK_ROLES.get(algorithm, ()):
        if shapes.get(role):
            return shapes[role][0]
    return None


_RANK_ROLES = {
    **dict.fromkeys(
        ("lora", "lora-scaled", "lora-bias", "lora-tucker", "dora", "adalora"), ("down",)
    ),
    "lora-embedding": ("embedding_down",),
    "loha": ("hada_w1_b",),
    "lokr": ("lokr_w2_b", "lokr_w1_b"),
    "glora": ("a2",),
    "hira": ("hira_A",),
    "vera": ("vera_lambda_d",),
}
