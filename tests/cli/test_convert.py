"""graft convert as a command: files, folders, REFs, pickles."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge.formats.hashes import sha256_file
from tests.cli.test_merge import graft, refused
from tests.fixtures.adapters import make_adapter


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "ink.safetensors", ranks=[4, 8], alphas=[2.0]).path


def test_a_file_becomes_a_folder_and_a_file_again(tmp_path: Path, ink: Path) -> None:
    done = graft(tmp_path, "convert", "ink.safetensors", "--to", "peft")
    assert (done.returncode, done.stderr) == (0, "")
    assert "kohya → peft, tiny-sd: 56 layers, lora (56)" in done.stdout
    assert "4 – 8" in done.stdout
    files = sorted(path.name for path in (tmp_path / "ink.peft").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    done = graft(tmp_path, "convert", "ink.peft", "--to", "kohya", "--json")
    said = json.loads(done.stdout)
    back = tmp_path / "ink.peft.kohya.safetensors"
    assert (said["path"], said["sha256"]) == (back.name, sha256_file(back))
    first, second = load_file(ink), load_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].double(), second[key].double()) for key in first)


def test_nothing_is_replaced_that_was_not_named(tmp_path: Path, ink: Path) -> None:
    (tmp_path / "ink.comfy.safetensors").write_bytes(b"mine")
    line = refused(tmp_path, "convert", ink, "--to", "comfy")
    assert line == "error: ink.comfy.safetensors exists; --force replaces it"
    line = refused(tmp_path, "convert", ink, "--to", "kohya", "-o", ink)
    assert line.endswith("ink.safetensors is what the conversion reads; nothing was written")


def test_wrong_usage(tmp_path: Path, ink: Path) -> None:
    done = graft(tmp_path, "convert", ink, "--to", "koya")
    assert done.returncode == 2
    assert "'koya' is not one of 'kohya', 'diffusers', 'peft', 'comfy'" in " ".join(
        done.stderr.replace("│", " ").split()
    )
    line = refused(tmp_path, "convert", ink, status=2)
    assert line == "error: say what to write: --to kohya, diffusers, peft, comfy"
    line = refused(tmp_path, "convert", ink, "--to", "peft", "--from-pickle", status=2)
    assert line == "error: --from-pickle only unpacks; convert the file it writes"
    line = refused(tmp_path, "convert", "none.safetensors", "--to", "peft")
    assert line == "error: none.safetensors: there is no such file or folder"


def test_a_pickle_is_unpacked(tmp_path: Path) -> None:
    torch.save({"<cat>": torch.ones(2, 768)}, tmp_path / "cat.pt")
    done = graft(tmp_path, "convert", "--from-pickle", "cat.pt", "--json")
    said = json.loads(done.stdout)
    assert (said["kind"], said["path"]) == ("embedding", "cat.safetensors")
    assert said["sha256"] == sha256_file(tmp_path / "cat.safetensors")
    line = refused(tmp_path, "convert", "--from-pickle", "cat.pt")
    assert line == "error: cat.safetensors exists; --force replaces it"
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    line = refused(tmp_path, "convert", "--from-pickle", "model.pt")
    assert "it holds an object of torch.nn.modules.linear.Linear, not only tensors" in line
