"""Bakes whose base, adapters or result lie in S3: the same bytes as here, or nothing at all."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cli import ranges, s3
from cli.__main__ import app
from cli.console import CommandError
from cli.ranges import Blocks
from cli.refs import open_ref, place_of
from merge.errors import BadFile, CannotWrite, MergeError
from merge.execute import Cancelled, execute
from merge.families import FAMILIES
from merge.formats.hashes import sha256_file
from merge.formats.sources import read_bytes
from merge.formats.writer import layout, write_file
from merge.plan import Plan, plan
from tests.fixtures.engine import make_adapter, make_recipe, some_of
from tests.fixtures.proxy import CUT_BODY, LOSE_ANSWER, Request, proxy_to
from tests.fixtures.s3 import S3Server, serve_s3

ROOT = Path(__file__).parents[2]
BASE = ROOT / "train/tiny/pipeline/unet/diffusion_pytorch_model.safetensors"
FAMILY = FAMILIES["tiny-sd"]
NAMES = [name for name in some_of(FAMILY) if name[0] == "unet"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        server.client().create_bucket(Bucket="bucket")
        yield server


@pytest.fixture
def held(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The base and an adapter, here and in the store; requests are small and therefore many."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 100_000)
    monkeypatch.setattr(ranges, "KEPT", 12)
    monkeypatch.setattr(s3, "HEAD_BYTES", 1000)
    monkeypatch.setattr(s3, "_PART_BYTES", 300_000)
    (tmp_path / "base.safetensors").symlink_to(BASE)
    make_adapter(tmp_path / "ink.safetensors", FAMILY, NAMES, dialect="peft", alpha=8.0)
    client = server.client()
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=item["Key"])
    for name in ("base.safetensors", "ink.safetensors", "adapter_config.json"):
        put(server, f"in/{name}", (tmp_path / name).read_bytes())
    server.use(monkeypatch)
    return server


def put(server: S3Server, key: str, data: bytes) -> None:
    server.client().put_object(Bucket="bucket", Key=key, Body=data)


def content(server: S3Server, key: str) -> bytes | None:
    held = server.client().list_objects_v2(Bucket="bucket").get("Contents", [])
    if key not in [item["Key"] for item in held]:
        return None
    return bytes(server.client().get_object(Bucket="bucket", Key=key)["Body"].read())


def uploads(server: S3Server) -> list[Any]:
    client = server.client()
    try:
        return list(client.list_multipart_uploads(Bucket="bucket").get("Uploads", []))
    except client.exceptions.NoSuchUpload:  # rclone's way to say that there never was one
        return []


def graft(*arguments: str) -> str:
    """What a command prints; its errors are raised, not printed."""
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def planned(blocks: Blocks, base: str = "s3://bucket/in/base.safetensors") -> Plan:
    """A bake of the objects, as they are now."""
    recipe, _ = make_recipe([(Path("ink.safetensors"), 0.8)], base=Path("base.safetensors"))
    refs = {"base.safetensors": base, "ink.safetensors": "s3://bucket/in/ink.safetensors"}
    return plan(recipe, {name: open_ref(ref, blocks) for name, ref in refs.items()})


STORE = "s3://bucket/in/"


@pytest.mark.parametrize(
    ("base", "ink", "out"),
    [
        (f"{STORE}base.safetensors", f"{STORE}ink.safetensors", "s3://bucket/out.safetensors"),
        (f"{STORE}base.safetensors", "ink.safetensors", "out.safetensors"),
        ("base.safetensors", f"{STORE}ink.safetensors", "out.safetensors"),
        ("base.safetensors", "ink.safetensors", "s3://bucket/out.safetensors"),
    ],
)
def test_a_bake_is_the_same_wherever_its_files_lie(
    held: S3Server, tmp_path: Path, base: str, ink: str, out: str
) -> None:
    graft("bake", "base.safetensors", "ink.safetensors=0.8", "-o", "here", "--reproducible")
    expected = sha256_file(tmp_path / "here")
    told = graft("bake", base, f"{ink}=0.8", "-o", out, "--reproducible", "--json")
    found = json.loads(told)
    assert (found["path"], found["sha256"]) == (out, expected)
    if out.startswith("s3"):
        (tmp_path / "out.safetensors").write_bytes(content(held, "out.safetensors") or b"")
    assert sha256_file(tmp_path / "out.safetensors") == expected
    assert found["size"] == (tmp_path / "out.safetensors").stat().st_size
    assert uploads(held) == []
    assert not (tmp_path / "cache").exists()


def test_a_merge_goes_to_a_store_and_an_inspection_reads_there(
    held: S3Server, tmp_path: Path
) -> None:
    ink = "s3://bucket/in/ink.safetensors"
    graft("merge", f"{ink}=0.5", "ink.safetensors=0.25", "--to", "kohya", "-o", "s3://bucket/both")
    found = json.loads(graft("inspect", "s3://bucket/both", "--json"))
    assert (found["dialect"], found["modules"]) == ("kohya", len(NAMES))
    (tmp_path / "both").write_bytes(content(held, "both") or b"")
    assert found["hashes"]["sha256"] == sha256_file(tmp_path / "both")
    assert json.loads(graft("inspect", ink, "--no-hashes", "--json"))["dialect"] == "peft"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "s3://bucket/in/base.safetensors"), "base.safetensors is an input of the recipe"),
        (("-o", "s3://bucket"), "write s3://bucket/key"),
        (("-o", "https://host/x"), "results go to a path or to s3://bucket/key"),
        (("-o", "s3://nowhere/x"), "s3://nowhere/x: there is no such bucket; nothing was written"),
    ],
)
def test_a_result_that_cannot_be_written_there_is_refused_before_anything_is_read(
    held: S3Server, arguments: tuple[str, ...], says: str
) -> None:
    before = content(held, "in/base.safetensors")
    with pytest.raises((CommandError, MergeError), match=says):
        graft("bake", "s3://bucket/in/base.safetensors", "none.safetensors", *arguments)
    assert content(held, "in/base.safetensors") == before
    assert uploads(held) == []


def test_an_object_is_replaced_only_where_that_is_asked(held: S3Server) -> None:
    put(held, "out", b"old")
    command = ("bake", "base.safetensors", "ink.safetensors", "-o", "s3://bucket/out")
    with pytest.raises(CommandError, match=r"^s3://bucket/out exists; --force replaces it$"):
        graft(*command)
    assert content(held, "out") == b"old"
    graft(*command, "--force")
    assert len(content(held, "out") or b"") > BASE.stat().st_size


def test_the_engine_does_not_write_over_an_input_either(held: S3Server) -> None:
    with Blocks() as blocks, pytest.raises(CannotWrite, match="is an input of the recipe itself"):
        execute(planned(blocks), place_of("s3://bucket/in/base.safetensors", force=True))


def test_a_folder_is_not_written_to_a_store(held: S3Server) -> None:
    with pytest.raises(CannotWrite, match="a folder, which can only be written to a disk here"):
        graft("merge", "ink.safetensors", "--to", "peft", "-o", "s3://bucket/peft")
    assert content(held, "peft") is None


def test_wrong_credentials_are_one_sentence(
    held: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.use(monkeypatch, secret="wrong-secret")
    base, out = "s3://bucket/in/base.safetensors", "s3://bucket/out.safetensors"
    with pytest.raises(CannotWrite, match="does not accept this secret key; nothing was written"):
        graft("bake", base, "ink.safetensors", "-o", out)
    with pytest.raises(CommandError, match=f"^{base}: the store does not accept this secret key$"):
        graft("bake", base, "ink.safetensors", "-o", "out.safetensors")
    assert content(held, "out.safetensors") is None


def test_without_boto3_the_message_says_how_to_get_it(
    held: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cli.s3", "train.s3"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "boto3", None)
    for base, out in [("s3://bucket/in/base.safetensors", "x"), ("base.safetensors", "s3://b/k")]:
        with pytest.raises(CommandError, match=r"S3 needs boto3: pip install 'grafthub\[train\]'"):
            graft("bake", base, "ink.safetensors", "-o", out)


@pytest.mark.parametrize("when", ["before it is opened", "while it is written"])
def test_an_object_that_changes_meanwhile_is_an_error(held: S3Server, when: str) -> None:
    old = BASE.read_bytes()
    new = old[:-3_000_000] + Random(0).randbytes(3_000_000)

    def change(*ignored: int) -> None:
        put(held, "in/base.safetensors", new)

    with Blocks() as blocks:
        wish = planned(blocks)
        if when == "before it is opened":
            change()
        with pytest.raises(BadFile, match=r"base\.safetensors: the object changed .*st_changed"):
            execute(wish, place_of("s3://bucket/out", force=True), change, workers=1)
    assert content(held, "out") is None
    assert uploads(held) == []


def test_an_object_that_is_deleted_meanwhile_is_an_error(held: S3Server) -> None:
    with Blocks() as blocks:
        file = open_ref("s3://bucket/in/base.safetensors", blocks)
        assert not isinstance(file, Path)
        held.client().delete_object(Bucket="bucket", Key="in/base.safetensors")
        with pytest.raises(BadFile, match="st_changed"):
            read_bytes(file, 2_000_000, 10)


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_a_bake_that_is_stopped_leaves_what_was_there(
    held: S3Server, error: type[BaseException]
) -> None:
    put(held, "out", b"old")
    finished: list[int] = []

    def progress(done: int, total: int) -> None:
        finished.append(done)
        if len(finished) == 4:
            raise error

    with Blocks() as blocks, pytest.raises(error):
        execute(planned(blocks), place_of("s3://bucket/out", force=True), progress, workers=2)
    assert content(held, "out") == b"old"
    assert uploads(held) == []


def test_ctrl_c_takes_back_what_was_sent(held: S3Server) -> None:
    sending, go_on = threading.Event(), threading.Event()

    def decide(request: Request) -> None:
        if "partNumber=" in request.path:
            sending.set()
            assert go_on.wait(60)

    command = [sys.executable, "-c", _TAKES_CTRL_C, "bake", "base.safetensors", "ink.safetensors"]
    with proxy_to(held.endpoint, decide) as address:
        env = os.environ | {"AWS_ENDPOINT_URL_S3": address, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen([*command, "-o", "s3://bucket/out"], env=env) as process:
            try:
                assert sending.wait(60)
                assert len(uploads(held)) == 1
                process.send_signal(signal.SIGINT)
            finally:
                go_on.set()
            assert process.wait(60) == 130
    assert content(held, "out") is None
    assert uploads(held) == []


# What a shell runs in its background ignores the signal, and so do its children.
_TAKES_CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from cli.__main__ import main
main()
"""


def test_a_server_that_dies_midway_is_one_sentence_and_shows_nothing(
    held: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other/bucket").mkdir(parents=True)
    stop = threading.Event()
    with serve_s3(tmp_path / "other") as other:
        other.use(monkeypatch)
        target = place_of("s3://bucket/out", force=True)

        def progress(done: int, total: int) -> None:
            other.process.kill()
            other.process.wait()
            stop.set()

        held_base = Path("base.safetensors")
        recipe, files = make_recipe([(Path("ink.safetensors"), 0.8)], base=held_base)
        with pytest.raises(CannotWrite, match="s3://bucket/out: .*Could not connect.*upload"):
            execute(plan(recipe, files), target, progress, workers=1)
    assert stop.is_set()
    with serve_s3(tmp_path / "other") as again:
        assert content(again, "out") is None
        assert uploads(again) == []


def deciding(decisions: dict[str, list[str | int | None]]) -> Callable[[Request], str | int | None]:
    """The next decision for the first pattern that is in `METHOD path`."""

    def decide(request: Request) -> str | int | None:
        for pattern, left in decisions.items():
            if pattern in f"{request.method} {request.path}" and left:
                return left.pop(0)
        return None

    return decide


def bake_through(held: S3Server, monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    with proxy_to(held.endpoint, decide) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        base, ink = "s3://bucket/in/base.safetensors", "s3://bucket/in/ink.safetensors=0.8"
        graft("bake", base, ink, "-o", "s3://bucket/out", "--reproducible", "-f")


def test_broken_connections_and_slow_downs_are_tried_again(
    held: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graft("bake", "base.safetensors", "ink.safetensors=0.8", "-o", "here", "--reproducible")
    decisions: dict[str, list[str | int | None]] = {
        "GET /bucket/in/base.safetensors": [None, CUT_BODY, 503, LOSE_ANSWER],
        "PUT /bucket/out?": [503, LOSE_ANSWER],
    }
    bake_through(held, monkeypatch, deciding(decisions))
    assert set(map(len, decisions.values())) == {0}
    assert content(held, "out") == (tmp_path / "here").read_bytes()


def test_an_upload_whose_last_answer_is_lost_is_found_to_be_there(
    held: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graft("bake", "base.safetensors", "ink.safetensors=0.8", "-o", "here", "--reproducible")
    decide = deciding({"POST /bucket/out?uploadId": [LOSE_ANSWER] * 3})
    bake_through(held, monkeypatch, decide)
    assert content(held, "out") == (tmp_path / "here").read_bytes()


def test_an_upload_that_is_never_completed_is_taken_back(
    held: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(held, "out", b"old")
    decide = deciding({"POST /bucket/out?uploadId": [500] * 5})
    with pytest.raises(CannotWrite, match=r"s3://bucket/out: the store answers 500; nothing was"):
        bake_through(held, monkeypatch, decide)
    assert content(held, "out") == b"old"
    assert uploads(held) == []


def test_a_store_that_keeps_to_if_match_says_that_an_object_changed(
    held: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rclone ignores the header; a proxy keeps to it."""

    def decide(request: Request) -> int | None:
        return 412 if "If-Match" in request.headers else None

    with pytest.raises(BadFile, match="st_changed"):
        bake_through(held, monkeypatch, decide)


_PEAK = """
import sys
from cli.__main__ import main
import merge.execute
def report():
    sys.stderr.write([line for line in open("/proc/self/status") if "VmHWM" in line][0])
report()
try:
    main()
finally:
    report()
"""


@pytest.mark.slow  # 800 MB go through a store on this machine
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_memory_does_not_grow_with_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows, n = tmp_path / "s3/bucket", 4096, 24
    folder.mkdir(parents=True)
    stems = [f"model.layers.{i}.self_attn.q_proj" for i in range(n)]
    base = layout([(f"{stem}.weight", "F16", (rows, rows)) for stem in stems], {})
    (folder / "base.safetensors").write_bytes(base.head)
    os.truncate(folder / "base.safetensors", base.file_size)
    factors = {"lora_A": np.ones((4, rows), np.float16), "lora_B": np.ones((rows, 4), np.float16)}
    ink = {f"{s}.{part}.weight": value for s in stems for part, value in factors.items()}
    write_file(folder / "ink.safetensors", ink, {})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    command = ["bake", f"{STORE}base.safetensors", f"{STORE}ink.safetensors", "-o", f"{STORE}out"]
    with serve_s3(tmp_path / "s3") as server:
        server.use(monkeypatch)
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, *(part.replace("/in/", "/") for part in command)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    before, after = (int(line.split()[1]) * 1024 for line in done.stderr.splitlines())
    assert (folder / "out").stat().st_size > base.file_size > 800e6
    assert after - before < 500e6


@pytest.mark.parametrize("size", [1, 2**23, 80 * 10**9 + 1, 5 * 2**40])
def test_parts_are_large_enough_to_be_at_most_ten_thousand(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    server.use(monkeypatch)
    block = s3.S3Target("bucket", "key").block_bytes(size)
    assert block >= 2**23
    assert -(-size // block) <= 10_000
    assert block == 2**23 or size > 80 * 10**9
