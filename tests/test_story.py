"""The whole way once: train, push, browse, download, use, merge, bake, publish.

Real processes (`graft`, `hf`, `curl`, the hub and its jobs, an S3 server), real clients
(huggingface_hub, diffusers, peft), and at the end pictures whose measured style and concept
scores are compared with those of the base model on the same prompts and seeds.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import snapshot_download
from numpy.typing import NDArray

from merge.formats.header import read_header
from merge.formats.reader import TensorFile
from tests.fixtures.s3 import ACCESS_KEY, SECRET_KEY, S3Server, serve_s3
from tests.fixtures.server import RunningHub, running_hub
from train.tiny import PIPELINE_DIR
from train.tiny.generate import generate
from train.tiny.load import load_pipeline
from train.tiny.metrics import concept_scores, style_scores
from train.tiny.render import CONCEPTS, STYLES, Scene, caption, known_scenes

ROOT = Path(__file__).parents[1]
STYLE, CONCEPT = "stripes", "ring"
STYLE_STRENGTH, CONCEPT_STRENGTH = 0.7, 0.5
SEED = 7


@dataclass(frozen=True)
class Person:
    """Somebody at a shell: a home of their own, the hub's address and a token, nothing else."""

    hub: RunningHub
    home: Path

    def run(self, *command: str | Path, **extra: str) -> str:
        """What the command prints; its failure is the test's, with everything it said."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "GRAFT_ENDPOINT": self.hub.url,
            "GRAFT_TOKEN": self.hub.admin_token,
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": self.hub.admin_token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **extra,
        }
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        said = f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, said
        return done.stdout

    def graft(self, *arguments: str | Path, **extra: str) -> str:
        return self.run(sys.executable, "-m", "cli", *arguments, **extra)

    def python(self, script: str) -> str:
        return self.run(sys.executable, "-c", script)

    def get(self, path: str) -> Any:
        answer = httpx2.get(self.hub.url + path, headers=self.hub.auth, timeout=30)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        return httpx2.post(self.hub.url + path, json=body, headers=self.hub.auth, timeout=60)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    (tmp_path / "s3").mkdir()
    with serve_s3(tmp_path / "s3") as server:
        yield server


# Loading a second adapter beside the first is what the test is about; peft calls it suspicious.
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_train_push_browse_merge_bake_download_use(
    tmp_path: Path, hub: RunningHub, s3: S3Server
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    person = Person(hub, home)
    bucket = s3.make_bucket("adapters")

    # Train two adapters; one goes to object storage in the same breath.
    person.graft("push", PIPELINE_DIR, "admin/tiny-sd")
    train(person, "style", {"style": STYLE}, s3)
    train(person, "concept", {"concept": CONCEPT})
    assert_published(bucket / "style", home / "style")

    # A stranger's tool uploads too, and everything is on the page and in the catalogue.
    (home / "mirror").mkdir()
    shutil.copy(home / "concept" / "concept.safetensors", home / "mirror")
    person.run("hf", "upload", "admin/mirror", "mirror", ".")
    assert_catalogued(person)

    # Every way down gives the same bytes, and stock loaders take it by its name alone.
    assert_downloads_agree(person)
    assert_stock_loaders_take_it(person)

    # Merge: at the shell, and over HTTP with its events.
    inputs = [f"admin/style={STYLE_STRENGTH}", f"admin/concept={CONCEPT_STRENGTH}"]
    person.graft("merge", *inputs, "-o", "merged.safetensors")
    merged = merge_over_http(person)

    # Bake: at the shell a base in float32 (to compare exactly), and over HTTP as it is stored.
    load_pipeline().save_pretrained(home / "base32")
    person.graft("bake", home / "base32", *inputs, "-o", "baked")
    baked_repo = bake_over_http(person)

    assert_pictures(person, merged, baked_repo)


def train(person: Person, name: str, dataset: dict[str, Any], s3: S3Server | None = None) -> None:
    """`graft train --push`, with the settings of the demo catalogue."""
    fields = yaml.safe_load((ROOT / "train/demo/configs" / f"{DEMO[name]}.yaml").read_text())
    fields |= {"name": name, "dataset": {**fields["dataset"], **dataset}, "threads": 1}
    (person.home / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    command = ["train", f"{name}.yaml", "--push", f"admin/{name}", "--json"]
    if s3 is None:
        shown = person.graft(*command)
    else:
        shown = person.graft(
            *command,
            "--publish",
            "s3://adapters/",
            AWS_ENDPOINT_URL_S3=s3.endpoint,
            AWS_ACCESS_KEY_ID=ACCESS_KEY,
            AWS_SECRET_ACCESS_KEY=SECRET_KEY,
            AWS_DEFAULT_REGION="us-east-1",
        )
    result = json.loads(shown)
    folder = person.home / name
    assert result["sha256"] == sha256(folder / f"{name}.safetensors")
    assert list((folder / "samples").glob("*.png"))


DEMO = {"style": "glim-style", "concept": "zorb"}


def assert_published(there: Path, here: Path) -> None:
    """Object storage holds the same files as the run's folder, and the manifest names them all."""
    manifest = json.loads(next(there.rglob("manifest.json")).read_text())
    assert manifest
    stored = {p.relative_to(there).name: sha256(p) for p in there.rglob("*") if p.is_file()}
    local = {p.name: sha256(p) for p in here.rglob("*") if p.is_file() and p.name in stored}
    assert stored == local
    assert "style.safetensors" in stored


def assert_catalogued(person: Person) -> None:
    style = person.get("/api/adapters?q=style")["items"]
    assert "admin/style" in {item["repo"] for item in style}
    details = person.get("/api/adapters/admin/style/style.safetensors")
    text = json.dumps(details)
    for shown in ("tiny-sd", "lora", STYLES[STYLE].word):
        assert shown in text
    digest = sha256(person.home / "concept" / "concept.safetensors")
    found = json.dumps(person.get(f"/api/hashes/{digest[:10].upper()}"))
    assert "admin/concept" in found
    assert "admin/mirror" in found
    page = httpx2.get(f"{person.hub.url}/admin/style", timeout=30)
    assert page.status_code == 200
    for shown in (STYLES[STYLE].word, sha256(person.home / "style" / "style.safetensors")):
        assert shown in page.text
    thumbs = httpx2.get(person.hub.url, timeout=30).text
    assert "<img" in thumbs


def assert_downloads_agree(person: Person) -> None:
    original = person.home / "style" / "style.safetensors"
    person.graft("pull", "admin/style", "pulled")
    person.run("hf", "download", "admin/style", "style.safetensors", "--local-dir", "by-hf")
    snapshot = snapshot_download(
        "admin/style",
        endpoint=person.hub.url,
        token=person.hub.admin_token,
        cache_dir=person.home / "cache",
    )
    for copy in (
        person.home / "pulled" / "style.safetensors",
        person.home / "by-hf" / "style.safetensors",
        Path(snapshot) / "style.safetensors",
    ):
        assert sha256(copy) == sha256(original), copy
    url = f"{person.hub.url}/admin/style/resolve/main/style.safetensors"
    person.run("curl", "-sS", "--fail", "-r", "100-1099", "-o", "piece", url)
    assert (person.home / "piece").read_bytes() == original.read_bytes()[100:1100]


def assert_stock_loaders_take_it(person: Person) -> None:
    """diffusers and peft with nothing set but HF_ENDPOINT (and the token)."""
    shown = person.python(
        "from diffusers import StableDiffusionPipeline\n"
        "pipe = StableDiffusionPipeline.from_pretrained('admin/tiny-sd')\n"
        "pipe.load_lora_weights('admin/style', weight_name='style.safetensors')\n"
        "print(pipe.get_list_adapters())\n"
    )
    assert "unet" in shown
    (person.home / "peft").mkdir()
    person.python(
        "import torch\n"
        "from diffusers import UNet2DConditionModel\n"
        "from peft import LoraConfig, get_peft_model\n"
        "unet = UNet2DConditionModel.from_pretrained('admin/tiny-sd', subfolder='unet')\n"
        "torch.manual_seed(0)\n"
        "model = get_peft_model(unet, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False,\n"
        "    target_modules=['to_q', 'to_v']))\n"
        "model.save_pretrained('peft')\n"
    )
    person.graft("push", "peft", "admin/peft-made")
    person.python(
        "import torch\n"
        "from diffusers import UNet2DConditionModel\n"
        "from peft import PeftModel\n"
        "from safetensors.torch import load_file\n"
        "unet = UNet2DConditionModel.from_pretrained('admin/tiny-sd', subfolder='unet')\n"
        "model = PeftModel.from_pretrained(unet, 'admin/peft-made')\n"
        "from peft import get_peft_model_state_dict\n"
        "got = get_peft_model_state_dict(model)\n"
        "want = load_file('peft/adapter_model.safetensors')\n"
        "assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)\n"
    )


def merge_over_http(person: Person) -> Path:
    """The file the hub made, after following its events to the end."""
    recipe = {
        "schema": 1,
        "kind": "merge",
        "inputs": [
            {"ref": "admin/style", "strength": STYLE_STRENGTH},
            {"ref": "admin/concept", "strength": CONCEPT_STRENGTH},
        ],
        "method": {"name": "linear"},
        "rank": {"exact": True},
    }
    job = follow(
        person,
        "/api/merges",
        {"recipe": recipe, "publish": {"repo": "admin/merged", "path": "merged.safetensors"}},
    )
    person.graft("pull", "admin/merged", "from-hub")
    file = person.home / "from-hub" / "merged.safetensors"
    assert sha256(file) == job["result"]["sha256"]
    metadata = read_header(file).metadata
    assert metadata["graft.recipe_digest"] == job["result"]["recipe_digest"]
    held = json.loads(metadata["graft.recipe"])
    assert sorted(i["strength"] for i in held["inputs"]) == [CONCEPT_STRENGTH, STYLE_STRENGTH]
    kept = person.get(f"/api/recipes/{job['result']['recipe_digest']}")
    assert json.dumps(STYLE_STRENGTH) in json.dumps(kept)
    assert person.get("/api/models/admin/merged")["sha"] == job["result"]["commit"]
    # The shell's merge of the same inputs holds the same tensors.
    assert_same_tensors(file, person.home / "merged.safetensors")
    return file


def bake_over_http(person: Person) -> Path:
    recipe = {
        "schema": 1,
        "kind": "bake",
        "base": {"ref": "admin/tiny-sd"},
        "inputs": [
            {"ref": "admin/style", "strength": STYLE_STRENGTH},
            {"ref": "admin/concept", "strength": CONCEPT_STRENGTH},
        ],
    }
    follow(person, "/api/bakes", {"recipe": recipe, "publish": {"repo": "admin/baked-on-hub"}})
    person.graft("pull", "admin/baked-on-hub", "baked-on-hub")
    return person.home / "baked-on-hub"


def follow(person: Person, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Start a job, read its server-sent events until it is over, and give its last state."""
    accepted = person.post(path, body)
    assert accepted.status_code == 202, accepted.text
    where = accepted.headers["Location"]
    events: list[dict[str, Any]] = []
    with httpx2.stream(
        "GET", f"{person.hub.url}{where}/events", headers=person.hub.auth, timeout=300
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line.removeprefix("data:")))
    job: dict[str, Any] = person.get(where)
    assert job["state"] == "succeeded", job
    assert events
    assert events[-1]["state"] == "succeeded"
    return job


def assert_pictures(person: Person, merged: Path, baked_repo: Path) -> None:
    """Each way of using the adapters shows more style and concept than the base does."""
    home = person.home
    concept = CONCEPTS[CONCEPT]
    grounds = ["white", "gray"] * 6
    styled = [Scene(s.shape, s.colour, s.background, STYLE) for s in known_scenes()][::3]
    style_prompts = [caption(scene) for scene in styled]
    concept_prompts = [caption(concept.scene(ground), concept.word) for ground in grounds]
    both_prompts = [caption(concept.scene(ground, STYLE), concept.word) for ground in grounds]

    base = load_pipeline()
    base_style = style_scores(generate(base, style_prompts, SEED), STYLE).mean()
    base_concept = concept_scores(generate(base, concept_prompts, SEED), CONCEPT).mean()
    base_both = both_scores(generate(base, both_prompts, SEED))

    live = load_pipeline()
    live.load_lora_weights(home / "style", weight_name="style.safetensors", adapter_name="style")
    live.load_lora_weights(
        home / "concept", weight_name="concept.safetensors", adapter_name="concept"
    )
    live.set_adapters(["style"], [1.0])
    assert style_scores(generate(live, style_prompts, SEED), STYLE).mean() > base_style + 0.3
    live.set_adapters(["concept"], [1.0])
    shown = concept_scores(generate(live, concept_prompts, SEED), CONCEPT).mean()
    assert shown > base_concept + 0.3
    live.set_adapters(["style", "concept"], [STYLE_STRENGTH, CONCEPT_STRENGTH])
    live_both = exact_pictures(live, both_prompts)
    assert_more(both_scores(as_bytes(live_both)), base_both, "live")

    with_merged = load_pipeline()
    with_merged.load_lora_weights(merged.parent, weight_name=merged.name)
    assert_more(both_scores(generate(with_merged, both_prompts, SEED)), base_both, "merged")

    baked = load_pipeline(home / "baked")
    baked_both = exact_pictures(baked, both_prompts)
    assert_more(both_scores(as_bytes(baked_both)), base_both, "baked")
    # float32 all the way: what is left is the order of the same additions, over 20 steps.
    assert np.abs(baked_both - live_both).max() < 2e-3
    assert_baked_weights_are_live_weights(baked, live)

    stored = load_pipeline(baked_repo)
    assert_more(both_scores(generate(stored, both_prompts, SEED)), base_both, "baked on the hub")


def assert_baked_weights_are_live_weights(
    baked: StableDiffusionPipeline, live: StableDiffusionPipeline
) -> None:
    live.fuse_lora(adapter_names=["style", "concept"])
    live.unload_lora_weights()
    fused = live.unet.state_dict()
    for key, weight in baked.unet.state_dict().items():
        torch.testing.assert_close(weight, fused[key], rtol=1e-5, atol=1e-6, msg=key)


def both_scores(images: NDArray[np.uint8]) -> tuple[float, float]:
    return (
        float(style_scores(images, STYLE).mean()),
        float(concept_scores(images, CONCEPT, STYLE).mean()),
    )


def assert_more(found: tuple[float, float], base: tuple[float, float], what: str) -> None:
    said = (
        f"{what}: style {found[0]:.2f} (base {base[0]:.2f}), concept {found[1]:.2f} ({base[1]:.2f})"
    )
    print(said)  # noqa: T201  # the figures belong in the report of a failed or verbose run
    assert found[0] > base[0] + 0.1, said
    assert found[1] > base[1] + 0.1, said


def exact_pictures(pipe: StableDiffusionPipeline, prompts: list[str]) -> NDArray[np.float32]:
    """As `generate`, without rounding to bytes."""
    generators = [torch.Generator().manual_seed(SEED * 1_000_003 + i) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=generators,
        output_type="np",
    ).images
    return np.asarray(images, dtype=np.float32)


def as_bytes(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray((images * 255).round(), dtype=np.uint8)


def assert_same_tensors(one: Path, other: Path) -> None:
    with TensorFile(one) as a, TensorFile(other) as b:
        assert list(a.header.tensors) == list(b.header.tensors)
        for key in a.header.tensors:
            torch.testing.assert_close(a.read_tensor(key), b.read_tensor(key), msg=key)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
