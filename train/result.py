"""The folder a run leaves: adapter, samples, scores, configuration, card and manifest.

It appears by one rename after everything in it was written and read back.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from merge.errors import CannotWrite
from merge.formats.hashes import sha256_file
from merge.formats.positioned import sync_folder
from merge.formats.reader import TensorFile
from merge.formats.writer import write_file
from train.card import card
from train.keys import PEFT_CONFIG, Factors, file_name, keyed, peft_config
from train.manifest import write_manifest
from train.metadata import file_metadata
from train.run import Run
from train.samples import Sample, cover

COVER = "samples/cover.webp"


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run on disk."""

    folder: Path
    file: Path
    sha256: str
    size_bytes: int
    scores: dict[str, float]
    trainable: int
    total: int


def write_result(output: Path, run: Run, factors: Factors, samples: Sequence[Sample]) -> Result:
    """Write everything beside `output`, read it back, and rename it there."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise CannotWrite(output.name, error.strerror or str(error)) from error
    try:
        temporary.chmod(0o755)
        name = _fill(temporary, run, factors, samples)
        os.rename(temporary, output)
        sync_folder(output.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CannotWrite(output.name, error.strerror or str(error)) from error
        raise
    file = output / name
    return Result(
        folder=output,
        file=file,
        sha256=sha256_file(file),
        size_bytes=file.stat().st_size,
        scores=dict(run.scores),
        trainable=run.trainable,
        total=run.total,
    )


def _fill(folder: Path, run: Run, factors: Factors, samples: Sequence[Sample]) -> str:
    """Write and check every file; the name of the adapter's."""
    dialect = run.config.output.dialect
    name = file_name(run.config.name, dialect)
    tensors = keyed(factors, run.alpha, dialect)
    write_file(folder / name, tensors, file_metadata(run, factors, tensors))
    _read_back(folder / name, tensors)
    if dialect == "peft":
        config = peft_config(list(factors), run.config.rank, run.alpha, run.base.label)
        _write_text(folder / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "samples").mkdir()
    for index, sample in enumerate(samples):
        sample.save(folder / _sample_path(index))
    if samples:
        cover(samples).save(folder / COVER, quality=90)
    _write_text(folder / "metrics.json", json.dumps(_metrics(run, folder / name), indent=2) + "\n")
    _write_text(folder / "config.yaml", _config_yaml(run))
    shown = [(_sample_path(index), sample.prompt) for index, sample in enumerate(samples)]
    _write_text(folder / "README.md", card(run, name, shown, COVER if samples else None))
    write_manifest(folder, run.config.name)
    return name


def _read_back(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The file on disk has the header rules, keys and values that were meant."""
    with TensorFile(path) as file:
        if set(file.header.tensors) != set(tensors):
            raise CannotWrite(path.name, "read back with other keys than were written")
        for key, tensor in tensors.items():
            if not torch.equal(file.read_tensor(key), tensor):
                raise CannotWrite(path.name, f"{key} was read back with other values")


def _metrics(run: Run, file: Path) -> dict[str, Any]:
    return {
        "scores": dict(run.scores),
        "trainable_parameters": run.trainable,
        "base_parameters": run.total,
        "file_bytes": file.stat().st_size,
        "steps": run.config.steps,
        "last_loss": round(run.last_loss, 6),
    }


def _config_yaml(run: Run) -> str:
    """What was asked, for a repeat; a folder of images appears by its last name, or not at all."""
    fields = run.config.model_dump(mode="json", exclude_defaults=True)
    fields["base"] = run.base.label
    if run.config.dataset.folder is not None:
        is_named = run.config.output.privacy == "full"
        fields["dataset"]["folder"] = run.config.dataset.folder.name if is_named else "dataset"
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _sample_path(index: int) -> str:
    return f"samples/{index:02d}.png"
