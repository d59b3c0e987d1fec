"""Train the demo adapters again: `python -m train.demo [--only NAME …] [--output DIR]`.

The same versions of torch and diffusers on the same kind of CPU give the same bytes.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: the committed files were made with one thread and this clock.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SOURCE_DATE_EPOCH", "1767225600")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from diffusers.utils.logging import disable_progress_bar

from train.config import load_config
from train.demo import CATALOGUE, CONFIGS, NAMESPACE
from train.sd15 import train


def main() -> None:
    """Train each configuration into a temporary folder and put it in place of the old result."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description="Train the adapters of the demo catalogue.")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--output", type=Path, default=CATALOGUE / NAMESPACE)
    arguments = parser.parse_args()
    disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        begun = time.monotonic()
        scores = _train_one(name, arguments.output / name)
        told = ", ".join(f"{key} {value:.2f}" for key, value in scores.items())
        sys.stdout.write(f"{name}: {told}, {time.monotonic() - begun:.0f} s\n")
        sys.stdout.flush()


def _train_one(name: str, place: Path) -> dict[str, float]:
    config = load_config(CONFIGS / f"{name}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder) / name)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(result.folder, place)
    return result.scores


if __name__ == "__main__":
    main()
