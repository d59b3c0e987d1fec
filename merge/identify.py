"""What a safetensors file is, from its header and a few numbers in it. No torch.

Any valid file gets an answer. What merging would refuse is a warning here, in the same words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from merge import doubts
from merge.doubts import Doubt
from merge.errors import BadAdapter, BadCheckpoint
from merge.families import FAMILIES
from merge.families.checkpoints import Checkpoint, read_checkpoint
from merge.formats.adapters import AdapterLayout, dialect_of, layout_of, resolve
from merge.formats.embeddings import WIDTHS, is_embedding
from merge.formats.hashes import Hashes, hash_file
from merge.formats.keys import Group, Survey, survey
from merge.formats.lookup import Fit, Found, fit_all
from merge.formats.metadata import trigger_words
from merge.formats.reader import TensorFile
from merge.formats.shapes import Dims, measure
from merge.guesses import FamilyGuess, guess, outside_guesses

ADAPTER, CHECKPOINT, EMBEDDING, OTHER = "adapter", "checkpoint", "embedding", "other"


@dataclass(frozen=True, slots=True)
class Span:
    """The smallest and the largest of some numbers."""

    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Identification:
    """The answer of `graft inspect`. `to_json` is its public form."""

    kind: str
    algorithms: tuple[str, ...]  # by falling number of modules, values stored whole last
    dialect: str | None  # of an adapter's keys, or the layout of a checkpoint
    families: tuple[FamilyGuess, ...]  # likeliest first
    modules: int
    components: Mapping[str, int]
    ranks: Span | None
    alphas: Span | None
    targets: tuple[str, ...]
    dtypes: Mapping[str, int]
    parameters: int
    size_bytes: int
    hashes: Hashes | None
    trigger_words: tuple[str, ...]
    metadata: Mapping[str, str]
    warnings: tuple[Doubt, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "algorithms": list(self.algorithms),
            "dialect": self.dialect,
            "families": [
                {"name": f.name, "confidence": f.confidence, "why": f.why} for f in self.families
            ],
            "modules": self.modules,
            "components": dict(self.components),
            "ranks": _span_json(self.ranks),
            "alphas": _span_json(self.alphas),
            "targets": list(self.targets),
            "dtypes": dict(self.dtypes),
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "hashes": None if self.hashes is None else self.hashes.to_json(),
            "trigger_words": list(self.trigger_words),
            "metadata": dict(self.metadata),
            "warnings": [
                {"code": w.code, "message": w.message, "keys": list(w.keys)} for w in self.warnings
            ],
        }


def identify(
    path: Path,
    *,
    hashes: bool = True,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Identification:
    """Say what the file at `path` is; BadFile if it is no valid safetensors file.

    `config` is the parsed adapter_config.json beside a PEFT file. Hashes read the whole file.
    """
    with TensorFile(path, name=name) as file:
        computed = hash_file(path, file.header.data_offset, name=name) if hashes else None
        return identify_file(file, hashes=computed, config=config)


def identify_file(
    file: TensorFile, *, hashes: Hashes | None = None, config: Mapping[str, Any] | None = None
) -> Identification:
    """The same for a file that is open, with hashes that are known."""
    found = survey(file.header.tensors)
    # Looking for a checkpoint takes time.
    checkpoint = None if found.is_mostly_adapted else _read_checkpoint(file)
    if checkpoint is not None:
        facts = _checkpoint_facts(checkpoint)
    elif any(group.is_adapted for group in found.groups):
        facts = _adapter_facts(file, found, config)
    elif is_embedding(file.header.tensors):
        facts = _embedding_facts(file)
    else:
        facts = _other_facts(file, found)
    return _identification(file, facts, hashes)


@dataclass(frozen=True, slots=True)
class _Facts:
    """The part of the answer that depends on the kind of file."""

    kind: str
    algorithms: tuple[str, ...] = ()
    dialect: str | None = None
    families: tuple[FamilyGuess, ...] = ()
    modules: int = 0
    components: Mapping[str, int] | None = None
    ranks: Span | None = None
    alphas: Span | None = None
    targets: tuple[str, ...] = ()
    warnings: tuple[Doubt, ...] = ()


def _identification(file: TensorFile, facts: _Facts, hashes: Hashes | None) -> Identification:
    header = file.header
    tensors = header.tensors.values()
    return Identification(
        kind=facts.kind,
        algorithms=facts.algorithms,
        dialect=facts.dialect,
        families=facts.families,
        modules=facts.modules,
        components=facts.components or {},
        ranks=facts.ranks,
        alphas=facts.alphas,
        targets=facts.targets,
        dtypes=dict(Counter(info.dtype for info in tensors).most_common()),
        parameters=sum(info.n_elements for info in tensors),
        size_bytes=header.file_size,
        hashes=hashes,
        trigger_words=tuple(trigger_words(header.metadata)),
        metadata=header.metadata,
        warnings=(*facts.warnings, *doubts.of_container(header, hashes)),
    )


def _read_checkpoint(file: TensorFile) -> Checkpoint | None:
    try:
        return read_checkpoint(file.header, file.name)
    except BadCheckpoint:
        return None


def _checkpoint_facts(checkpoint: Checkpoint) -> _Facts:
    family = checkpoint.family
    components = {
        name: sum(module.takes_adapters for module in family.components[name].values())
        for name in checkpoint.components
    }
    n = sum(components.values())
    why = f"all {n} layers of {_listed(components)} are there with its shapes"
    confidence = 1.0 if len(checkpoint.families) == 1 else 0.5
    return _Facts(
        kind=CHECKPOINT,
        dialect=checkpoint.layout,
        families=tuple(FamilyGuess(f.name, confidence, why) for f in checkpoint.families),
        modules=n,
        components=components,
    )


def _adapter_facts(file: TensorFile, found: Survey, config: Mapping[str, Any] | None) -> _Facts:
    groups = found.groups
    layout, refusal = _try_layout(file, found, config)
    described = _refused_modules(file, found) if layout is None else _modules(layout)
    dims = [its for its in described.dims if its is not None]
    extents = [None if its is None else its.extent for its in described.dims]
    alphas = _read_alphas(file, groups)
    ranks = [its.rank for its in dims if its.rank is not None]
    return _Facts(
        kind=ADAPTER,
        algorithms=_by_weight(described.algorithms),
        dialect=dialect_of(groups),
        families=guess(file.header.metadata, groups, extents, described.fits, config),
        modules=len(groups),
        components=_components(groups, described.layers),
        ranks=_span(ranks),
        alphas=_span([a for a in alphas.values() if isfinite(a)] or _config_alphas(layout)),
        targets=_targets(groups, described.layers),
        warnings=(
            *([refusal] if refusal else []),
            *([doubts.OPEN_FAMILY] if layout is not None and layout.family is None else []),
            *doubts.of_adapter(file.header, found, alphas, ranks, refusal),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Modules:
    """What is known of every module of an adapter; the lists are parallel to the survey's groups."""

    algorithms: Sequence[str]
    dims: Sequence[Dims | None]
    layers: Sequence[Found | None]
    fits: Sequence[Fit]


def _modules(layout: AdapterLayout) -> _Modules:
    entries = layout.entries
    layers = [(entry.component, entry.layer) for entry in entries]
    n_measured = sum(entry.dims.is_shown for entry in entries)
    return _Modules(
        [entry.algorithm for entry in entries],
        [entry.dims for entry in entries],
        layers,
        [Fit(FAMILIES[name], layers, len(layers), 0, n_measured) for name in layout.families],
    )


def _refused_modules(file: TensorFile, found: Survey) -> _Modules:
    tensors, groups = file.header.tensors, found.groups
    shapes = [{role: tensors[key].shape for role, key in g.keys.items()} for g in groups]
    matches = [layout_of(group, its) for group, its in zip(groups, shapes, strict=True)]
    dims = [
        _measured(match.layout, its) if match.is_whole else None
        for match, its in zip(matches, shapes, strict=True)
    ]
    fits = fit_all([group.location for group in groups], dims)
    best = max(fits, key=lambda fit: (fit.n_fitting, fit.n_named), default=None)
    layers = [None] * len(groups) if best is None else best.layers
    return _Modules([match.name for match in matches], dims, layers, fits)


def _measured(layout: str, shapes: Mapping[str, tuple[int, ...]]) -> Dims | None:
    """None for factors that do not fit each other, and for what is recognised and not read."""
    try:
        return measure(layout, shapes) if layout else None
    except ValueError:
        return None


def _try_layout(
    file: TensorFile, found: Survey, config: Mapping[str, Any] | None
) -> tuple[AdapterLayout | None, Doubt | None]:
    try:
        return resolve(found, file.header, name=file.name, config=config), None
    except BadAdapter as error:
        return None, doubts.of_refusal(error, file.name)


# Norms and biases that come along, often more of them than of the layers an adapter is about.
_STORED_WHOLE = frozenset({"full", "norm", "replacement", "ln-tuning", "tokens"})


def _by_weight(names: Iterable[str]) -> tuple[str, ...]:
    counts = Counter(names)
    return tuple(sorted(counts, key=lambda name: (name in _STORED_WHOLE, -counts[name])))


def _components(groups: Sequence[Group], layers: Sequence[Found | None]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for group, layer in zip(groups, layers, strict=True):
        counts[(layer[0] if layer else group.location.component) or "unknown"] += 1
    return dict(counts.most_common())


# Up to the last numbered block, which says where a module is and not what it is.
_BLOCK = re.compile(r"^.*\.\d+\.(?=[^.]*[a-z])|^.*_\d+_(?=[a-z])")


def _targets(groups: Sequence[Group], layers: Sequence[Found | None]) -> tuple[str, ...]:
    """The kinds of layers that are changed: attn1.to_q, ff.net.0.proj, conv1, …"""
    counts: Counter[str] = Counter()
    for group, layer in zip(groups, layers, strict=True):
        path = layer[1].module or layer[1].path if layer else group.location.path
        counts[_kind_of_layer(path)] += 1
    return tuple(sorted(counts))


def _kind_of_layer(path: str) -> str:
    found = _OWN_BLOCK.match(path)
    return path[found.end() :] if found else _BLOCK.sub("", path)


_OWN_BLOCK = re.compile(
    r"^.*?(?:transformer_blocks|encoder\.layers)\.\d+\.|^.*?(?:resnets|attentions|samplers)\.\d+\."
)


def _read_alphas(file: TensorFile, groups: Iterable[Group]) -> dict[str, float]:
    """Key -> value of every stored alpha; one small read each."""
    found = {}
    for group in groups:
        key = group.keys.get("alpha")
        if key is None:
            continue
        info = file.header.tensors[key]
        if info.n_elements == 1 and not info.dtype.startswith("F8"):
            found[key] = file.read_scalar(key)
    return found


def _config_alphas(layout: AdapterLayout | None) -> list[float]:
    if layout is None:
        return []
    return [e.facts["scale"] * (e.rank or 1) for e in layout.entries if "scale" in e.facts]


_SD3 = ("sd3-medium", "sd35-medium", "sd35-large")


def _embedding_facts(file: TensorFile) -> _Facts:
    tensors = file.header.tensors
    widths = {info.shape[-1] for info in tensors.values() if info.shape}
    if {768, 1280} <= widths:
        names: tuple[str, ...] = _SD3 if 4096 in widths else ("sdxl",)
    elif {768, 4096} <= widths:
        names = ("flux1",)
    else:
        names = WIDTHS.get(max(widths, default=0), ())
    why = f"its vectors are {_listed(sorted(widths))} wide"
    return _Facts(
        kind=EMBEDDING,
        families=tuple(FamilyGuess(name, round(0.8 / len(names), 2), why) for name in names),
        components={key: _n_vectors(info.shape) for key, info in tensors.items()},
    )


def _n_vectors(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) > 1 else 1


_FEWEST_LAYERS = 10
_NOT_CHECKPOINTS = (
    (r"^lllite_unet_", "a ControlNet-LLLite"),
    (r"^control_model\.|controlnet_cond_embedding\.|^controlnet_", "a ControlNet"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"^(first_stage_model\.)?(encoder\.conv_in|decoder\.conv_out)\.", "a VAE"),
    (r"^optimizer_state", "the state of an optimizer"),
)


def _other_facts(file: TensorFile, found: Survey) -> _Facts:
    for expression, what in _NOT_CHECKPOINTS:
        pattern = re.compile(expression)
        if any(pattern.search(key) for key in file.header.tensors):
            notice = Doubt("recognised_as", f"it looks like {what}, which is no adapter", ())
            return _Facts(kind=OTHER, warnings=(notice,))
    layers = [group for group in found.groups if "weight" in group.keys]
    if len(layers) < _FEWEST_LAYERS:
        return _Facts(kind=OTHER)
    extents = [_weight_extent(file, group) for group in layers]
    return _Facts(
        kind=CHECKPOINT,
        families=outside_guesses(file.header.metadata, layers, extents),
        modules=len(layers),
        warnings=(Doubt("unknown_family", "its keys and shapes are of no family we know", ()),),
    )


def _weight_extent(file: TensorFile, group: Group) -> tuple[int, int] | None:
    shape = file.header.tensors[group.keys["weight"]].shape
    return (shape[0], shape[1]) if len(shape) >= 2 else None


def _span(values: Sequence[float]) -> Span | None:
    return Span(min(values), max(values)) if values else None


def _span_json(span: Span | None) -> dict[str, float] | None:
    return None if span is None else {"min": span.min, "max": span.max}


def _listed(values: Iterable[Any]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
