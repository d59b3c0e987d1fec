"""Which adapters are combined: styles and concepts of the tiny pipeline, trained once per seed.

Every pair has a style and a concept adapter that no other pair has, so pairs are independent
samples. The seeds rotate who meets whom: with three seeds or more every style meets every concept.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.config import TrainConfig, load_config
from train.demo import CONFIGS
from train.sd15 import train

RANK = 8
TUNING_SEED = 0
"""Parameters are chosen on the pairs of this seed and reported on the others."""

STYLES = {"stripes": "glim-style", "dots": "pokka-style", "sepia": "umber-style"}
CONCEPTS = {"ring": "zorb", "star": "vexo", "cross": "plim"}
"""Name in the renderer -> name of the demo catalogue's configuration, whose settings are used."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A style and a concept of the renderer, and the seed both adapters were trained with."""

    style: str
    concept: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.style}-{self.concept}-{self.seed}"


def pairs(seeds: int) -> list[Pair]:
    concepts = list(CONCEPTS)
    return [
        Pair(style, concepts[(index + seed) % len(concepts)], seed)
        for seed in range(seeds)
        for index, style in enumerate(STYLES)
    ]


def adapter_file(folder: Path, name: str, seed: int) -> Path:
    """Where the adapter of a style or concept is once it is trained."""
    return folder / "adapters" / f"{name}-{seed}" / f"{name}-{seed}.safetensors"


def train_all(folder: Path, seeds: int) -> Iterator[str]:
    """Train what is not there yet, and yield each name when its adapter is whole."""
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for name in (*STYLES, *CONCEPTS):
            file = adapter_file(folder, name, seed)
            if not file.exists():
                # A result appears by one rename; what a broken run left beside it is no use here.
                shutil.rmtree(file.parent.with_name(f"{file.parent.name}.run"), ignore_errors=True)
                train(_config(name, seed), file.parent)
            yield f"{name}-{seed}"


def _config(name: str, seed: int) -> TrainConfig:
    """The demo catalogue's settings, at one rank and in one dialect for all."""
    known = load_config(CONFIGS / f"{(STYLES | CONCEPTS)[name]}.yaml")
    document = known.model_dump(mode="json", exclude_defaults=True)
    document |= {"name": f"{name}-{seed}", "seed": seed, "rank": RANK}
    document |= {"alpha": None, "samples": {"prompts": ["a picture"]}, "output": {}}
    return TrainConfig.model_validate(document)


def cache_folder() -> Path:
    """For the trained adapters and the scores, where --dir does not say."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "grafthub" / "merge_quality"
