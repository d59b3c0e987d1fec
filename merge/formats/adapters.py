"""What an adapter file holds, resolved against the module tables of the families we know.

Every key is claimed exactly once, by one module of one family with factors that fit it, or the
file is refused with the keys named. Needs the header alone; `scale_of` reads one number.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from merge.errors import (
    BadAdapter,
    MissingKeys,
    NotFinite,
    ShapeMismatch,
    UnknownKeys,
    UnknownModules,
    Unsupported,
)
from merge.families import FAMILIES, Family
from merge.formats.grammar import SUPPORTED, Dims, lora_dims
from merge.formats.header import Header, read_header
from merge.formats.keys import Group, Location, Survey, survey
from merge.formats.metadata import ARCHITECTURE, BASE_VERSION
from merge.formats.reader import TensorFile
from merge.formats.scales import Scales, check_config

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One module's factors. `module` is the path inside the component in diffusers' names.

    `kernel` is the base weight's: () for a linear layer, (1, 1) or (3, 3) for a convolution.
    `config_scale` is alpha / rank where a configuration states it and not the file's tensors.
    """

    component: str
    module: str
    algorithm: str
    keys: Mapping[str, str]
    rank: int
    out_features: int
    in_features: int
    kernel: tuple[int, ...]
    config_scale: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """An adapter whose every key was claimed. `families` are all that fit, `family` the likeliest.

    `alpha_source` says where scales come from: "keys" (some or all modules), "config"
    (adapter_config.json), "metadata" (lora_adapter_metadata), or "assumed" (alpha = rank).
    """

    dialect: str
    family: str | None
    entries: tuple[Entry, ...]
    alpha_source: str
    families: tuple[str, ...] = ()


def config_beside(path: Path) -> Path | None:
    """The adapter_config.json that `path` is read with; None without one. BadFile as for headers."""
    beside = path.with_name(CONFIG_NAME)
    return beside if beside.is_file() and takes_config(read_header(path)) else None


def takes_config(header: Header) -> bool:
    """Whether an adapter_config.json in the same folder is this file's: its keys are PEFT's.

    The file's name says nothing: PEFT files are renamed when they are shared.
    """
    groups = survey(header.tensors).groups
    return bool(groups) and dialect_of(groups) == "peft"


def read_config(path: Path) -> Mapping[str, Any] | None:
    """What `config_beside` holds, parsed."""
    beside = config_beside(path)
    if beside is None:
        return None
    try:
        config = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(path.name, f"{beside.name} beside it is not JSON") from error
    if not isinstance(config, dict):
        raise BadAdapter(path.name, f"{beside.name} beside it is not a JSON object")
    return config


def read_layout(
    file: TensorFile | Header, *, name: str, config: Mapping[str, Any] | None = None
) -> AdapterLayout:
    """Resolve every key of an adapter, or raise BadAdapter naming what does not resolve.

    `config` is the parsed adapter_config.json beside a PEFT file, which decides its scales.
    """
    header = file.header if isinstance(file, TensorFile) else file
    return resolve(survey(header.tensors), header, name=name, config=config)


def resolve(
    found: Survey, header: Header, *, name: str, config: Mapping[str, Any] | None = None
) -> AdapterLayout:
    """`read_layout` of a file whose keys are grouped already.

    Unsupported for PEFT keys without alphas and configuration: PEFT's alpha is rarely the rank.
    """
    if config is not None:
        check_config(config, name)
    _check_survey(found, name)
    dims = [_dims(group, header, name) for group in found.groups]
    family, modules, families = _choose_family(found, dims, header, name)
    scales = Scales(header, config, name)
    entries = tuple(
        _entry(group, its_dims, family, module, scales)
        for group, its_dims, module in zip(found.groups, dims, modules, strict=True)
    )
    _check_unique(entries, name)
    dialect, alpha_source = dialect_of(found.groups), _alpha_source(entries, scales)
    unstated = alpha_source != "keys" and any(entry.config_scale is None for entry in entries)
    if dialect == "peft" and unstated:
        raise Unsupported(name, f"its {CONFIG_NAME}, which holds its alphas, is missing")
    return AdapterLayout(
        dialect=dialect,
        family=family.name,
        entries=entries,
        alpha_source=alpha_source,
        families=families,
    )


def scale_of(entry: Entry, file: TensorFile, layout: AdapterLayout) -> float:
    """alpha / rank. A module without an alpha has 1, as readers of kohya's and diffusers' files do.

    PEFT means something else by that, so `resolve` refuses a PEFT file without its configuration.
    """
    alpha_key = entry.keys.get("alpha")
    if alpha_key is None:
        return 1.0 if entry.config_scale is None else entry.config_scale
    alpha = file.read_scalar(alpha_key)
    if not isfinite(alpha):
        raise NotFinite(file.name, alpha_key)
    return alpha / entry.rank


def dialect_of(groups: Iterable[Group]) -> str:
    """The dialect most modules are spelled in; files that mix two are written by hand."""
    return Counter(group.location.dialect for group in groups).most_common(1)[0][0]


def _check_survey(found: Survey, name: str) -> None:
    if found.unknown:
        raise UnknownKeys(name, found.unknown)
    if len(found.adapter_names) > 1:
        names = ", ".join(found.adapter_names)
        raise Unsupported(name, f"it holds several adapters ({names}); split it first")
    repeated = [key for group in found.groups for key in group.repeated]
    if repeated:
        raise UnknownKeys(name, repeated)
    matches = [(group, group.match) for group in found.groups]
    other = Counter(match.name for _, match in matches if match.name not in SUPPORTED)
    if other:
        what = ", ".join(f"{algorithm} ({n} modules)" for algorithm, n in other.most_common())
        raise Unsupported(name, f"it uses {what}; only LoRA can be merged or baked so far")
    missing = [
        f"{group.location.path} ({', '.join(sorted(match.missing))})"
        for group, match in matches
        if match.missing
    ]
    if missing:
        raise MissingKeys(name, missing)
    extra = [group.keys[role] for group, match in matches for role in sorted(match.extra)]
    if extra:
        raise UnknownKeys(name, extra)


def _dims(group: Group, header: Header, name: str) -> Dims:
    shapes = {role: header.tensors[key].shape for role, key in group.keys.items()}
    alpha = group.keys.get("alpha")
    if alpha is not None and header.tensors[alpha].n_elements != 1:
        detail = f"alpha is {list(header.tensors[alpha].shape)} and not one number"
        raise ShapeMismatch(name, group.location.path, detail)
    try:
        return lora_dims(shapes)
    except ValueError as error:
        raise ShapeMismatch(name, group.location.path, str(error)) from error


def find_module(
    location: Location, family: Family, *, extent: tuple[int, int] | None
) -> tuple[str, str] | None:
    """(component, module) of `family` that a key points to, or None.

    Where the key leaves the component open and several have such a module, `extent`,
    (out, in * kernel) of the adapter's delta, decides. Packed layers are not found.
    """
    found = family.find(location.component, location.path, is_flat=location.is_flat, extent=extent)
    if found is None or found[1].module is None:
        return None
    return found[0], found[1].module


def _choose_family(
    found: Survey, dims: list[Dims], header: Header, name: str
) -> tuple[Family, list[tuple[str, str]], tuple[str, ...]]:
    candidates = []
    for family in FAMILIES.values():
        modules = [
            find_module(group.location, family, extent=its_dims.extent)
            for group, its_dims in zip(found.groups, dims, strict=True)
        ]
        n_named = sum(module is not None for module in modules)
        n_fitting = sum(_fits(m, d, family) for m, d in zip(modules, dims, strict=True))
        candidates.append((n_fitting, n_named, family, modules))
    whole = [(f, m) for n, _, f, m in candidates if n == len(found.groups)]
    if not whole:
        _, n_named, family, modules = max(candidates, key=lambda c: (c[1], c[0]))
        _refuse(found, dims, family if n_named else None, modules, name)
    family, modules = min(whole, key=lambda fit: _unlikeliness(fit[0], header.metadata))
    resolved = [module for module in modules if module is not None]
    return family, resolved, tuple(f.name for f, _ in whole)


def _fits(module: tuple[str, str] | None, dims: Dims, family: Family) -> bool:
    return module is not None and dims.fits(family.components[module[0]][module[1]].shape)


def _unlikeliness(family: Family, metadata: Mapping[str, str]) -> int:
    """0 where the metadata names the family: it breaks ties that keys and shapes leave."""
    return 0 if is_hinted(family, metadata) else 1


def is_hinted(family: Family, metadata: Mapping[str, str]) -> bool:
    """Whether the trainer says that the adapter is for `family`."""
    version = metadata.get(BASE_VERSION, "").strip().lower()
    architecture = metadata.get(ARCHITECTURE, "").strip().lower().partition("/")[0]
    return version in family.base_versions or architecture == family.architecture


def _refuse(
    found: Survey,
    dims: list[Dims],
    family: Family | None,
    modules: list[tuple[str, str] | None],
    name: str,
) -> None:
    if family is None:
        paths = [group.location.path for group in found.groups]
        raise UnknownModules(name, paths, "any family we know")
    unknown = [g.location.path for g, m in zip(found.groups, modules, strict=True) if m is None]
    if unknown:
        raise UnknownModules(name, unknown, family.title)
    for module, its_dims in zip(modules, dims, strict=True):
        if module is not None and not _fits(module, its_dims, family):
            shape = family.components[module[0]][module[1]].shape
            delta = (its_dims.out_features, its_dims.in_features, *its_dims.kernel)
            detail = f"the delta is {delta}, the weight in {family.title} is {shape}"
            raise ShapeMismatch(name, f"{module[0]}.{module[1]}", detail)


def _entry(
    group: Group, dims: Dims, family: Family, module: tuple[str, str], scales: Scales
) -> Entry:
    component, path = module
    has_alpha = "alpha" in group.keys
    return Entry(
        component=component,
        module=path,
        algorithm=group.match.name,
        keys=dict(group.keys),
        rank=dims.rank,
        out_features=dims.out_features,
        in_features=dims.in_features,
        kernel=family.components[component][path].kernel,
        config_scale=None if has_alpha else scales.of(group.location, component, dims.rank),
    )


def _check_unique(entries: Iterable[Entry], name: str) -> None:
    seen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        other = seen.setdefault((entry.component, entry.module), entry)
        if other is not entry:
            both = f"{other.keys['down']} and {entry.keys['down']}"
            raise BadAdapter(name, f"{entry.component}.{entry.module} is there twice: {both}")


def _alpha_source(entries: Iterable[Entry], scales: Scales) -> str:
    if any("alpha" in entry.keys for entry in entries):
        return "keys"
    return scales.source
