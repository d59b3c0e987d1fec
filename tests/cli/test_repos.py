"""login, whoami, push, pull, show, search and fetch, as commands against a real hub."""

import hashlib
import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hub.context import open_hub
from hub.settings import Settings
from merge.formats.writer import write_file
from tests.fixtures.server import RunningHub, running_hub
from tests.hub.conftest import make_user

MiB = 2**20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def other(folder: Path) -> str:
    """A token of a second user, made before the server starts."""
    with open_hub(Settings(data_dir=folder / "data", min_free_bytes=0)) as hub:
        return make_user(hub, "other")[1]


@pytest.fixture(scope="module")
def hub(folder: Path, other: str) -> Iterator[RunningHub]:
    with running_hub(folder, max_regular_bytes=2 * MiB, max_commit_bytes=4 * MiB) as hub:
        yield hub


@dataclass
class Shell:
    """Runs `graft` in a folder with a home of its own."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(
        self, *arguments: str | Path, stdin: str = "", **extra: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "cli", *map(str, arguments)],
            check=False,
            cwd=self.home,
            env=self.all_of_it | extra,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ok(self, *arguments: str | Path, **extra: str) -> str:
        done = self.run(*arguments, **extra)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *arguments: str | Path, **extra: str) -> str:
        """The one sentence on stderr of a command that fails."""
        done = self.run(*arguments, **extra)
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert done.stdout == ""
        prefix, _, sentence = done.stderr.strip().partition("error: ")
        assert prefix == ""
        assert "\n" not in sentence
        assert "Traceback" not in sentence
        return sentence

    @property
    def all_of_it(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        home = {"HOME": str(self.home), "HF_HOME": str(self.home / "hf"), "PYTHONPATH": str(ROOT)}
        return kept | home | self.environment


@pytest.fixture
def anonymous(hub: RunningHub, tmp_path: Path) -> Shell:
    return Shell(tmp_path, {"GRAFT_ENDPOINT": hub.url})


@pytest.fixture
def shell(anonymous: Shell, hub: RunningHub) -> Shell:
    return Shell(anonymous.home, anonymous.environment | {"GRAFT_TOKEN": hub.admin_token})


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A folder as a trainer leaves it."""
    folder = tmp_path / "style"
    (folder / "samples").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("secret")
    (folder / "README.md").write_text("---\ntags: [style]\nlicense: mit\n---\n# A style\n")
    (folder / "samples/1.txt").write_text("not really a picture")
    (folder / "style.bin").write_bytes(os.urandom(MiB + 5))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pushed(style: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_in(style).items() if not name.startswith(".")}


def upload(hub: RunningHub, folder: Path, repo: str, *, private: bool = False) -> str:
    """What a test finds on the hub before its own command runs; the commit."""
    api = HfApi(endpoint=hub.url, token=hub.admin_token)
    api.create_repo(repo, private=private, exist_ok=True)
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    ]
    return api.create_commit(repo, operations, commit_message="before").oid


# login


def test_login_is_remembered_for_this_user_only(hub: RunningHub, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    done = shell.run("login", hub.url + "/", stdin=hub.admin_token + "\n")
    assert done.returncode == 0, done.stderr
    stored = tmp_path / ".config/graft/hub.json"
    assert str(stored) in done.stdout
    assert hub.admin_token not in done.stdout
    assert stored.stat().st_mode & 0o777 == 0o600
    assert shell.ok("whoami") == f"admin on {hub.url}\n"
    assert json.loads(shell.ok("whoami", "--json")) == {
        "endpoint": hub.url,
        "name": "admin",
        "orgs": [],
    }


def test_the_environment_comes_before_what_is_stored(
    hub: RunningHub, other: str, tmp_path: Path
) -> None:
    shell = Shell(tmp_path)
    shell.ok("login", hub.url, "--token", hub.admin_token)
    assert shell.ok("whoami", GRAFT_TOKEN=other).startswith("other on")


def test_a_stored_token_goes_to_no_other_hub(hub: RunningHub, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.ok("login", hub.url, "--token", hub.admin_token)
    elsewhere = hub.url.replace("127.0.0.1", "localhost")
    assert "not logged in" in shell.refused("whoami", GRAFT_ENDPOINT=elsewhere)


def test_a_wrong_token_is_not_stored(hub: RunningHub, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    assert "does not accept th" in shell.refused("login", hub.url, "--token", "graft_no")
    assert not (tmp_path / ".config").exists()
    assert "no" in shell.refused("login", hub.url, "--token", " ")


@pytest.mark.parametrize("address", ["hub.example", "ftp://hub", "http://a b", "http://u:p@h"])
def test_a_wrong_address_is_named(tmp_path: Path, address: str) -> None:
    assert "is not an address" in Shell(tmp_path).refused("login", address, "--token", "x")


def test_a_hub_that_is_gone_is_named(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    shell = Shell(tmp_path, {"GRAFT_ENDPOINT": endpoint, "GRAFT_TOKEN": "graft_x"})
    (tmp_path / "a.bin").write_bytes(b"x")
    for command in (("whoami",), ("push", "a.bin", "me/a"), ("pull", "me/a"), ("search", "x")):
        assert shell.refused(*command) == f"{endpoint} does not answer; is the hub running?"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hf") == ["a.bin"]


# push and pull


def test_a_folder_goes_up_as_one_commit_and_comes_back(
    hub: RunningHub, shell: Shell, anonymous: Shell, style: Path
) -> None:
    answer = json.loads(shell.ok("push", style, "admin/style", "-m", "first", "--json"))
    assert answer["url"] == f"{hub.url}/admin/style"
    history = httpx2.get(f"{hub.url}/api/models/admin/style/commits/main").json()
    assert [commit["title"] for commit in history] == ["first", "initial commit"]
    assert history[0]["id"] == answer["commit"]
    pulled = json.loads(anonymous.ok("pull", "admin/style", "--json"))
    assert pulled["commit"] == answer["commit"]
    assert files_in(shell.home / "style") | pushed(style) == files_in(shell.home / "style")
    anonymous.ok("pull", "admin/style", "out")
    assert files_in(shell.home / "out") == pushed(style)
    assert not [path for path in shell.home.iterdir() if path.name.endswith(".part")]


def test_a_file_goes_to_the_users_own_namespace(hub: RunningHub, shell: Shell, style: Path) -> None:
    out = shell.ok("push", style / "style.bin", "just-a-name")
    assert out.startswith(f"{hub.url}/admin/just-a-name is at commit ")
    shell.ok("pull", "admin/just-a-name:style.bin", "here")
    assert files_in(shell.home / "here") == {"style.bin": (style / "style.bin").read_bytes()}


def test_files_together_larger_than_any_commit(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for name in "abcd":
        (tmp_path / f"large/{name}.bin").write_bytes(os.urandom(2 * MiB))
    shell.ok("push", "large", "admin/large")
    shell.ok("pull", "admin/large", "out")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "large")


def test_pushing_the_same_again_changes_nothing(shell: Shell, style: Path) -> None:
    first = json.loads(shell.ok("push", style, "admin/again", "--json"))
    assert json.loads(shell.ok("push", style, "admin/again", "--json")) == first


def test_a_pull_into_a_folder_replaces_files_and_keeps_others(
    hub: RunningHub, shell: Shell, style: Path
) -> None:
    first = upload(hub, style, "admin/updated")
    (style / "README.md").write_text("---\ntags: [a]\n---\n# newer\n")
    upload(hub, style, "admin/updated")
    (shell.home / "out").mkdir()
    (shell.home / "out/mine.txt").write_text("mine")
    shell.ok("pull", f"admin/updated@{first}", "out")
    assert "A style" in (shell.home / "out/README.md").read_text()
    shell.ok("pull", "admin/updated", "out")
    assert files_in(shell.home / "out") == pushed(style) | {"mine.txt": b"mine"}


def test_a_private_repo_is_the_users_alone(
    hub: RunningHub, shell: Shell, anonymous: Shell, other: str, style: Path
) -> None:
    shell.ok("push", style, "admin/mine-alone", "--private")
    assert "or it is private" in anonymous.refused("pull", "admin/mine-alone")
    assert "not yours to see" in shell.refused("pull", "admin/mine-alone", GRAFT_TOKEN=other)
    assert not (shell.home / "mine-alone").exists()
    shell.ok("pull", "admin/mine-alone")
    upload(hub, style, "admin/for-all")
    assert "everybody can see it" in shell.refused("push", style, "admin/for-all", "--private")


def test_bytes_that_rotted_on_the_hub_are_not_put_in_place(
    hub: RunningHub, anonymous: Shell, tmp_path: Path
) -> None:
    folder = tmp_path / "sound"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(os.urandom(1000))
    upload(hub, folder, "admin/rotten")
    digest = hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    (blob,) = (hub.data_dir / "store/blobs").rglob(digest)
    blob.chmod(0o600)
    blob.write_bytes(os.urandom(1000))
    assert "a.safetensors arrived damaged" in anonymous.refused("pull", "admin/rotten")
    assert not (anonymous.home / "rotten").exists()


def test_a_push_that_is_refused_changes_nothing(
    hub: RunningHub, shell: Shell, other: str, style: Path
) -> None:
    before = upload(hub, style, "admin/kept")
    (style / "README.md").write_text("---\ntags: [\n---\n")
    (style / "style.bin").write_bytes(os.urandom(3 * MiB))
    assert "Invalid YAML front matter" in shell.refused("push", style, "admin/kept")
    (style / "README.md").write_text("fine")
    refused = shell.refused("push", style, "admin/kept", GRAFT_TOKEN=other)
    assert refused.endswith("refused: other may not write to admin/kept")
    assert httpx2.get(f"{hub.url}/api/models/admin/kept").json()["sha"] == before


def test_what_is_wrong_is_named(
    hub: RunningHub, shell: Shell, anonymous: Shell, style: Path
) -> None:
    assert shell.refused("push", "gone", "admin/x") == "gone: there is no such file or folder"
    (shell.home / "empty").mkdir()
    assert "holds no files" in shell.refused("push", "empty", "admin/x")
    assert "run `graft login`" in anonymous.refused("push", style, "admin/x")
    assert "a/b/c is not a repo name" in shell.refused("push", style, "a/b/c")
    assert "there is no user" in shell.refused("push", style, "nobody/x")
    assert "does not accept th" in shell.refused("push", style, "a/x", GRAFT_TOKEN="no")
    assert "admin/none is not on" in shell.refused("pull", "admin/none")
    assert "is not a repo" in shell.refused("pull", "https://example.com/x")
    upload(hub, style, "admin/there")
    assert "no such revision" in shell.refused("pull", "admin/there@v9")
    assert "has no file x.bin" in shell.refused("pull", "admin/there:x.bin")
    (shell.home / "there").write_text("a file in the way")
    assert "is no folder" in shell.refused("pull", "admin/there")
    assert (shell.home / "there").read_text() == "a file in the way"


def test_a_terminal_shows_bytes_on_their_way(shell: Shell, style: Path) -> None:
    seen = _on_a_terminal(shell, "push", str(style), "admin/shown")
    assert "push admin/shown" in seen
    assert "1.0/1.0 MB" in seen
    assert "1.0/1.0 MB" in _on_a_terminal(shell, "pull", "admin/shown", "out")


def _on_a_terminal(shell: Shell, *arguments: str) -> str:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "cli", *arguments]
    environment = shell.all_of_it | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        command, cwd=shell.home, env=environment, stdout=subprocess.PIPE, stderr=child
    ) as process:
        os.close(child)
        seen = b""
        while True:
            try:
                seen += os.read(parent, 65536)
            except OSError:  # Linux says so when the last writer has closed it.
                break
    os.close(parent)
    assert process.returncode == 0, seen
    return seen.decode()


# show and search


@pytest.fixture
def adapter(hub: RunningHub, tmp_path: Path) -> str:
    """A repo with one LoRA of rank 4 for one layer of Stable Diffusion 1.5."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_down.weight": np.ones((4, 320), np.float16),
        f"{stem}.lora_up.weight": np.ones((320, 4), np.float16),
        f"{stem}.alpha": np.array(4, np.float16),
    }
    write_file(folder / "quill.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    (folder / "README.md").write_text(
        "---\ntags: [feather]\ntrigger_words: [qll]\n---\n# Quill\n\nThin strokes.\n"
    )
    upload(hub, folder, "admin/quill")
    return "admin/quill"


def test_show_tells_what_the_files_say(anonymous: Shell, adapter: str) -> None:
    shown = anonymous.ok("show", adapter)
    assert shown.startswith(f"{adapter} at ")
    row = next(line for line in shown.splitlines() if line.startswith("quill.safetensors"))
    assert row.split()[:5] == ["quill.safetensors", "adapter", "lora", "sd15", "4"]
    answer = json.loads(anonymous.ok("show", adapter, "--json"))
    assert [file["file"] for file in answer["files"]] == ["README.md", "quill.safetensors"]
    assert answer["adapters"][0]["hashes"].keys() >= {"sha256", "autov2", "autov3"}
    assert (answer["private"], answer["tags"]) == (False, ["feather"])
    assert "is not on" in anonymous.refused("show", "admin/nothing")


def test_search_finds_by_word_facet_and_hash(
    anonymous: Shell, adapter: str, tmp_path: Path
) -> None:
    def found(*arguments: str) -> list[str]:
        items = json.loads(anonymous.ok("search", *arguments, "--json"))["items"]
        return [f"{item['repo']}:{item['file']}" for item in items]

    here = [f"{adapter}:quill.safetensors"]
    assert found("strokes", "--tag", "feather", "--base", "sd15", "--algorithm", "lora") == here
    assert found("strokes", "--base", "sdxl") == []
    digest = hashlib.sha256((tmp_path / "adapter/quill.safetensors").read_bytes()).hexdigest()
    assert found(digest[:10].upper()) == here
    assert "quill.safetensors" in anonymous.ok("search", "quill", "--sort", "name")
    assert anonymous.run("search", "strokes", "--tag", "none").stderr == "nothing matches\n"
    wrong = anonymous.run("search", "--sort", "sideways")
    assert (wrong.returncode, "'sideways' is not one of" in wrong.stderr) == (2, True)


# REFs on the hub


FETCH = """
import sys
from cli.console import CommandError
from cli.refs import fetch
for ref in sys.argv[1:]:
    try:
        print(fetch(ref))
    except CommandError as error:
        print(f"error: {error}")
"""


def fetch(shell: Shell, *refs: str) -> list[str]:
    """The path of each REF, or its error; in a process, because clients read settings once."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *refs],
        check=False,
        cwd=shell.home,
        env=shell.all_of_it,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_ref_on_the_hub_is_fetched(hub: RunningHub, shell: Shell, tmp_path: Path) -> None:
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_model.safetensors").write_bytes(os.urandom(1000))
    (peft / "adapter_config.json").write_text("{}")
    upload(hub, peft, "admin/peft")
    both = tmp_path / "both"
    (both / "unet").mkdir(parents=True)
    (both / "a.safetensors").write_bytes(b"a")
    (both / "unet/b.safetensors").write_bytes(b"b")
    before = upload(hub, both, "admin/both")
    (both / "model_index.json").write_text("{}")
    upload(hub, both, "admin/both")
    found, again, several, folder, pipeline = fetch(
        shell,
        "admin/peft",
        "admin/peft@main:adapter_model.safetensors",
        f"admin/both@{before}",
        "admin/both:unet",
        "admin/both",
    )
    assert Path(found).read_bytes() == (peft / "adapter_model.safetensors").read_bytes()
    assert Path(found).with_name("adapter_config.json").read_text() == "{}"
    assert again == found
    files = "one of a.safetensors, unet/b.safetensors"
    assert (
        several
        == f"error: admin/both@{before}: which file? write admin/both@{before}:FILE with {files}"
    )
    assert (Path(folder) / "b.safetensors").read_bytes() == b"b"
    assert files_in(Path(pipeline)) == files_in(both)


def test_a_ref_that_is_not_on_the_hub_is_named(hub: RunningHub, shell: Shell, style: Path) -> None:
    upload(hub, style, "admin/no-weights")
    errors = fetch(
        shell,
        "admin/no-weights",
        "admin/no-weights:x.safetensors",
        "admin/nowhere",
        "admin/no-weights@v9",
    )
    missing = f"admin/nowhere is not on {hub.url}, or not yours to see"
    assert errors == [
        "error: admin/no-weights: the repo holds no .safetensors file",
        "error: admin/no-weights:x.safetensors: the repo has no such file",
        f"error: admin/nowhere is no path here, and {missing}",
        f"error: admin/no-weights has no such revision on {hub.url}",
    ]
