"""The shell blocks of docs/clients.md run as they stand, against a real hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from merge.formats.writer import write_file
from tests.fixtures.server import running_hub

ROOT = Path(__file__).parents[1]


def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    (tmp_path / "ink").mkdir()
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{stem}.lora_down.weight": np.ones((2, 768), np.float16),
        f"{stem}.lora_up.weight": np.ones((1280, 2), np.float16),
    }
    write_file(tmp_path / "ink/ink.safetensors", tensors, {})
    (tmp_path / "ink/README.md").write_text("---\ntags: [ink]\n---\n# Ink\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    graft = tools / "graft"
    graft.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli "$@"\n')
    graft.chmod(0o755)

    page = (ROOT / "docs/clients.md").read_text()
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    with running_hub(tmp_path / "hub") as hub:
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            check=False,
            cwd=tmp_path,
            env={
                "PATH": os.pathsep.join(
                    [str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]
                ),
                "HOME": str(tmp_path / "home"),
                "PYTHONPATH": str(ROOT),
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": hub.admin_token,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    weights = (tmp_path / "ink/ink.safetensors").read_bytes()
    for copy in ("copy-of-ink", "from-hf", "one-file", "."):
        assert (tmp_path / copy / "ink.safetensors").read_bytes() == weights, copy
    assert "\n8\n" in done.stdout
