"""An adapter in one dialect -> the same adapter in another, exactly or not at all.

Names, packing and the place of alphas change; values do not. With `algorithm="lora"`, factors of
other algorithms that are a product of low rank become that product, GLoRA where the base is given.
Each dialect holds some algorithms and not others: what it cannot hold is refused with the reason and
with what can be done instead. docs/formats/dialects.md lists what becomes what.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge import provenance
from merge.algorithms import dora, glora, lora, read_change
from merge.bases import open_base
from merge.combine import PEFT_WEIGHTS, write_text
from merge.encode import Encoded, encode, scaled
from merge.errors import CannotWrite, NotFinite, Unsupported
from merge.execute import new_folder
from merge.families import FAMILIES, Family, Layer
from merge.formats import dialects
from merge.formats import metadata as names
from merge.formats.adapters import (
    CONFIG_NAME,
    AdapterLayout,
    Entry,
    config_beside,
    read_config,
    read_layout,
)
from merge.formats.hashes import sha256_file
from merge.formats.reader import TensorFile
from merge.formats.sources import shown_name
from merge.formats.writer import write_file
from merge.inputs import OpenBase
from merge.packing import Note, Notes, NotExact, Part, repack

PLAIN = "lora"


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written. `algorithms` (with how many layers) and `ranks` are the output's."""

    sha256: str
    size: int
    source_dialect: str
    dialect: str
    family: str | None
    layers_read: int
    layers_written: int
    algorithms: Mapping[str, int]
    ranks: tuple[int, ...]
    notices: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "size": self.size,
            "from": self.source_dialect,
            "to": self.dialect,
            "family": self.family,
            "layers": {"read": self.layers_read, "written": self.layers_written},
            "algorithms": dict(self.algorithms),
            "ranks": {"min": min(self.ranks), "max": max(self.ranks)} if self.ranks else None,
            "notices": list(self.notices),
        }


def convert(
    path: Path,
    out: Path,
    dialect: str,
    *,
    algorithm: str | None = None,
    base: Path | None = None,
) -> Converted:
    """Write the adapter at `path` in `dialect` to `out`: a file, or for PEFT a new folder.

    `algorithm` is None to keep each layer's own, or "lora". Unsupported says what is not exact.
    """
    assert dialect in dialects.WRITABLE_DIALECTS, dialect
    assert algorithm in (None, PLAIN), algorithm
    inputs = [path, config_beside(path), base]
    _check_target([its for its in inputs if isinstance(its, Path)], out, dialect)
    config, name = read_config(path), shown_name(path)
    with TensorFile(path, name=name) as file:
        layout = read_layout(file, name=name, config=config)
        family = None if layout.family is None else FAMILIES[layout.family]
        try:
            parts = _read_parts(file, layout, algorithm, base)
            packed, notes = repack(
                parts, _layers(parts, dialect, family), read_notes(file.header.metadata)
            )
            encoded = encode(packed, dialect, family, _options(config, layout))
        except NotExact as error:
            raise Unsupported(name, str(error)) from error
        stated = file.header.metadata
    changes = provenance.Conversion(
        source=f"sha256:{sha256_file(path)}",
        dialect=dialect,
        family=family,
        algorithms=Counter(_algorithm(part) for part in packed),
        ranks=[part.rank for part in packed if part.rank is not None],
        alphas=[part.alpha for part in packed if part.alpha is not None],
        is_same=algorithm is None,
        notes=notes,
    )
    metadata = provenance.of_conversion(stated, changes) | dict(encoded.metadata)
    _write(out, encoded, metadata)
    weights = out / PEFT_WEIGHTS if dialect == "peft" else out
    return Converted(
        sha256=sha256_file(weights),
        size=weights.stat().st_size,
        source_dialect=layout.dialect,
        dialect=dialect,
        family=layout.family,
        layers_read=len(layout.entries),
        layers_written=len(packed),
        algorithms=changes.algorithms,
        ranks=tuple(changes.ranks),
        notices=tuple(_notices(packed, dialect, family)),
    )


def _check_target(inputs: Sequence[Path], out: Path, dialect: str) -> None:
    if not out.parent.is_dir():
        raise CannotWrite(out.name, f"the folder {out.parent} does not exist")
    if out.is_dir():
        raise CannotWrite(out.name, "a folder of this name exists")
    if out.exists() and dialect == "peft":
        raise CannotWrite(out.name, "a file of this name exists, and PEFT wants a folder")
    if out.exists() and any(out.samefile(path) for path in inputs):
        raise CannotWrite(out.name, "is what the conversion reads")


def _layers(
    parts: Sequence[Part], dialect: str, family: Family | None
) -> dict[str, Mapping[str, Layer]]:
    """Component -> path -> layer, as the dialect names and packs them."""
    components = sorted({part.component for part in parts})
    if family is None:
        return {
            component: {p.layer.path: p.layer for p in parts if p.component == component}
            for component in components
        }
    return {
        component: family.layers[component][dialects.naming_of(dialect, component, family)]
        for component in components
    }


def _options(config: Mapping[str, Any] | None, layout: AdapterLayout) -> dict[str, Any]:
    """What PEFT's configuration said that is about the base and not about the factors."""
    found: dict[str, Any] = {}
    if config is not None and isinstance(config.get("base_model_name_or_path"), str):
        found["base_model_name_or_path"] = config["base_model_name_or_path"]
    if config is not None and isinstance(config.get("task_type"), str):
        found["task_type"] = config["task_type"]
    if any(entry.facts.get("fan_in_fan_out") for entry in layout.entries):
        found["fan_in_fan_out"] = True
    return found


def _read_parts(
    file: TensorFile, layout: AdapterLayout, algorithm: str | None, base: Path | None
) -> list[Part]:
    if algorithm is None:
        return [read_part(entry, file) for entry in layout.entries]
    if base is None:
        return [_plain_part(entry, file, None) for entry in layout.entries]
    with OpenBase(open_base(base, layout.families)) as opened:
        return [_plain_part(entry, file, opened) for entry in layout.entries]


_SCALED = frozenset({"lora", "loha", "lokr"})
_OWN_NAMES = {
    "lora-torchtune": "its names and the order of its rows are torchtune's; torchtune can export PEFT",
    "lora-mha": "it changes the packed projection of an nn.MultiheadAttention, which only PEFT names",
}


def read_part(entry: Entry, file: TensorFile) -> Part:
    """One entry's tensors as they are stored, with one way to say the scale and every shape."""
    layout = entry.layout
    if layout in _OWN_NAMES:
        raise NotExact(f"{entry.name}: {_OWN_NAMES[layout]}")
    tensors = {role: file.read_tensor(key) for role, key in entry.keys.items()}
    if layout == "lora-mlx" and tensors["mlx_down"].ndim == 2:
        layout = "lora"
        tensors["down"] = tensors.pop("mlx_down").mT.contiguous()
        tensors["up"] = tensors.pop("mlx_up").mT.contiguous()
    if layout not in _SCALED:
        return Part(entry.component, entry.layer, layout, tensors)
    scalar = _number(file, entry, "scalar") if tensors.pop("scalar", None) is not None else 1.0
    part = Part(entry.component, entry.layer, layout, _shaped(tensors, layout, entry))
    rank = part.rank
    scale = entry.facts.get("scale")
    if scale is None and tensors.get("scale") is not None:
        scale = _number(file, entry, "scale")
    tensors = {role: tensor for role, tensor in part.tensors.items() if role != "scale"}
    if rank is None:  # two full factors of LoKr: their alpha means nothing, a stated scale does
        factor = (1.0 if scale is None else scale) * scalar
        if factor != 1:
            tensors["lokr_w1"] = scaled(tensors["lokr_w1"], factor)
        return replace(part, tensors=tensors)
    if scale is not None:
        alpha = numerator(scale, rank)
    else:
        alpha = _number(file, entry, "alpha") if "alpha" in tensors else float(rank)
    return replace(part, tensors=tensors, alpha=alpha * scalar)


def _number(file: TensorFile, entry: Entry, role: str) -> float:
    value = file.read_scalar(entry.keys[role])
    if not isfinite(value):
        raise NotFinite(file.name, entry.keys[role])
    return value


def numerator(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is this scale, the roundest one that gives it bit for bit."""
    for digits in range(1, 16):
        alpha = float(f"{scale * rank:.{digits}g}")
        if alpha / rank == scale:
            return alpha
    return scale * rank


def _shaped(tensors: Mapping[str, Tensor], layout: str, entry: Entry) -> dict[str, Tensor]:
    """A 1x1 convolution and a linear layer take each other's factors: those of the layer's own shape."""
    found = dict(tensors)
    out, _, *kernel = entry.layer.shape
    if layout == "lora" and "mid" not in tensors:
        rank = tensors["down"].shape[0]
        found["down"] = tensors["down"].reshape(rank, -1, *kernel)
        found["up"] = tensors["up"].reshape(out, rank, *[1] * len(kernel))
    if layout == "loha" and "hada_t1" not in tensors:
        found |= {r: tensors[r].flatten(1) for r in ("hada_w1_b", "hada_w2_b")}
    if layout == "lokr" and "lokr_w2_b" in tensors and "lokr_t2" not in tensors:
        found["lokr_w2_b"] = tensors["lokr_w2_b"].flatten(1)
    if "dora_scale" in tensors:
        axis = dora.axis_of(tensors["dora_scale"], entry.layer.shape, entry.facts)
        ones = [1] * len(kernel)
        shape = (out, 1, *ones) if axis is dora.Axis.OUTPUT else (1, -1, *ones)
        found["dora_scale"] = tensors["dora_scale"].reshape(shape)
    return found


_NOT_LORA = {
    "lora": "its sparse residual is no product of low rank",
    "lokr": "both of its factors are whole, so its product is of full rank",
    "glora": "its change is a product with the base's own weight",
}


def _plain_part(entry: Entry, file: TensorFile, base: OpenBase | None) -> Part:
    """The same change as plain LoRA of its exact rank; NotExact where it is none."""
    is_plain = not entry.keys.keys() & {"mid", "dora_scale", "bias_values"}
    if (entry.layout == "lora" and is_plain) or entry.layout == "norm":
        return read_part(entry, file)
    if entry.layout == "full" and "diff" not in entry.keys:
        return read_part(entry, file)
    if "dora_scale" in entry.keys:
        why = "DoRA rescales the sum with the base, which no product of low rank does"
        raise NotExact(f"{entry.name}: {why}; bake it into its base instead")
    entry = _settled(entry, base)
    stored = {role: file.read_tensor(key) for role, key in entry.keys.items()}
    wide = {r: t.double() if t.is_floating_point() else t for r, t in stored.items()}
    change = read_change(entry.layout, wide, entry.layer.shape, entry.facts)
    factors = change.factors()
    if factors is None and isinstance(change, glora.GLoRA) and base is not None:
        factors = glora.to_lora_given(change, _weight(base, entry))
    if factors is None:
        why = _NOT_LORA.get(entry.layout, f"{entry.algorithm} is no product of low rank")
        instead = (
            "name its base with --base" if entry.layout == "glora" else "bake it into its base"
        )
        raise NotExact(f"{entry.name}: {why}; {instead} instead")
    dtype = next(t.dtype for role, t in stored.items() if t.is_floating_point() and t.ndim > 1)
    written = lora.write(factors, entry.layer.shape[2:])
    tensors = {role: _narrowed(written[role], dtype) for role in ("down", "up")}
    if "up_bias" in stored:
        tensors["up_bias"] = stored["up_bias"]
    alpha = numerator(factors.scale, factors.rank)
    return Part(entry.component, entry.layer, PLAIN, tensors, alpha)


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the file's dtype where that holds every value, else in float32."""
    own = tensor.to(dtype)
    return (own if torch.equal(own.double(), tensor) else tensor.float()).contiguous()


def _settled(entry: Entry, base: OpenBase | None) -> Entry:
    """The entry with the whole shape of its layer, which some factors do not show."""
    if 0 not in entry.layer.shape:
        return entry
    if base is None:
        why = "its factors do not show the whole shape of the layer"
        raise NotExact(f"{entry.name}: {why}; name its base with --base instead")
    (run,) = entry.layer.runs
    shape = base.base.shape(entry.component, run.module, kind=entry.layer.kind)
    if shape is None:
        raise NotExact(f"{entry.name} is not in the base {base.base.path.name}")
    layer = replace(entry.layer, shape=shape, runs=(replace(run, rows=shape[0]),))
    return replace(entry, layer=layer)


def _weight(base: OpenBase, entry: Entry) -> Tensor:
    """(out, in * kernel) of the layer's weight, in float64."""
    kind = entry.layer.kind
    for run in entry.layer.runs:
        pieces = base.base.find(entry.component, run.module, "weight", kind=kind)
        if not pieces:
            raise NotExact(f"{entry.name} is not in the base {base.base.path.name}")
        if any(
            piece.columns != entry.layer.extent[1] for piece in pieces if not piece.is_transposed
        ):
            raise NotExact(f"{entry.name} has another shape in the base {base.base.path.name}")
    weight = base.read(entry, "weight", torch.float64)
    assert weight is not None
    return weight


def read_notes(metadata: Mapping[str, str]) -> Notes:
    """What an earlier conversion noted; nothing where the text is not ours."""
    found: Notes = {}
    stated = names.read_json(metadata, names.GRAFT_PACKED)
    for layer, parts in stated.items() if isinstance(stated, dict) else ():
        if isinstance(parts, dict) and all(_is_note(note) for note in parts.values()):
            found[layer] = {path: Note(*note) for path, note in parts.items()}
    return found


def _is_note(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    rank, alpha, *dtypes = value
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and isfinite(alpha)
    return type(rank) is int and rank > 0 and is_number and all(isinstance(d, str) for d in dtypes)


def _algorithm(part: Part) -> str:
    return "dora" if "dora_scale" in part.tensors and part.layout == PLAIN else part.layout


def _notices(parts: Sequence[Part], dialect: str, family: Family | None) -> Iterator[str]:
    """What is exact and yet may surprise."""
    large = [p for p in parts if p.layout == PLAIN and (p.rank or 0) > min(lora_extent(p.layer))]
    if large:
        yield f"{len(large)} layers have a rank above their own size: exact, and larger than need be"
    alphas = {part.alpha for part in parts if part.layout == PLAIN and part.component == "unet"}
    if dialect == "kohya" and len(alphas) > 1:
        yield "diffusers 0.42 takes the most common alpha of a kohya file for all of its attention"
    t5 = {
        part.component
        for part in parts
        if family is not None
        and dialect == "diffusers"
        and "t5xxl" in family.comfy.get(part.component, "")
    }
    for component in sorted(t5):
        yield f"diffusers 0.42 loads no adapter of {component}, which is a T5"


def lora_extent(layer: Layer) -> tuple[int, int]:
    return layer.shape[0], prod(layer.shape[1:])


def _write(out: Path, encoded: Encoded, metadata: Mapping[str, str]) -> None:
    if encoded.config is None:
        write_file(out, encoded.tensors, metadata)
        return
    with new_folder(out) as folder:
        write_file(folder / PEFT_WEIGHTS, encoded.tensors, metadata)
        write_text(folder / CONFIG_NAME, json.dumps(encoded.config, indent=2) + "\n")
