"""Which family a checkpoint file is of, in which layout, and where each parameter lies in it.

Decided by keys and shapes of the header alone; names of files and metadata say nothing here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from merge.errors import BadCheckpoint
from merge.families import FAMILIES, Family, Place, openclip
from merge.families.family import OPENCLIP
from merge.families.layers import CONV, LINEAR, OWN, Layer, parameter_key
from merge.families.tables import TEXT_MODEL
from merge.formats.header import Header, TensorInfo

LDM = "ldm"
ORIGINAL_LAYOUT = "original"
DIFFUSERS = "diffusers"

FLAT_TEXT = "flat_text"
_FUSED_BY_OPENCLIP = 3
_DECISIVE = (LINEAR, CONV)  # text encoders are stored with and without norms and position ids


@dataclass(frozen=True, slots=True)
class Component:
    """One model inside a checkpoint file. `prefix` and `naming` lead from a module to its key.

    `naming` is "own" (diffusers, transformers), "flat_text" (that without `text_model.`),
    "openclip" or another naming of the model.
    """

    name: str
    prefix: str
    naming: str

    def places(self, family: Family, module: str, parameter: str = "weight") -> tuple[Place, ...]:
        """Where the rows of a module's weight or bias lie, by rows of the module."""
        table = family.tables[self.name]
        if self.naming in table.namings:
            return tuple(
                Place(
                    self.prefix + parameter_key(layer.path, layer.kind, parameter),
                    None if layer.module else (run.begin, run.begin + run.rows),
                    run.first,
                )
                for layer, run in table.packed(self.naming)[module]
            )
        if self.naming == OPENCLIP:
            width = table.modules[f"{TEXT_MODEL}final_layer_norm"].shape[0]
            return (openclip.place(self.prefix, module, parameter, width),)
        path = module.removeprefix(TEXT_MODEL) if self.naming == FLAT_TEXT else module
        key = parameter_key(path, table.modules[module].kind, parameter)
        return (Place(self.prefix + key),)

    def tensors(self, family: Family) -> Iterator[tuple[str, Layer]]:
        """(key of the weight, layer as it is stored there) of everything that adapters change."""
        table = family.tables[self.name]
        if self.naming != OPENCLIP:
            for layer in table.layers[self._names].values():
                yield self._key(layer), layer
            return
        for module, layer in table.layers[OWN].items():
            (place,) = self.places(family, module)
            if place.is_transposed:
                layer = replace(layer, shape=layer.shape[::-1])
            if place.rows is not None:
                layer = replace(
                    layer, shape=(_FUSED_BY_OPENCLIP * layer.shape[0], *layer.shape[1:])
                )
            yield place.key, layer

    def may_hold(self, header: Header, family: Family) -> bool:
        """Whether the first layer is there, which costs less than to look at all of them."""
        if self.naming == OPENCLIP:
            return f"{self.prefix}positional_embedding" in header.tensors
        head = family.tables[self.name].head(self._names)
        info = header.tensors.get(self._key(head))
        if self._names != OWN:  # the probe is one part of what may be a packed layer
            return info is not None or family.is_optional(self.name, head)
        return family.is_optional(self.name, head) or (
            info is not None and family.accepts(self.name, head, info.shape)
        )

    @property
    def _names(self) -> str:
        return OWN if self.naming == FLAT_TEXT else self.naming

    def _key(self, layer: Layer) -> str:
        path = layer.path.removeprefix(TEXT_MODEL) if self.naming == FLAT_TEXT else layer.path
        return self.prefix + parameter_key(path, layer.kind, "weight")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint file holds. `families` are all that fit: a CLIP-L alone fits several."""

    family: Family
    layout: str
    components: Mapping[str, Component]
    families: tuple[Family, ...]
    tensors: Mapping[str, TensorInfo]

    def places(self, component: str, module: str, parameter: str = "weight") -> tuple[Place, ...]:
        """Where a parameter lies; several places if its rows are apart, () if the file lacks it."""
        held = self.components.get(component)
        if held is None or module not in self.family.components[component]:
            return ()
        places = held.places(self.family, module, parameter)
        return places if all(place.key in self.tensors for place in places) else ()


def read_checkpoint(header: Header, name: str, *, family: Family | None = None) -> Checkpoint:
    """The checkpoint behind `header`; BadCheckpoint if no family (or not `family`) fits."""
    candidates = FAMILIES.values() if family is None else (family,)
    fits = [(found, held) for found in candidates if (held := find_components(header, found))]
    if not fits:
        wanted = "any family we know" if family is None else family.title
        raise BadCheckpoint(name, f"its keys and shapes are not those of {wanted}")
    # Wan's text-to-video model has no layer that its image-to-video model lacks, so the most win.
    most = max(_size(*fit) for fit in fits)
    best = [fit for fit in fits if _size(*fit) == most]
    found, held = best[0]
    families = tuple(family for family, _ in best)
    return Checkpoint(found, _layout(found, held), held, families, header.tensors)


def _size(family: Family, held: Mapping[str, Component]) -> tuple[int, int]:
    return len(held), sum(len(family.components[name]) for name in held)


def _layout(family: Family, held: Mapping[str, Component]) -> str:
    is_single = any(
        component.naming not in (OWN, FLAT_TEXT)
        or (
            component.prefix
            and (component.prefix, OWN) in family.single_file.get(component.name, ())
        )
        for component in held.values()
    )
    if not is_single:
        return DIFFUSERS
    return LDM if "unet" in family.models else ORIGINAL_LAYOUT


def find_components(header: Header, family: Family) -> dict[str, Component]:
    """The components of `family` that the file holds whole, every module with its shape."""
    found = {}
    for name in family.models:
        for component in _spellings(family, name):
            if component.may_hold(header, family) and _holds(header, family, component):
                found[name] = component
                break
    return found


def _spellings(family: Family, name: str) -> Iterator[Component]:
    # A file without a prefix is the first expert's of two.
    bare = () if name == "transformer_2" else (("", OWN),)
    for prefix, naming in (*family.single_file.get(name, ()), *bare, (f"{name}.", OWN)):
        yield Component(name, prefix, naming)
        # Files of the NovelAI era lack text_model., and so do those of transformers 5.6 and later.
        if naming == OWN and family.tables[name].has_text_model:
            yield Component(name, prefix, FLAT_TEXT)


def _holds(header: Header, family: Family, component: Component) -> bool:
    for key, layer in component.tensors(family):
        if layer.kind not in _DECISIVE:
            continue
        info = header.tensors.get(key)
        if info is None and family.is_optional(component.name, layer):
            continue
        if info is None or not family.accepts(component.name, layer, info.shape):
            return False
    return True
