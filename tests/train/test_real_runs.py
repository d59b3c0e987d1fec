"""A real style and a real concept, learned on the committed pipeline: minutes, so marked slow."""

from pathlib import Path

import pytest

from train.config import load_config
from train.demo import CONFIGS
from train.sd15 import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["glim-style", "zorb"])
def test_an_adapter_learns_its_subject_and_leaves_the_rest_alone(name: str, tmp_path: Path) -> None:
    result = train(load_config(CONFIGS / f"{name}.yaml"), tmp_path / name)
    scores = result.scores
    assert scores["score"] >= scores["base_score"] + 0.8
    assert scores["present"] >= 0.9
    assert scores["leak"] <= 0.1
    assert scores["forgetting"] <= 0.15
    assert result.size_bytes <= 1_500_000
