"""graft unbake: back to the base's own bytes, or to a bake of fewer adapters."""

import json
import shutil
from pathlib import Path

import pytest

from merge.families import FAMILIES
from merge.formats.folders import folder_digest
from merge.formats.hashes import sha256_file
from tests.cli.test_recipes import graft, refused
from tests.fixtures.engine import make_adapter, run, some_of

FAMILY = FAMILIES["tiny-sd"]
NAMES = [name for name in some_of(FAMILY) if name[0] == "unet"]
PIPELINE = Path(__file__).parents[2] / "train" / "tiny" / "pipeline"


@pytest.fixture
def baked(tmp_path: Path) -> tuple[str, str]:
    """`base`, and `baked` from it with a and b of `leaves`; their SHA-256."""
    shutil.copytree(PIPELINE, tmp_path / "base")
    (tmp_path / "leaves").mkdir()
    a, b = (
        make_adapter(tmp_path / "leaves" / f"{name}.safetensors", FAMILY, NAMES, seed=seed).path
        for seed, name in enumerate("ab")
    )
    run(tmp_path / "baked", [(a, 0.8), (b, -0.5)], base=tmp_path / "base")
    return sha256_file(a), sha256_file(b)


def test_unbaking_gives_the_bases_own_bytes(tmp_path: Path, baked: tuple[str, str]) -> None:
    done = graft(tmp_path, "unbake", "baked", "--base", "base")
    digest = folder_digest(PIPELINE)
    assert sorted(done.stdout.splitlines()) == sorted(
        [
            f"0.8 × sha256:{baked[0]}  removed",
            f"-0.5 × sha256:{baked[1]}  removed",
            f"base    sha256:{digest}",
            "baked was made of it; -o OUT writes it",
        ]
    )
    done = graft(tmp_path, "unbake", "baked", "--base", "base", "-o", "again", "--json")
    answer = json.loads(done.stdout)
    assert (answer["path"], answer["base_sha256"]) == ("again", digest)
    assert [its["removed"] for its in answer["inputs"]] == [True, True]
    files = [path.relative_to(PIPELINE) for path in PIPELINE.rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (PIPELINE / file).read_bytes()


def test_removing_an_adapter_is_a_bake_of_the_others(
    tmp_path: Path, baked: tuple[str, str]
) -> None:
    unbake = ("unbake", "baked", "--base", "base", "--from", "leaves", "-o")
    done = graft(tmp_path, *unbake, "one", "--remove", baked[0][:12])
    assert done.returncode == 0, done.stderr
    assert f"0.8 × sha256:{baked[0]}  removed\n" in done.stdout
    assert f"-0.5 × sha256:{baked[1]}\n" in done.stdout
    run(tmp_path / "b", [(tmp_path / "leaves" / "b.safetensors", -0.5)], base=PIPELINE)
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "b")
    both = ("--remove", "leaves/a.safetensors", "--remove", f"sha256:{baked[1]}")
    done = graft(tmp_path, *unbake, "none", *both)
    assert done.returncode == 0, done.stderr
    assert folder_digest(tmp_path / "none") == folder_digest(PIPELINE)


def test_a_single_file_is_restored_too(tmp_path: Path) -> None:
    unet = tmp_path / "unet.safetensors"
    shutil.copy(PIPELINE / "unet" / "diffusion_pytorch_model.safetensors", unet)
    a = make_adapter(tmp_path / "a.safetensors", FAMILY, NAMES).path
    run(tmp_path / "baked.safetensors", [(a, 1.0)], base=unet)
    done = graft(tmp_path, "unbake", "baked.safetensors", "--base", unet, "-o", "x.safetensors")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.safetensors").read_bytes() == unet.read_bytes()


def test_a_method_that_gave_no_plain_sum_is_not_said_to_be_taken_away_by_one(
    tmp_path: Path, baked: tuple[str, str]
) -> None:
    inputs = [(path, 1.0) for path in (tmp_path / "leaves").iterdir()]
    run(tmp_path / "voted", inputs, base=tmp_path / "base", method={"name": "ties"})
    line = refused(tmp_path, "unbake", "voted")
    assert line.endswith(" (without it ties cannot be undone: what it gave is no plain sum)")


def test_what_cannot_be_undone_is_one_sentence(tmp_path: Path, baked: tuple[str, str]) -> None:
    line = refused(tmp_path, "unbake", "baked")
    assert f"baked was baked into sha256:{folder_digest(PIPELINE)}: give it with --base" in line
    assert "`graft bake baked ADAPTER=" in line
    assert "what rounding took from the base's values does not come back" in line
    (tmp_path / "base" / "unet" / "config.json").write_text("{}")
    line = refused(tmp_path, "unbake", "baked", "--base", "base", "-o", "x")
    assert line.startswith(
        f"error: baked: it was baked into sha256:{folder_digest(PIPELINE)}, and "
    )
    base = ("unbake", "baked", "--base", PIPELINE)
    line = refused(tmp_path, *base, "--remove", "0123456789", "-o", "x")
    assert "sha256:0123456789 is not among them; they are sha256:" in line
    line = refused(tmp_path, *base, "--remove", baked[0], "-o", "x")
    assert f"1 file that it needs was not found: sha256:{baked[1]} (give them" in line
    line = refused(tmp_path, *base, "--remove", baked[0])
    assert line == "error: --remove makes a new file: say where with -o OUT"
    line = refused(tmp_path, *base, "-o", "leaves")
    assert "a folder of this name exists" in line
    line = refused(tmp_path, "unbake", "leaves/a.safetensors", "--base", PIPELINE)
    assert "it carries no recipe" in line
    merged = tmp_path / "merged.safetensors"
    run(merged, [(tmp_path / "leaves" / "a.safetensors", 1.0)])
    line = refused(tmp_path, "unbake", merged, "--base", PIPELINE)
    assert "it was made by a merge; only a bake has a base to go back to" in line
