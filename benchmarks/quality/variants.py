"""Every way to combine two adapters that is compared; methods come from merge.methods.METHODS.

Inputs have rank RANK. A method of low rank is tried at its own rank, nothing cut off ("whole"), and
cut to RANK, the size of one input. A method that works on elements makes changes of full rank: it
is tried baked, nothing cut off, and as an adapter of twice RANK, the size of both inputs, and of RANK.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from merge.execute import execute
from merge.formats.folders import folder_digest
from merge.formats.hashes import sha256_file
from merge.method_parameters import Space
from merge.methods import METHODS
from merge.plan import plan
from merge.recipe import Recipe
from train.tiny import PIPELINE_DIR

from .painting import UNET, Change
from .study import RANK

SCALES = (0.7, 0.85, 1.0, 1.4, 2.0, 2.8)
"""What the strength of both inputs is tried at."""

SIZES = {"whole": {"exact": True}, f"rank {2 * RANK}": {"fixed": 2 * RANK}}
SIZES[f"rank {RANK}"] = {"fixed": RANK}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to combine. `strengths` are those of the style and of the concept."""

    label: str
    size: str = "whole"
    """A key of SIZES, "baked" or "unmerged"."""
    strengths: tuple[float, float] = (1.0, 1.0)
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "linear"})
    is_live: bool = False
    used_at: float = 1.0
    """The strength that the merged adapter is used at."""

    @property
    def name(self) -> str:
        return f"{self.label}, {self.size}"


def baselines() -> Iterator[Variant]:
    """What needs no merge, and linear merges as people use them."""
    yield Variant("style alone", "unmerged", (1, 0))
    yield Variant("concept alone", "unmerged", (0, 1))
    yield Variant("stacked live 1 / 1", "unmerged", is_live=True)
    yield Variant("stacked live 0.7 / 0.7", "unmerged", (0.7, 0.7), is_live=True)
    for size in _sizes("linear"):
        yield Variant("linear", size)
        yield Variant("linear 0.7 / 0.7", size, (0.7, 0.7))
        for normalise in ("energy", "strengths"):
            method = {"name": "linear", "normalise": normalise}
            yield Variant(f"linear, normalise {normalise}", size, method=method)


def defaults() -> Iterator[Variant]:
    """Each method but linear, with the parameters it has when nothing is said, at 1 / 1."""
    for name in METHODS:
        if name != "linear":
            for size in _sizes(name):
                yield Variant(name, size, method={"name": name})


def grids() -> dict[str, list[Variant]]:
    """Name -> what is tried of a method, at the size of both inputs.

    That is the strength of both inputs, which does what `scale` does where a method has one that
    multiplies its result; and where strengths are shares, the strength the merge is used at.
    """
    found = {name: [_scaled(name, scale) for scale in SCALES] for name in METHODS}
    energy = {"name": "linear", "normalise": "energy"}
    found["linear, normalise energy"] = [
        Variant(f"linear, normalise energy, {s:g} / {s:g}", strengths=(s, s), method=energy)
        for s in SCALES
    ]
    return found


def _scaled(name: str, scale: float) -> Variant:
    size = next(size for size in _sizes(name) if size != "baked")
    if METHODS[name].parameters.takes_shares:
        return Variant(f"{name} used at {scale:g}", size, method={"name": name}, used_at=scale)
    return Variant(f"{name} {scale:g} / {scale:g}", size, (scale, scale), {"name": name})


def _sizes(method: str) -> tuple[str, ...]:
    if METHODS[method].parameters.space is Space.ELEMENTS:
        return ("baked", *list(SIZES)[1:])
    return ("whole", f"rank {RANK}")


@dataclass(frozen=True, slots=True)
class Made:
    """A change that can be painted, and what names its tensors."""

    change: Change
    digest: str


def make(variant: Variant, style: Path, concept: Path, folder: Path) -> Made:
    """Run the variant's recipe; what it writes goes to the empty folder."""
    files = {"style": style, "concept": concept}
    strengths = dict(zip(files, variant.strengths, strict=True))
    if variant.size == "unmerged":
        change = Change(
            tuple((files[ref], strength) for ref, strength in strengths.items() if strength),
            is_live=variant.is_live,
        )
        digests = [f"{_tensor_digest(path)}={strength:g}" for path, strength in change.adapters]
        return Made(change, f"live={variant.is_live} {' '.join(digests)}")
    document: dict[str, Any] = {
        "inputs": [
            {"ref": ref, "sha256": sha256_file(path), "strength": strengths[ref]}
            for ref, path in files.items()
        ],
        "method": dict(variant.method),
    }
    if variant.size == "baked":
        base = {"ref": "base", "sha256": folder_digest(PIPELINE_DIR)}
        recipe = Recipe.parse({"kind": "bake", "base": base, **document})
        execute(plan(recipe, {**files, "base": PIPELINE_DIR}), folder / "baked")
        unet = folder / "baked" / UNET
        return Made(Change(unet=unet), _tensor_digest(unet))
    output = {"dtype": "float16", "dialect": "kohya"}
    document |= {"kind": "merge", "rank": SIZES[variant.size], "output": output}
    out = folder / "merged.safetensors"
    execute(plan(Recipe.parse(document), files), out)
    digest = f"{_tensor_digest(out)}={variant.used_at:g}"
    return Made(Change(((out, variant.used_at),)), digest)


def _tensor_digest(path: Path) -> str:
    """Of names and values alone: metadata may say who made them, and when."""
    digest = sha256()
    for key, tensor in sorted(load_file(path).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
