"""What `deploy/` promises holds: a valid compose file, settings that exist, an entry point that runs."""

import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from hub.settings import Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def test_the_compose_file_follows_the_compose_specification() -> None:
    check = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            DEPLOY / "compose.yaml",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_setting_named_in_deploy_exists() -> None:
    known = {f"GRAFT_{name.upper()}" for name in Settings.model_fields}
    for file in sorted(DEPLOY.iterdir()):
        named = set(re.findall(r"\bGRAFT_[A-Z_]+\b", file.read_text()))
        assert named <= known, f"{file.name} names {sorted(named - known)}"


def test_the_image_copies_what_exists_and_starts_our_command() -> None:
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources), line
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert 'ENTRYPOINT ["graft"]' in lines
    assert "graft" in scripts


def test_image_unit_and_compose_agree_on_the_port_and_the_command() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    port = compose["services"]["hub"]["ports"][0].rsplit(":", 1)[-1]
    assert f"EXPOSE {port}" in (DEPLOY / "Containerfile").read_text()
    assert int(port) == Settings.model_fields["port"].default
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # keys are case-sensitive
    unit.read(DEPLOY / "grafthub.service")
    assert unit["Service"]["ExecStart"].endswith("graft serve")
