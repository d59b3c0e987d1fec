"""graft verify, recipe run and recipe show as commands, on files, folders and a real hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cli.console import CommandError
from cli.finding import Finder, Hint
from merge.families import FAMILIES
from merge.formats.hashes import sha256_file
from merge.pins import pin
from merge.recipe import Recipe
from tests.fixtures.engine import make_adapter, run, some_of
from tests.fixtures.server import running_hub

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "train" / "tiny" / "pipeline"
FAMILY = FAMILIES["tiny-sd"]
NAMES = [name for name in some_of(FAMILY) if name[0] == "unet"]


@pytest.fixture
def leaves(tmp_path: Path) -> dict[str, str]:
    """SHA-256 of three adapters in the folder `leaves`."""
    (tmp_path / "leaves").mkdir()
    return {
        name: sha256_file(
            make_adapter(tmp_path / "leaves" / f"{name}.safetensors", FAMILY, NAMES, seed=seed).path
        )
        for seed, name in enumerate("abc")
    }


@pytest.fixture
def second(tmp_path: Path, leaves: dict[str, str]) -> str:
    """(a + b) + c as second.safetensors; the SHA-256 of a + b, which is gone."""
    a, b, c = (tmp_path / "leaves" / f"{name}.safetensors" for name in leaves)
    first = tmp_path / "first.safetensors"
    run(first, [(a, 0.7), (b, 0.5)])
    run(
        tmp_path / "second.safetensors",
        [{"ref": str(first), "components": {"unet": 0.9}}, (c, -0.5)],
        rank={"fixed": 4},
    )
    digest = sha256_file(first)
    first.unlink()
    return digest


def graft(
    folder: Path, *arguments: str | Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "GRAFT_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
            "COLUMNS": "80",
            **environment,
        },
    )
    assert "Traceback" not in done.stderr
    return done


def refused(folder: Path, *arguments: str | Path, status: int = 1) -> str:
    """The one sentence of a failure, after which nothing has changed."""
    before = sorted(p.name for p in folder.iterdir())
    done = graft(folder, *arguments)
    assert done.returncode == status
    assert done.stdout == ""
    assert sorted(p.name for p in folder.iterdir()) == before
    (line,) = done.stderr.splitlines()
    return line


def test_verify_finds_leaves_in_folders_and_makes_the_rest_again(
    tmp_path: Path, second: str
) -> None:
    done = graft(tmp_path, "verify", "second.safetensors", "--from", "leaves", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    made_again = [its["sha256"] for its in answer["inputs"] if its["made_again"]]
    assert (answer["verdict"], made_again) == ("identical bytes", [second])
    assert answer["engine"]["file"] == answer["engine"]["here"]
    assert answer["differences"] == answer["wrong"] == answer["notes"] == []


def test_verify_of_a_file_that_differs_names_the_tensor_and_ends_with_1(
    tmp_path: Path, second: str
) -> None:
    path = tmp_path / "second.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key].view(-1)[0] += 1
    with safe_open(path, "pt") as file:
        save_file(tensors, path, dict(file.metadata()))
    done = graft(tmp_path, "verify", "second.safetensors", "--from", "leaves")
    assert done.returncode == 1
    assert done.stderr == ""
    assert f"differs  {key}\n         1 of " in done.stdout
    assert done.stdout.splitlines()[-1] == "second.safetensors  differs"


def test_a_baked_folder_is_proved_from_its_base_and_its_leaves(tmp_path: Path, second: str) -> None:
    run(tmp_path / "baked", [(tmp_path / "second.safetensors", 0.8)], base=PIPELINE)
    (tmp_path / "second.safetensors").unlink()
    places = ("--from", "leaves", "--from", PIPELINE.parent)
    (tmp_path / "scratch").mkdir()
    done = graft(tmp_path, "verify", "baked", *places, "--scratch", "scratch")
    assert done.stdout.splitlines()[1:] == [
        "made of  2 files; 2 made again first",
        "tensors  490 of 490 the same, bit for bit",
        "baked  identical bytes",
    ]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_cannot_be_proved_is_one_sentence(
    tmp_path: Path, leaves: dict[str, str], second: str
) -> None:
    path = tmp_path / "second.safetensors"
    line = refused(tmp_path, "verify", path, "--from", "leaves/a.safetensors")
    assert line.startswith("error: second.safetensors: 2 files that it needs were not found: ")
    assert leaves["b"] in line
    assert leaves["c"] in line
    assert line.endswith(
        "(not under --from; http://127.0.0.1:9 does not answer; is the hub running?)"
    )
    line = refused(tmp_path, "verify", path)
    assert "(give them with --from PATH; http://127.0.0.1:9 does not" in line
    line = refused(tmp_path, "verify", "leaves/a.safetensors")
    assert line.startswith("error: a.safetensors: it carries no recipe")
    line = refused(tmp_path, "verify", path, "--from", "nope")
    assert line == "error: --from nope: there is no such file or folder"
    line = refused(tmp_path, "verify", path, "--scratch", "nope")
    assert line == "error: --scratch nope: there is no such folder"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    metadata["graft.recipe"] = metadata["graft.recipe"].replace("0.5", "0.6")
    save_file(load_file(path), path, metadata)
    line = refused(tmp_path, "verify", path, "--from", "leaves")
    assert "second.safetensors: its recipe is sha256:" in line
    assert line.endswith("one of them was changed")


def test_a_recipe_is_run_from_what_it_made_with_all_that_is_gone(
    tmp_path: Path, second: str
) -> None:
    command = ("recipe", "run", "second.safetensors", "--from", "leaves", "-o", "x.safetensors")
    # Another process, with other hashes of strings and more threads, makes the same bytes.
    done = graft(tmp_path, *command, PYTHONHASHSEED="7", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert sha256_file(tmp_path / "x.safetensors") == sha256_file(tmp_path / "second.safetensors")
    line = refused(tmp_path, "recipe", "run", "leaves/a.safetensors", "-o", "y.safetensors")
    assert "it carries no recipe" in line


def test_show_prints_what_everything_was_made_of(
    tmp_path: Path, leaves: dict[str, str], second: str
) -> None:
    done = graft(tmp_path, "recipe", "show", "second.safetensors")
    lines = [line.lstrip("│├└─ ") for line in done.stdout.splitlines()]
    assert lines[0] == "second.safetensors  merge by linear, rank 4"
    made = f"1 × (unet 0.9) sha256:{second[:16]}  merge by linear"
    assert {made, f"-0.5 × sha256:{leaves['c'][:16]}"} < set(lines)
    assert {f"0.7 × sha256:{leaves['a'][:16]}", f"0.5 × sha256:{leaves['b'][:16]}"} < set(lines)
    assert len(lines) == 5
    assert max(map(len, done.stdout.splitlines())) <= 80
    answer = json.loads(graft(tmp_path, "recipe", "show", "second.safetensors", "--json").stdout)
    inputs = {its["sha256"]: its["strength"] for its in answer["parents"][second]["inputs"]}
    assert inputs == {leaves["a"]: 0.7, leaves["b"]: 0.5}
    (tmp_path / "wish.yaml").write_text("kind: merge\ninputs: [{ref: ink.safetensors}]")
    done = graft(tmp_path, "recipe", "show", "wish.yaml")
    assert done.stdout == "wish.yaml  merge by linear\n└── 1 × ink.safetensors\n"
    far = "/".join(["folder"] * 15)
    (tmp_path / "wish.yaml").write_text(f"kind: merge\ninputs: [{{ref: {far}/ink.safetensors}}]")
    assert f" {far}/ink.safetensors\n" in graft(tmp_path, "recipe", "show", "wish.yaml").stdout


def test_what_is_not_here_is_asked_of_the_hub(
    tmp_path: Path, leaves: dict[str, str], second: str
) -> None:
    with running_hub(tmp_path / "hub") as hub:
        at_hub = {"GRAFT_ENDPOINT": hub.url, "GRAFT_TOKEN": hub.admin_token}
        for name in "ac":
            done = graft(tmp_path, "push", f"leaves/{name}.safetensors", f"admin/{name}", **at_hub)
            assert done.returncode == 0, done.stderr
        verify = ("verify", "second.safetensors", "--from", "leaves/b.safetensors")
        done = graft(tmp_path, *verify, **at_hub)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "second.safetensors  identical bytes"
        done = graft(tmp_path, "verify", "second.safetensors", **at_hub)
        assert done.returncode == 1
        assert f"1 file that it needs was not found: sha256:{leaves['b']}" in done.stderr
        assert done.stderr.strip().endswith("(give them with --from PATH; not on the hub)")
        for push in (("second.safetensors", "admin/both"), ("leaves/b.safetensors", "admin/b")):
            assert graft(tmp_path, "push", *push, **at_hub).returncode == 0
        done = graft(tmp_path, "recipe", "show", "admin/both", **at_hub)
        assert done.stdout.startswith("second.safetensors  merge by linear, rank 4\n")
        done = graft(tmp_path, "recipe", "run", "admin/both", "-o", "again.safetensors", **at_hub)
        assert done.returncode == 0, done.stderr
        assert sha256_file(tmp_path / "again.safetensors") == sha256_file(
            tmp_path / "second.safetensors"
        )


def test_a_prompt_becomes_a_recipe_that_runs(tmp_path: Path, leaves: dict[str, str]) -> None:
    prompt = "ink robot <lora:a:0.8> <lora:b:0.5>"
    done = graft(tmp_path, "recipe", "import", prompt, "--loras", "leaves", "-o", "wish.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "from a prompt: merge by linear\n"
    graft(tmp_path, "recipe", "run", "wish.yaml", "-o", "x.safetensors")
    a, b = (tmp_path / "leaves" / f"{name}.safetensors" for name in "ab")
    run(tmp_path / "y.safetensors", [(a, 0.8), (b, 0.5)])
    assert sha256_file(tmp_path / "x.safetensors") == sha256_file(tmp_path / "y.safetensors")


def test_files_are_found_by_name_by_what_trainers_called_them_and_by_content(
    tmp_path: Path, leaves: dict[str, str]
) -> None:
    folder = tmp_path / "leaves"
    (folder / "more" / "peft").mkdir(parents=True)
    for name in ("ink-000002", "ink-000004", "more/a", "more/dot"):
        made = make_adapter(
            folder / f"{name}.safetensors",
            FAMILY,
            NAMES[:1],
            metadata={"ss_output_name": name.split("-")[0]},
        )
    made.path.rename(folder / "more" / "stop.safetensors")
    make_adapter(
        folder / "more" / "peft" / "adapter_model.safetensors", FAMILY, NAMES, dialect="peft"
    )

    def imported(text: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "prompt.txt").write_text(text)
        return graft(tmp_path, "recipe", "import", "prompt.txt", "--loras", "leaves", "--json")

    done = imported("<lora:more/a><lora:more/dot:2><lora:peft:3><lora:ink-000002:4>")
    assert [its["ref"] for its in json.loads(done.stdout)["recipe"]["inputs"]] == [
        "leaves/more/a.safetensors",
        "leaves/more/stop.safetensors",
        "leaves/more/peft/adapter_model.safetensors",
        "leaves/ink-000002.safetensors",
    ]
    done = imported("<lora:a>")
    both = "leaves/a.safetensors, leaves/more/a.safetensors"
    assert done.stderr == f"error: prompt.txt: <lora:a>: a could be any of {both}\n"
    done = imported("<lora:ink>")
    assert "ink could be any of leaves/ink-000002.safetensors, leaves/ink-000004" in done.stderr
    line = refused(tmp_path, "recipe", "import", "a cat", "--loras", "leaves")
    assert line == "error: a cat: there is no such file, and no <lora:name:strength> in it"
    done = imported("<lora:inc>")
    assert "no file in leaves is called inc; did you mean ink?" in done.stderr
    loras = [{"file_name": "renamed", "hash": leaves["b"]}, {"file_name": "x", "hash": "0" * 64}]
    done = imported(json.dumps({"loras": loras}))
    assert json.loads(done.stdout)["recipe"]["inputs"] == [
        {"ref": "leaves/b.safetensors", "sha256": leaves["b"]},
        {"sha256": "0" * 64},
    ]


def test_of_equal_weights_those_with_the_recipes_configuration_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_ENDPOINT", "http://127.0.0.1:9")
    for name, alpha in (("x", 2.0), ("y", 8.0), ("z", 4.0)):
        (tmp_path / name).mkdir()
        weights = tmp_path / name / "adapter_model.safetensors"
        make_adapter(weights, FAMILY, NAMES, alpha=alpha, dialect="peft")
    wanted = pin(weights)
    finder = Finder([tmp_path], {wanted.sha256: Hint(size=weights.stat().st_size)})
    recipe = Recipe.parse({"kind": "merge", "inputs": [wanted.model_dump()]})
    leaves = finder.search(recipe, {}, "x")
    assert list(leaves.files.values()) == [weights]
    other = Finder([tmp_path], {wanted.sha256: Hint(size=1)})
    with pytest.raises(CommandError, match="1 file that it needs was not found"):
        other.search(recipe, {}, "x")
