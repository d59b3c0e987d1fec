"""Where a module's parameters lie in a base checkpoint: which file, which tensor, which rows.

A base is a diffusers folder, a transformers folder (both with shards), or one file: in the names of
the model's original code, as the families' tables know them, or in the model's own.
In a folder, and in a single file of a model outside the tables, modules are looked up in the base's
own keys. Only headers and configurations are read.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from merge.errors import BadCheckpoint
from merge.families import FAMILIES
from merge.families.checkpoints import DIFFUSERS, Checkpoint, read_checkpoint
from merge.families.family import TEXT_MODEL
from merge.families.layers import PARAMETER, parameter_key
from merge.formats.folders import Folder, is_part, is_weight_index, read_component, read_folder
from merge.formats.header import Header, TensorInfo, read_header
from merge.formats.keys import survey
from merge.formats.reader import TensorFile
from merge.formats.sources import File

BAKEABLE = {"F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1}
FP8 = ("F8_E4M3", "F8_E5M2")
# Names of the scales of an fp8 weight, all of which multiply: ComfyUI's older and newer, that of
# compressed-tensors and diffusers, and DeepSeek's, one for each block of 128 x 128.
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_SCALE_BLOCK = 128
_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2")
MODEL = "model"  # the component of a base that is one model, and of adapters that name none
_LDM_PREFIX = "model.diffusion_model."
_PIPELINE = "model_index.json"
_CONFIG = "config.json"
# Key beginnings by which a single file in a model's own names shows which component it is.
_COMPONENTS = {
    "unet": ("down_blocks.",),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
    "text_encoder": ("text_model.", "encoder.layers."),
}
# The wrappers that a language model's layers are found in: with a head or without, in a model that
# sees too, before and after transformers 4.52.
_WRAPPERS = frozenset(
    {"model", "language_model", "transformer", "gpt_neox", "base_model", "diffusion_model"}
)
# Layers that GPT, GPT-2 and their kin have as Conv1D, which holds its matrix the other way round.
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_QUANTISED = {
    "qweight": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "biases": "MLX",
}


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a stored tensor, seen as a matrix of (rows, everything else).

    They are the module's rows from `first` on, or its columns if the tensor is transposed.
    `is_copy` says that the checkpoint holds these rows elsewhere too (a moving average).
    """

    file: str
    key: str
    first_row: int
    rows: int
    columns: int
    first: int = 0
    is_transposed: bool = False
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of a stored matrix: one for every `rows` x `columns` of its entries."""

    key: str
    rows: int
    columns: int
    groups: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Experts:
    """Packed matrices (expert, out, in), by rows of all of them one after the other."""

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class BaseFile:
    """One safetensors file of the base; `component` is None where a file holds several."""

    path: File
    header: Header
    component: str | None


@dataclass(frozen=True)
class Base:
    """A checkpoint by its headers. `files` and `others` are named relative to a folder's root;
    `others` are copied with it so that the result loads. `single` is set for a single file of a
    family that we know, `config` for a transformers folder.
    """

    path: File
    layout: str  # folder | model, else a single file: diffusers | ldm | original
    files: Mapping[str, BaseFile]
    others: tuple[str, ...] = ()
    single: Checkpoint | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    is_folder: bool = False

    @property
    def folder(self) -> Path:
        assert isinstance(self.path, Path), "only a folder has other files"
        return self.path

    def find(
        self, component: str, module: str, parameter: str = "weight", *, kind: str = "linear"
    ) -> tuple[Slice, ...]:
        """Every place where rows of this parameter are stored; empty if the base lacks it."""
        if self.single is not None:
            return self._find_single(self.single, component, module, parameter)
        found = self._find_key(component, module, parameter, kind)
        if found is None:
            return ()
        whole = self._whole(*found)
        return (replace(whole, is_transposed=parameter == "weight" and self.is_conv1d(module)),)

    def find_key(self, module: str, parameter: str) -> tuple[str, str] | None:
        """(file, key) of a parameter of a transformers model, whatever its wrappers are called."""
        return self._find_key(MODEL, module, parameter, "linear")

    def find_experts(self, component: str, module: str) -> Experts | None:
        """The matrices of a layer's experts: one packed tensor, or one or two for every expert."""
        found = self._find_key(component, module, "weight", PARAMETER)
        if found is not None:
            whole, shape = self._whole(*found), self.files[found[0]].header.tensors[found[1]].shape
            if len(shape) != 3:
                return None
            rows = shape[0] * shape[1]
            return Experts(shape, (replace(whole, rows=rows, columns=shape[2]),))
        layer, _, name = module.rpartition(".")
        for path, parts in itertools.product(_expert_paths(layer), _EXPERT_PARTS.get(name, ())):
            pieces = list(self._expert_pieces(component, path, parts))
            if pieces:
                n = len(pieces) // len(parts)
                rows = sum(piece.rows for piece in pieces) // n
                return Experts((n, rows, pieces[0].columns), tuple(pieces))
        return None

    def _expert_pieces(self, component: str, path: str, parts: Sequence[str]) -> Iterator[Slice]:
        """Rows one after the other: of the first expert's parts, then of the second's."""
        first = 0
        for expert in itertools.count():
            for part in parts:
                found = self._find_key(component, f"{path}.{expert}.{part}", "weight", "linear")
                if found is None:
                    return
                piece = self._whole(*found)
                yield replace(piece, first=first)
                first += piece.rows

    def text(self, name: str) -> str:
        """One of `others`."""
        return (self.folder / name).read_text("utf-8")

    def shape(self, component: str, module: str, *, kind: str = "linear") -> tuple[int, ...] | None:
        """The weight's shape as it is computed with, where one tensor is all of it."""
        pieces = [p for p in self.find(component, module, kind=kind) if not p.is_copy]
        if len(pieces) != 1:
            return None
        (piece,), shape = pieces, self.info(pieces[0]).shape
        if piece.rows != shape[0]:
            return None
        return shape[::-1] if piece.is_transposed else shape

    def info(self, piece: Slice) -> TensorInfo:
        return self.files[piece.file].header.tensors[piece.key]

    def scale(self, piece: Slice) -> Scale | None:
        """What the stored values of an fp8 weight are multiplied with; None where nothing is said."""
        info, stem = self.info(piece), piece.key.removesuffix(".weight")
        if info.dtype not in FP8 or stem == piece.key:
            return None
        self._check_format(piece.file, f"{stem}.comfy_quant")
        rows, columns = info.shape[0], prod(info.shape[1:])
        for name in _SCALES:
            key = f"{stem}.{name}"
            if key in self.files[piece.file].header.tensors:
                return self._scale(piece.file, key, rows, columns)
            if any(key in file.header.tensors for file in self.files.values()):
                detail = f"{key} lies in another shard than the weight that it scales"
                raise BadCheckpoint(self.path.name, detail)
        return None

    def _scale(self, name: str, key: str, rows: int, columns: int) -> Scale:
        file = self.files[name]
        info = file.header.tensors[key]
        blocks = -(-rows // _SCALE_BLOCK), -(-columns // _SCALE_BLOCK)
        if info.dtype in ("F16", "BF16", "F32"):
            if info.n_elements == 1:
                return Scale(key, rows, columns, (1, 1))
            if info.n_elements == rows and info.shape[0] == rows:
                return Scale(key, 1, columns, (rows, 1))
            if info.shape == blocks:
                return Scale(key, _SCALE_BLOCK, _SCALE_BLOCK, blocks)
        detail = f"{key} is {info.dtype}{list(info.shape)}, which scales no ({rows}, {columns})"
        raise BadCheckpoint(file.path.name, detail)

    def _check_format(self, name: str, key: str) -> None:
        """ComfyUI writes beside a quantised weight how it is, as JSON in bytes."""
        file = self.files[name]
        if key not in file.header.tensors:
            return
        with TensorFile(file.path) as opened:
            text = bytes(opened.read(key))
        try:
            said = json.loads(text).get("format")
        except (ValueError, AttributeError) as error:
            raise BadCheckpoint(file.path.name, f"{key} is no JSON object") from error
        if said not in _COMFY_FORMATS:
            detail = (
                f"{key} says {said}; of ComfyUI's formats only {', '.join(_COMFY_FORMATS)} bake"
            )
            raise BadCheckpoint(file.path.name, detail)

    def _find_single(
        self, held: Checkpoint, component: str, module: str, parameter: str
    ) -> tuple[Slice, ...]:
        (name,) = self.files
        found = []
        for place in held.places(component, module, parameter):
            whole = self._whole(name, place.key)
            begin, end = place.rows or (0, whole.rows)
            piece = replace(
                whole,
                first_row=begin,
                rows=end - begin,
                first=place.first,
                is_transposed=place.is_transposed and parameter == "weight",
            )
            found += [piece, *self._averaged(piece)]
        return tuple(found)

    def _averaged(self, piece: Slice) -> tuple[Slice, ...]:
        """The same rows in the moving average that some files carry and some tools prefer.

        Its keys are those of the model without dots: model_ema.diffusion_modelinput_blocks00weight.
        """
        key = "model_ema." + piece.key.removeprefix("model.").replace(".", "")
        tensors = self.files[piece.file].header.tensors
        if not piece.key.startswith(_LDM_PREFIX) or key not in tensors:
            return ()
        self._whole(piece.file, key)
        return (replace(piece, key=key, is_copy=True),)

    def _find_key(
        self, component: str, module: str, parameter: str, kind: str
    ) -> tuple[str, str] | None:
        """(file, key) of a parameter in the base's own names."""
        held = self._component(component)
        for path in _spellings(module):
            key = parameter_key(path, kind, parameter)
            for name, file in self.files.items():
                if file.component == held and key in file.header.tensors:
                    return name, key
        places = self._unwrapped.get((held, _unwrap(parameter_key(module, kind, parameter))))
        return places[0] if places is not None and len(places) == 1 else None

    def _component(self, name: str) -> str | None:
        """The base's name for a component that an adapter calls by a general one."""
        held = {file.component for file in self.files.values()}
        if name in held or len(held) > 1:
            return name
        return held.pop() if name == MODEL or MODEL in held else name

    @cached_property
    def _unwrapped(self) -> Mapping[tuple[str | None, str], list[tuple[str, str]]]:
        found: dict[tuple[str | None, str], list[tuple[str, str]]] = {}
        for name, file in self.files.items():
            for key in file.header.tensors:
                found.setdefault((file.component, _unwrap(key)), []).append((name, key))
        return found

    def is_conv1d(self, module: str) -> bool:
        """Whether a layer's weight is stored as (in, out)."""
        return self._has_conv1d and module.rpartition(".")[2] in _CONV1D

    @cached_property
    def _has_conv1d(self) -> bool:
        """As shapes show it, for a file alone has no configuration, and other models have linear
        layers of these names: c_attn is never square, and its bias is as long as its outputs.
        """
        tensors = {
            k: info for file in self.files.values() for k, info in file.header.tensors.items()
        }
        return any(
            tensors[bias].shape == info.shape[1:]
            for key, info in tensors.items()
            if key.endswith("c_attn.weight") and info.shape[:1] != info.shape[1:]
            if (bias := key.removesuffix("weight") + "bias") in tensors
        )

    def _whole(self, name: str, key: str) -> Slice:
        info = self.files[name].header.tensors[key]
        if info.dtype not in BAKEABLE:
            detail = f"{key} is stored as {info.dtype}; a bake needs F16, BF16, F32 or fp8"
            raise BadCheckpoint(self.files[name].path.name, detail)
        if not info.shape:
            raise BadCheckpoint(self.files[name].path.name, f"{key} is a scalar, not a weight")
        return Slice(name, key, 0, info.shape[0], prod(info.shape[1:]))


def open_base(file: File, families: Sequence[str]) -> Base:
    """The base in a file or folder; `families` are those that the adapters fit, likeliest first."""
    base = _open(file, families)
    for held in base.files.values():
        _check_precision(held.header, held.path.name)
    return base


def _open(file: File, families: Sequence[str]) -> Base:
    if isinstance(file, Path) and file.is_dir():
        if (file / _PIPELINE).is_file():
            return _open_folder(file)
        if (file / _CONFIG).is_file():
            return _open_model(file)
        detail = f"it is a folder with neither {_PIPELINE} (a pipeline) nor {_CONFIG} (a model)"
        raise BadCheckpoint(file.name, detail)
    header = read_header(file)
    files = {file.name: BaseFile(file, header, None)}
    try:
        single = _read_single(header, file.name, families)
    except BadCheckpoint:
        if any(key.startswith(_LDM_PREFIX) for key in header.tensors):
            raise
    else:
        if single is not None:
            return Base(file, single.layout, files, single=single)
    for component, beginnings in _COMPONENTS.items():
        if any(key.startswith(beginnings) for key in header.tensors):
            return Base(file, DIFFUSERS, {file.name: BaseFile(file, header, component)})
    refuse_adapter(header, file.name)
    if families:
        titles = " or ".join(FAMILIES[name].title for name in families)
        detail = f"its keys and shapes are not those of {titles}, in any layout we know"
        raise BadCheckpoint(file.name, detail)
    return Base(file, MODEL, {file.name: BaseFile(file, header, MODEL)})


def refuse_adapter(header: Header, name: str) -> None:
    """BadCheckpoint about a file in the place of a checkpoint that holds an adapter."""
    if survey(header.tensors).is_mostly_adapted:
        raise BadCheckpoint(name, "it is an adapter, not a checkpoint")


def _read_single(header: Header, name: str, families: Sequence[str]) -> Checkpoint | None:
    """The file as one of the adapters' families; None if those are outside our tables."""
    problem = None
    for family in families:
        try:
            return read_checkpoint(header, name, family=FAMILIES[family])
        except BadCheckpoint as error:
            problem = error
    if problem is not None:
        raise problem
    return None


def _open_folder(path: Path) -> Base:
    folder = _read_any_variant(path)
    files = {
        file.relative_to(path).as_posix(): BaseFile(file, read_header(file), component.name)
        for component in folder.components.values()
        for file in component.files
    }
    indices = {component.index for component in folder.components.values()}
    others = tuple(sorted(_others(path, indices)))
    return Base(path, "folder", files, others, is_folder=True)


def _open_model(path: Path) -> Base:
    """A transformers model: its configuration and weights, with whatever lies beside them."""
    model = read_component(path)
    files = {file.name: BaseFile(file, read_header(file), MODEL) for file in model.files}
    others = tuple(
        sorted(
            file.name
            for file in path.iterdir()
            if file.is_file()
            and is_part(f"{MODEL}/{file.name}")
            and file.suffix != ".safetensors"
            and not (is_weight_index(file.name) and file != model.index)
        )
    )
    return Base(path, MODEL, files, others, config=model.config, is_folder=True)


def _read_any_variant(path: Path) -> Folder:
    """Plain weights, or else the half precision copies that many repos hold alone."""
    try:
        return read_folder(path)
    except BadCheckpoint:
        for variant in ("fp16", "bf16"):
            if any(path.glob(f"*/*.{variant}*.safetensors")):
                return read_folder(path, variant=variant)
        raise


def _others(path: Path, indices: set[Path | None]) -> Iterator[str]:
    """The pipeline's index and whatever is in its folders, but no second copy of the weights.

    Of the indices of shards, only those of the weights that are written: loaders look for others
    (of a variant, of .bin files) and would miss their shards.
    """
    for file in path.rglob("*"):
        relative = file.relative_to(path).as_posix()
        is_foreign = is_weight_index(file.name) and file not in indices
        is_weights = file.suffix == ".safetensors"
        if is_part(relative) and not (is_foreign or is_weights) and file.is_file():
            yield relative


def _check_precision(header: Header, name: str) -> None:
    """Refuse what a weight cannot be added to: integers with tables beside them."""
    for key in header.tensors:
        stem, _, last = key.rpartition(".")
        if last in _QUANTISED and (last != "biases" or f"{stem}.scales" in header.tensors):
            detail = (
                f"it is quantised with {_QUANTISED[last]} ({key}); a bake changes weights in place, "
                "so take the model in float16, bfloat16 or float32"
            )
            raise BadCheckpoint(name, detail)


def _spellings(module: str) -> tuple[str, ...]:
    """Paths of a module; transformers 5.6 and later save CLIP without `text_model.`."""
    stem = module.removeprefix(TEXT_MODEL)
    return tuple(dict.fromkeys((module, stem, f"{TEXT_MODEL}{stem}")))


# What transformers packs in memory is stored expert by expert, in older names and in newer ones.
_EXPERT_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def _expert_paths(layer: str) -> tuple[str, ...]:
    return layer, layer.replace(".mlp.experts", ".block_sparse_moe.experts")


def _unwrap(key: str) -> str:
    """A key less the wrappers it begins with."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)
