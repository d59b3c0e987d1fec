"""The REF grammar, and fetching from S3 and the web with real servers."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from cli.console import CommandError
from cli.refs import Local, OnHub, OnS3, OnWeb, fetch, parse_ref, parse_weighted
from merge.formats.adapters import read_config
from tests.fixtures.adapters import make_adapter


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors=0.8", ("a.safetensors", 0.8)),
        ("a.safetensors=-.5", ("a.safetensors", -0.5)),
        ("a.safetensors=1e-2", ("a.safetensors", 0.01)),
        ("a.safetensors=0", ("a.safetensors", 0.0)),
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("v=2.safetensors", ("v=2.safetensors", 1.0)),
        ("v=2.safetensors=3", ("v=2.safetensors", 3.0)),
        ("ns/name@v1:a.safetensors=0.7", ("ns/name@v1:a.safetensors", 0.7)),
        ("https://h/get?id=x", ("https://h/get?id=x", 1.0)),
        ("https://h/get?id=7=1", ("https://h/get?id=7", 1.0)),
        ("s3://b/k=v/f.safetensors=2", ("s3://b/k=v/f.safetensors", 2.0)),
    ],
)
def test_a_strength_is_the_number_after_the_last_equals_sign(
    text: str, expected: tuple[str, float]
) -> None:
    assert parse_weighted(text) == expected


@pytest.mark.parametrize("text", ["a=nan", "a=inf", "a=-Infinity", "a=", "=0.5", "a=1e999"])
def test_a_strength_that_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="strength"):
        parse_weighted(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ns/name", OnHub("ns/name", None, None)),
        ("ns/name@v1.0", OnHub("ns/name", "v1.0", None)),
        ("ns/name@feature/a:sub/f.safetensors", OnHub("ns/name", "feature/a", "sub/f.safetensors")),
        ("ns/name:f.safetensors", OnHub("ns/name", None, "f.safetensors")),
        ("hf://ns/name", OnHub("ns/name", None, None, True)),
        ("hf://ns/name@refs%2Fpr%2F1/d/f.bin", OnHub("ns/name", "refs/pr/1", "d/f.bin", True)),
        ("s3://bucket/a/b.safetensors", OnS3("bucket", "a/b.safetensors")),
        ("https://h/x.safetensors", OnWeb("https://h/x.safetensors")),
        ("http://127.0.0.1:1/x", OnWeb("http://127.0.0.1:1/x")),
        ("f.safetensors", Local(Path("f.safetensors"))),
        ("./ns/name", Local(Path("ns/name"))),
        ("/ns/name", Local(Path("/ns/name"))),
        ("a/b/c.safetensors", Local(Path("a/b/c.safetensors"))),
    ],
)
def test_what_a_ref_names(text: str, expected: object) -> None:
    assert parse_ref(text) == expected


def test_a_path_that_exists_is_a_path() -> None:
    Path("ns").mkdir()
    Path("ns/name").write_bytes(b"x")
    assert parse_ref("ns/name") == Local(Path("ns/name"))
    assert fetch("ns/name") == Path("ns/name")


@pytest.mark.parametrize(
    "text",
    ["", "hf://name", "s3://bucket", "s3://", "http://example.com/x", "ftp://h/x", "file:///x"],
)
def test_a_ref_of_no_known_form_is_refused(text: str) -> None:
    with pytest.raises(CommandError):
        parse_ref(text)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(CommandError, match=r"^gone\.safetensors: there is no such file"):
        fetch("gone.safetensors")


class Web:
    """A web server whose answers a test sets; counts the bodies that it sends."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                status, headers, body = web.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

            def log_message(self, *ignored: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


def test_a_web_file_is_fetched_whole_and_kept_by_its_version(web: Web) -> None:
    web.answers["/a.safetensors"] = (200, {"ETag": '"1"'}, b"x" * 3_000_000)
    first = fetch(f"{web.url}/a.safetensors")
    assert first.name == "a.safetensors"
    assert first.read_bytes() == b"x" * 3_000_000
    assert fetch(f"{web.url}/a.safetensors") == first
    web.answers["/a.safetensors"] = (200, {"ETag": '"2"'}, b"y")
    assert fetch(f"{web.url}/a.safetensors").read_bytes() == b"y"
    assert first.read_bytes() == b"x" * 3_000_000


def test_a_web_download_that_breaks_leaves_nothing(web: Web, tmp_path: Path) -> None:
    web.answers["/a"] = (200, {"Content-Length": "100"}, b"x" * 10)
    with pytest.raises(CommandError, match="/a: "):
        fetch(f"{web.url}/a")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_web_refusal_is_one_sentence(web: Web) -> None:
    with pytest.raises(CommandError, match=r"/gone: the server answers 404$"):
        fetch(f"{web.url}/gone")
    web.answers["/away"] = (302, {"Location": "http://example.invalid/"}, b"")
    with pytest.raises(CommandError, match="/away: "):
        fetch(f"{web.url}/away")


def test_more_bytes_than_the_cap_are_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.refs.MAX_BYTES", 1000)
    web.answers["/a"] = (200, {}, b"x" * 1001)
    with pytest.raises(CommandError, match="1001 bytes are more than 1000"):
        fetch(f"{web.url}/a")


def test_the_configuration_of_a_peft_file_comes_with_it(web: Web, tmp_path: Path) -> None:
    made = make_adapter(tmp_path / "a.safetensors", dialect="peft")
    web.answers["/x/a.safetensors?v=1"] = (200, {"ETag": '"1"'}, made.path.read_bytes())
    config = fetch(f"{web.url}/x/a.safetensors?v=1").with_name("adapter_config.json")
    assert web.asked == ["/x/a.safetensors?v=1", "/x/adapter_config.json?v=1"]
    assert not config.exists()
    for text in (b"{}", b'{"r": 4}'):  # another configuration of the same weights
        web.answers["/x/adapter_config.json?v=1"] = (200, {"ETag": '"1"'}, text)
        fetch(f"{web.url}/x/a.safetensors?v=1")
        assert config.read_bytes() == text
    web.answers["/x/adapter_config.json?v=1"] = (500, {}, b"")
    with pytest.raises(CommandError, match="/x/adapter_config.json.*: the server answers 500"):
        fetch(f"{web.url}/x/a.safetensors?v=1")
    del web.answers["/x/adapter_config.json?v=1"]
    fetch(f"{web.url}/x/a.safetensors?v=1")
    assert not config.exists()
    kohya = make_adapter(tmp_path / "b.safetensors", dialect="kohya")
    web.answers["/x/b.safetensors"] = (200, {}, kohya.path.read_bytes())
    fetch(f"{web.url}/x/b.safetensors")
    assert web.asked[-1] == "/x/b.safetensors"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[pytest.MonkeyPatch], None]]:
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket/sub").mkdir(parents=True)
    (folder / "bucket/sub/a.safetensors").write_bytes(os.urandom(2_000_000))
    make_adapter(folder / "bucket/peft/ink.safetensors", dialect="peft", alphas=8.0)
    make_adapter(folder / "bucket/bare/ink.safetensors", dialect="peft")
    (folder / "bucket/bare/adapter_config.json").unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("rclone")),
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
    ]
    command += ["--auth-key", "key,secret", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)

        def use(monkeypatch: pytest.MonkeyPatch) -> None:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

        yield use
        server.terminate()


def test_an_s3_object_is_fetched(
    s3: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3(monkeypatch)
    path = fetch("s3://bucket/sub/a.safetensors")
    client = boto3.Session().client(
        "s3", config=Config(response_checksum_validation="when_required")
    )
    expected = client.get_object(Bucket="bucket", Key="sub/a.safetensors")["Body"].read()
    assert path.name == "a.safetensors"
    assert path.read_bytes() == expected


def test_a_peft_file_on_s3_comes_with_its_configuration(
    s3: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3(monkeypatch)
    config = read_config(fetch("s3://bucket/peft/ink.safetensors"))
    assert config is not None
    assert config["lora_alpha"] == 8.0
    assert read_config(fetch("s3://bucket/bare/ink.safetensors")) is None


@pytest.mark.parametrize(
    ("ref", "why"),
    [("s3://bucket/none", "no such object"), ("s3://nowhere/none", "no such bucket")],
)
def test_a_missing_s3_object_is_named(
    s3: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    ref: str,
    why: str,
) -> None:
    s3(monkeypatch)
    with pytest.raises(CommandError, match=f"^{ref}: there is {why}$"):
        fetch(ref)


def test_s3_without_credentials_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(CommandError, match="no S3 credentials"):
        fetch("s3://bucket/key")
