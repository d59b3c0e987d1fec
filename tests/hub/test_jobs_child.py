"""The child process by itself: limits, its parent's death, and the files it is given."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hub.jobs.child import Spec
from hub.jobs.process import COMMAND, Child
from hub.jobs.scratch import Input, lay_out
from merge.recipe import Recipe
from tests.fixtures.tiny_files import write_lora

ROOT = Path(__file__).parents[2]
GiB = 2**30


def start(folder: Path, *, memory_bytes: int = 4 * GiB, file_bytes: int = GiB) -> Child:
    """A merge of one adapter."""
    write_lora(folder / "ink.safetensors", 0, rank=4)
    sha256 = hashlib.sha256((folder / "ink.safetensors").read_bytes()).hexdigest()
    recipe = Recipe.parse({"kind": "merge", "inputs": [{"ref": "a/ink", "sha256": sha256}]})
    spec = Spec(
        parent=os.getpid(),
        scratch=folder / "scratch",
        recipe=recipe.model_dump_json(by_alias=True, exclude_none=True),
        inputs=[
            Input(
                ref="a/ink",
                main="ink.safetensors",
                files={"ink.safetensors": folder / "ink.safetensors"},
            )
        ],
        output="out.safetensors",
        memory_bytes=memory_bytes,
        file_bytes=file_bytes,
        threads=1,
    )
    spec.scratch.mkdir()
    return Child(COMMAND, spec.model_dump_json(), spec.scratch, 1)


def run(folder: Path, **limits: int) -> dict[str, object]:
    """The last message of such a merge."""
    return end_of(start(folder, **limits))


def end_of(child: Child) -> dict[str, object]:
    last: dict[str, object] = {}
    try:
        while True:
            last = child.hear(300) or last
    except EOFError:
        child.wait()
    finally:
        child.close()
    return last


def test_it_merges(tmp_path: Path) -> None:
    answer = run(tmp_path)
    result = answer["result"]
    assert isinstance(result, dict)
    written = (tmp_path / "scratch" / "output" / "out.safetensors").read_bytes()
    assert result["sha256"] == hashlib.sha256(written).hexdigest()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no niceness")
def test_a_job_leaves_the_processor_to_requests(tmp_path: Path) -> None:
    seen = own = os.getpriority(os.PRIO_PROCESS, 0)
    child = start(tmp_path)
    try:
        while seen == own:  # until it has read what it is to do; ProcessLookupError if it never was
            seen = os.getpriority(os.PRIO_PROCESS, child.pid)
    finally:
        end_of(child)
    assert seen > own


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits private memory")
def test_an_allocation_beyond_its_memory_is_one_clear_error(tmp_path: Path) -> None:
    answer = run(tmp_path, memory_bytes=0)
    assert answer["error"] == {
        "code": "OutOfMemory",
        "message": "the job needs more memory than the 0 bytes it may take",
        "param": None,
    }
    assert not list((tmp_path / "scratch" / "output").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file size limit")
def test_an_output_beyond_its_size_is_one_clear_error_and_nothing_is_left(tmp_path: Path) -> None:
    answer = run(tmp_path, file_bytes=2000)
    assert answer["error"] == {
        "code": "NoSpace",
        "message": "the output grew beyond the size its plan announced; nothing was written",
        "param": None,
    }
    assert not list((tmp_path / "scratch" / "output").iterdir())


def wait_in_python(code: str) -> "subprocess.Popen[bytes]":
    """A Python process that says `ready` after `code` and then sleeps."""
    script = f"import os, sys, time\nfrom hub.jobs import confine\n{code}\n"
    script += "print('ready', flush=True)\ntime.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_it_ends_when_the_pipe_of_its_parent_ends() -> None:
    process = wait_in_python("confine.die_with_pipe(0)")
    assert process.poll() is None
    process.communicate(timeout=60)
    assert process.returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
def test_it_ends_when_its_parent_is_killed() -> None:
    code = (
        "import subprocess\n"
        "inner = 'import time; from hub.jobs import confine; import os;'"
        "        'confine.die_with_parent(os.getppid()); print(os.getpid(), flush=True);'"
        "        'time.sleep(600)'\n"
        "child = subprocess.Popen([sys.executable, '-c', inner], stdout=subprocess.PIPE)\n"
        "print(child.stdout.readline().decode().strip(), file=sys.stderr, flush=True)\n"
    )
    script = f"import sys, time\n{code}\nprint('ready', flush=True)\ntime.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert parent.stdout is not None
    assert parent.stderr is not None
    assert parent.stdout.readline() == b"ready\n"
    assert int(parent.stderr.readline()) > 0
    parent.send_signal(signal.SIGKILL)
    # The grandchild holds the other end of stderr: this returns when it has ended too.
    parent.communicate(timeout=60)


def test_nothing_of_the_servers_environment_reaches_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_SECRET_KEY", "do not tell")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do not tell")
    code = "import json, os, sys; sys.stdin.readline(); print(json.dumps(dict(os.environ)))"
    child = Child([sys.executable, "-c", code], "{}", tmp_path, 1)
    environment = child.hear(60)
    child.close()
    assert environment is not None
    assert "do not tell" not in environment.values()
    assert environment["TMPDIR"] == str(tmp_path)


@pytest.mark.parametrize("missing", [(), ("link",), ("link", "symlink")])
def test_inputs_are_laid_out_under_their_own_names_whatever_links_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "not permitted")

    for way in missing:
        monkeypatch.setattr(os, way, refuse)
    for name in ("aa", "bb", "cc"):
        (tmp_path / name).write_text(name)
    adapter = {"x/adapter_model.safetensors": "aa", "x/adapter_config.json": "bb"}
    places = lay_out(
        tmp_path / "inputs",
        [
            Input(
                ref="one",
                main="x/adapter_model.safetensors",
                files={name: tmp_path / blob for name, blob in adapter.items()},
            ),
            Input(ref="two", main=None, files={"unet/config.json": tmp_path / "cc"}),
        ],
    )
    assert places["one"].read_text() == "aa"
    assert places["one"].with_name("adapter_config.json").read_text() == "bb"
    assert (places["two"] / "unet" / "config.json").read_text() == "cc"
