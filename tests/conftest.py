"""Shared by all tests: one torch thread, no tokens of the shell, shapes in signatures checked."""

import inspect
import os
from functools import cache

import httpx2
import pytest
from httpx2._transports import default
from jaxtyping import install_import_hook

# Before any test imports torch or huggingface_hub: both read these once, at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Clients' own five and ten seconds are too few on a machine that does much else.
PATIENCE_S = 60
os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] = os.environ["HF_HUB_ETAG_TIMEOUT"] = str(PATIENCE_S)
# One object is the default of every function and client of httpx2.
_TIMEOUT = inspect.signature(httpx2.get).parameters["timeout"].default
_TIMEOUT.connect = _TIMEOUT.read = _TIMEOUT.write = _TIMEOUT.pool = PATIENCE_S
# Reading all certificates takes 20 ms of each request that makes a client of its own.
default.create_ssl_context = cache(default.create_ssl_context)  # type: ignore[attr-defined]

# Before any test imports them, in whatever order the tests run.
install_import_hook(["merge.algorithms", "merge.methods"], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--database",
        choices=("sqlite", "postgresql"),
        default="sqlite",
        help="the catalogue of the tests of the hub that do not say which they need",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The story takes minutes: begun last, it would keep one worker busy and the others idle."""
    items.sort(key=lambda item: item.path.name != "test_story.py")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting, token or endpoint of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("GRAFT_", "HF_TOKEN", "HF_ENDPOINT", "AWS_")):
            monkeypatch.delenv(name)
