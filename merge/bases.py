"""Where a module's weight lies in a base checkpoint: which file, which tensor, which rows.

Three layouts are known: a diffusers folder (shards too), components of it as a single file, and
the LDM single file that most tools share. Single files go through the tables of the adapters'
family; in a folder, and in a single file of another model with diffusers' names, modules are looked
up in the base's own keys.
Only headers are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from merge.errors import BadCheckpoint
from merge.families import FAMILIES
from merge.families.checkpoints import DIFFUSERS, Checkpoint, read_checkpoint
from merge.formats.folders import Folder, is_part, is_weight_index, read_folder
from merge.formats.header import Header, read_header

BAKEABLE = {"F16": 2, "BF16": 2, "F32": 4}
_LDM_PREFIX = "model.diffusion_model."
# Key beginnings by which a single diffusers file shows which component it is.
_COMPONENTS = {
    "unet": ("down_blocks.",),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
    "text_encoder": ("text_model.", "encoder.layers."),
}


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of whole rows of a stored tensor, seen as a matrix of (rows, everything else)."""

    file: str
    key: str
    first_row: int
    rows: int
    columns: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class BaseFile:
    """One safetensors file of the base; `component` is None where a file holds several."""

    path: Path
    header: Header
    component: str | None


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint by its headers. `files` and `others` are named relative to a folder's root;
    `others` are copied with it so that the result loads. `single` is set for a single file of a
    family that we know.
    """

    path: Path
    layout: str  # folder | diffusers | ldm
    files: Mapping[str, BaseFile]
    others: tuple[str, ...] = ()
    single: Checkpoint | None = None

    def find(self, component: str, module: str) -> tuple[Slice, ...]:
        """Every place where this module's weight is stored; empty if the base does not have it."""
        if self.single is not None:
            return self._find_single(self.single, component, module)
        for key in _spellings(module):
            for name, file in self.files.items():
                if file.component == component and key in file.header.tensors:
                    return (self._whole(name, key),)
        return ()

    def _find_single(self, held: Checkpoint, component: str, module: str) -> tuple[Slice, ...]:
        if module not in held.family.components.get(component, {}):
            return ()
        places = held.places(component, module)
        if len(places) != 1:
            return ()
        (place,), (name,) = places, self.files
        whole = self._whole(name, place.key)
        first, last = place.rows or (0, whole.rows)
        piece = replace(whole, first_row=first, rows=last - first, transposed=place.is_transposed)
        return (piece, *self._averaged(piece))

    def _averaged(self, piece: Slice) -> tuple[Slice, ...]:
        """The same rows in the moving average that some files carry and some tools prefer.

        Its keys are those of the model without dots: model_ema.diffusion_modelinput_blocks00weight.
        """
        key = "model_ema." + piece.key.removeprefix("model.").replace(".", "")
        tensors = self.files[piece.file].header.tensors
        if not piece.key.startswith(_LDM_PREFIX) or key not in tensors:
            return ()
        self._whole(piece.file, key)
        return (replace(piece, key=key),)

    def _whole(self, name: str, key: str) -> Slice:
        info = self.files[name].header.tensors[key]
        if info.dtype not in BAKEABLE:
            detail = f"{key} is stored as {info.dtype}; a bake needs F16, BF16 or F32"
            raise BadCheckpoint(self.files[name].path.name, detail)
        if not info.shape:
            raise BadCheckpoint(self.files[name].path.name, f"{key} is a scalar, not a weight")
        return Slice(name, key, 0, info.shape[0], prod(info.shape[1:]))


def open_base(path: Path, families: Sequence[str]) -> Base:
    """The base at `path`; `families` are those that the adapters fit, likeliest first."""
    if path.is_dir():
        return _open_folder(path)
    header = read_header(path)
    files = {path.name: BaseFile(path, header, None)}
    is_ldm = any(key.startswith(_LDM_PREFIX) for key in header.tensors)
    try:
        single = _read_single(header, path.name, families)
    except BadCheckpoint:
        if is_ldm:
            raise
    else:
        return Base(path, single.layout, files, single=single)
    for component, beginnings in _COMPONENTS.items():
        if any(key.startswith(beginnings) for key in header.tensors):
            return Base(path, DIFFUSERS, {path.name: BaseFile(path, header, component)})
    raise BadCheckpoint(path.name, "is neither an LDM checkpoint nor a diffusers model")


def _read_single(header: Header, name: str, families: Sequence[str]) -> Checkpoint:
    *others, last = families
    for family in others:
        with suppress(BadCheckpoint):
            return read_checkpoint(header, name, family=FAMILIES[family])
    return read_checkpoint(header, name, family=FAMILIES[last])


def _open_folder(path: Path) -> Base:
    folder = _read_any_variant(path)
    files = {
        file.relative_to(path).as_posix(): BaseFile(file, read_header(file), component.name)
        for component in folder.components.values()
        for file in component.files
    }
    indices = {component.index for component in folder.components.values()}
    others = tuple(sorted(_others(path, indices)))
    return Base(path, "folder", files, others)


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


def _spellings(module: str) -> tuple[str, ...]:
    """Keys of a module's weight; transformers 5.6 and later save CLIP without `text_model.`."""
    stem = module.removeprefix("text_model.")
    return (f"{module}.weight", f"{stem}.weight", f"text_model.{stem}.weight")
