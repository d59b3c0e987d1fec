"""vLLM's LoRA resolvers and InvokeAI's installer, as their releases have them, fetch from the hub.

The packages come without what they depend on: the parts that run here need little of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi

from merge.formats.writer import write_file
from tests.fixtures.clients import client_packages
from tests.fixtures.server import RunningHub, running_hub

pytestmark = pytest.mark.slow

BASE = "acme/small-llama"
VLLM = ("vllm==0.33.0", "msgspec==0.21.1")
INVOKEAI = ("invokeai==6.14.2", "onnxruntime==1.27.0")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """One repo with an adapter at its root, one in a folder, and a private one."""
    folder = tmp_path_factory.mktemp("loaders")
    write_peft_adapter(folder / "adapter")
    with running_hub(folder / "hub", workers=0) as hub:
        api = HfApi(hub.url, hub.admin_token)
        api.create_repo("admin/sql-style")
        api.upload_folder(repo_id="admin/sql-style", folder_path=folder / "adapter")
        api.upload_folder(
            repo_id="admin/sql-style", folder_path=folder / "adapter", path_in_repo="terse"
        )
        api.create_repo("admin/secret", private=True)
        api.upload_folder(repo_id="admin/secret", folder_path=folder / "adapter")
        yield hub


def write_peft_adapter(folder: Path) -> None:
    folder.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{stem}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    write_file(folder / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 2, "lora_alpha": 2}
    config |= {"target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load(packages: Path, environment: dict[str, str], *arguments: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("load_elsewhere.py")), *arguments],
        check=False,
        env=clean | {"PYTHONPATH": str(packages)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if "/" in line or "None" in line]


def test_vllm_resolves_adapters_of_the_hub(hub: RunningHub, tmp_path: Path) -> None:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "VLLM_PLUGINS": "lora_hf_hub_resolver",
        "VLLM_LORA_RESOLVER_HF_REPO_LIST": "admin/sql-style,admin/secret",
    }
    names = ["admin/sql-style", "admin/sql-style/terse", "admin/sql-style/absent", "admin/other"]
    packages = client_packages("vllm", *VLLM)
    root, folder, *absent = load(packages, settings, "vllm-hub", BASE, *names)
    assert (Path(root) / "adapter_model.safetensors").is_file()
    assert (Path(folder) / "adapter_model.safetensors").is_file()
    assert Path(folder).name == "terse"
    assert absent == ["None", "None"]

    with_token = settings | {"HF_TOKEN": hub.admin_token}
    (private,) = load(packages, with_token, "vllm-hub", BASE, "admin/secret")
    assert (Path(private) / "adapter_config.json").is_file()
    with pytest.raises(AssertionError, match="RepositoryNotFoundError"):
        load(packages, settings, "vllm-hub", BASE, "admin/secret")


def test_vllm_resolves_a_pulled_folder(hub: RunningHub, tmp_path: Path) -> None:
    pull = [sys.executable, "-m", "cli", "pull", "admin/sql-style", str(tmp_path / "sql-style")]
    environment = {**os.environ, "GRAFT_ENDPOINT": hub.url, "HOME": str(tmp_path)}
    subprocess.run(pull, check=True, env=environment, capture_output=True, timeout=120)
    settings = {"VLLM_LORA_RESOLVER_CACHE_DIR": str(tmp_path)}
    packages = client_packages("vllm", *VLLM)
    found = load(packages, settings, "vllm-folder", BASE, "sql-style", "sql-style/terse")
    assert found == [str(tmp_path / "sql-style"), str(tmp_path / "sql-style/terse")]
    assert load(packages, settings, "vllm-folder", "another/base", "sql-style") == ["None"]


def test_invokeai_installs_from_an_address(hub: RunningHub, tmp_path: Path) -> None:
    packages = client_packages("invokeai", *INVOKEAI)
    settings = {"INVOKEAI_ROOT": str(tmp_path / "root")}
    file = "resolve/main/adapter_model.safetensors"
    for repo, token in (("sql-style", ""), ("secret", hub.admin_token)):
        folder = tmp_path / repo
        folder.mkdir()
        url = f"{hub.url}/admin/{repo}/{file}"
        (path,) = load(packages, settings, "invokeai", str(folder), token, url)
        assert Path(path).name == "adapter_model.safetensors"
        assert Path(path).stat().st_size > 100
