"""What a folder of adapters becomes on a hub: one repo per adapter, with its sidecars and a card."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cli.sidecars import PICTURES, BadSidecar, Words, published, read_words, sidecars_of
from hub.errors import HubError
from hub.repos.paths import check_path
from hub.users.names import check_name
from merge.errors import MergeError

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
# Names that every trainer gives: the folder says what the file is.
NAMELESS = {"adapter_model", "pytorch_lora_weights", "model", "lora", "diffusion_pytorch_model"}
PICKLES = (".pt", ".ckpt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class Import:
    """One adapter on its way: `files` are name in the repo -> file here or bytes made here.

    `what` says what the file is, `words` what its sidecars say.
    """

    path: Path
    name: str
    what: str
    files: Mapping[str, Path | bytes]
    words: Words

    @property
    def weights(self) -> str:
        return self.path.name

    @property
    def n_bytes(self) -> int:
        return sum(
            len(file) if isinstance(file, bytes) else file.stat().st_size
            for file in self.files.values()
        )


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that stays here, and why."""

    path: Path
    why: str


def plan(folder: Path) -> tuple[list[Import], list[Refused]]:
    """Everything in a folder that holds weights, by path: to be imported, or refused."""
    found: list[Import] = []
    refused: list[Refused] = []
    inside = {path: names for path, names in _folders(folder)}
    weights = [path / name for path, names in inside.items() for name in names if _is_weights(name)]
    for path in sorted(weights):
        try:
            found.append(_import(path, inside[path.parent], folder))
        except (_NotImported, BadSidecar, HubError, MergeError, OSError) as error:
            refused.append(Refused(path, _sentence(error)))
    return _with_names_of_their_own(found, folder, refused), refused


def card(item: Import) -> bytes:
    """The README.md of a repo whose adapter has none: what its sidecars say, as a card."""
    words = item.words
    pictures = [name for name in item.files if name.lower().endswith(PICTURES)]
    matter: dict[str, object] = {
        "tags": [tag[:100] for tag in words.tags],
        "instance_prompt": words.trigger_words[0][:100] if words.trigger_words else None,
        "trigger_words": [word[:100] for word in words.trigger_words],
        "widget": [{"text": "-", "output": {"url": name}} for name in pictures],
    }
    matter = {name: value for name, value in matter.items() if value}
    front = yaml.safe_dump(matter, allow_unicode=True, sort_keys=False) if matter else ""
    facts = {
        "Version": words.version,
        "Author": words.author,
        "Base model": words.base,
        "Strength": f"{words.strength:g}" if words.strength is not None else "",
        "Negative prompt": words.negative,
        "Source": f"<{words.url}>" if words.url.startswith(("https://", "http://")) else words.url,
    }
    title = words.title or item.path.stem
    if title in NAMELESS:
        title = item.name
    parts = [f"---\n{front}---" if front else "", f"# {' '.join(title.split())}"]
    parts += [words.description, words.notes]
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items() if value))
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


class _NotImported(Exception):
    """Why a file is not imported."""


def _folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below, without hidden ones, and the names of the files in each."""
    for path, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(path), sorted(name for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _is_weights(name: str) -> bool:
    return name.lower().endswith((".safetensors", *PICKLES))


def _import(path: Path, beside: Sequence[str], root: Path) -> Import:
    from merge.identify import identify

    if path.suffix.lower() in PICKLES:
        raise _NotImported(
            f"a pickle may run code when it is opened; `graft convert --from-pickle` makes"
            f" {path.with_suffix('.safetensors').name} of it"
        )
    if any(name.endswith(".safetensors.index.json") for name in beside):
        raise _NotImported("a part of a model in many files; `graft push` sends its whole folder")
    if any(Path(at, "model_index.json").exists() for at in _upwards(path.parent, root)):
        raise _NotImported("a part of a pipeline; `graft push` sends its whole folder")
    config = None
    companions = sidecars_of(path, beside)
    if path.name == PEFT_FILES[0] and PEFT_FILES[1] in beside:
        from merge.formats.adapters import read_config

        config = read_config(path)
        companions += [path.with_name(PEFT_FILES[1])]
        companions += [path.with_name("README.md")] if "README.md" in beside else []
    found = identify(path, hashes=False, config=config)
    files: dict[str, Path | bytes] = {path.name: path}
    for companion in companions:
        files[companion.name] = published(companion) or companion
    for name in files:
        check_path(name)
    what = " ".join((found.kind, *found.algorithms, *(f.name for f in found.families[:1])))
    words = read_words(companion for companion in companions if companion.name not in PEFT_FILES)
    name = path.parent.name if path.stem in NAMELESS and path.parent != root else path.stem
    return Import(path, check_name(_slug(name), "name"), what, files, words)


def _upwards(folder: Path, root: Path) -> Iterator[Path]:
    while folder != root:
        yield folder
        folder = folder.parent
    yield root


def _with_names_of_their_own(
    found: Sequence[Import], root: Path, refused: list[Refused]
) -> list[Import]:
    """Files of one name in several folders are called by their folders too."""
    by_name: dict[str, list[Import]] = defaultdict(list)
    for item in found:
        by_name[item.name.lower()].append(item)
    named: dict[str, Import] = {}
    for item in found:
        name = item.name
        if len(by_name[name.lower()]) > 1:
            folders = item.path.parent.relative_to(root).parts
            name = _slug("-".join((*folders, item.path.stem)))
        if (other := named.get(name.lower())) is not None:
            refused.append(Refused(item.path, f"would be {name}, as {other.path} is"))
            continue
        named[name.lower()] = Import(item.path, name, item.what, item.files, item.words)
    return list(named.values())


def _slug(text: str) -> str:
    """The nearest name that a repo can have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", name))
    return name.lstrip("-._")[:96].rstrip("-.") or "adapter"


def _sentence(error: Exception) -> str:
    if isinstance(error, HubError):
        return error.message
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
