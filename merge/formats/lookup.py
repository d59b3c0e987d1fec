"""Which layer of which family a module's tensors are for: names first, then shapes.

A family outside our tables is open: its dotted paths are taken as they stand, and the base in hand
decides by its own keys. Underscore names are never guessed at.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge.errors import ShapeMismatch, UnknownModules
from merge.families import Family, Layer, Run, candidates
from merge.families.family import DENOISER, OWN
from merge.families.stated import statements
from merge.formats.keys import Location
from merge.formats.shapes import Dims

Found = tuple[str, Layer]
_TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True, slots=True)
class Choice:
    """The family a file is for, None for an open one, all that fit, and a layer for every module."""

    family: Family | None
    families: tuple[str, ...]
    layers: Sequence[Found]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a file's modules fit one family; `layers` is parallel to them, None for an unknown name."""

    family: Family
    layers: Sequence[Found | None]
    n_named: int
    n_misfitting: int  # named modules whose factors do not fit the layer
    n_measured: int  # named modules whose factors show a side of their weight at least

    @property
    def n_fitting(self) -> int:
        return self.n_named - self.n_misfitting

    @property
    def is_meant(self) -> bool:
        """Whether the file is for this family, even if something in it is not."""
        n = len(self.layers)
        return self.n_named == n or 2 * self.n_fitting >= n

    @property
    def is_whole(self) -> bool:
        return self.n_named == len(self.layers) and not self.n_misfitting


def find_layer(location: Location, family: Family, dims: Dims | None) -> Found | None:
    """(component, layer) of `family` that a key points to, one that fits `dims` if there is one."""
    first = None
    for found in _candidates(location, family, dims):
        if dims is None or dims.fits(found[1].shape):
            return found
        first = first or found
    return first


def _candidates(location: Location, family: Family, dims: Dims | None) -> Iterator[Found]:
    component, path, is_flat = location.component, location.path, location.is_flat
    extent = dims.extent if dims is not None else None
    if found := family.find(component, path, is_flat=is_flat, extent=extent):
        yield found
    elif part := _part(location, family):
        yield part
    elif found := family.find(component, f"{path}.scale", is_flat=is_flat):
        yield found  # the original Flux calls the weight of a norm its scale
    if extent is None and (component is None or component.startswith(_TEXT_ENCODER)):
        for name in family.models:
            if name != component and (component is None or name.startswith(_TEXT_ENCODER)):
                found = family.find(name, path, is_flat=is_flat)
                if found is not None and found[0] == name:
                    yield found


_PART = re.compile(r"(.+)\.(\d|qkv)")


def _part(location: Location, family: Family) -> Found | None:
    """`img_attn.qkv.1` is the second part of a packed layer, `linear1.qkv` its first three."""
    found = None if location.is_flat else _PART.fullmatch(location.path)
    if found is None:
        return None
    packed = family.find(location.component, found[1], is_flat=False)
    if packed is None or len(packed[1].runs) < 2:
        return None
    runs = packed[1].runs
    wanted = runs[:3] if found[2] == "qkv" else runs[int(found[2]) : int(found[2]) + 1]
    if not wanted:
        return None
    begin = wanted[0].begin
    moved = tuple(replace(run, begin=run.begin - begin) for run in wanted)
    shape = (sum(run.rows for run in wanted), *packed[1].shape[1:])
    return packed[0], replace(packed[1], path=location.path, shape=shape, runs=moved)


def fit_all(locations: Sequence[Location], dims: Sequence[Dims | None]) -> list[Fit]:
    """How the modules fit every family that may name most of them, and does name some."""
    families = candidates((location.path, location.is_flat) for location in locations)
    fits = (fit(locations, dims, family) for family in families)
    return [its for its in fits if its.n_named]


def fit(locations: Sequence[Location], dims: Sequence[Dims | None], family: Family) -> Fit:
    """Look every module up in one family."""
    layers = [find_layer(at, family, its) for at, its in zip(locations, dims, strict=True)]
    named = [(layer, its) for layer, its in zip(layers, dims, strict=True) if layer is not None]
    measured = [(layer[1], its) for layer, its in named if its is not None and its.is_shown]
    n_misfitting = sum(not its.fits(layer.shape) for layer, its in measured)
    return Fit(family, layers, len(named), n_misfitting, len(measured))


def choose(
    locations: Sequence[Location], dims: Sequence[Dims], metadata: Mapping[str, str], name: str
) -> Choice:
    """The family whose layers take every module, or an open one.

    UnknownModules or ShapeMismatch where a family is meant and does not take them all.
    """
    fits = fit_all(locations, dims)
    whole = [its for its in fits if its.is_whole]
    if whole:
        stated = {family for said in statements(metadata) for family in said.families}
        likeliest = min(whole, key=lambda its: its.family.name not in stated)
        layers = [layer for layer in likeliest.layers if layer is not None]
        return Choice(likeliest.family, tuple(its.family.name for its in whole), layers)
    best = max(fits, key=lambda its: (its.n_named, its.n_fitting), default=None)
    is_flat = any(location.is_flat for location in locations)
    if best is not None and (is_flat or best.is_meant):
        _refuse(locations, dims, best, name)
    if is_flat:
        raise UnknownModules(name, [at.path for at in locations], "any family we know")
    return Choice(None, (), [_open_layer(at, its) for at, its in zip(locations, dims, strict=True)])


def _refuse(locations: Sequence[Location], dims: Sequence[Dims], best: Fit, name: str) -> None:
    title = best.family.title
    unknown = [at.path for at, layer in zip(locations, best.layers, strict=True) if layer is None]
    if unknown:
        raise UnknownModules(name, unknown, title)
    for layer, its in zip(best.layers, dims, strict=True):
        if layer is not None and not its.fits(layer[1].shape):
            detail = f"the delta is {its.shape}, the weight in {title} is {layer[1].shape}"
            raise ShapeMismatch(name, f"{layer[0]}.{layer[1].path}", detail)


_OPEN_COMPONENT = "model"
_OPEN_DENOISER = "transformer"


def _open_layer(location: Location, dims: Dims) -> Found:
    component = location.component or _OPEN_COMPONENT
    if location.dialect == "peft":
        component = _OPEN_COMPONENT
    elif component == DENOISER:
        component = _OPEN_DENOISER
    return component, open_layer(location.whole, dims)


def open_layer(path: str, dims: Dims, kind: str | None = None) -> Layer:
    """A layer of no table; 0 stands in its shape for a side that the factors do not show."""
    if kind is None:
        kind = "norm" if dims.is_vector else "conv" if dims.kernel else "linear"
    run = Run(path, 0, 0, dims.out or 0)
    return Layer(OWN, path, kind, dims.shape, False, (run,))
