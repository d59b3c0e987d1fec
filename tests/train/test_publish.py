"""Publishing to a real S3 server: complete, verified, repeatable, and honest when it fails."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.s3 import S3Server, serve_s3
from train.errors import BadResult, CannotPublish
from train.manifest import MANIFEST, read_manifest, write_manifest
from train.publish import State, publish
from train.targets import S3Target, s3_target


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new one for each test, as the folder that holds its objects as files."""
    server.use(monkeypatch)
    return server.make_bucket(f"bucket-{secrets.token_hex(4)}")


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A folder as a run leaves it, as far as publishing can tell."""
    folder = tmp_path / "toy"
    (folder / "samples").mkdir(parents=True)
    (folder / "toy.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "samples" / "00.png").write_bytes(b"not really a picture")
    (folder / "README.md").write_text("# toy\n")
    write_manifest(folder, "toy")
    return folder


def target_of(bucket: Path) -> S3Target:
    return s3_target(f"s3://{bucket.name}/adapters", "toy")


def stored(bucket: Path) -> dict[str, bytes]:
    root = bucket / "adapters" / "toy"
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def put(server: S3Server, bucket: Path, path: str, data: bytes) -> None:
    server.client().put_object(Bucket=bucket.name, Key=f"adapters/toy/{path}", Body=data)


def local(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_everything_arrives_and_the_manifest_comes_last(bucket: Path, result: Path) -> None:
    states: list[State] = []
    seen: dict[State, set[str]] = {}

    def note(state: State, detail: str) -> None:
        states.append(state)
        seen[state] = set(stored(bucket))

    published = publish(result, target_of(bucket), note)
    assert stored(bucket) == local(result)
    assert states == list(State)
    assert seen[State.STAGED] == set()
    assert seen[State.VERIFIED] == set(local(result)) - {MANIFEST}
    assert set(published.sent) == seen[State.VERIFIED]


def test_a_second_time_sends_nothing(bucket: Path, result: Path) -> None:
    publish(result, target_of(bucket))
    times = {path: path.stat().st_mtime_ns for path in bucket.rglob("*") if path.is_file()}
    assert publish(result, target_of(bucket)).sent == ()
    assert times == {path: path.stat().st_mtime_ns for path in bucket.rglob("*") if path.is_file()}


def test_an_attempt_that_broke_is_finished_by_the_next(
    bucket: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(bucket)
    original = S3Target._put

    def breaks(self: S3Target, path: str, body: object) -> None:
        if path == "toy.safetensors":
            raise KeyboardInterrupt
        original(self, path, body)

    monkeypatch.setattr(S3Target, "_put", breaks)
    with pytest.raises(KeyboardInterrupt):
        publish(result, target)
    assert MANIFEST not in stored(bucket)
    monkeypatch.setattr(S3Target, "_put", original)
    assert publish(result, target).sent == ("toy.safetensors",)
    assert stored(bucket) == local(result)


def test_a_damaged_object_is_found_and_sent_again(
    server: S3Server, bucket: Path, result: Path
) -> None:
    publish(result, target_of(bucket))
    put(server, bucket, "toy.safetensors", b"bit rot")
    assert publish(result, target_of(bucket)).sent == ("toy.safetensors",)
    assert stored(bucket) == local(result)


def test_a_store_that_keeps_other_bytes_gets_no_manifest(
    server: S3Server, bucket: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = S3Target._put

    def loses_a_byte(self: S3Target, path: str, body: Any) -> None:
        original(self, path, body)
        if path == "toy.safetensors":
            put(server, bucket, path, (result / path).read_bytes()[:-1])

    monkeypatch.setattr(S3Target, "_put", loses_a_byte)
    with pytest.raises(CannotPublish, match="toy.safetensors does not have the bytes"):
        publish(result, target_of(bucket))
    assert MANIFEST not in stored(bucket)


def test_a_new_version_replaces_the_old_one_and_removes_what_it_dropped(
    server: S3Server, bucket: Path, result: Path
) -> None:
    publish(result, target_of(bucket))
    put(server, bucket, "notes.txt", b"somebody else's")
    (result / "samples" / "00.png").rename(result / "samples" / "01.png")
    write_manifest(result, "toy")
    publish(result, target_of(bucket))
    assert stored(bucket) == local(result) | {"notes.txt": b"somebody else's"}


@pytest.mark.parametrize("damage", ["change", "remove", "manifest", "escape"])
def test_a_folder_that_is_not_what_its_manifest_says_is_refused(
    bucket: Path, result: Path, damage: str
) -> None:
    match damage:
        case "change":
            (result / "README.md").write_text("# other\n")
            message = "README.md was changed after the run"
        case "remove":
            (result / "README.md").unlink()
            message = "README.md is missing"
        case "manifest":
            (result / MANIFEST).write_text("{}")
            message = "is not one of ours"
        case _:
            manifest = json.loads((result / MANIFEST).read_text())
            manifest["files"]["../secret"] = manifest["files"]["README.md"]
            (result / MANIFEST).write_text(json.dumps(manifest))
            message = "not inside it"
    with pytest.raises(BadResult, match=message):
        publish(result, target_of(bucket))
    assert not (bucket / "adapters").exists()


def test_a_folder_without_manifest_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(BadResult, match="no finished run"):
        read_manifest(tmp_path)
    with pytest.raises(BadResult, match="no finished run"):
        read_manifest(tmp_path / "none")


def test_the_check_writes_nothing_that_stays(bucket: Path) -> None:
    target_of(bucket).check()
    assert [path for path in bucket.rglob("*") if path.is_file()] == []


def test_each_refusal_is_one_sentence(
    server: S3Server, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CannotPublish, match="no such bucket"):
        s3_target("s3://nowhere/x", "toy").check()
    server.use(monkeypatch, secret="wrong-secret")
    with pytest.raises(CannotPublish, match="secret key|credentials"):
        target_of(bucket).check()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CannotPublish, match="credentials"):
        target_of(bucket).check()
    server.use(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(CannotPublish, match="Could not connect"):
        target_of(bucket).check()


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "https://bucket/x", "bucket/x", "s3://b/x?y=1"]
)
def test_what_is_no_s3_address_is_refused(url: str) -> None:
    with pytest.raises(CannotPublish, match="not an address"):
        s3_target(url, "toy")


def test_the_name_makes_a_folder_of_its_own(bucket: Path) -> None:
    assert s3_target("s3://b", "toy").prefix == "toy"
    assert s3_target("s3://b/", "toy").prefix == "toy"
    assert s3_target("s3://b/x/y/", "toy").prefix == "x/y/toy"
