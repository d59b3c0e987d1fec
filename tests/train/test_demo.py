"""The committed demo adapters are what their configurations say, work, and stay small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image

from merge.formats.folders import folder_digest
from merge.formats.metadata import trigger_words
from merge.identify import identify
from train.config import load_config
from train.demo import CATALOGUE, CONFIGS, NAMESPACE
from train.keys import file_name
from train.manifest import MANIFEST, read_manifest
from train.rendered import trigger
from train.tiny import PIPELINE_DIR
from train.tiny.load import load_pipeline

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
FOLDER = CATALOGUE / NAMESPACE
LARGEST_BYTES = 700_000
ALL_BYTES = 8_000_000


def test_every_configuration_has_its_result_and_every_result_its_configuration() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == NAMES
    assert sorted(path.name for path in CATALOGUE.iterdir()) == [NAMESPACE]


@pytest.mark.parametrize("name", NAMES)
def test_a_demo_adapter_is_what_its_configuration_says(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    manifest = read_manifest(FOLDER / name)
    found = {p.relative_to(FOLDER / name).as_posix() for p in (FOLDER / name).rglob("*.*")}
    assert found == {*manifest.files, MANIFEST}
    facts = identify(FOLDER / name / file_name(name, config.output.dialect)).to_json()
    assert config.name == name
    assert facts["kind"] == "adapter"
    assert facts["dialect"] == config.output.dialect
    assert facts["families"][0]["name"] == "tiny-sd"
    assert facts["ranks"] == {"min": config.rank, "max": config.rank}
    if config.output.dialect != "peft":  # whose alpha is in adapter_config.json
        assert facts["alphas"] == {"min": config.effective_alpha, "max": config.effective_alpha}
    assert facts["trigger_words"] == [trigger(config.dataset)]
    assert facts["metadata"]["graft.config_digest"] == f"sha256:{config.digest()}"
    assert trigger_words(facts["metadata"]) == [trigger(config.dataset)]


@pytest.mark.parametrize("name", NAMES)
def test_a_demo_adapter_does_what_it_is_for(name: str) -> None:
    scores = json.loads((FOLDER / name / "metrics.json").read_text())["scores"]
    assert scores["score"] >= 0.8
    assert scores["base_score"] <= 0.2
    assert scores["leak"] <= 0.1


@pytest.mark.parametrize("name", ["glim-style", "vexo", "cyano-style"])
def test_each_dialect_paints_the_committed_samples_again(name: str) -> None:
    dialect = load_config(CONFIGS / f"{name}.yaml").output.dialect
    card = yaml.safe_load((FOLDER / name / "README.md").read_text().split("---\n")[1])
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if dialect == "peft":
        pipe.unet = PeftModel.from_pretrained(pipe.unet, FOLDER / name)
    else:
        pipe.load_lora_weights(FOLDER / name)
    for index, widget in enumerate(card["widget"][1:3]):
        made = pipe(
            widget["text"],
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1 + index),
        ).images[0]
        with Image.open(FOLDER / name / widget["output"]["url"]) as image:
            difference = np.abs(np.asarray(image, dtype=float) - np.asarray(made, dtype=float))
        # Not bit for bit: another kind of CPU rounds otherwise.
        assert difference.mean() < 2


def test_all_of_them_were_trained_on_the_base_that_is_committed() -> None:
    digest = folder_digest(PIPELINE_DIR)
    for name in NAMES:
        assert digest in (FOLDER / name / "README.md").read_text()


def test_the_catalogue_is_small() -> None:
    sizes = {path: path.stat().st_size for path in CATALOGUE.rglob("*") if path.is_file()}
    assert max(sizes.values()) <= LARGEST_BYTES
    assert sum(sizes.values()) <= ALL_BYTES
    assert {path.suffix for path in sizes} == {
        ".safetensors",
        ".png",
        ".webp",
        ".json",
        ".yaml",
        ".md",
    }


def test_the_catalogue_is_found_without_a_tensor_library() -> None:
    code = "import sys, train.demo; assert 'torch' not in sys.modules; print(train.demo.CATALOGUE)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == CATALOGUE
