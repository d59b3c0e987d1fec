"""`graft inspect`: one document or one page, one sentence for every malformed file, no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.__main__ import main
from merge.identify import identify
from tests.fixtures.adapters import make_adapter
from tests.fixtures.malformed import MALFORMED, Malformed


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["graft", "inspect", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def _adapter(path: Path, **options: object) -> Path:
    metadata = {"modelspec.trigger_phrase": "zorb", "evil\x1b[2J": "\x1b[31m[bold]" + "x" * 500}
    return make_adapter(path, alphas=[8.0, 2.0], metadata=metadata, **options).path  # type: ignore[arg-type]


def test_json_is_the_whole_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _adapter(tmp_path / "f.safetensors")
    assert _run(monkeypatch, str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == identify(path).to_json()
    assert _run(monkeypatch, str(path), "--json", "--no-hashes") == 0
    assert json.loads(capsys.readouterr().out)["hashes"] is None


def test_the_page_says_what_matters_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _adapter(tmp_path / "zorb.safetensors")
    assert _run(monkeypatch, str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "zorb.safetensors  lora adapter for Tiny SD (built in) in kohya names"
    assert "rank           4" in lines
    assert "alpha          2 to 8" in lines
    assert "trigger words  zorb" in lines
    hashes = identify(path).hashes
    assert hashes is not None
    assert f"sha256  {hashes.sha256}" in lines


def test_what_strangers_wrote_does_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, str(_adapter(tmp_path / "f.safetensors"))) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[31m[bold]xxx" in shown
    assert "(513 characters" not in shown  # cut to one line, with its true length
    assert "characters)\n" in shown
    assert shown.endswith("--json prints all of it\n")


def test_the_settings_of_a_training_share_a_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {f"ss_setting_{n}": str(n) for n in range(9)}
    others = {"ss_sd_model_name": "v1-5", "ss_long": "x" * 25, "ss_no": "None", "a": "1\n 2"}
    path = make_adapter(tmp_path / "f.safetensors", metadata=settings | others).path
    assert _run(monkeypatch, str(path), "--no-hashes") == 0
    lines = capsys.readouterr().out.splitlines()
    shared = ", ".join(f"setting_{n} {n}" for n in range(9))
    assert lines[-6:] == [
        "a                 1 2",
        "format            pt",
        f"ss_long           {'x' * 25}",
        "ss_sd_model_name  v1-5",
        f"ss_…              {shared}",
        "--json prints all of it",
    ]


def test_a_peft_folder_is_its_adapter_with_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _adapter(tmp_path / "adapter_model.safetensors", dialect="peft")
    assert _run(monkeypatch, str(tmp_path), "--json", "--no-hashes") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["dialect"], answer["alphas"]) == ("peft", {"min": 2.0, "max": 8.0})
    (tmp_path / "adapter_config.json").write_text("{")
    assert _run(monkeypatch, str(tmp_path)) == 1
    assert "adapter_config.json beside it is not JSON" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").unlink()
    assert _run(monkeypatch, str(tmp_path), "--json", "--no-hashes") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["dialect"], answer["alphas"]) == ("adapter", "peft", None)
    (warning,) = answer["warnings"]
    assert warning["message"] == "its adapter_config.json, which holds its alphas, is missing"


def test_a_folder_of_many_files_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        _adapter(tmp_path / f"{name}.safetensors")
    assert _run(monkeypatch, str(tmp_path)) == 1
    assert "is a folder with 2 safetensors files; name one file" in capsys.readouterr().err


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_a_malformed_file_is_one_sentence(
    case: Malformed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = case.write(tmp_path)
    before = path.stat()
    assert _run(monkeypatch, str(path), "--json") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: file.safetensors: ")
    assert shown.err.endswith(f"({case.reason})\n")
    assert shown.err.count("\n") == 1
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_missing_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, str(tmp_path / "nothing.safetensors")) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_the_command_imports_neither_torch_nor_the_web_server(tmp_path: Path) -> None:
    path = _adapter(tmp_path / "f.safetensors")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cli", "inspect", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "merge.identify" in imported
    assert imported.isdisjoint({"torch", "numpy", "safetensors", "fastapi", "sqlmodel", "boto3"})
