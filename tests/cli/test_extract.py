"""graft extract, resize and whatis as commands, on the pipeline that comes with the project."""

import json
from pathlib import Path

import numpy as np
import pytest

from merge.families import FAMILIES
from merge.recipe import Recipe
from tests.cli.test_merge import PIPELINE, graft, refused
from tests.fixtures.engine import MadeAdapter, load_deltas, make_adapter, some_of

FAMILY = FAMILIES["tiny-sd"]
NAMES = some_of(FAMILY)


@pytest.fixture
def ink(tmp_path: Path) -> MadeAdapter:
    return make_adapter(tmp_path / "ink.safetensors", FAMILY, NAMES, rank=4, size=0.3)


def test_what_was_baked_is_extracted_and_named(tmp_path: Path, ink: MadeAdapter) -> None:
    assert graft(tmp_path, "bake", PIPELINE, "ink.safetensors=0.5", "-o", "tuned").returncode == 0
    options = ("-o", "out.safetensors", "--rank", "4", "--save-recipe", "recipe.yaml")
    done = graft(tmp_path, "extract", "tuned", PIPELINE, *options)
    assert done.returncode == 0
    assert "the same in both: 171 layers" in done.stdout
    assert "error 0.0" in done.stdout
    found = load_deltas(tmp_path / "out.safetensors", FAMILY, NAMES)
    for name, change in found.items():
        assert np.linalg.norm(change - 0.5 * ink.deltas[name]) < 2e-3 * np.linalg.norm(change)
    again = graft(tmp_path, "recipe", "run", "recipe.yaml", "-o", "again.safetensors")
    assert again.returncode == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "out.safetensors"
    ).read_bytes()
    only = ("--only", "text_encoder.*", "--json", "-o", "text.safetensors", "--energy", "0.9")
    said = json.loads(graft(tmp_path, "extract", "tuned", PIPELINE, *only).stdout)
    assert said["plan"]["left_out"] == ["unet.*", "vae.*"]
    assert {name.partition(".")[0] for name in said["certificate"]["modules"]} == {"text_encoder"}


def test_refusals_name_what_was_typed(tmp_path: Path, ink: MadeAdapter) -> None:
    extract = ("extract", PIPELINE, PIPELINE, "-o", "out.safetensors")
    assert "one of --rank, --energy" in refused(tmp_path, *extract, status=2)
    assert "nothing differs from the base" in refused(tmp_path, *extract, "--rank", "4")
    line = refused(tmp_path, *extract, "--rank", "4", "--leave-out", "nowhere.*")
    assert "--leave-out nowhere.*: matches nothing" in line
    resize = ("resize", "ink.safetensors", "-o", "out.safetensors")
    assert "--rank: no layer has more than rank 4" in refused(tmp_path, *resize, "--rank", "9")
    assert "one of --rank, --energy" in refused(tmp_path, *resize, status=2)


def test_an_adapter_is_made_smaller(tmp_path: Path, ink: MadeAdapter) -> None:
    options = ("--shared", "2", "-o", "small.safetensors", "--save-recipe", "recipe.yaml")
    done = graft(tmp_path, "resize", "ink.safetensors", *options)
    assert done.returncode == 0
    assert "of the adapter as it was: truncation" in done.stdout
    assert Recipe.load(tmp_path / "recipe.yaml").kind == "resize"
    assert (tmp_path / "small.safetensors").stat().st_size < ink.path.stat().st_size


def test_a_checkpoint_says_which_adapter_is_in_it(tmp_path: Path, ink: MadeAdapter) -> None:
    make_adapter(tmp_path / "robot.safetensors", FAMILY, NAMES, rank=4, seed=2, size=0.3)
    bake = ("bake", PIPELINE, "ink.safetensors=0.5", "--component", "text_encoder=0.2")
    assert graft(tmp_path, *bake, "-o", "tuned").returncode == 0
    asked = ("whatis", "tuned", "--base", PIPELINE)
    done = graft(tmp_path, *asked, "--adapters", "ink.safetensors", "robot.safetensors")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1][:4] == ["ink.safetensors", "0.200", "to", "0.500"]
    assert lines[2][:4] == ["robot.safetensors", "not", "in", "it"]
    assert lines[3][-1] == "component"
    assert done.stdout.endswith("all of the difference, but for rounding to float16\n")
    said = json.loads(graft(tmp_path, *asked, "ink.safetensors", "--json").stdout)
    assert said["level"] == "component"
    assert said["strengths"]["unet"]["strengths"][0] == pytest.approx(0.5, abs=1e-3)
    assert [its["is_in"] for its in said["adapters"]] == [True]
    line = refused(tmp_path, *asked, status=2)
    assert "say which adapters may be in it" in line
    same = graft(tmp_path, "whatis", PIPELINE, "--base", PIPELINE, "ink.safetensors")
    assert same.stdout == "nothing differs: it is the base\n"
