"""The committed tiny pipeline as a StableDiffusionPipeline, and the checksums of its files."""

import hashlib
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from train.tiny import PIPELINE_DIR

SUMS = "SHA256SUMS"


def load_pipeline(
    folder: Path = PIPELINE_DIR, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """From disk alone; the files are float16, and float32 is what a CPU computes fast."""
    return StableDiffusionPipeline.from_pretrained(
        folder,
        dtype=dtype,
        safety_checker=None,
        requires_safety_checker=False,
        local_files_only=True,
    )


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS, which `sha256sum --check` reads."""
    lines = [f"{digest}  {name}" for name, digest in sorted(digests(folder).items())]
    (folder / SUMS).write_text("\n".join(lines) + "\n")


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 in hex, as SHA256SUMS says."""
    lines = (folder / SUMS).read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 in hex, as the files themselves say."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
