"""diffusers, peft and transformers load from the hub when only HF_ENDPOINT points at it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.fixtures.server import running_hub


def test_libraries_load_by_name_with_only_the_endpoint_set(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONWARNINGS": "default"}
    with running_hub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("load_adapters.py")), hub.admin_token],
            check=False,
            env=environment | {"HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "load_with_diffusers",
        "load_with_peft",
        "load_with_transformers",
    ]
