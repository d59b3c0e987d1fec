"""`graft serve` as a person runs it: a process, a port, a data folder."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest

import cli.serve
from cli.console import CommandError
from hub.app import create_app
from hub.settings import Settings
from tests.fixtures.server import GREETING, running_hub, start_hub

ROOT = Path(__file__).parents[2]


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", "serve", *arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_serve_answers_and_stops_cleanly_and_starts_again_on_the_same_data(tmp_path: Path) -> None:
    """The first start as a command; tests that need a hub fork theirs, see `tests.fixtures`."""
    data = tmp_path / "data"
    command = [
        sys.executable,
        "-m",
        "cli",
        "serve",
        "--port",
        "0",
        "--no-demo",
        "--data",
        str(data),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        where, shown, file = (process.stdout.readline() for _ in range(3))
        url, token = where.removeprefix(GREETING).strip(), shown.rpartition(" ")[2].strip()
        assert file == f"Token file: {data}/admin.token\n"
        assert (data / "admin.token").read_text().strip() == token
        assert httpx2.get(f"{url}/healthz", timeout=60).json() == {"status": "ok"}
        assert httpx2.get(f"{url}/readyz", timeout=60).status_code == 200
        auth = {"Authorization": f"Bearer {token}"}
        assert httpx2.get(f"{url}/metrics", headers=auth, timeout=60).status_code == 200
        assert (data / "admin.token").stat().st_mode & 0o777 == 0o600
        assert (data / "secret.key").stat().st_mode & 0o777 == 0o600
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "Stop with Ctrl-C.\n")
    assert not (data / "hub.sqlite3-wal").exists()
    with running_hub(tmp_path) as hub:
        assert hub.admin_token == token
        assert httpx2.get(f"{hub.url}/metrics", headers=hub.auth, timeout=60).status_code == 200


def test_a_token_file_that_is_not_there_is_not_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cli.serve._greet(Settings(data_dir=tmp_path), listener, None)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "Token file: not here; the server that was started first made it"


def test_a_second_server_on_the_same_data_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with running_hub(tmp_path, database_url=None) as hub:
        second = serve("--port", "0", "--data", str(hub.data_dir))
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr == f"error: another hub is running on {hub.data_dir}\n"


def test_a_killed_server_leaves_the_data_folder_usable(tmp_path: Path) -> None:
    hub = start_hub(tmp_path)
    hub.kill()
    with running_hub(tmp_path) as hub:
        assert httpx2.get(f"{hub.url}/readyz", timeout=60).status_code == 200


@pytest.mark.timeout(60)
def test_a_signal_that_python_swallowed_ends_the_server_at_its_start(tmp_path: Path) -> None:
    told = threading.Event()
    told.set()
    app = create_app(Settings(data_dir=tmp_path / "data", workers=0))
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            cli.serve._run(app, listener, told)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve("--port", str(port), "--data", str(tmp_path / "data"))
    assert result.returncode == 1
    assert result.stderr == (
        f"error: port {port} on 127.0.0.1 is in use; choose another one with --port\n"
    )
    assert not (tmp_path / "data").exists()


def test_a_data_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = serve("--port", "0", "--data", str(tmp_path / "file" / "data"))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot write to the data folder {tmp_path}/file/data")
    assert result.stderr.count("\n") == 1


def test_a_public_address_needs_to_be_told_how_it_is_reached(tmp_path: Path) -> None:
    result = serve("--host", "0.0.0.0", "--port", "0", "--data", str(tmp_path / "data"))
    assert result.returncode == 1
    assert "GRAFT_PUBLIC_URL" in result.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SECRET_KEY", "short", "at least 32 random characters are needed"),
        ("PUBLIC_URL", "hub.example", "hub.example is no address such as https://hub.example"),
        ("MIRROR_URL", "ftp://x", "ftp://x is no address such as https://hub.example"),
        ("ALLOWED_HOSTS", "a,b", 'a JSON list such as ["hub.lan", "hub.example"] is needed'),
    ],
)
def test_a_setting_that_cannot_be_meant_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"GRAFT_{name}", value)
    with pytest.raises(CommandError) as refused:
        cli.serve.load_settings()
    assert str(refused.value) == f"GRAFT_{name}: {said}"


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    result = serve("--port", "99999", "--data", str(tmp_path / "data"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: --port: ")
