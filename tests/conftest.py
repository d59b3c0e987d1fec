"""Shared by all tests: fixed seeds, one torch thread, no proxies or tokens from the environment."""

import os

import pytest

# Before any test imports torch or huggingface_hub: both read these once, at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting, token or endpoint of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("GRAFT_", "HF_TOKEN", "HF_ENDPOINT", "AWS_")):
            monkeypatch.delenv(name)
