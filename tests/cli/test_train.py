"""train and publish, as commands against a real hub and a real S3 server."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from PIL import Image

from hub.context import open_hub
from hub.settings import Settings
from tests.fixtures.pipelines import save_random_pipeline
from tests.fixtures.s3 import ACCESS_KEY, SECRET_KEY, S3Server, serve_s3
from tests.fixtures.server import RunningHub, running_hub
from tests.hub.conftest import make_user

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return save_random_pipeline(folder / "untrained")


@pytest.fixture(scope="module")
def other(folder: Path) -> str:
    """A token of a user who owns nothing, made before the server starts."""
    with open_hub(Settings(data_dir=folder / "hub" / "data", min_free_bytes=0)) as hub:
        return make_user(hub, "other")[1]


@pytest.fixture(scope="module")
def hub(folder: Path, base: Path, other: str) -> Iterator[RunningHub]:
    """With the base among its repos."""
    with running_hub(folder / "hub", min_free_bytes=0) as hub:
        api = HfApi(hub.url, token=hub.admin_token)
        api.create_repo("admin/untrained")
        api.upload_folder(repo_id="admin/untrained", folder_path=base)
        yield hub


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[S3Server]:
    (folder / "s3").mkdir()
    with serve_s3(folder / "s3") as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def work(tmp_path: Path, base: Path) -> Path:
    """A folder with run.yaml and its pictures."""
    (tmp_path / "photos").mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (90 * index, 40, 80)).save(tmp_path / "photos" / f"{index}.png")
        (tmp_path / "photos" / f"{index}.txt").write_text("a sks circle")
    write_config(tmp_path, base=str(base))
    return tmp_path


def write_config(work: Path, **fields: Any) -> None:
    config = {
        "name": "toy",
        "triggers": ["sks"],
        "dataset": {"folder": "photos"},
        "class_images": None,
        "samples": {"steps": 2, "prompts": ["a sks circle"]},
        "rank": 2,
        "steps": 3,
        "batch": 1,
        "device": "cpu",
        "threads": 1,
    }
    (work / "run.yaml").write_text(yaml.safe_dump(config | fields))


def environment(work: Path, **variables: str) -> dict[str, str]:
    return os.environ | {"HOME": str(work), "PYTHONPATH": str(ROOT), **variables}


def graft(work: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        check=False,
        cwd=work,
        env=environment(work, **variables),
        capture_output=True,
        text=True,
    )


def to_hub(hub: RunningHub, token: str | None = None) -> dict[str, str]:
    return {"GRAFT_ENDPOINT": hub.url, "GRAFT_TOKEN": token or hub.admin_token}


def to_s3(s3: S3Server, secret: str = SECRET_KEY) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": s3.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def test_a_base_from_the_hub_is_trained_pushed_and_published(
    work: Path, hub: RunningHub, s3: S3Server
) -> None:
    write_config(work, base="admin/untrained")
    variables = to_hub(hub) | to_s3(s3)
    arguments = ["--push", "admin/toy", "--publish", "s3://bucket/adapters"]
    done = graft(work, "train", "run.yaml", *arguments, "--json", **variables)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["folder"] == "toy"
    assert answer["scores"].keys() == {"drift"}
    assert [len(one["sent"]) for one in answer["published"]] == [6, 6]
    assert "training 16,576 of " in done.stderr
    assert "step 3 of 3: loss " in done.stderr
    expected = files_of(work / "toy")
    assert files_of(s3.folder / "bucket" / "adapters" / "toy") == expected
    api = HfApi(hub.url, token=hub.admin_token)
    got = Path(api.snapshot_download("admin/toy", local_dir=work / "got"))
    assert {name: data for name, data in files_of(got).items() if name in expected} == expected
    for target in ("admin/toy", "s3://bucket/adapters"):
        again = graft(work, "publish", "toy", target, **variables)
        assert again.returncode == 0
        assert "already has all of it" in again.stdout


def test_bad_credentials_are_found_before_training(
    work: Path, other: str, hub: RunningHub, s3: S3Server
) -> None:
    cases = [
        (["--push", "admin/toy"], to_hub(hub, "graft_wrong"), "does not accept th"),
        (["--push", "nobody/toy"], to_hub(hub, other), "refused"),
        (["--push", "toy"], to_hub(hub), "namespace/name"),
        (["--publish", "s3://bucket/x"], to_s3(s3, "wrong"), "s3://bucket/x/toy: the store"),
        (["--publish", "s3://nowhere/x"], to_s3(s3), "there is no such bucket"),
        (["--publish", "bucket/x"], to_s3(s3), "is not an address"),
    ]
    for arguments, variables, message in cases:
        done = graft(work, "train", "run.yaml", *arguments, **variables)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert sorted(path.name for path in work.iterdir()) == ["photos", "run.yaml"]


def test_a_signal_saves_before_it_stops(work: Path, base: Path) -> None:
    write_config(work, base=str(base), steps=100_000)
    command = [sys.executable, "-m", "cli", "train", "run.yaml"]
    with subprocess.Popen(
        command, cwd=work, env=environment(work), stderr=subprocess.PIPE, text=True
    ) as process:
        events = work / "toy.run" / "events.jsonl"
        while not (events.exists() and '"step": 5,' in events.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 1
    assert "run again with --resume to continue" in said
    kept = json.loads(events.read_text().splitlines()[-2])
    assert kept["event"] == "checkpoint"


def test_presets_are_listed_without_a_tensor_library(tmp_path: Path) -> None:
    script = (
        "import sys; from cli.__main__ import app\n"
        "app(['train', '--list-presets', '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'boto3' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    presets = json.loads(done.stdout)
    assert list(presets)[:2] == ["xattn-kv", "xattn"]
    table = graft(tmp_path, "train", "--list-presets")
    assert all(name in table.stdout for name in presets)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train"], 2, "CONFIG"),
        (["train", "none.yaml"], 1, "none.yaml: No such file"),
        (["publish", "photos", "admin/toy"], 1, "photos: holds no manifest.json"),
        (["publish", "photos"], 2, "TARGET"),
    ],
)
def test_wrong_usage_says_what_is_missing(
    work: Path, arguments: list[str], status: int, message: str
) -> None:
    done = graft(work, *arguments)
    assert done.returncode == status
    assert message in done.stderr


def test_an_unknown_base_is_named(work: Path, hub: RunningHub) -> None:
    write_config(work, base="admin/nothing")
    done = graft(work, "train", "run.yaml", **to_hub(hub))
    assert done.returncode == 1
    assert "admin/nothing" in done.stderr
    assert not (work / "toy.run").exists()
