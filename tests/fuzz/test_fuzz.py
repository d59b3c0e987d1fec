"""A short run of every fuzzer; `make fuzz` goes on for longer."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris has wheels for Linux only", exc_type=ImportError)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "runs"), [("headers", 40_000), ("commits", 8_000)])
def test_no_bytes_break_a_parser(name: str, runs: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", name, str(tmp_path / "corpus")]
    command += [f"-runs={runs}", "-seed=1", "-max_len=1500", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"Done {runs} runs" in done.stderr
