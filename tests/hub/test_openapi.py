"""Requests made up by schemathesis from the routes: whatever is asked, the hub makes no error.

`make fuzz` runs the same with more of them (FUZZ_EXAMPLES).
"""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.openapi.utils import get_openapi
from fastapi.routing import iter_route_contexts

from hub.app import create_app
from hub.context import open_hub
from hub.settings import Settings
from hub.users import service as users
from hub.users.models import Scope
from tests.fixtures.catalogue import lora_bytes, picture, publish_files
from tests.fixtures.server import RunningHub, running_hub, settings_of

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))
# What the hub does not have is a 501 on purpose, and a 503 says when to come back.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 501, 503, 507]
"""
# Its own token would be revoked, and an endless answer outlasts every time limit.
LEFT_OUT = ["^/api/tokens/", "/events$", "^/logout$"]
SAMPLES = {
    "kind": "models",
    "namespace": "admin",
    "name": "ink",
    "file": "ink.safetensors",
    "revision": "main",
    "path": "README.md",
    "place": "main/README.md",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningHub, str]]:
    """A hub with one repo, and a token of an administrator who writes there."""
    folder = tmp_path_factory.mktemp("openapi")
    with open_hub(settings_of(folder)) as hub:
        assert hub.admin_token is not None
        with hub.db.read() as session:
            admin = users.viewer_of(session, hub.admin_token)
        files = {
            "ink.safetensors": lora_bytes(folder, rank=4),
            "README.md": b"---\ntags: [style]\n---\n# Ink\n",
            "0.png": picture(),
        }
        publish_files(hub, admin, "admin/ink", files)
        with hub.db.write() as session:
            ada = users.create_user(session, "ada", admin=True)
            token = users.issue_token(session, ada, "made up", Scope.ADMIN)
    with running_hub(folder, workers=0) as running:
        yield running, token


def every_route() -> dict[str, Any]:
    """Also those that the hub's own document leaves out: the Hugging Face protocol and the pages."""
    app = create_app(Settings())
    hidden = [
        route.original_route
        for route in iter_route_contexts(app.routes)
        if getattr(route.original_route, "include_in_schema", True) is False
    ]
    for route in hidden:
        route.include_in_schema = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            # An address with GET and HEAD has one operation id for both.
            warnings.filterwarnings("ignore", "Duplicate Operation ID")
            document = get_openapi(title="all", version="1", routes=app.routes)
    finally:
        for route in hidden:  # they belong to every application of this process
            route.include_in_schema = False  # type: ignore[attr-defined]
    assert {"/{namespace}/{name}", "/api/{kind}/{namespace}/{name}"} <= document["paths"].keys()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _name_all_parts(path, operation.setdefault("parameters", []))
    return document


def _name_all_parts(path: str, parameters: list[dict[str, Any]]) -> None:
    """Parts of an address that only a dependency or the route's own pattern knows."""
    known = {parameter["name"] for parameter in parameters}
    for name in sorted(set(re.findall(r"{(\w+)}", path)) - known):
        schema = {"type": "string"}
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})


def about_ink(document: dict[str, Any]) -> dict[str, Any]:
    """The same document, where addresses name the repo that is there."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if parameter["in"] == "path" and parameter["name"] in SAMPLES:
                    parameter["schema"] = {"enum": [SAMPLES[parameter["name"]], "x"]}
    return document


def ask(site: RunningHub, document: str, folder: Path, *options: str) -> None:
    """Send what schemathesis makes of a document; fail with its own account of what broke."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis as s; s()"]
    command += ["--config-file", str(config), "--no-color", "run", document, *options]
    command += ["--checks", "not_a_server_error", "--max-examples", str(EXAMPLES), "--seed", "1"]
    command += ["--warnings", "off", "--request-timeout", "30"]
    for path in LEFT_OUT:
        command += ["--exclude-path-regex", path]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Traceback" not in site.log.read_text()
    assert httpx2.get(site.url + "/readyz").status_code == 200


def test_no_request_of_our_document_is_an_error(
    site: tuple[RunningHub, str], tmp_path: Path
) -> None:
    """As it is served; the edges of each schema are tried with the document of every route."""
    running, token = site
    document = running.url + "/api/openapi.json"
    options = ["--phases", "fuzzing", "-H", f"Authorization: Bearer {token}"]
    ask(running, document, tmp_path, *options)


@pytest.mark.parametrize("who", ["anonymous", "administrator"])
def test_no_request_of_any_route_is_an_error(
    site: tuple[RunningHub, str], tmp_path: Path, who: str
) -> None:
    running, token = site
    document = every_route() if who == "anonymous" else about_ink(every_route())
    (tmp_path / "all.json").write_text(json.dumps(document))
    options = ["--url", running.url, "--phases", "coverage,fuzzing"]
    if who == "administrator":
        options += ["-H", f"Authorization: Bearer {token}"]
    ask(running, str(tmp_path / "all.json"), tmp_path, *options)
