"""Pickled adapters (.pt, .bin, .ckpt) -> safetensors, in a process of its own with limited memory.

A pickle is a program. torch's weights_only reader runs only the part of it that makes tensors and
plain containers, and it still runs apart, for a person at a command line: no server and no worker
imports this module. What can be flattened: a LoRA and its relatives, a textual inversion in the
layouts of AUTOMATIC1111, diffusers and SDXL, and an AUTOMATIC1111 hypernetwork.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import CannotWrite, Unsupported
from merge.formats.keys import survey
from merge.formats.metadata import FORMAT

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

# torch reserves a few GiB of addresses; tensors are copied at most a few times on their way.
_ADDRESSES = 8 * 2**30
_ADDRESSES_PER_BYTE = 8
_MOST_PER_BYTE = 4
_LONGEST_S = 600
_REFUSED = 3  # exit status of a child that says why on its standard output

_EMBEDDING, _HYPERNETWORK, _ADAPTER = "embedding", "hypernetwork", "adapter"


def from_pickle(path: Path, out: Path) -> str:
    """Write what `path` holds to `out` and say what it is: adapter, embedding or hypernetwork.

    Unsupported, with the class or the reason, for everything else; then nothing was written.
    """
    if not path.is_file():
        raise Unsupported(path.name, "there is no such file")
    if not out.parent.is_dir():
        raise CannotWrite(out.name, f"the folder {out.parent} does not exist")
    if out.exists() and out.samefile(path):
        raise CannotWrite(out.name, "is the pickle itself")
    command = [sys.executable, "-m", "merge.pickles", str(path), str(out)]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_LONGEST_S
        )
    except subprocess.TimeoutExpired as error:
        raise Unsupported(path.name, f"reading it took more than {_LONGEST_S} s") from error
    if done.returncode == 0:
        return done.stdout.strip()
    if done.returncode == _REFUSED:
        raise Unsupported(path.name, done.stdout.strip())
    lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
    raise Unsupported(path.name, f"it is no pickle that can be read: {lines[-1]}")


class Refused(Exception):
    """What the file is, in words for a person."""


class _Parameters:
    """Stands for torch.nn.ParameterDict, which old textual inversions hold; its state is data."""


def _main(path: Path, out: Path) -> int:
    _limit_memory(_ADDRESSES + _ADDRESSES_PER_BYTE * path.stat().st_size)
    from merge.formats.writer import write_file

    try:
        kind, tensors, metadata = flatten(_load(path))
        _check_size(tensors, path.stat().st_size)
    except Refused as refusal:
        print(refusal)  # noqa: T201  (the parent reads it)
        return _REFUSED
    write_file(out, tensors, {FORMAT: "pt"} | metadata)
    print(kind)  # noqa: T201
    return 0


def _check_size(tensors: "Tensors", file_size: int) -> None:
    """A view with stride 0 makes a table of any size out of one number."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > _MOST_PER_BYTE * file_size:
        raise Refused(f"its {file_size} bytes unfold to {size}: no training writes that")


def _limit_memory(size_bytes: int) -> None:
    """At most so many bytes of addresses, where the system can do that."""
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))


def _load(path: Path) -> Any:
    import pickle

    import torch

    torch.serialization.add_safe_globals(
        [(_Parameters, "torch.nn.modules.container.ParameterDict")]
    )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Refused(_what_it_wants(str(error))) from error


def _what_it_wants(message: str) -> str:
    """torch says at length what it refused; the name of the class is all that helps."""
    for mark in ("Unsupported global: GLOBAL ", "unsupported GLOBAL "):
        if mark in message:
            name = message.partition(mark)[2].split()[0]
            return f"it holds an object of {name}, not only tensors; such a pickle runs code"
    return f"it is no pickle of tensors: {message.splitlines()[0]}"


def flatten(value: Any) -> tuple[str, "Tensors", dict[str, str]]:
    """(kind, tensors by key, metadata) of what a pickle held."""
    import torch

    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, torch.Tensor):
        return _EMBEDDING, {"emb_params": _vectors(value)}, {}
    if not isinstance(value, dict) or not value:
        raise Refused(f"it holds a {type(value).__name__}, not an adapter")
    if "string_to_param" in value:
        return _textual_inversion(value)
    if any(isinstance(key, int) for key in value):
        return _hypernetwork(value)
    if set(value) == {"state_dict"} and isinstance(value["state_dict"], dict):
        value = value["state_dict"]
    others = [key for key, part in value.items() if not isinstance(part, torch.Tensor)]
    if others or not all(isinstance(key, str) for key in value):
        raise Refused(f"it holds {_some(others or list(value))} beside tensors: no adapter we know")
    found = survey(value)
    has_factors = any(not _is_weight(group.keys) for group in found.groups)
    if not found.unknown and has_factors:
        return _ADAPTER, dict(value), {}
    if _is_embedding(value):
        return _EMBEDDING, {key: _vectors(part) for key, part in value.items()}, {}
    if found.groups and not has_factors:
        raise Refused("it is a checkpoint or another whole model, not an adapter")
    raise Refused(f"its keys belong to no adapter we know: {_some(found.unknown)}")


def _is_weight(roles: Mapping[str, str]) -> bool:
    return set(roles) <= {"weight", "bias"}


def _is_embedding(value: Mapping[str, Any]) -> bool:
    """Rows for the tokens that the keys name, or for the encoders: clip_l, clip_g, t5xxl."""
    is_flat = all("." not in key for key in value)
    return is_flat and all(
        part.ndim in (1, 2) and part.is_floating_point() for part in value.values()
    )


def _textual_inversion(value: Mapping[Any, Any]) -> tuple[str, "Tensors", dict[str, str]]:
    parameters = value["string_to_param"]
    if isinstance(parameters, _Parameters):
        parameters = vars(parameters).get("_parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise Refused("its string_to_param holds no vectors")
    vectors = {str(token): _vectors(tensor) for token, tensor in parameters.items()}
    # "*" is the placeholder of the original code: the file's name is the token.
    keys = {"emb_params": vectors["*"]} if set(vectors) == {"*"} else vectors
    said = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")
    return _EMBEDDING, keys, _strings({key: value[key] for key in said if key in value})


def _vectors(tensor: Any) -> "torch.Tensor":
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (1, 2):
        raise Refused("its vectors are not a table of numbers")
    return tensor.detach()


def _hypernetwork(value: Mapping[Any, Any]) -> tuple[str, "Tensors", dict[str, str]]:
    """{768: (network of k, network of v), "layer_structure": …} -> "768.0.linear.0.weight", …"""
    tensors: Tensors = {}
    for size, pair in value.items():
        if isinstance(size, int):
            tensors |= dict(_networks(size, pair))
    facts = {key: part for key, part in value.items() if not isinstance(key, int)}
    return _HYPERNETWORK, tensors, _strings(facts)


def _networks(size: int, pair: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise Refused(f"its entry {size} is not the pair of a hypernetwork")
    for index, network in enumerate(pair):
        for key, tensor in network.items() if isinstance(network, dict) else [("", None)]:
            if not isinstance(tensor, torch.Tensor):
                raise Refused(f"its entry {size} holds no networks")
            yield f"{size}.{index}.{key}", tensor.detach()


def _strings(facts: Mapping[Any, Any]) -> dict[str, str]:
    """Facts as the strings that metadata can hold; what is unsaid is left out."""
    return {
        str(key): fact if isinstance(fact, str) else json.dumps(fact, default=repr)
        for key, fact in facts.items()
        if fact is not None
    }


def _some(keys: Any) -> str:
    shown = [str(key) for key in list(keys)[:3]]
    return ", ".join(shown) + (" and more" if len(list(keys)) > 3 else "")


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
