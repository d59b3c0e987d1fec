"""Key <-> (component, module path) in every dialect.

Prefixes are taken off the left end here. What is left is a dotted or an underscore path, which
only a family's table can resolve: `to_q` and `time_emb_proj` hold underscores of their own.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from merge.families.family import DENOISER
from merge.formats.grammar import Match, algorithm_of, parts_of
from merge.formats.suffixes import (
    MLX,
    OLD,
    OTHER,
    PEFT,
    TORCHTUNE,
    XLABS,
    SplitKey,
    is_bundled,
    split_key,
)

TEXT, TEXT_2, TEXT_3 = "text_encoder", "text_encoder_2", "text_encoder_3"
TRANSFORMER_2 = "transformer_2"  # Wan 2.2's expert for low noise

# Longest first: "lora_te1_" is no "lora_te_" with a path that begins with 1.
_FLAT_PREFIXES: tuple[tuple[str, str, str | None], ...] = (
    ("lora_te_wrapped_transformer_", "kohya", TEXT),
    ("lora_prior_unet_", "kohya", "prior"),
    ("lora_prior_te_", "kohya", "prior_text_encoder"),
    ("lora_transformer_", "kohya", DENOISER),
    ("lora_unet_", "kohya", DENOISER),
    ("lora_te1_", "kohya", TEXT),
    ("lora_te2_", "kohya", TEXT_2),
    ("lora_te3_", "kohya", TEXT_3),
    ("lora_te_", "kohya", TEXT),
    ("oft_unet_", "kohya", DENOISER),
    ("oft_te1_", "kohya", TEXT),
    ("oft_te2_", "kohya", TEXT_2),
    ("oft_te_", "kohya", TEXT),
    ("lycoris_", "lycoris", None),
)
_OFT_PREFIX = "oft_"
# Underscores for dots under a prefix we do not know.
_FLAT = re.compile(r"(lora|lycoris|oft|loha|lokr|locon|glora)_")
_DOTTED_PREFIXES: tuple[tuple[str, str | None, str], ...] = (
    ("model.diffusion_model.", "comfy", DENOISER),
    ("diffusion_model.", "comfy", DENOISER),
    ("clip_l.", "comfy", TEXT),
    ("clip_g.", "comfy", TEXT_2),
    ("t5xxl.", "comfy", TEXT_3),
    ("unet.", None, DENOISER),
    ("text_encoder.", None, TEXT),
    ("text_encoder_2.", None, TEXT_2),
    ("text_encoder_3.", None, TEXT_3),
    ("transformer_2.", None, TRANSFORMER_2),
    ("transformer.", None, DENOISER),
    ("prior.", None, "prior"),
    ("vae.", None, "vae"),
    ("connectors.", None, "connectors"),
)
_COMFY_TEXT = re.compile(r"^text_encoders\.([^.]+)\.(transformer\.)?")
_COMFY_ENCODERS = {"clip_l": TEXT, "clip_g": TEXT_2, "t5xxl": TEXT_3}
_PEFT_PREFIX = "base_model.model."
# Left in names by DistributedDataParallel and torch.compile.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|module)(?=\.)")
# PEFT calls a layer that it wraps its base_layer.
_BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")
# First parts of the names of Black Forest Labs' own code, in files without a prefix.
_BFL = {
    *("double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in"),
    "final_layer",
}


@dataclass(frozen=True, slots=True)
class Location:
    """Where a key points, as far as the key itself can say.

    `path` has underscores for dots if `is_flat`; `component` is None if the file leaves it open.
    `whole` is the path in the model that a configuration speaks of: in a PEFT file what looks like a
    component's prefix may be part of it, as in GPT-2's `transformer.h.0`. `wraps` counts PEFT's wrappers between the module and its parameter.
    """

    dialect: str
    component: str | None
    path: str
    is_flat: bool
    whole: str
    wraps: int = 0
    is_oft: bool = False  # kohya's OFT marks itself by its prefix


@dataclass(slots=True)
class Group:
    """The tensors of one module: role -> key. `repeated` keys claim a role a second time."""

    location: Location
    keys: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    spellings: set[str] = field(default_factory=set)

    @property
    def match(self) -> Match:
        return algorithm_of(frozenset(self.keys))

    @property
    def is_adapted(self) -> bool:
        """Whether the module's tensors could be those of no checkpoint."""
        match = self.match
        if match.name == "replacement":
            return PEFT in self.spellings or "set_weight" in self.keys
        return match.is_whole or bool(self.keys.keys() & {"down", "up"})


@dataclass(frozen=True, slots=True)
class Survey:
    """All keys of a file: grouped by module, shared by all modules, word vectors, or unknown.

    Nothing is left out.
    """

    groups: tuple[Group, ...]
    unknown: tuple[str, ...]
    adapter_names: tuple[str, ...]
    bundled: tuple[str, ...] = ()

    @property
    def is_mostly_adapted(self) -> bool:
        """Whether most modules have what no checkpoint has: then it is an adapter."""
        return 2 * sum(group.is_adapted for group in self.groups) > len(self.groups)


# VeRA's projections: one pair for all modules, beside the model itself.
_SHARED = ("vera_A", "vera_B")


def survey(keys: Iterable[str]) -> Survey:
    """Put every key into its module's group, or among the bundled or unknown."""
    groups: dict[tuple[str | None, str, int], Group] = {}
    shared: dict[str, str] = {}
    unknown: list[str] = []
    bundled: list[str] = []
    names: dict[str, None] = {}
    for key in keys:
        split = split_key(key)
        if split is None:
            (bundled if is_bundled(key) else unknown).append(key)
            continue
        if split.adapter is not None:
            names[split.adapter] = None
        if split.role in _SHARED and split.role not in shared:
            shared[split.role] = key
            continue
        _put(groups, key, split)
    for group in groups.values():
        if "vera_lambda_b" in group.keys:
            group.keys |= shared
    if shared and not any("vera_A" in group.keys for group in groups.values()):
        unknown += shared.values()
    found = tuple(part for group in groups.values() for part in _parts(group))
    return Survey(found, tuple(unknown), tuple(names), tuple(bundled))


def _put(groups: dict[tuple[str | None, str, int], Group], key: str, split: SplitKey) -> None:
    location = locate(split)
    if split.role in ("weight", "bias"):  # a wrapped layer's own parameters
        location = replace(location, wraps=0)
    place = (location.component, location.path, location.wraps)
    group = groups.setdefault(place, Group(location))
    if split.spelling != OTHER:  # an alpha is spelled alike everywhere
        group.location = location
    group.spellings.add(split.spelling)
    if split.role in group.keys:
        group.repeated.append(key)
    else:
        group.keys[split.role] = key


def _parts(group: Group) -> list[Group]:
    first, *more = parts_of(group.keys)
    whole = Group(group.location, dict(first), group.repeated, group.spellings)
    return [whole, *(Group(group.location, dict(keys), [], group.spellings) for keys in more)]


def locate(split: SplitKey) -> Location:
    """Component, path and dialect of a key whose suffix is known."""
    if "." not in split.stem:
        for prefix, dialect, component in _FLAT_PREFIXES:
            if split.stem.startswith(prefix):
                # Some trainers leave an underscore at either end of the path.
                path = split.stem.removeprefix(prefix).strip("_")
                is_oft = prefix.startswith(_OFT_PREFIX)
                return Location(dialect, component, path, True, path, is_oft=is_oft)
        if _FLAT.match(split.stem):
            return Location("kohya", None, split.stem, True, split.stem)
    return _locate_dotted(split)


def _locate_dotted(split: SplitKey) -> Location:
    path = _WRAPPERS.sub("", split.stem).lstrip(".")
    path, wraps = _BASE_LAYER.subn("", path)
    is_peft = path.startswith(_PEFT_PREFIX)
    whole = path = path.removeprefix(_PEFT_PREFIX)
    dialect, component = None, None
    # Twice, because some scripts put "transformer." before "diffusion_model.".
    for _ in range(2):
        path, its_dialect, its_component = _take_prefix(path)
        dialect, component = its_dialect or dialect, its_component or component
        path = path.removeprefix(_PEFT_PREFIX)  # "unet.base_model.model.": written by some scripts
    if split.spelling == XLABS:
        path = _path_of_xlabs(path)
    elif split.spelling == TORCHTUNE:
        path = whole = _path_of_torchtune(path)
    path = _current_path(path)
    dialect = "peft" if is_peft else _dialect(split, dialect, component, path)
    return Location(dialect, component, path, False, whole if is_peft else path, wraps)


def _take_prefix(path: str) -> tuple[str, str | None, str | None]:
    if found := _COMFY_TEXT.match(path):
        return path[found.end() :], "comfy", _COMFY_ENCODERS.get(found[1], TEXT)
    for prefix, dialect, component in _DOTTED_PREFIXES:
        if path.startswith(prefix):
            return path.removeprefix(prefix), dialect, component
    return path, None, None


def _dialect(split: SplitKey, dialect: str | None, component: str | None, path: str) -> str:
    if split.spelling in (MLX, TORCHTUNE, XLABS):
        return split.spelling
    if dialect is not None:
        return dialect
    if split.spelling == OLD:
        return "diffusers_old"
    if component is None and path.partition(".")[0] in _BFL:
        return "bfl"
    return "diffusers"


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


_XLABS_STREAMS = {"1": "img_attn", "2": "txt_attn"}
_XLABS_SINGLE = {"qkv": "linear1.qkv", "proj": "linear2"}


def _path_of_xlabs(path: str) -> str:
    """`double_blocks.0.processor.qkv_lora1` is `double_blocks.0.img_attn.qkv` of the original code.

    A single block's `qkv_lora` is the first three parts of its linear1.
    """
    found = re.fullmatch(r"(.+)\.processor\.(qkv|proj)_lora([12]?)", path)
    if found is None:
        return path
    block, layer, stream = found.groups()
    return (
        f"{block}.{_XLABS_STREAMS[stream]}.{layer}" if stream else f"{block}.{_XLABS_SINGLE[layer]}"
    )


_TORCHTUNE = (
    (".attn.output_proj", ".self_attn.o_proj"),
    (".attn.", ".self_attn."),
    (".mlp.w1", ".mlp.gate_proj"),
    (".mlp.w2", ".mlp.down_proj"),
    (".mlp.w3", ".mlp.up_proj"),
)


def _path_of_torchtune(path: str) -> str:
    """torchtune's names of a decoder's layers as transformers has them."""
    if path == "output":
        return "lm_head"
    for its, ours in _TORCHTUNE:
        if its in path:
            path = path.replace(its, ours)
            break
    return path if path.startswith("model.") else f"model.{path}"
