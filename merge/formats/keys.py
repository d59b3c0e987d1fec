"""Key <-> (component, module path) in every dialect.

Prefixes are taken off the left end here. What is left is a dotted or an underscore path, which
only a family's table can resolve: `to_q` and `time_emb_proj` hold underscores of their own.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from merge.formats.grammar import OLD, OTHER, Match, SplitKey, algorithm_of, split_key

UNET, TEXT, TEXT_2, TEXT_3 = "unet", "text_encoder", "text_encoder_2", "text_encoder_3"
TRANSFORMER = "transformer"

# Longest first: "lora_te1_" is no "lora_te_" with a path that begins with 1.
_FLAT_PREFIXES: tuple[tuple[str, str, str | None], ...] = (
    ("lora_prior_unet_", "kohya", "prior"),
    ("lora_prior_te_", "kohya", "prior_text_encoder"),
    ("lora_transformer_", "kohya", TRANSFORMER),
    ("lora_unet_", "kohya", UNET),
    ("lora_te1_", "kohya", TEXT),
    ("lora_te2_", "kohya", TEXT_2),
    ("lora_te3_", "kohya", TEXT_3),
    ("lora_te_", "kohya", TEXT),
    ("oft_unet_", "kohya", UNET),
    ("oft_te1_", "kohya", TEXT),
    ("oft_te2_", "kohya", TEXT_2),
    ("oft_te_", "kohya", TEXT),
    ("lycoris_", "lycoris", None),
)
_DOTTED_PREFIXES: tuple[tuple[str, str | None, str], ...] = (
    ("model.diffusion_model.", "comfy", UNET),
    ("diffusion_model.", "comfy", UNET),
    ("text_encoders.clip_l.transformer.", "comfy", TEXT),
    ("text_encoders.clip_g.transformer.", "comfy", TEXT_2),
    ("text_encoders.t5xxl.transformer.", "comfy", TEXT_3),
    ("unet.", None, UNET),
    ("text_encoder.", None, TEXT),
    ("text_encoder_2.", None, TEXT_2),
    ("text_encoder_3.", None, TEXT_3),
    ("transformer_2.", None, "transformer_2"),
    ("transformer.", None, TRANSFORMER),
    ("prior.", None, "prior"),
    ("vae.", None, "vae"),
)
_PEFT_PREFIX = "base_model.model."
# Left in names by DistributedDataParallel and torch.compile.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|module)(?=\.)")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a key points, as far as the key itself can say.

    `path` has underscores for dots if `is_flat`; `component` is None if the file leaves it open.
    """

    dialect: str
    component: str | None
    path: str
    is_flat: bool


@dataclass(slots=True)
class Group:
    """The tensors of one module: role -> key. `repeated` keys claim a role a second time."""

    location: Location
    keys: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    @property
    def match(self) -> Match:
        return algorithm_of(frozenset(self.keys))


@dataclass(frozen=True, slots=True)
class Survey:
    """All keys of a file: grouped by module, or unknown. Nothing is left out."""

    groups: tuple[Group, ...]
    unknown: tuple[str, ...]
    adapter_names: tuple[str, ...]


def survey(keys: Iterable[str]) -> Survey:
    """Put every key into its module's group, or among the unknown."""
    groups: dict[tuple[str | None, str], Group] = {}
    unknown: list[str] = []
    names: dict[str, None] = {}
    for key in keys:
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        if split.adapter is not None:
            names[split.adapter] = None
        location = locate(split)
        group = groups.setdefault((location.component, location.path), Group(location))
        if split.spelling != OTHER:  # an alpha is spelled alike everywhere
            group.location = location
        if split.role in group.keys:
            group.repeated.append(key)
        else:
            group.keys[split.role] = key
    return Survey(tuple(groups.values()), tuple(unknown), tuple(names))


def locate(split: SplitKey) -> Location:
    """Component, path and dialect of a key whose suffix is known."""
    if "." not in split.stem:
        for prefix, dialect, component in _FLAT_PREFIXES:
            if split.stem.startswith(prefix):
                # Some trainers leave an underscore at either end of the path.
                path = split.stem.removeprefix(prefix).strip("_")
                return Location(dialect, component, path, is_flat=True)
    return _locate_dotted(split)


def _locate_dotted(split: SplitKey) -> Location:
    path = _WRAPPERS.sub("", split.stem).lstrip(".")
    is_peft = path.startswith(_PEFT_PREFIX)
    path = path.removeprefix(_PEFT_PREFIX)
    dialect, component = None, None
    for prefix, its_dialect, its_component in _DOTTED_PREFIXES:
        if path.startswith(prefix):
            path, dialect, component = path.removeprefix(prefix), its_dialect, its_component
            break
    if path.startswith(_PEFT_PREFIX):  # "unet.base_model.model.": written by some scripts
        path = path.removeprefix(_PEFT_PREFIX)
        is_peft = True
    path = _current_path(path)
    if is_peft:
        dialect = "peft"
    elif dialect is None:
        dialect = "diffusers_old" if split.spelling == OLD else "diffusers"
    return Location(dialect, component, path, is_flat=False)


_PROCESSOR_NAMES = {"to_out_lora": "to_out.0"}
_TEXT_PROCESSOR_NAMES = {
    "to_q_lora": "q_proj",
    "to_k_lora": "k_proj",
    "to_v_lora": "v_proj",
    "to_out_lora": "out_proj",
}


def _current_path(path: str) -> str:
    """`attn1.processor.to_out_lora` of diffusers before 0.22 is today's `attn1.to_out.0`."""
    head, _, last = path.replace(".processor.", ".").rpartition(".")
    if last.endswith("_lora"):
        names = _TEXT_PROCESSOR_NAMES if head.endswith("self_attn") else _PROCESSOR_NAMES
        last = names.get(last, last.removesuffix("_lora"))
    return f"{head}.{last}" if head else last
