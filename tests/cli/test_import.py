"""`graft import`: folders as other programs leave them, against a real hub."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi

from cli.sidecars import BadSidecar, read_words, sidecars_of
from tests.cli.test_repos import Shell
from tests.fixtures.catalogue import lora_bytes, picture
from tests.fixtures.server import RunningHub, running_hub

SHA = "0" * 64
CIVITAI: dict[str, Any] = {
    "id": 222,
    "modelId": 111,
    "name": "v2",
    "baseModel": "SDXL 1.0",
    "description": "<p>Less <strong>noise</strong>.</p>",
    "trainedWords": ["ink style, brush", "brush"],
    "model": {
        "name": "Ink XL",
        "description": '<p>See <a href="https://ink.example/x">here</a>.</p><ul><li>one*</li></ul>',
        "tags": ["style", "ink"],
    },
    "creator": {"username": "ada"},
    "files": [{"hashes": {"SHA256": SHA.upper()}}],
}
LORA_MANAGER: dict[str, Any] = {
    "file_name": "robot",
    "model_name": "My robot",
    "file_path": "C:\\Users\\ada\\loras\\robot.safetensors",
    "preview_url": "C:/Users/ada/loras/robot.webp",
    "base_model": "Unknown",
    "notes": "<p>strong</p>",
    "tags": ["character"],
    "usage_tips": '{"strength": 0.7}',
    "civitai": {"trainedWords": ["robot"], "baseModel": "Pony"},
}
STABILITY: dict[str, Any] = {
    "ModelId": 5,
    "VersionId": 6,
    "ModelName": "Fox",
    "UserTitle": "Our fox",
    "BaseModel": "SD 1.5",
    "TrainedWords": ["fox"],
    "Tags": ["animal"],
    "AuthorUsername": "bob",
    "Hashes": {"SHA256": SHA},
    "ModelDescription": None,
}
A1111: dict[str, Any] = {
    "description": "drawn by hand",
    "sd version": "SDXL",
    "activation text": "inky, ink style",
    "preferred weight": 0.8,
    "negative text": "photo",
    "notes": "mine",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def shell(hub: RunningHub, tmp_path: Path) -> Shell:
    return Shell(tmp_path, {"GRAFT_ENDPOINT": hub.url, "GRAFT_TOKEN": hub.admin_token})


@pytest.fixture
def library(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A library as four programs have left it; repos get the test's name before their own."""
    folder = tmp_path / "library"
    start = request.node.name.replace("_", "-").replace("[", "-").rstrip("]")[5:45]
    # The hub knows files by their bytes, so each test has its own.
    first = zlib.crc32(start.encode()) % 2**31
    for seed, place in enumerate(("ink", "sub/robot", "fox"), first):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        named = path.with_name(f"{start}-{path.name}")
        named.with_suffix(".safetensors").write_bytes(lora_bytes(tmp_path, seed=seed))
    ink, robot, fox = (
        folder / f"{start}-ink",
        folder / f"sub/{start}-robot",
        folder / f"{start}-fox",
    )
    _beside(ink, ".civitai.info").write_text(json.dumps(CIVITAI))
    _beside(ink, ".json").write_text(json.dumps(A1111))
    _beside(ink, ".preview.png").write_bytes(picture())
    _beside(robot, ".metadata.json").write_text(json.dumps(LORA_MANAGER))
    _beside(robot, ".webp").write_bytes(picture(format="WEBP"))
    _beside(fox, ".cm-info.json").write_text(json.dumps(STABILITY))
    (folder / ".cache").mkdir()
    (folder / ".cache/hidden.safetensors").write_bytes(b"not looked at")
    return folder


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _start(library: Path) -> str:
    return next(library.glob("*-ink.safetensors")).stem.removesuffix("-ink")


def _imports(printed: str) -> dict[str, dict[str, Any]]:
    """The answer of --json by file."""
    return {item["file"]: item for item in json.loads(printed)["imports"]}


def test_a_folder_becomes_repos_with_cards(hub: RunningHub, shell: Shell, library: Path) -> None:
    start = _start(library)
    assert "3 sent, 0 there before, 0 refused" in shell.ok("import", library)
    api = HfApi(endpoint=hub.url, token=hub.admin_token)
    assert api.list_repo_files(f"admin/{start}-ink") == [
        "README.md",
        f"{start}-ink.civitai.info",
        f"{start}-ink.json",
        f"{start}-ink.preview.png",
        f"{start}-ink.safetensors",
    ]
    answer = httpx2.get(f"{hub.url}/admin/{start}-ink/resolve/main/README.md").text
    assert answer == (
        f"""---
tags:
- style
- ink
instance_prompt: inky
trigger_words:
- inky
- ink style
- brush
widget:
- text: '-'
  output:
    url: {start}-ink.preview.png
---

# Ink XL

drawn by hand

mine

- Version: v2
- Author: ada
- Base model: SDXL
- Strength: 0.8
- Negative prompt: photo
- Source: <https://civitai.com/models/111?modelVersionId=222>
"""
    )
    weights = httpx2.get(f"{hub.url}/admin/{start}-ink/resolve/main/{start}-ink.safetensors")
    assert weights.content == (library / f"{start}-ink.safetensors").read_bytes()
    # The catalogue reads the card as it reads any other.
    found = httpx2.get(
        f"{hub.url}/api/adapters/admin/{start}-ink/{start}-ink.safetensors", headers=hub.auth
    ).json()
    assert set(found["trigger_words"]) >= {"inky", "ink style", "brush"}
    assert found["title"] == "Ink XL"


def test_paths_of_this_machine_stay_here(hub: RunningHub, shell: Shell, library: Path) -> None:
    shell.ok("import", library)
    place = f"{hub.url}/admin/{_start(library)}-robot/resolve/main"
    sidecar = httpx2.get(f"{place}/{_start(library)}-robot.metadata.json").json()
    assert sidecar == LORA_MANAGER | {
        "file_path": "robot.safetensors",
        "preview_url": "robot.webp",
    }
    card = httpx2.get(f"{place}/README.md").text
    assert "# My robot" in card
    assert "- Strength: 0.7" in card
    assert "- Base model: Pony" in card


def test_a_dry_run_says_what_would_be_and_does_nothing(
    hub: RunningHub, shell: Shell, library: Path
) -> None:
    start = _start(library)
    told = _imports(shell.ok("import", library, "--dry-run", "--json"))
    assert told[f"sub/{start}-robot.safetensors"] == {
        "file": f"sub/{start}-robot.safetensors",
        "what": "adapter lora tiny-sd",
        "repo": f"admin/{start}-robot",
        "state": "new",
        "files": [
            "README.md",
            f"{start}-robot.metadata.json",
            f"{start}-robot.safetensors",
            f"{start}-robot.webp",
        ],
        "commit": None,
    }
    assert httpx2.get(f"{hub.url}/api/models/admin/{start}-robot").status_code == 401


def test_a_repeat_does_nothing(hub: RunningHub, shell: Shell, library: Path) -> None:
    start = _start(library)
    first = _imports(shell.ok("import", library, "--json"))
    api = HfApi(endpoint=hub.url, token=hub.admin_token)
    # Somebody writes a better card, and somebody gives a repo another name.
    api.upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\n# Mine\n",
        path_in_repo="README.md",
        repo_id=f"admin/{start}-ink",
    )
    head = api.model_info(f"admin/{start}-ink").sha
    again = _imports(shell.ok("import", library, "--json"))
    assert {item["state"] for item in first.values()} == {"new"}
    assert {(item["state"], *item["files"]) for item in again.values()} == {("there",)}
    assert api.model_info(f"admin/{start}-ink").sha == head


def test_what_came_later_is_added_and_nothing_else(
    hub: RunningHub, shell: Shell, library: Path
) -> None:
    start = _start(library)
    shell.ok("import", library)
    (library / f"{start}-fox.preview.png").write_bytes(picture())
    again = _imports(shell.ok("import", library, "--json"))
    changed = {name: item["files"] for name, item in again.items() if item["files"]}
    assert changed == {f"{start}-fox.safetensors": [f"{start}-fox.preview.png"]}


def test_an_interrupted_import_goes_on(hub: RunningHub, shell: Shell, library: Path) -> None:
    start = _start(library)
    api = HfApi(endpoint=hub.url, token=hub.admin_token)
    # What is left when the command ends between making a repo and its commit.
    api.create_repo(f"admin/{start}-fox")
    states = {
        item["repo"]: item["state"]
        for item in _imports(shell.ok("import", library, "--json")).values()
    }
    assert states[f"admin/{start}-fox"] == "new"
    assert api.file_exists(f"admin/{start}-fox", f"{start}-fox.safetensors")


def test_every_refused_file_is_named_and_the_others_go(
    hub: RunningHub, shell: Shell, library: Path, tmp_path: Path
) -> None:
    start = _start(library)
    weights = (library / f"{start}-fox.safetensors").read_bytes()
    (library / f"{start}-cut.safetensors").write_bytes(weights[:-1])
    (library / f"{start}-old.pt").write_bytes(b"\x80\x04.")
    (library / f"{start}-fox.cm-info.json").write_text('{"TrainedWords": "fox"}')
    (library / f"{start}-nul.safetensors").write_bytes(lora_bytes(tmp_path, seed=9))
    (library / f"{start}-nul.json").write_text("")
    done = shell.run("import", library, "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert {item["file"] for item in answer["imports"]} == {
        f"{start}-ink.safetensors",
        f"sub/{start}-robot.safetensors",
    }
    why = {item["file"].removeprefix(f"{start}-"): item["why"] for item in answer["refused"]}
    assert set(why) == {"cut.safetensors", "old.pt", "fox.safetensors", "nul.safetensors"}
    assert "TrainedWords is not a list of texts" in why["fox.safetensors"]
    assert "graft convert --from-pickle" in why["old.pt"]
    assert "nul.json is no JSON" in why["nul.safetensors"]
    assert done.stderr.strip() == f"error: 4 files of {library} were not imported"


def test_weights_on_the_hub_are_replaced_only_when_asked(
    hub: RunningHub, shell: Shell, library: Path, tmp_path: Path
) -> None:
    start = _start(library)
    shell.ok("import", library)
    (library / f"{start}-fox.safetensors").write_bytes(lora_bytes(tmp_path, seed=30))
    done = shell.run("import", library)
    assert done.returncode == 1
    assert f"{start}-fox.safetensors: admin/{start}-fox holds other weights" in done.stderr
    sent = _imports(shell.ok("import", library, "--update", "--json"))
    assert sent[f"{start}-fox.safetensors"]["files"] == [f"{start}-fox.safetensors"]
    assert len(HfApi(endpoint=hub.url).list_repo_commits(f"admin/{start}-fox")) == 3


def test_files_of_one_name_are_called_by_their_folders(
    hub: RunningHub, shell: Shell, library: Path, tmp_path: Path
) -> None:
    start = _start(library)
    for place, seed in (("a", 4), ("b c", 5)):
        (library / place).mkdir()
        (library / place / f"{start}-x.safetensors").write_bytes(lora_bytes(tmp_path, seed=seed))
    shutil.copy(library / f"{start}-fox.safetensors", library / f"{start}-vixen.safetensors")
    told = _imports(shell.ok("import", library, "--json"))
    assert told[f"a/{start}-x.safetensors"]["repo"] == f"admin/a-{start}-x"
    assert told[f"b c/{start}-x.safetensors"]["repo"] == f"admin/b-c-{start}-x"
    assert told[f"{start}-vixen.safetensors"]["state"] == "twice here"
    # Without its namesake the file would be called otherwise; its bytes are known.
    shutil.rmtree(library / "a")
    told = _imports(shell.ok("import", library, "--json"))
    assert told[f"b c/{start}-x.safetensors"]["state"] == "there"


def test_a_peft_folder_is_one_repo_of_its_name(
    hub: RunningHub, shell: Shell, tmp_path: Path
) -> None:
    from tests.fixtures.engine import family_of, make_adapter, some_of

    folder = tmp_path / "adapters/my peft style"
    folder.mkdir(parents=True)
    family = family_of("sd15")
    make_adapter(
        folder / "adapter_model.safetensors",
        family=family,
        names=[n for n in some_of(family) if n[0] == "unet"],
        dialect="peft",
    )
    (folder / "README.md").write_text("# As its trainer wrote it\n")
    shell.ok("import", folder.parent)
    api = HfApi(endpoint=hub.url)
    files = api.list_repo_files("admin/my-peft-style")
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_pipeline_is_not_taken_apart(shell: Shell, library: Path, tmp_path: Path) -> None:
    (library / "pipeline/unet").mkdir(parents=True)
    (library / "pipeline/model_index.json").write_text("{}")
    (library / "pipeline/unet/model.safetensors").write_bytes(lora_bytes(tmp_path, seed=7))
    done = shell.run("import", library)
    assert "pipeline/unet/model.safetensors: a part of a pipeline" in done.stderr


def test_what_cannot_be_imported_at_all(shell: Shell, tmp_path: Path) -> None:
    assert "no such folder" in shell.refused("import", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no adapters" in shell.refused("import", tmp_path / "empty")
    assert "not logged in" in Shell(tmp_path).refused("import", tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.civitai.info", [], "x.civitai.info is not a JSON object"),
        ("x.civitai.info", {"model": []}, "x.civitai.info: model is not an object"),
        ("x.civitai.info", {"files": [1]}, "x.civitai.info: files is not a list of objects"),
        ("x.json", {"preferred weight": "1"}, "x.json: preferred weight is not a number"),
        ("x.json", {"notes": 3}, "x.json: notes is not a text"),
        ("x.metadata.json", {"usage_tips": "{"}, "x.metadata.json: usage_tips is no JSON"),
        ("x.cm-info.json", {"Tags": [1]}, "x.cm-info.json: Tags is not a list of texts"),
    ],
)
def test_a_sidecar_with_other_types_is_refused(
    tmp_path: Path, name: str, content: object, why: str
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    found = sidecars_of(tmp_path / "x.safetensors", os.listdir(tmp_path))
    with pytest.raises(BadSidecar) as refusal:
        read_words(found)
    assert str(refusal.value) == why


def test_html_of_a_site_becomes_text(tmp_path: Path) -> None:
    (tmp_path / "x.civitai.info").write_text(json.dumps(CIVITAI))
    words = read_words([tmp_path / "x.civitai.info"])
    assert words.description == "See here <https://ink.example/x>.\n\n- one\\*"
    assert words.notes == "Less noise."
    assert words.sha256 == SHA
