"""Merges and bakes over HTTP: a real server, its real child processes, the real engine."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import safetensors.numpy
import torch
from huggingface_hub import HfApi
from safetensors import safe_open

from hub.context import open_hub
from hub.users import service as users
from hub.users.models import Scope
from merge.formats.writer import write_file
from tests.fixtures.families import tiny_llama
from tests.fixtures.server import RunningHub, running_hub, settings_of
from tests.fixtures.tiny_files import deltas_of, modules, write_base, write_lora

WAIT_S = 300.0


def make_data(folder: Path, **settings: Any) -> dict[str, str]:
    """A data folder with the users ada, bob and eve; gives a token of each, and a reading one."""
    tokens = {}
    with open_hub(settings_of(folder, **settings)) as hub, hub.db.write() as session:
        for name in ("ada", "bob", "eve"):
            user = users.create_user(session, name)
            tokens[name] = users.issue_token(session, user, "test")
            if name == "eve":
                tokens["reader"] = users.issue_token(session, user, "read", Scope.READ)
    return tokens


@dataclass(frozen=True)
class Person:
    """Someone who uses a hub over HTTP."""

    hub: RunningHub
    token: str

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.hub.url + path, headers=self.auth, timeout=WAIT_S)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        return httpx2.post(
            self.hub.url + path, json=body, headers=self.auth | headers, timeout=WAIT_S
        )

    def delete(self, path: str) -> httpx2.Response:
        return httpx2.delete(self.hub.url + path, headers=self.auth, timeout=WAIT_S)

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/api/jobs/{job_id}").json()
        return found

    def upload(self, folder: Path, repo: str, *, private: bool = False) -> None:
        api = HfApi(endpoint=self.hub.url, token=self.token)
        api.create_repo(repo, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder)

    def merge(self, target: str, *inputs: str, **publish: Any) -> httpx2.Response:
        """POST /api/merges of inputs written as `ref=strength`."""
        sources = [
            {"ref": ref, "strength": float(strength)}
            for ref, strength in (item.split("=") for item in inputs)
        ]
        body = {
            "recipe": {"kind": "merge", "inputs": sources},
            "publish": {"repo": target, "path": "merged.safetensors"} | publish,
        }
        return self.post("/api/merges", body)

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        wanted = states or ("succeeded", "failed", "cancelled")
        end = time.monotonic() + WAIT_S
        while (job := self.job(job_id))["state"] not in wanted:
            assert time.monotonic() < end, job
            time.sleep(0.05)
        return job


def events_of(person: Person, job_id: str, seen: int | None = None) -> list[dict[str, str]]:
    """All server-sent events of a job until the stream ends, each as its fields."""
    headers = person.auth | ({"Last-Event-ID": str(seen)} if seen is not None else {})
    url = f"{person.hub.url}/api/jobs/{job_id}/events"
    with httpx2.stream("GET", url, headers=headers, timeout=WAIT_S) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse_events("".join(response.iter_text()))


def parse_events(text: str) -> list[dict[str, str]]:
    blocks = [
        dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        for block in text.split("\n\n")
    ]
    return [block for block in blocks if "data" in block]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.getbasetemp() / "jobs-api")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, str]) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.getbasetemp() / "jobs-api") as running:
        yield running


@pytest.fixture(scope="module")
def ada(hub: RunningHub, tokens: dict[str, str]) -> Person:
    return Person(hub, tokens["ada"])


@pytest.fixture(scope="module")
def bob(hub: RunningHub, tokens: dict[str, str]) -> Person:
    return Person(hub, tokens["bob"])


Deltas = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def deltas(ada: Person, tmp_path_factory: pytest.TempPathFactory) -> Deltas:
    """ada/ink and ada/robot are public, ada/secret is private; gives what each changes."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, name in enumerate(("ink", "robot", "secret")):
        file = folder / name / f"{name}.safetensors"
        found[name] = write_lora(file, seed, rank=seed + 2, alpha=1.5, trigger=f"{name}word")
        (file.parent / "README.md").write_text("---\nlicense: mit\nbase_model: demo/tiny-sd\n---\n")
        ada.upload(file.parent, f"ada/{name}", private=name == "secret")
    return found


@pytest.fixture(scope="module")
def done(ada: Person, deltas: Deltas) -> str:
    """The id of a merge that succeeded."""
    job = ada.wait(ada.merge("ada/done", "ada/ink=1", "ada/robot=1").json()["id"])
    assert job["state"] == "succeeded", job["error"]
    return str(job["id"])


def fetch(person: Person, result: dict[str, Any], path: str, folder: Path) -> Path:
    """A file of a job's result, at the commit that the job names."""
    response = person.get(f"/{result['repo']}/resolve/{result['commit']}/{path}")
    assert response.status_code == 200
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(path).name
    target.write_bytes(response.content)
    return target


# What a person can do


def test_a_merge_becomes_a_commit_with_its_recipe_inside(
    ada: Person, deltas: Deltas, tmp_path: Path
) -> None:
    answer = ada.merge("ada/both", "ada/ink=0.7", "ada/robot=0.5", message="Ink robot")
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    assert answer.headers["Location"] == f"/api/jobs/{job_id}"
    events = events_of(ada, job_id)
    states = [json.loads(event["data"])["state"] for event in events]
    assert states[-1] == "succeeded", events[-1]["data"]
    assert states == sorted(states, key=["queued", "running", "succeeded"].index)
    job = ada.job(job_id)
    assert json.loads(events[-1]["data"]) == job
    assert job["progress"]["done"] == job["progress"]["total"] == len(modules())
    result = job["result"]
    assert result["repo"] == "ada/both"
    file = fetch(ada, result, "merged.safetensors", tmp_path)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == result["sha256"]
    merged = deltas_of(safetensors.numpy.load_file(file))
    for name, delta in merged.items():
        expected = 0.7 * deltas["ink"][name] + 0.5 * deltas["robot"][name]
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert metadata["graft.recipe_digest"] == result["recipe_digest"] == job["recipe_digest"]
    recipe = ada.get(f"/api/recipes/{result['recipe_digest']}").json()
    assert recipe["recipe"] == json.loads(metadata["graft.recipe"])
    commits = ada.get("/api/models/ada/both/commits/main").json()
    assert [commit["title"] for commit in commits] == ["Ink robot", "initial commit"]
    card = fetch(ada, result, "README.md", tmp_path).read_text()
    assert card.startswith("---\nlicense: mit\nbase_model: demo/tiny-sd\n")
    for words in ("ada/ink:ink.safetensors", "| 0.7 |", "| 0.5 |", "inkword", "robotword"):
        assert words in card


def test_a_result_joins_a_repo_and_its_card_without_changing_what_people_wrote(
    ada: Person, deltas: Deltas, tmp_path: Path
) -> None:
    card = "---\nlicense: mit\n---\n# My styles\n\nHand-written.\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text(card)
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    ada.upload(tmp_path / "mine", "ada/styles")
    for strength in ("0.25", "0.75"):
        job_id = ada.merge("ada/styles", f"ada/ink={strength}", "ada/robot=1").json()["id"]
        job = ada.wait(job_id)
        assert job["state"] == "succeeded", job["error"]
    text = fetch(ada, job["result"], "README.md", tmp_path).read_text()
    assert text.startswith("---\nlicense: mit\n")
    assert "# My styles\n\nHand-written.\n" in text
    assert text.count("merged.safetensors`") == 1
    assert "| 0.75 |" in text
    assert "| 0.25 |" not in text
    assert fetch(ada, job["result"], "notes.txt", tmp_path).read_text() == "mine"


def test_a_baked_folder_is_published_whole(ada: Person, deltas: Deltas, tmp_path: Path) -> None:
    weights = write_base(tmp_path / "base")
    ada.upload(tmp_path / "base", "ada/base")
    body = {
        "recipe": {
            "kind": "bake",
            "base": {"ref": "ada/base"},
            "inputs": [{"ref": "ada/ink", "strength": 0.8}],
        },
        "publish": {"repo": "ada/baked"},
    }
    answer = ada.post("/api/bakes", body)
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    result = job["result"]
    assert result["path"] == ""
    listed = ada.get(f"/api/models/ada/baked/tree/{result['commit']}?recursive=true").json()
    paths = {item["path"] for item in listed if item["type"] == "file"}
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert paths == {"README.md", "model_index.json", "unet/config.json", unet}
    config = fetch(ada, result, "unet/config.json", tmp_path).read_bytes()
    assert config == (tmp_path / "base" / "unet" / "config.json").read_bytes()
    baked = safetensors.numpy.load_file(fetch(ada, result, unet, tmp_path))
    assert set(baked) == set(weights)
    np.testing.assert_array_equal(baked["conv_in.bias"], weights["conv_in.bias"])
    for name, delta in deltas["ink"].items():
        expected = weights[f"{name}.weight"] + 0.8 * delta
        np.testing.assert_allclose(baked[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_baked_folder_leaves_no_weights_of_the_pipeline_it_replaces(
    ada: Person, deltas: Deltas, tmp_path: Path
) -> None:
    write_base(tmp_path / "base")
    ada.upload(tmp_path / "base", "ada/new-base")
    stale = {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00001.safetensors",
        "unet/diffusion_pytorch_model.bin",
    }
    kept = {"unet/notes.txt", "merged.safetensors", "other/model.safetensors"}
    for path in stale | kept:
        (tmp_path / "old" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / path).write_text(path)
    write_file(tmp_path / "old" / "merged.safetensors", {"a": np.ones(1, np.float32)}, {})
    ada.upload(tmp_path / "old", "ada/rebaked")
    body = {
        "recipe": {
            "kind": "bake",
            "base": {"ref": "ada/new-base"},
            "inputs": [{"ref": "ada/ink"}],
        },
        "publish": {"repo": "ada/rebaked"},
    }
    job = ada.wait(ada.post("/api/bakes", body).json()["id"])
    assert job["state"] == "succeeded", job["error"]
    commit = job["result"]["commit"]
    listed = ada.get(f"/api/models/ada/rebaked/tree/{commit}?recursive=true").json()
    paths = {item["path"] for item in listed if item["type"] == "file"} - {".gitattributes"}
    made = {"README.md", "model_index.json", "unet/config.json"}
    assert paths == kept | made | {"unet/diffusion_pytorch_model.safetensors"}
    commits = ada.get("/api/models/ada/rebaked/commits/main").json()
    assert len(commits) == 3  # the first one, the upload, and the bake with what it deletes


def test_what_was_baked_is_extracted_again_and_resized(
    ada: Person, deltas: Deltas, tmp_path: Path
) -> None:
    write_base(tmp_path / "base")
    ada.upload(tmp_path / "base", "ada/before")
    bake = {
        "recipe": {
            "kind": "bake",
            "base": {"ref": "ada/before"},
            "inputs": [{"ref": "ada/robot", "strength": 0.8}],
        },
        "publish": {"repo": "ada/after"},
    }
    job = ada.wait(ada.post("/api/bakes", bake).json()["id"])
    assert job["state"] == "succeeded", job["error"]
    extract = {
        "recipe": {
            "kind": "extract",
            "base": {"ref": "ada/before"},
            "tuned": {"ref": "ada/after"},
            "rank": {"fixed": 3},
        },
        "publish": {"repo": "ada/found"},  # of a base that we do not know: PEFT's two files
    }
    answer = ada.post("/api/extracts", extract)
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    assert job["kind"] == "extract"
    assert job["progress"]["unit"] == "steps"
    peft = safetensors.numpy.load_file(
        fetch(ada, job["result"], "adapter_model.safetensors", tmp_path)
    )
    found = {}
    for name, delta in deltas["robot"].items():
        down, up = (peft[f"base_model.model.{name}.lora_{its}.weight"] for its in "AB")
        found[name] = up.astype(np.float64) @ down
        np.testing.assert_allclose(found[name], 0.8 * delta, rtol=1e-3, atol=1e-3)
    card = fetch(ada, job["result"], "README.md", tmp_path).read_text()
    assert "base_model: ada/before" in card
    for words in ("Extracted from:", "(/ada/after) at", "| tuned |", "| base |"):
        assert words in card
    resize = {
        "recipe": {
            "kind": "resize",
            "inputs": [{"ref": "ada/found"}],
            "rank": {"fixed": 1},
            "output": {"dialect": "kohya"},
        },
        "publish": {"repo": "ada/found", "path": "small.safetensors"},
    }
    answer = ada.post("/api/merges", resize)
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    small = safetensors.numpy.load_file(fetch(ada, job["result"], "small.safetensors", tmp_path))
    for name, delta in deltas_of(small).items():
        u, s, v = np.linalg.svd(found[name], full_matrices=False)
        np.testing.assert_allclose(delta, s[0] * np.outer(u[:, 0], v[0]), rtol=1e-3, atol=1e-3)
    assert "Resized from:" in fetch(ada, job["result"], "README.md", tmp_path).read_text()


def test_vectors_are_files_of_this_hub_too(ada: Person, deltas: Deltas, tmp_path: Path) -> None:
    module, (n_out, _) = next(iter(modules().items()))
    rows = np.linspace(0, 1, n_out, dtype=np.float32)
    (tmp_path / "vectors").mkdir()
    write_file(tmp_path / "vectors" / "half.safetensors", {f"unet.{module}.rows": rows}, {})
    ada.upload(tmp_path / "vectors", "ada/vectors")
    body = {
        "recipe": {
            "kind": "merge",
            "inputs": [{"ref": "ada/ink", "vectors": {"ref": "ada/vectors"}}],
        },
        "publish": {"repo": "ada/weighed", "path": "weighed.safetensors"},
    }
    answer = ada.post("/api/merges", body)
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    made = deltas_of(
        safetensors.numpy.load_file(fetch(ada, job["result"], "weighed.safetensors", tmp_path))
    )
    for name, delta in deltas["ink"].items():
        expected = rows[:, None] * delta if name == module else delta
        np.testing.assert_allclose(made[name], expected, rtol=1e-4, atol=1e-5)
    card = fetch(ada, job["result"], "README.md", tmp_path).read_text()
    assert "| strengths within `ada/ink` |" in card
    wrong = {"ref": "ada/ink", "vectors": {"ref": "ada/robot"}}
    refused = ada.post(
        "/api/merges", body | {"recipe": {"kind": "merge", "inputs": [wrong]}}
    ).json()["error"]
    assert "inputs[0].vectors" in str(refused["param"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
def test_a_language_model_is_baked_as_the_folder_it_is(ada: Person, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "out"
    tiny_llama().save_pretrained(base, max_shard_size="100KB")
    shards = {path.name for path in base.glob("model-*.safetensors")}
    assert len(shards) > 1
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tuned)
    ada.upload(base, "ada/tiny-llama")
    ada.upload(tuned, "ada/llama-style")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("pytorch_model.bin", "model.safetensors.index.json.old", "notes.txt"):
        (old / name).write_text(name)
    write_file(old / "style.safetensors", {"a": np.ones(1, np.float32)}, {})
    ada.upload(old, "ada/llama-baked")
    body = {
        "recipe": {
            "kind": "bake",
            "base": {"ref": "ada/tiny-llama"},
            "inputs": [{"ref": "ada/llama-style", "strength": 1.0}],
        },
        "publish": {"repo": "ada/llama-baked"},
    }
    answer = ada.post("/api/bakes", body)
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    listed = ada.get("/api/models/ada/llama-baked/tree/main?recursive=true").json()
    paths = {item["path"] for item in listed} - {".gitattributes", "README.md"}
    beside = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert paths >= shards | beside | {"style.safetensors", "notes.txt"}
    assert "pytorch_model.bin" not in paths
    out.mkdir()
    for path in shards | beside:
        (out / path).write_bytes(ada.get(f"/ada/llama-baked/resolve/main/{path}").content)
    baked = LlamaForCausalLM.from_pretrained(out).state_dict()
    for name, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(baked[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dialect", "path", "made"),
    [
        ("kohya", "styles/merged.safetensors", {"styles/merged.safetensors"}),
        ("peft", None, {"adapter_model.safetensors", "adapter_config.json"}),
    ],
)
def test_a_merge_leaves_the_adapters_beside_it(
    ada: Person, deltas: Deltas, tmp_path: Path, dialect: str, path: str | None, made: set[str]
) -> None:
    beside = {"mine.safetensors", "styles/mine.safetensors"}
    for seed, name in enumerate(sorted(beside)):
        write_lora(tmp_path / "mine" / name, seed, rank=2, alpha=1.0, trigger="mine")
    ada.upload(tmp_path / "mine", f"ada/beside-{dialect}")
    body = {
        "recipe": {
            "kind": "merge",
            "inputs": [{"ref": "ada/ink"}, {"ref": "ada/robot"}],
            "output": {"dialect": dialect},
        },
        "publish": {"repo": f"ada/beside-{dialect}", "path": path},
    }
    answer = ada.post("/api/merges", body)
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    listed = ada.get(f"/api/models/ada/beside-{dialect}/tree/main?recursive=true").json()
    paths = {item["path"] for item in listed if item["type"] == "file"} - {".gitattributes"}
    assert paths == beside | made | {"README.md"}


def test_a_base_file_is_baked_into_a_file(ada: Person, deltas: Deltas, tmp_path: Path) -> None:
    weights = write_base(tmp_path / "base")
    ada.upload(tmp_path / "base", "ada/base-file")
    body = {
        "recipe": {
            "kind": "bake",
            "base": {"ref": "ada/base-file:unet/diffusion_pytorch_model.safetensors"},
            "inputs": [{"ref": "ada/ink", "strength": -1.0}, {"ref": "ada/robot"}],
        },
        "publish": {"repo": "ada/baked-file", "path": "checkpoints/unet.safetensors"},
    }
    answer = ada.post("/api/bakes", body)
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    file = fetch(ada, job["result"], "checkpoints/unet.safetensors", tmp_path)
    baked = safetensors.numpy.load_file(file)
    for name in modules():
        expected = weights[f"{name}.weight"] - deltas["ink"][name] + deltas["robot"][name]
        np.testing.assert_allclose(baked[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_peft_adapter_is_two_files_in_and_out(
    ada: Person, deltas: Deltas, tmp_path: Path
) -> None:
    body = {
        "recipe": {
            "kind": "merge",
            "inputs": [{"ref": "ada/ink"}],
            "output": {"dialect": "peft"},
        },
        "publish": {"repo": "ada/peft"},
    }
    to_peft = ada.post("/api/merges", body)
    assert to_peft.status_code == 202, to_peft.text
    job = ada.wait(to_peft.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        fetch(ada, job["result"], name, tmp_path)
    answer = ada.merge("ada/from-peft", "ada/peft=0.5", "ada/robot=1")
    assert answer.status_code == 202, answer.text
    job = ada.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    recipe = ada.get(f"/api/recipes/{job['recipe_digest']}").json()["recipe"]
    config = hashlib.sha256((tmp_path / "adapter_config.json").read_bytes()).hexdigest()
    assert [item.get("config_sha256") for item in recipe["inputs"]].count(config) == 1
    merged = deltas_of(
        safetensors.numpy.load_file(fetch(ada, job["result"], "merged.safetensors", tmp_path))
    )
    for name, delta in merged.items():
        expected = 0.5 * deltas["ink"][name] + deltas["robot"][name]
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


def test_a_file_can_be_named_by_its_digest_and_by_revision(ada: Person, deltas: Deltas) -> None:
    head = ada.get("/api/models/ada/ink").json()["sha"]
    by_ref = ada.merge("ada/a", f"ada/ink@{head}:ink.safetensors=1", "ada/robot=1").json()
    digest = by_ref["recipe_digest"]
    recipe = ada.get(f"/api/recipes/{digest}").json()["recipe"]
    inputs = [{"sha256": item["sha256"]} for item in recipe["inputs"]]
    body = {
        "recipe": {"kind": "merge", "inputs": inputs},
        "publish": {"repo": "ada/a", "path": "merged.safetensors"},
    }
    by_digest = ada.post("/api/merges", body)
    assert by_digest.status_code == 202, by_digest.text
    assert by_digest.json()["recipe_digest"] == digest
    job = ada.wait(by_ref["id"])
    assert job["state"] == "succeeded", job["error"]
    job = ada.wait(by_digest.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    # The same bytes again are no new commit.
    assert job["result"]["commit"] == ada.job(by_ref["id"])["result"]["commit"]


def test_the_configuration_of_a_file_named_by_its_digest_is_the_pinned_one(
    ada: Person, deltas: Deltas, tmp_path: Path
) -> None:
    tensors = {}
    for name, (n_out, n_in) in modules().items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones((1, n_in), np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones((n_out, 1), np.float32)
    write_file(tmp_path / "twin.safetensors", tensors, {})
    sha256 = hashlib.sha256((tmp_path / "twin.safetensors").read_bytes()).hexdigest()
    configs = {}
    for alpha in (2, 3):  # the newest is of alpha 3
        folder = tmp_path / f"alpha{alpha}"
        folder.mkdir()
        (folder / "twin.safetensors").write_bytes((tmp_path / "twin.safetensors").read_bytes())
        text = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": alpha}).encode()
        (folder / "adapter_config.json").write_bytes(text)
        configs[alpha] = hashlib.sha256(text).hexdigest()
        ada.upload(folder, f"ada/twin{alpha}")

    def merge(**source: str) -> httpx2.Response:
        inputs = [{"sha256": sha256, **source}]
        return ada.post(
            "/api/merges",
            {
                "recipe": {"kind": "merge", "inputs": inputs, "output": {"dialect": "kohya"}},
                "publish": {"repo": "ada/of-twin", "path": "merged.safetensors"},
            },
        )

    for alpha, config in configs.items():
        answer = merge(config_sha256=config)
        assert answer.status_code == 202, answer.text
        job = ada.wait(answer.json()["id"])
        assert job["state"] == "succeeded", job["error"]
        file = fetch(ada, job["result"], "merged.safetensors", tmp_path)
        for delta in deltas_of(safetensors.numpy.load_file(file)).values():
            np.testing.assert_allclose(delta, alpha, rtol=1e-5)
    for source, says in (({}, "say which"), ({"config_sha256": "0" * 64}, "this hub has no")):
        answer = merge(**source)
        assert answer.status_code == 422, answer.text
        assert says in answer.text
        assert "inputs[0].config_sha256" in answer.text


def test_the_server_itself_never_loads_torch(hub: RunningHub, done: str) -> None:
    assert "libtorch" not in Path(f"/proc/{hub.process.pid}/maps").read_text()


# Events


def test_events_are_readable_with_curl_and_end_with_the_job(ada: Person, deltas: Deltas) -> None:
    job_id = ada.merge("ada/curl", "ada/ink=1", "ada/robot=1").json()["id"]
    url = f"{ada.hub.url}/api/jobs/{job_id}/events"
    header = f"Authorization: Bearer {ada.token}"
    result = subprocess.run(
        ["curl", "-sN", "--max-time", str(WAIT_S), "-H", header, url],
        check=True,
        capture_output=True,
        text=True,
    )
    events = parse_events(result.stdout)
    assert {event["event"] for event in events} <= {"state", "progress"}
    assert json.loads(events[-1]["data"])["state"] == "succeeded"
    ids = [int(event["id"]) for event in events]
    assert ids == sorted(set(ids))


def test_a_reader_that_comes_back_gets_only_what_it_missed(ada: Person, done: str) -> None:
    (last,) = [int(event["id"]) for event in events_of(ada, done)]
    assert [int(event["id"]) for event in events_of(ada, done, seen=0)] == [last]
    url = f"{ada.hub.url}/api/jobs/{done}/events"
    answer = httpx2.get(url, headers=ada.auth | {"Last-Event-ID": str(last)})
    assert (answer.status_code, answer.text) == (204, "")


# Refusals: at once, with the field, and without a row


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"recipe": {"kind": "merge", "inputs": []}}, 422, "BadRecipe", "inputs"),
        (
            {"recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink"}], "colour": 1}},
            422,
            "BadRecipe",
            "colour",
        ),
        (
            {"recipe": {"kind": "merge", "inputs": [{"ref": "nonsense"}]}},
            422,
            "BadRecipe",
            "inputs[0].ref",
        ),
        (
            {"recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink"}, {"ref": "ada/no"}]}},
            422,
            "BadRecipe",
            "inputs[1].ref",
        ),
        (
            {"recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink@v9"}]}},
            422,
            "BadRecipe",
            "inputs[0].ref",
        ),
        (
            {"recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink:no.safetensors"}]}},
            422,
            "BadRecipe",
            "inputs[0].ref",
        ),
        (
            {"recipe": {"kind": "merge", "inputs": [{"sha256": "0" * 64}]}},
            422,
            "BadRecipe",
            "inputs[0].sha256",
        ),
        (
            {"recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink", "sha256": "0" * 64}]}},
            422,
            "BadRecipe",
            "inputs[0].sha256",
        ),
        (
            {"recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink", "blocks": {"*.x": 0.5}}]}},
            422,
            "BadRecipe",
            "inputs[0].blocks.*.x",
        ),
        (
            {
                "recipe": {
                    "kind": "bake",
                    "base": {"ref": "ada/ink"},
                    "inputs": [{"ref": "ada/ink"}],
                }
            },
            422,
            "BadRecipe",
            "kind",
        ),
        (
            {"recipe": {"kind": "resize", "inputs": [{"ref": "ada/ink", "strength": 2}]}},
            422,
            "BadRecipe",
            "inputs",
        ),
        (
            {
                "recipe": {
                    "kind": "extract",
                    "base": {"ref": "ada/ink"},
                    "tuned": {"ref": "ada/ink"},
                    "rank": {"fixed": 2},
                }
            },
            422,
            "BadRecipe",
            "kind",
        ),
        (
            {
                "recipe": {
                    "kind": "merge",
                    "inputs": [{"ref": "ada/ink", "vectors": {"ref": "ada/no"}}],
                }
            },
            422,
            "BadRecipe",
            "inputs[0].vectors.ref",
        ),
        (
            {
                "recipe": {
                    "kind": "merge",
                    "inputs": [{"ref": "ada/ink"}],
                    "method": {"name": "linear", "density": 0.5},
                }
            },
            422,
            "BadRecipe",
            "method.density",
        ),
        ({"publish": {"repo": "ada/x"}}, 422, "BadField", "publish.path"),
        ({"publish": {"repo": "ada/x", "path": "x.bin"}}, 422, "BadField", "publish.path"),
        (
            {"publish": {"repo": "ada/x", "path": "../x.safetensors"}},
            422,
            "BadPath",
            "publish.path",
        ),
        ({"publish": {"repo": "x", "path": "x.safetensors"}}, 422, "BadName", "publish.repo"),
        ({"publish": {"repo": "bob/x", "path": "x.safetensors"}}, 403, "Forbidden", "publish.repo"),
        ({"publish": {"repo": "ada/x", "path": "x.safetensors", "y": 1}}, 422, "BadField", None),
        ({"extra": 1}, 422, "BadField", None),
    ],
)
def test_what_is_impossible_is_refused_before_a_row_is_written(
    ada: Person,
    deltas: Deltas,
    change: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
) -> None:
    before = ada.get("/api/jobs").json()
    body = {
        "recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink"}, {"ref": "ada/robot"}]},
        "publish": {"repo": "ada/x", "path": "x.safetensors"},
    } | change
    answer = ada.post("/api/merges", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    assert ada.get("/api/jobs").json() == before
    assert not list((ada.hub.data_dir / "scratch").glob("plan-*"))


def test_an_extraction_is_asked_for_at_its_own_address(ada: Person, deltas: Deltas) -> None:
    def ask(**recipe: Any) -> dict[str, Any]:
        body = {"recipe": recipe, "publish": {"repo": "ada/x", "path": "x.safetensors"}}
        answer = ada.post("/api/extracts", body)
        assert answer.status_code == 422, answer.text
        error: dict[str, Any] = answer.json()["error"]
        return error

    merge = ask(kind="merge", inputs=[{"ref": "ada/ink"}])
    assert (merge["code"], merge["param"]) == ("BadRecipe", "kind")
    base, rank = {"ref": "ada/ink"}, {"fixed": 2}
    missing = ask(kind="extract", base=base, tuned={"ref": "ada/no"}, rank=rank)
    assert (missing["code"], missing["param"]) == ("BadRecipe", "tuned.ref")


def test_an_adapter_that_does_not_fit_the_base_is_refused_by_module(
    ada: Person, deltas: Deltas, tmp_path: Path
) -> None:
    write_base(tmp_path / "small")
    kept = dict(list(modules().items())[:1])
    write_file(
        tmp_path / "small" / "unet" / "diffusion_pytorch_model.safetensors",
        {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in kept.items()},
        {},
    )
    ada.upload(tmp_path / "small", "ada/small")
    body = {
        "recipe": {
            "kind": "bake",
            "base": {"ref": "ada/small"},
            "inputs": [{"ref": "ada/ink"}],
        },
        "publish": {"repo": "ada/never"},
    }
    answer = ada.post("/api/bakes", body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "UnknownModules"
    assert "ink.safetensors" in error["message"]
    assert any(name in error["message"] for name in modules())
    assert ada.get("/api/models/ada/never").status_code == 404


def test_several_files_need_one_to_be_named(ada: Person, deltas: Deltas, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_lora(tmp_path / "many" / f"{name}.safetensors", 3)
    ada.upload(tmp_path / "many", "ada/many")
    answer = ada.merge("ada/x", "ada/many=1")
    assert answer.status_code == 422
    assert "one.safetensors, two.safetensors" in answer.json()["error"]["message"]
    assert ada.merge("ada/x", "ada/many:one.safetensors=1").status_code == 202


def test_a_job_larger_than_its_memory_is_refused(
    tmp_path: Path,
) -> None:
    tokens = make_data(tmp_path)
    with running_hub(tmp_path, workers=0, job_memory_bytes=1000) as hub:
        ada = Person(hub, tokens["ada"])
        write_lora(tmp_path / "ink" / "ink.safetensors", 0)
        ada.upload(tmp_path / "ink", "ada/ink")
        answer = ada.merge("ada/x", "ada/ink=1")
    assert answer.status_code == 413
    assert "GRAFT_JOB_MEMORY_BYTES" in answer.json()["error"]["message"]


def test_writing_needs_a_writing_token(ada: Person, tokens: dict[str, str]) -> None:
    reader = Person(ada.hub, tokens["reader"])
    assert reader.merge("eve/x", "ada/ink=1").status_code == 403
    nobody = httpx2.post(f"{ada.hub.url}/api/merges", json={})
    assert nobody.status_code == 401
    assert httpx2.get(f"{ada.hub.url}/api/jobs").status_code == 401


# A repeat is harmless


def test_a_repeat_with_the_same_key_is_the_same_job(ada: Person, deltas: Deltas) -> None:
    body = {
        "recipe": {"kind": "merge", "inputs": [{"ref": "ada/ink"}, {"ref": "ada/robot"}]},
        "publish": {"repo": "ada/once", "path": "x.safetensors"},
    }
    key = {"Idempotency-Key": "once-1"}
    first = ada.post("/api/merges", body, **key)
    assert first.status_code == 202, first.text
    assert ada.post("/api/merges", body, **key).json()["id"] == first.json()["id"]
    ada.delete(f"/api/jobs/{first.json()['id']}")
    repeated = ada.post("/api/merges", body, **key)
    assert (repeated.status_code, repeated.json()["id"]) == (202, first.json()["id"])
    other = body | {"publish": {"repo": "ada/twice", "path": "x.safetensors"}}
    refused = ada.post("/api/merges", other, **key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "KeyReused")


# Tenants


def test_a_job_is_seen_by_its_requester_only(ada: Person, bob: Person, deltas: Deltas) -> None:
    answer = ada.merge("ada/mine", "ada/secret=1", "ada/ink=1").json()
    job_id, digest = answer["id"], answer["recipe_digest"]
    for response in (
        bob.get(f"/api/jobs/{job_id}"),
        bob.get(f"/api/jobs/{job_id}/events"),
        bob.delete(f"/api/jobs/{job_id}"),
        bob.get("/api/jobs/" + "0" * 32),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "JobNotFound")
    assert bob.get("/api/jobs").json() == {"items": [], "next_cursor": None}
    job = ada.wait(job_id)
    assert job["state"] == "succeeded", job["error"]
    assert ada.get(f"/api/recipes/{digest}").status_code == 200
    assert bob.get(f"/api/recipes/{digest}").json()["error"]["code"] == "RecipeNotFound"
    assert Person(ada.hub, ada.hub.admin_token).get(f"/api/jobs/{job_id}").status_code == 200


def test_somebody_elses_private_file_is_as_if_it_did_not_exist(
    ada: Person, bob: Person, deltas: Deltas
) -> None:
    by_name = bob.merge("bob/x", "ada/secret=1")
    missing = bob.merge("bob/x", "ada/absent=1")
    assert by_name.status_code == missing.status_code == 422
    assert by_name.text.replace("secret", "absent") == missing.text
    answer = ada.merge("ada/known", "ada/secret=1", "ada/ink=1").json()
    recipe = ada.get(f"/api/recipes/{answer['recipe_digest']}").json()["recipe"]
    statuses = [
        bob.post(
            "/api/merges",
            {
                "recipe": {"kind": "merge", "inputs": [{"sha256": item["sha256"]}]},
                "publish": {"repo": "bob/x", "path": "x.safetensors"},
            },
        ).status_code
        for item in recipe["inputs"]
    ]
    assert sorted(statuses) == [202, 422]


def test_the_result_of_a_private_input_is_private(ada: Person, deltas: Deltas) -> None:
    refused = ada.merge("ada/leak", "ada/secret=1", "ada/ink=1", private=False)
    assert refused.status_code == 403
    assert refused.json()["error"]["message"] == (
        "ada/secret is not open to all, so its result must be private: publish to a private repo"
    )
    public = ada.merge("ada/ink", "ada/secret=1", "ada/ink=1")
    assert (public.status_code, public.json()["error"]["param"]) == (403, "publish.repo")
    job = ada.wait(ada.merge("ada/hidden", "ada/secret=1", "ada/ink=1").json()["id"])
    assert job["state"] == "succeeded", job["error"]
    assert ada.get("/api/models/ada/hidden").json()["private"] is True
    assert httpx2.get(f"{ada.hub.url}/api/models/ada/hidden").status_code in (401, 404)


# Lists


def test_jobs_are_listed_newest_first_in_pages(ada: Person, deltas: Deltas) -> None:
    ids = [ada.merge("ada/list", "ada/ink=1", "ada/robot=1").json()["id"] for _ in range(3)]
    page = ada.get("/api/jobs?limit=2").json()
    assert [job["id"] for job in page["items"]] == ids[:0:-1]
    following = ada.get(f"/api/jobs?limit=1&cursor={page['next_cursor']}").json()
    assert [job["id"] for job in following["items"]] == ids[:1]
    for job_id in ids:
        ada.delete(f"/api/jobs/{job_id}")
        ada.wait(job_id)
    for state in ("queued", "running"):  # of other tests
        for job in ada.get(f"/api/jobs?state={state}").json()["items"]:
            ada.wait(job["id"])
    assert ada.get("/api/jobs?state=running").json()["items"] == []
    assert {job["kind"] for job in ada.get("/api/jobs?kind=merge").json()["items"]} == {"merge"}
    assert ada.get("/api/jobs?state=asleep").status_code == 422


# Death and cancel, on servers of their own


@pytest.fixture
def own(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Person]:
    """Ada on a server of her own, with ada/ink and ada/robot."""
    settings = getattr(request, "param", {})
    tokens = make_data(tmp_path, **settings)
    with running_hub(tmp_path, **settings) as hub:
        ada = Person(hub, tokens["ada"])
        for seed, name in enumerate(("ink", "robot")):
            write_lora(tmp_path / name / f"{name}.safetensors", seed)
            ada.upload(tmp_path / name, f"ada/{name}")
        yield ada


def children_of(hub: RunningHub) -> list[int]:
    mark = str(hub.data_dir / "scratch").encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def start_job(ada: Person) -> str:
    """A merge whose child process is running."""
    job_id: str = ada.merge("ada/both", "ada/ink=1", "ada/robot=1").json()["id"]
    ada.wait(job_id, "running")
    end = time.monotonic() + WAIT_S
    while not children_of(ada.hub):
        assert time.monotonic() < end
        assert ada.job(job_id)["state"] == "running"
        time.sleep(0.02)
    return job_id


def is_gone(process: int) -> bool:
    end = time.monotonic() + WAIT_S
    while Path(f"/proc/{process}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not Path(f"/proc/{process}").exists()


def is_empty(folder: Path) -> bool:
    """Whether it becomes empty: a worker tidies up after it has told that a job is over."""
    end = time.monotonic() + WAIT_S
    while list(folder.iterdir()) and time.monotonic() < end:
        time.sleep(0.01)
    return not list(folder.iterdir())


# On PostgreSQL another server may run it, so that its lease has to end first.
ON_SQLITE: dict[str, Any] = {"database_url": None}


@pytest.mark.parametrize("own", [ON_SQLITE], ids=["sqlite"], indirect=True)
def test_a_job_survives_the_kill_of_its_server(own: Person, tmp_path: Path) -> None:
    job_id = start_job(own)
    children = children_of(own.hub)
    own.hub.kill()
    assert all(is_gone(child) for child in children)
    with running_hub(tmp_path, **ON_SQLITE) as hub:
        ada = Person(hub, own.token)
        job = ada.wait(job_id)
        assert (job["state"], job["attempts"]) == ("succeeded", 2), job["error"]
        commits = ada.get("/api/models/ada/both/commits/main").json()
        assert len(commits) == 2
        assert is_empty(hub.data_dir / "scratch")


def test_a_server_that_is_asked_to_stop_hands_its_job_back(own: Person, tmp_path: Path) -> None:
    job_id = start_job(own)
    children = children_of(own.hub)
    assert own.hub.stop() == 0
    assert all(is_gone(child) for child in children)
    assert not list((own.hub.data_dir / "scratch").iterdir())
    with running_hub(tmp_path) as hub:
        job = Person(hub, own.token).wait(job_id)
        assert (job["state"], job["attempts"]) == ("succeeded", 1), job["error"]


def test_a_server_stops_while_someone_follows_a_job(tmp_path: Path) -> None:
    tokens = make_data(tmp_path)
    with running_hub(tmp_path, workers=0) as hub:
        ada = Person(hub, tokens["ada"])
        write_lora(tmp_path / "ink" / "ink.safetensors", 0)
        ada.upload(tmp_path / "ink", "ada/ink")
        job_id = ada.merge("ada/x", "ada/ink=1").json()["id"]
        url = f"{hub.url}/api/jobs/{job_id}/events"
        with httpx2.stream("GET", url, headers=ada.auth, timeout=WAIT_S) as response:
            chunks = response.iter_text()
            while "queued" not in next(chunks):
                pass
            hub.process.send_signal(signal.SIGTERM)
            rest = "".join(chunks)  # ends whole, so the client sees no broken transfer
        assert rest == ""
        assert hub.stop() == 0


def test_a_killed_child_is_tried_again(own: Person) -> None:
    job_id = start_job(own)
    for child in children_of(own.hub):
        os.kill(child, signal.SIGKILL)
    job = own.wait(job_id)
    assert (job["state"], job["attempts"]) == ("succeeded", 2), job["error"]


def test_cancel_ends_a_running_job_and_leaves_nothing(own: Person) -> None:
    job_id = start_job(own)
    children = children_of(own.hub)
    asked = own.delete(f"/api/jobs/{job_id}")
    assert (asked.status_code, asked.json()["cancel_requested"]) == (200, True)
    assert own.wait(job_id)["state"] == "cancelled"
    assert all(is_gone(child) for child in children)
    assert own.delete(f"/api/jobs/{job_id}").json()["state"] == "cancelled"
    assert own.get("/api/models/ada/both").status_code == 404
    assert is_empty(own.hub.data_dir / "scratch")


def test_a_worker_with_sqlite_is_refused_in_one_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cli", "worker"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"GRAFT_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == (
        "error: with SQLite `graft serve` runs the jobs itself; workers need GRAFT_DATABASE_URL\n"
    )
    assert not (tmp_path / "data").exists()
