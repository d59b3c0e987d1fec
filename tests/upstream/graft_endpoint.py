"""pytest plugin that points huggingface_hub's own test suite at a hub of ours.

It runs in the environment of the client under test, loaded with `-p graft_endpoint` before the
suite is imported, and imports nothing of this project.
The suite hard-codes its server, its users and their tokens in `tests/testing_constants.py`; all of
them are replaced by what the environment says.
"""

import json
import os
from typing import Any

from huggingface_hub import constants

from tests import testing_constants

ENDPOINT = os.environ["HF_ENDPOINT"]
RESULTS: dict[str, str] = {}

assert constants.ENDPOINT == ENDPOINT, (
    "HF_ENDPOINT has to be set before huggingface_hub is imported"
)
# The library takes addresses of either for its own.
constants._HF_DEFAULT_STAGING_ENDPOINT = ENDPOINT
testing_constants.ENDPOINT_STAGING = ENDPOINT
for name, value in json.loads(os.environ["GRAFT_SUITE_CONSTANTS"]).items():
    assert hasattr(testing_constants, name), f"the suite has no constant {name}"
    setattr(testing_constants, name, value)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what asks the real huggingface.co, and what the list says is not applicable."""
    prefixes = tuple(json.loads(os.environ["GRAFT_SUITE_DESELECT"]))
    left = []
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if item.get_closest_marker("production") or name.startswith(prefixes):
            RESULTS[name] = "deselected"
        else:
            left.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def pytest_runtest_logreport(report: Any) -> None:
    """One word for each test: an error in its setup or teardown counts as a failure."""
    path = report.nodeid.removeprefix("tests/")
    if report.failed:
        RESULTS[path] = "failed"
    elif report.skipped:
        RESULTS.setdefault(path, "skipped")
    elif report.when == "call":
        RESULTS.setdefault(path, "passed")


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported is one failure."""
    if report.failed:
        RESULTS[report.nodeid.removeprefix("tests/")] = "failed"


def pytest_sessionfinish() -> None:
    with open(os.environ["GRAFT_SUITE_RESULTS"], "w") as file:
        json.dump(RESULTS, file)
