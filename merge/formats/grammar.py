"""Which roles make which algorithm: one row for each way its factors are stored. No torch.

`name` is the algorithm for people, `layout` the key under which merge.algorithms reads the factors.
A row without a layout is recognised and not read, and `why` says what stands against it.
A new layout is a row here, its shape rule in merge.formats.shapes, a reader in merge.algorithms
and a page in docs/formats.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

# What `needs` answers: how much of the base's weight the change of some rows depends on.
NOTHING, ROWS, WHOLE = "nothing", "rows", "whole"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row: a module's roles must hold all of `required` and nothing outside `allowed`."""

    name: str
    layout: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    needs: str = NOTHING
    why: str = ""

    @property
    def allowed(self) -> frozenset[str]:
        return self.required | self.optional


def _row(
    name: str, layout: str, required: str, optional: str = "", needs: str = NOTHING, why: str = ""
) -> Algorithm:
    required_roles, optional_roles = frozenset(required.split()), frozenset(optional.split())
    return Algorithm(name, layout, required_roles, optional_roles, needs, why)


_SCALES = "alpha scalar dora_scale"
_SPARSE = "bias_indices bias_values bias_size"
_PAPER_PARTS = " ".join(
    [f"glora_{letter}.{part}" for letter in "ABC" for part in ("Xd", "Xu", "X", "zeros")]
    + [f"glora_{letter}.{part}" for letter in "DE" for part in ("X", "zeros")]
)
_FORK_PARTS = "glora_Ad glora_Au glora_Bd glora_Bu glora_Cd glora_Cu glora_D glora_E"

# Ordered: the first row that fits names the module.
ALGORITHMS: tuple[Algorithm, ...] = (
    _row("adalora", "adalora", "down up lora_E", "ranknum alpha"),
    _row("lora", "lora", "down up", f"{_SCALES} scale mid up_bias {_SPARSE}"),
    _row("lora", "lora-embedding", "embedding_down embedding_up", "alpha dora_scale"),
    _row("lora", "lora-mlx", "mlx_down mlx_up", "dora_scale"),
    _row("lora", "lora-torchtune", "torchtune_down torchtune_up", "alpha dora_scale"),
    _row("loha", "loha", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", f"hada_t1 hada_t2 {_SCALES}"),
    _row("lokr", "lokr", "lokr_w1 lokr_w2", _SCALES),
    _row("lokr", "lokr", "lokr_w1 lokr_w2_a lokr_w2_b", f"lokr_t2 {_SCALES}"),
    _row("lokr", "lokr", "lokr_w1_a lokr_w1_b lokr_w2", _SCALES),
    _row("lokr", "lokr", "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b", f"lokr_t2 {_SCALES}"),
    _row("vera", "vera", "vera_lambda_b vera_lambda_d vera_A vera_B"),
    _row("glora", "glora", "a1 a2 b1 b2", f"bm scale {_SCALES}", ROWS),
    *(
        _row("glora-paper", "glora-paper", role, _PAPER_PARTS, ROWS)
        for role in _PAPER_PARTS.split()
        if not role.endswith(("Xu", "zeros"))
    ),
    *(_row("glora-paper", "glora-paper", role, _FORK_PARTS, ROWS) for role in _FORK_PARTS.split()),
    _row("oft", "oft", "oft_blocks", "alpha rescale dora_scale", WHOLE),
    _row("oft", "oft-kohya", "oft_blocks.0", "alpha", WHOLE),
    _row("oft", "oft-legacy", "oft_diag", "alpha", WHOLE),
    _row("oft", "oft-peft", "oft_R", "scaled_oft", ROWS),
    _row("oft", "oft-peft", "oft_embedding_R", "scaled_oft", ROWS),
    _row("boft", "boft-peft", "boft_R boft_s", "", ROWS),
    _row("ia3", "ia3", "weight on_input", "", ROWS),
    _row("ia3", "ia3-peft", "ia3_l", "", ROWS),
    _row("hra", "hra", "hra_u", "", ROWS),
    _row("hira", "hira", "hira_A hira_B", "", ROWS),
    _row("hira", "hira", "hira_embedding_A hira_embedding_B", "", ROWS),
    _row("full", "full", "diff", "diff_b alpha dora_scale"),
    _row("full", "full", "diff_b", "alpha"),
    _row("norm", "norm", "w_norm", "b_norm"),
    _row("norm", "norm", "b_norm"),
    _row("ln-tuning", "replacement", "ln_tuning_weight", "ln_tuning_bias", ROWS),
    _row("ln-tuning", "replacement", "ln_tuning_bias"),
    _row("tokens", "tokens", "trainable_tokens_delta", "", ROWS),
    _row("replacement", "replacement", "set_weight", "", ROWS),
    _row("replacement", "replacement", "weight", "bias", ROWS),
    _row("replacement", "replacement", "bias"),
    _row("replacement", "replacement", "scale", "", ROWS),
    # Recognised, and not read.
    _row("lora", "", "down up down_bias", f"{_SCALES} up_bias", why="its lora_A has a bias"),
    _row(
        *("lora", "", "down up reshape_weight", f"{_SCALES} up_bias"),
        why="it enlarges layers of the base (reshape_weight)",
    ),
    _row("lokr", "", "lokr_w1_a lokr_w1_b lokr_t1", f"lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 {_SCALES}",
         why="its first factor is a Tucker product"),
    _row("vera", "", "vera_lambda_b vera_lambda_d", "vera_A vera_B",
         why="its shared projections are not in the file (save_projection was false)"),
    _row("oft", "", "oft_r", why="it is of PEFT before 0.16, whose OFT was another formula"),
    _row("tlora", "", "q_layer p_layer lambda_layer", "alpha",
         why="T-LoRA subtracts what its training computed from the base and did not save"),
    _row("control-lora", "", "control_down control_up",
         why="a Control-LoRA is a ControlNet and not a change of the base"),
)  # fmt: skip

LAYOUTS = frozenset(row.layout for row in ALGORITHMS if row.layout) | {
    # These are told apart by a shape, a prefix or a configuration, not by their roles.
    *("boft", "boft-legacy", "lora-experts", "lora-mha"),
}
# Roles that mean what another one means, under which merge.algorithms reads them.
SAME = {"ln_tuning_weight": "weight", "ln_tuning_bias": "bias", "scale": "weight"}
# Roles that change another parameter than the row they stand beside, and make a part of their own.
_APART = (frozenset({"diff", "diff_b"}), frozenset({"w_norm", "b_norm"}), frozenset({"bias"}))
_WHOLE_LAYER = frozenset({"weight", "bias"})
_PEFT = "base_model.model."
_WHY = {
    "vblora": "VB-LoRA takes its factors from a bank of vectors",
    "randlora": "RandLoRA regenerates its projections from a seed",
    "fourierft": "FourierFT regenerates its frequencies from a seed",
    "waveft": "WaveFT regenerates its positions from a seed",
    "road": "RoAd rotates activations and not weights here",
    "prompt": "prompts are inputs and not weights",
    "adaption": "an adaption prompt is an input and not a weight",
    "poly": "Poly routes among several adapters",
}


@dataclass(frozen=True, slots=True)
class Match:
    """The algorithm of a module; `missing` roles make it incomplete, `extra` ones belong to none."""

    name: str
    layout: str
    needs: str = NOTHING
    why: str = ""
    missing: frozenset[str] = frozenset()
    extra: frozenset[str] = frozenset()

    @property
    def is_whole(self) -> bool:
        return not self.missing and not self.extra


def algorithm_of(roles: frozenset[str]) -> Match:
    """The row that fits `roles`, or the nearest one with what is missing or too much."""
    for role in roles:
        method, colon, _ = role.partition(":")
        if colon:
            return Match(method, "", why=_WHY.get(method, f"{method} is not a method we merge"))
    numbered = frozenset(role for role in roles if role.startswith("oft_blocks."))
    for row in ALGORITHMS:
        allowed = row.allowed | numbered if row.layout == "oft-kohya" else row.allowed
        if row.required <= roles <= allowed:
            return _matched(row, roles)
    nearest = max(ALGORITHMS, key=lambda row: _likeness(row, roles))
    if not nearest.required & roles:
        nearest = ALGORITHMS[1]  # an alpha or the like, alone
    return Match(
        nearest.name,
        nearest.layout,
        nearest.needs,
        nearest.why,
        nearest.required - roles,
        roles - nearest.allowed,
    )


def _matched(row: Algorithm, roles: frozenset[str]) -> Match:
    is_dora = row.layout.startswith("lora") and "dora_scale" in roles
    return Match("dora" if is_dora else row.name, row.layout, row.needs, row.why)


def _likeness(row: Algorithm, roles: frozenset[str]) -> tuple[int, int]:
    return len(row.required & roles), len(row.allowed & roles) - len(row.required - roles)


def counts_alpha(roles: Collection[str]) -> bool:
    """Whether an alpha among these roles means anything: beside two whole factors of a Kronecker
    product LyCORIS stores one and ignores it.
    """
    return not {"lokr_w1", "lokr_w2"} <= set(roles)


def parts_of(keys: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    """A module's roles and keys, cut where a file changes weight and bias by different algorithms.

    Distilled models come as low-rank factors beside `diff_b`, and PEFT (bias="all") saves the
    module's own bias beside its factors. Of embeddings and heads that it adapts PEFT saves the weight
    too, for their vocabulary may have grown. Each part has a row of its own.
    """
    if algorithm_of(frozenset(keys)).is_whole:
        return (keys,)
    for apart in _APART:
        if parts := _cut(keys, apart):
            return parts
    parts = _cut(keys, _WHOLE_LAYER) if keys.get("weight", "").startswith(_PEFT) else ()
    if not parts or "dora_scale" in keys:
        return (keys,)
    # What depends on the weight would have to see the one that is saved.
    return parts if algorithm_of(frozenset(parts[0])).needs == NOTHING else (keys,)


def _cut(keys: Mapping[str, str], apart: frozenset[str]) -> tuple[Mapping[str, str], ...]:
    """The keys without some roles, if they are whole, and those; nothing otherwise."""
    part = {role: key for role, key in keys.items() if role in apart}
    rest = {role: key for role, key in keys.items() if role not in apart}
    return (rest, part) if part and rest and algorithm_of(frozenset(rest)).is_whole else ()
