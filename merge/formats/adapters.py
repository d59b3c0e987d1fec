"""What an adapter file holds, resolved against the module tables of the families we know.

Every key is claimed exactly once, by one layer with factors that fit it, or the file is refused
with the keys named. Needs the header alone.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge.errors import (
    BadAdapter,
    BadCheckpoint,
    ShapeMismatch,
    Unsupported,
)
from merge.families import Layer
from merge.families.checkpoints import read_checkpoint
from merge.formats.claims import check_survey, check_unique
from merge.formats.configs import NEEDS_CONFIG, Config, Configs
from merge.formats.embeddings import is_embedding
from merge.formats.grammar import ROWS, SAME, WHOLE, Match
from merge.formats.header import Header, read_header
from merge.formats.keys import Group, Survey, survey
from merge.formats.lookup import choose, open_layer
from merge.formats.reader import TensorFile
from merge.formats.shapes import Dims, is_on_input, measure
from merge.formats.sources import File, beside, opened, read_bytes

CONFIG_NAME = "adapter_config.json"
_CONFIGURED = ("peft", "mlx", "torchtune")  # dialects whose files are half of an adapter


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer's factors, by role. `algorithm` is for people, `layout` for merge.algorithms.

    `rank` is the stored inner dimension; `exact_rank` that of the change as a product without a
    base, None if it is none. `needs` says how much of the base's weight the change depends on.
    `facts` is what a configuration says and the tensors do not. `dims` is what the factors show:
    where they leave a side open, `layer` has 0 there unless a family knows it.
    """

    component: str
    layer: Layer
    algorithm: str
    layout: str
    keys: Mapping[str, str]
    rank: int | None
    exact_rank: int | None
    needs: str
    dims: Dims
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.component}.{self.layer.path}"

    @property
    def touches_bias(self) -> bool:
        """Whether the layer's bias changes too."""
        if self.layout == "ia3-peft":
            return not self.facts.get("is_feedforward", False)
        return any(role in _BIAS_ROLES for role in self.keys)

    @property
    def touches_weight(self) -> bool:
        return not self.keys.keys() <= {"diff_b", "b_norm", "bias", "alpha"}


_BIAS_ROLES = frozenset(
    {
        *("up_bias", "diff_b", "b_norm", "bias"),
        *(f"glora_{letter}.{part}" for letter in "CDE" for part in ("Xd", "Xu", "X")),
        *("glora_Cd", "glora_Cu", "glora_D", "glora_E"),
    }
)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """An adapter whose every key was claimed. `families` are all that fit, `family` the likeliest.

    Both are empty for a family outside our tables. `alpha_source` says where scales come from:
    "keys" (some or all modules), "config" (adapter_config.json), "metadata"
    (lora_adapter_metadata), or "assumed" (alpha = rank).
    """

    dialect: str
    family: str | None
    entries: tuple[Entry, ...]
    alpha_source: str
    families: tuple[str, ...] = ()


def config_beside(file: File) -> File | None:
    """The adapter_config.json that `file` is read with; None without one. BadFile as for headers."""
    # Here a look costs less than the header, elsewhere it costs a request.
    if isinstance(file, Path) and beside(file, CONFIG_NAME) is None:
        return None
    return beside(file, CONFIG_NAME) if takes_config(read_header(file)) else None


def takes_config(header: Header) -> bool:
    """Whether an adapter_config.json in the same folder is this file's: its keys are PEFT's,
    MLX's or torchtune's.

    The file's name says nothing: PEFT files are renamed when they are shared.
    """
    groups = survey(header.tensors).groups
    return bool(groups) and dialect_of(groups) in _CONFIGURED


def read_config(file: File) -> Mapping[str, Any] | None:
    """What `config_beside` holds, parsed."""
    found = config_beside(file)
    if found is None:
        return None
    try:
        with opened(found) as source:
            config = json.loads(read_bytes(source, 0, source.size))
    except (ValueError, RecursionError) as error:
        raise BadAdapter(file.name, f"{CONFIG_NAME} beside it is not JSON") from error
    if not isinstance(config, dict):
        raise BadAdapter(file.name, f"{CONFIG_NAME} beside it is not a JSON object")
    return config


def read_layout(
    file: TensorFile | Header, *, name: str, config: Mapping[str, Any] | None = None
) -> AdapterLayout:
    """Resolve every key of an adapter, or raise BadAdapter naming what does not resolve.

    `config` is the parsed adapter_config.json beside a PEFT or MLX file.
    """
    header = file.header if isinstance(file, TensorFile) else file
    return resolve(survey(header.tensors), header, name=name, config=config)


def resolve(
    found: Survey, header: Header, *, name: str, config: Mapping[str, Any] | None = None
) -> AdapterLayout:
    """`read_layout` of a file whose keys are grouped already.

    Unsupported for PEFT keys without alphas and configuration: PEFT's alpha is rarely the rank.
    """
    _check_whole(name)
    _check_kind(found, header, name)
    configs = Configs(header, config, name)
    check_survey(found, name)
    parts = [_Part(group, header, configs.of("")) for group in found.groups]
    _mark_attention(parts)
    for part in parts:
        part.measure(name)
    choice = choose(
        [p.group.location for p in parts], [p.dims for p in parts], header.metadata, name
    )
    entries = tuple(
        _entry(part, *layer, configs) for part, layer in zip(parts, choice.layers, strict=True)
    )
    for entry in entries:
        _check_stated(entry, name)
    check_unique(entries, name)
    dialect = dialect_of(found.groups)
    for entry in entries:
        is_stated = configs.of(entry.component) is not None or "alpha" in entry.keys
        if dialect in _CONFIGURED and entry.layout in NEEDS_CONFIG and not is_stated:
            raise Unsupported(name, f"its {CONFIG_NAME}, which holds its alphas, is missing")
    return AdapterLayout(
        dialect=dialect,
        family=None if choice.family is None else choice.family.name,
        entries=entries,
        alpha_source=_alpha_source(entries, configs),
        families=choice.families,
    )


def _check_stated(entry: Entry, name: str) -> None:
    """Refuse what can only be read with more than the file says."""
    is_fork = entry.layout == "glora-paper" and not all("." in role for role in entry.keys)
    if is_fork and "eval_config" not in entry.facts:
        why = "it holds a GLoRA supernet, and its eval_config, which says what counts, is missing"
        raise Unsupported(name, why)
    if entry.layout == "lora-mlx" and entry.layer.path.endswith(_EMBEDDINGS):
        why = f"{entry.name} is an embedding, whose factors MLX stores the other way round"
        raise Unsupported(name, why)


_EMBEDDINGS = (".embed_tokens", ".wte", ".tok_embeddings")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


def _check_whole(name: str) -> None:
    shard = _SHARD.search(name)
    if shard is not None and shard[2] != "00001":
        why = f"it is part {int(shard[1])} of {int(shard[2])} of an adapter; join the parts first"
        raise Unsupported(name, why)


def _check_kind(found: Survey, header: Header, name: str) -> None:
    """Refuse what is whole weights: as an adapter it would replace those of the base."""
    if any(group.is_adapted for group in found.groups) or not header.tensors:
        return
    if is_embedding(header.tensors):
        raise Unsupported(name, "it holds word vectors (textual inversion), which change no weight")
    try:
        checkpoint = read_checkpoint(header, name)
    except BadCheckpoint:
        return
    titles = " or ".join(family.title for family in checkpoint.families)
    raise Unsupported(name, f"it is a checkpoint of {titles}, not an adapter")


def dialect_of(groups: Iterable[Group]) -> str:
    """The dialect most modules are spelled in; files that mix two are written by hand."""
    return Counter(group.location.dialect for group in groups).most_common(1)[0][0]


def layout_of(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> Match:
    """The module's row; kinds of OFT have the same roles and other shapes or prefixes."""
    match = group.match
    blocks = next((shapes[role] for role in ("oft_blocks", "oft_diag") if role in shapes), ())
    if match.layout not in ("oft", "oft-legacy") or not blocks:
        return match
    if match.layout == "oft" and group.location.is_oft:
        return replace(match, layout="oft-kohya")
    if len(blocks) == 4:
        return replace(match, name="boft", layout=f"b{match.layout}")
    return match


class _Part:
    """A group on its way to an entry."""

    def __init__(self, group: Group, header: Header, config: Config | None) -> None:
        self.group = group
        self.shapes = {role: header.tensors[key].shape for role, key in group.keys.items()}
        self.match = layout_of(group, self.shapes)
        self.layout = self.match.layout
        self.parameter = ""  # a bare parameter of the module, which its key does not name
        self.experts = 0
        if self.layout == "lora" and config is not None:
            self._aim_at_experts(config)

    def _aim_at_experts(self, config: Config) -> None:
        target = config.experts(self.group.location)
        if target is not None:
            self.layout = "lora-experts"
            self.parameter, self.rank = target
            self.experts = self.shapes["down"][0] // self.rank

    def measure(self, name: str) -> None:
        try:
            self.dims = measure(self.layout, self.shapes)
            if self.experts and self.shapes["down"][0] != self.experts * self.rank:
                raise ValueError(
                    f"down is {self.shapes['down']}, which is no list of ranks {self.rank}"
                )
        except ValueError as error:
            raise ShapeMismatch(name, self.group.location.path, str(error)) from error

    @property
    def needs(self) -> str:
        """DoRA's norms are of rows, or of columns, which take the whole weight."""
        if "dora_scale" not in self.shapes:
            return self.match.needs
        axis = self.dora_axis
        if axis is None:
            is_input = is_on_input(self.shapes["dora_scale"], self.dims)
        else:
            is_input = axis == "input"
        return WHOLE if is_input or self.match.needs == WHOLE else ROWS

    @property
    def dora_axis(self) -> str | None:
        """Which axis PEFT's name for the magnitudes means; other names leave it to the shape."""
        if "magnitude_vector" not in self.group.keys.get("dora_scale", ""):
            return None
        return "input" if self.layout == "lora-embedding" else "output"


def _mark_attention(parts: Sequence[_Part]) -> None:
    """PEFT puts the factors of nn.MultiheadAttention's packed projection on the module itself."""
    wrapped = {p.group.location.path for p in parts if p.group.location.wraps}
    for part in parts:
        path = part.group.location.path
        if part.layout == "lora" and f"{path}.out_proj" in wrapped:
            part.layout, part.parameter = "lora-mha", "in_proj_weight"


def _entry(part: _Part, component: str, layer: Layer, configs: Configs) -> Entry:
    keys = dict(part.group.keys)
    if part.layout == "replacement":
        keys = {SAME.get(role, role): key for role, key in keys.items()}
    dims, facts = part.dims, {}
    config = configs.of(component)
    if config is not None:
        has_alpha = "alpha" in keys
        facts = config.facts(part.layout, part.group.location, dims, has_alpha=has_alpha)
    if part.layout == "ia3-peft" and len(part.shapes["ia3_l"]) == 2:
        facts.setdefault("is_feedforward", part.shapes["ia3_l"][0] == 1)
    if part.dora_axis is not None:
        facts["dora_axis"] = part.dora_axis
    if "dora_scale" in keys and configs.dora_eps:
        facts["dora_eps"] = configs.dora_eps
    if part.parameter:
        layer = open_layer(f"{layer.path}.{part.parameter}", dims, "parameter")
    if part.experts:
        facts["n_experts"] = part.experts
        out, inner = dims.shape[:2]
        layer = replace(layer, shape=(part.experts, out, inner))
        dims = Dims(part.experts, out * inner, None, dims.rank)
    return Entry(
        component=component,
        layer=layer,
        algorithm=part.match.name,
        layout=part.layout,
        keys=keys,
        rank=dims.rank,
        exact_rank=dims.exact_rank,
        needs=part.needs,
        dims=dims,
        facts=facts,
    )


def _alpha_source(entries: Iterable[Entry], configs: Configs) -> str:
    if any("alpha" in entry.keys for entry in entries):
        return "keys"
    return configs.source
