"""A base with random weights, a folder of pictures, and the shortest useful configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.pipelines import save_random_pipeline
from train.config import TrainConfig, parse_config


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the tiny classes, untrained."""
    return save_random_pipeline(tmp_path_factory.mktemp("bases") / "untrained")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four noise pictures with captions that hold the trigger sks."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, colour in enumerate(["red", "blue", "green", "yellow"]):
        pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a sks {colour} circle")
    return folder


@pytest.fixture
def config(base: Path, photos: Path) -> Callable[..., TrainConfig]:
    """A run of seconds; keyword arguments replace top-level fields."""

    def make(**fields: Any) -> TrainConfig:
        return parse_config(
            {
                "name": "toy",
                "base": str(base),
                "triggers": ["sks"],
                "dataset": {"folder": str(photos)},
                "class_images": {"count": 2, "steps": 2},
                "samples": {"steps": 2, "prompts": ["a sks circle"]},
                "rank": 2,
                "steps": 4,
                "batch": 2,
                "learning_rate": 1e-3,
                "device": "cpu",
                "threads": 1,
            }
            | fields
        )

    return make
