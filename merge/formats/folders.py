"""A diffusers folder: its components, their shards and variants, and one digest for the whole.

`model_index.json` names the components; each has a folder with `config.json` and either one
weight file or shards with an index that says which file holds which key.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from merge.errors import BadCheckpoint
from merge.formats.hashes import sha256_file

_PIPELINE = "model_index.json"
_INDEX = ".safetensors.index"
# diffusers calls its weights diffusion_pytorch_model, transformers calls them model.
_STEMS = ("diffusion_pytorch_model", "model")
_MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_OTHER_WEIGHTS = {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".pb"}


@dataclass(frozen=True, slots=True)
class Component:
    """One model of a pipeline. `files` are its weight files, all shards of one variant."""

    name: str
    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    index: Path | None
    variant: str | None


@dataclass(frozen=True, slots=True)
class Folder:
    """A diffusers folder; `components` holds those that have weights."""

    path: Path
    components: Mapping[str, Component]


def read_folder(path: Path, *, variant: str | None = None) -> Folder:
    """What the folder holds, from file names and indices alone; no header is read.

    `variant` ("fp16") picks among copies of the weights; without it the plain files are taken.
    BadCheckpoint names what is missing: an index, a shard, a component's weights.
    """
    index = _read_json(path / _PIPELINE, path.name)
    components = {}
    for name, entry in index.items():
        is_component = isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
        if name.startswith("_") or not is_component or not (path / name / "config.json").is_file():
            continue
        components[name] = read_component(path / name, variant=variant)
    if not components:
        raise BadCheckpoint(path.name, "model_index.json names no component with weights")
    return Folder(path, components)


def read_component(path: Path, *, variant: str | None = None) -> Component:
    """The weights of one model folder (`unet/`, `text_encoder/`, a transformers model)."""
    config = _read_json(path / "config.json", path.name)
    infix = f".{variant}" if variant else ""
    for stem in _STEMS:
        single = path / f"{stem}{infix}.safetensors"
        if single.is_file():
            return Component(path.name, path, config, (single,), None, variant)
        index = path / f"{stem}{_INDEX}{infix}.json"
        if index.is_file():
            files = tuple(path / name for name in _shards(index, path))
            return Component(path.name, path, config, files, index, variant)
    what = f"the variant {variant}" if variant else "its weights"
    raise BadCheckpoint(path.name, f"there is no safetensors file with {what}")


def read_weight_map(component: Component) -> dict[str, str]:
    """Key -> file name, as the index of a sharded component says; BadCheckpoint if it is not one."""
    assert component.index is not None, f"{component.name} is not sharded"
    return _weight_map(component.index, component.path)


def folder_digest(path: Path) -> str:
    """SHA-256 over sorted lines "relative path NUL sha256" of the files that count.

    Of a pipeline they are those of `is_part`; of another folder, which has no model_index.json,
    the .safetensors and .json files that are not hidden.
    """
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return digest_of_files({name: sha256_file(path / name) for name in _counted(names)})


def digest_of_files(digests: Mapping[str, str]) -> str:
    """The digest of a folder from the SHA-256 of each of its files by relative path."""
    digest = hashlib.sha256()
    for name in _counted(digests):
        digest.update(f"{name}\0{digests[name]}\n".encode())
    return digest.hexdigest()


def is_part(relative: str) -> bool:
    """Whether the file at this path may matter to a pipeline: model_index.json and what is in its
    folders, but no weights that are not safetensors.

    Hidden files and folders are out: download clients keep their caches there.
    """
    path = PurePosixPath(relative)
    inside = len(path.parts) > 1 and path.suffix not in _OTHER_WEIGHTS
    return (inside or relative == _PIPELINE) and not _is_hidden(path)


def files_of_base(names: Iterable[str]) -> list[str] | None:
    """The files of a repo that is a base as a whole, a pipeline or a transformers model.

    None of a repo that holds files of their own, adapters or single checkpoints.
    """
    found = set(names)
    if _PIPELINE in found:
        return sorted(found)
    if "config.json" not in found or not any(map(_MODEL_WEIGHTS.fullmatch, found)):
        return None
    beside = (name for name in found if "/" not in name)
    return sorted(name for name in beside if is_part(f"{_STEMS[1]}/{name}"))


def is_weight_index(name: str) -> bool:
    """Whether a file of this name says which shard holds which key, in any format and variant."""
    return re.fullmatch(r".*\.index.*\.json", name) is not None


def _counted(names: Iterable[str]) -> list[str]:
    found = set(names)
    counts = is_part if _PIPELINE in found else _is_config_or_weights
    return sorted(filter(counts, found))


def _is_config_or_weights(relative: str) -> bool:
    path = PurePosixPath(relative)
    return path.suffix in {".safetensors", ".json"} and not _is_hidden(path)


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _shards(index: Path, folder: Path) -> list[str]:
    names = sorted(set(_weight_map(index, folder).values()))
    for name in names:
        if not (folder / name).is_file():
            raise BadCheckpoint(folder.name, f"{index.name} names {name}, which is missing")
    return names


def _weight_map(index: Path, folder: Path) -> dict[str, str]:
    weight_map = _read_json(index, folder.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(folder.name, f"{index.name} has no weight_map")
    for key, name in weight_map.items():
        # A shard is a file beside its index; anything else would reach outside the folder.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise BadCheckpoint(folder.name, f"{index.name} puts {key} into {name!r}")
    return weight_map


def _read_json(path: Path, folder: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadCheckpoint(folder, f"{path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(folder, f"{path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(folder, f"{path.name} is not a JSON object")
    return value
