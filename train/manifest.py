"""manifest.json: the SHA-256 and size of every file of a finished run."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge.formats.hashes import sha256_file
from train.errors import BadResult

MANIFEST = "manifest.json"


class Entry(BaseModel):
    """One file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """All files of a result but the manifest itself, by their path in the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: int = Field(1, alias="schema")
    name: str
    files: Mapping[str, Entry]


def write_manifest(folder: Path, name: str) -> None:
    """Describe every file that is in the folder now."""
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_file(path),
            "size": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    text = json.dumps({"schema": 1, "name": name, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all as it says; raises BadResult."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadResult(folder, f"holds no {MANIFEST}, so it is no finished run") from error
    except OSError as error:
        raise BadResult(folder, f"its {MANIFEST} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise BadResult(folder, f"its {MANIFEST} is not one of ours") from error
    for path, entry in manifest.files.items():
        _require(folder, path, entry)
    return manifest


def _require(folder: Path, path: str, entry: Entry) -> None:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise BadResult(folder, f"its manifest names {path}, which is not inside it")
    file = folder / path
    if not file.is_file():
        raise BadResult(folder, f"{path} is missing")
    if sha256_file(file) != entry.sha256:
        raise BadResult(folder, f"{path} was changed after the run; its SHA-256 is another")
