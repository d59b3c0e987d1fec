"""Which family a checkpoint file is of, in which layout, and where each parameter lies in it.

Decided by keys and shapes of the header alone; names of files and metadata say nothing here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from merge.errors import BadCheckpoint
from merge.families import FAMILIES, Family, Place
from merge.families.family import TEXT_MODEL
from merge.formats.header import Header

LDM = "ldm"
DIFFUSERS = "diffusers"

# The first convolution takes 4 latent channels; 8 for InstructPix2Pix, 9 for inpainting.
_FIRST_CONV = "conv_in"
_LATENT_CHANNELS = (4, 8, 9)


@dataclass(frozen=True, slots=True)
class Component:
    """One model inside a checkpoint file. `prefix` and `naming` lead from a module to its key."""

    name: str
    prefix: str
    naming: str  # "own" (diffusers, transformers), "flat_text" (no text_model.), or single-file

    def place(self, family: Family, module: str, parameter: str = "weight") -> Place:
        """Where the module's weight or bias lies in the file."""
        if self.naming == "own":
            return Place(f"{self.prefix}{module}.{parameter}")
        if self.naming == "flat_text":
            return Place(f"{self.prefix}{module.removeprefix(TEXT_MODEL)}.{parameter}")
        return family.single_file_place(self.name, module, parameter)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint file holds. `families` are all that fit: a CLIP-L alone fits several."""

    family: Family
    layout: str
    components: Mapping[str, Component]
    families: tuple[Family, ...]

    def place(self, component: str, module: str, parameter: str = "weight") -> Place | None:
        """Where a parameter lies, or None if the file does not hold that component."""
        held = self.components.get(component)
        return None if held is None else held.place(self.family, module, parameter)


def read_checkpoint(header: Header, name: str, *, family: Family | None = None) -> Checkpoint:
    """The checkpoint behind `header`; BadCheckpoint if no family (or not `family`) fits."""
    candidates = FAMILIES.values() if family is None else (family,)
    fits = [(found, held) for found in candidates if (held := find_components(header, found))]
    if not fits:
        wanted = "any family we know" if family is None else family.title
        raise BadCheckpoint(name, f"its keys and shapes are not those of {wanted}")
    most = max(len(held) for _, held in fits)
    best = [(found, held) for found, held in fits if len(held) == most]
    found, held = best[0]
    is_single = any(c.naming not in ("own", "flat_text") for c in held.values())
    return Checkpoint(found, LDM if is_single else DIFFUSERS, held, tuple(f for f, _ in best))


def find_components(header: Header, family: Family) -> dict[str, Component]:
    """The components of `family` that the file holds whole, every module with its shape."""
    found = {}
    for name in family.components:
        for component in _spellings(family, name):
            if _holds(header, family, component):
                found[name] = component
                break
    return found


def _spellings(family: Family, name: str) -> Iterator[Component]:
    prefix, naming = family.single_file[name]
    yield Component(name, prefix, naming)
    if naming == "hf":  # files of the NovelAI era lack text_model.
        yield Component(name, prefix, "flat_text")
    for prefix in ("", f"{name}."):
        yield Component(name, prefix, "own")
        if name != "unet":  # transformers 5.6 and later drop text_model. from CLIPTextModel
            yield Component(name, prefix, "flat_text")


def _holds(header: Header, family: Family, component: Component) -> bool:
    for path, module in family.components[component.name].items():
        if not module.takes_adapters:
            continue
        place = component.place(family, path)
        info = header.tensors.get(place.key)
        if info is None:
            return False
        expected = module.shape[::-1] if place.is_transposed else module.shape
        if place.rows is not None:
            expected = (3 * module.shape[0], *module.shape[1:])
        if info.shape != expected and not _is_other_input(path, info.shape, expected):
            return False
    return True


def _is_other_input(path: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return (
        path == _FIRST_CONV
        and len(shape) == 4
        and shape[1] in _LATENT_CHANNELS
        and (shape[0], *shape[2:]) == (expected[0], *expected[2:])
    )
