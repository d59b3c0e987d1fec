"""Strengths for every direction, row or column of a layer, from a safetensors file beside an adapter.

Methods that learn how adapters share a layer give such vectors: ZipLoRA (Shah et al. 2023,
https://arxiv.org/abs/2311.13600) and LoRA.rar one for the columns, others one for the rank-1 directions.
A tensor `<component>.<layer>.<directions|rows|columns>` of the right length multiplies the change of
that layer: the stored factors' directions, the rows of the weight, or its columns (in * kernel).
`<layer>` is a module of ours, or the path of a layer that the adapter packs. Layers that are not named
keep their change, as do biases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge.errors import BadRecipe
from merge.formats.adapters import Entry
from merge.formats.header import Header, read_header
from merge.formats.sources import File, shown_name
from merge.units import ELSEWHERE

KINDS = ("directions", "rows", "columns")
_DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Vectors:
    """`keys`: name of an entry -> kind -> key in the file."""

    path: File
    header: Header
    keys: Mapping[str, Mapping[str, str]]


def read_vectors(file: File, entries: Sequence[Entry], param: str) -> Vectors:
    """The vectors of an adapter with these entries; BadRecipe names what does not fit."""
    header, name = read_header(file), shown_name(file)
    known: dict[str, Entry] = {}
    for entry in entries:
        for alias in _names(entry):
            if entry.touches_weight or alias not in known:  # a bias may have an entry of its own
                known[alias] = entry
    found: dict[str, dict[str, str]] = {}
    for key, info in header.tensors.items():
        layer, _, kind = key.rpartition(".")
        weighed = known.get(layer)
        if kind not in KINDS or weighed is None:
            detail = f"{key} in {name} is of no layer of the adapter; write LAYER.{'|'.join(KINDS)}"
            raise BadRecipe(param, detail)
        length = _length(weighed, kind, param, key)
        if info.shape != (length,) or info.dtype not in _DTYPES:
            detail = f"{key} in {name} is {info.dtype} {info.shape}, {length} floats are needed"
            raise BadRecipe(param, detail)
        if kind in found.setdefault(weighed.name, {}):
            raise BadRecipe(param, f"{name} has {kind} of {weighed.name} twice")
        found[weighed.name][kind] = key
    if not found:
        raise BadRecipe(param, f"{name} holds no vectors")
    return Vectors(file, header, found)


def _names(entry: Entry) -> list[str]:
    own = [] if entry.layer.module is None else [f"{entry.component}.{entry.layer.module}"]
    return [entry.name, *own]


def _length(entry: Entry, kind: str, param: str, key: str) -> int:
    is_matrix = entry.touches_weight and entry.layout not in ELSEWHERE
    if not is_matrix or 0 in entry.layer.shape:
        raise BadRecipe(param, f"{key}: {entry.name} has no change that vectors could weigh")
    if kind != "directions":
        return entry.layer.extent[0 if kind == "rows" else 1]
    if entry.exact_rank is None or entry.layout != "lora":
        raise BadRecipe(
            param, f"{key}: {entry.algorithm} has no directions; rows and columns it has"
        )
    return entry.exact_rank
