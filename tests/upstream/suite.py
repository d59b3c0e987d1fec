"""huggingface_hub's own tests against a fresh hub: `make test-hf SUITE=DIR`.

DIR is a checkout of https://github.com/huggingface/huggingface_hub at the tag of a release.
That release is installed into an environment of its own and run against a hub that starts with
the users the suite expects. What is not to pass stands in `expected.yaml`, with reasons; anything
else that fails, and anything listed there that passes, makes the exit status 1.
`--write` puts the figures into docs/protocol.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from hub.context import open_hub
from hub.settings import Settings
from hub.users import service as users
from hub.users.models import Scope
from tests.fixtures.clients import client_environment
from tests.fixtures.server import RunningHub, running_hub

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DOCUMENT = ROOT / "docs" / "protocol.md"
TABLE = re.compile(r"(<!-- suite -->\n).*?(<!-- /suite -->)", re.DOTALL)

FILES = (
    *("hf_api", "hf_file_system", "file_download", "snapshot_download", "commit_api"),
    *("commit_scheduler", "copy_files", "upload_pipeline", "upload_large_folder", "repocard"),
    *("repocard_data", "hub_mixin", "xet_upload", "xet_download", "lfs", "auth", "verification"),
    *("cli_discussions", "tree_cache", "cache_layout", "local_folder", "utils_http"),
    *("utils_errors", "utils_pagination", "utils_validators", "utils_hf_uris"),
)
# Of its setup.py, what these files need.
REQUIREMENTS = ("authlib", "fastapi", "itsdangerous", "jedi", "Jinja2", "numpy", "Pillow", "pytest")
REQUIREMENTS += ("pytest-asyncio", "pytest-mock", "pytest-timeout", "pytest-vcr", "urllib3")
# Names that this hub cannot give are not needed: the suite asks for them through its constants.
USER, OTHER, ENTERPRISE = "dummy-hub-user", "DVUser", "EnterpriseAdmin"
ORGANIZATIONS = {"valid_org_hub": ("Dummy Hub Org", USER), "EnterpriseOrgPrivate": ("", ENTERPRISE)}


@dataclass(frozen=True, slots=True)
class Expected:
    """Prefixes of test names, each with the reason: not to be run, and to fail by decision."""

    not_applicable: Mapping[str, str]
    decided: Mapping[str, str]

    def is_decided(self, name: str) -> bool:
        return name.startswith(tuple(self.decided))

    @classmethod
    def read(cls, path: Path) -> "Expected":
        told = yaml.safe_load(path.read_text(encoding="utf-8"))

        def by_name(part: str) -> dict[str, str]:
            return {name: why for why, names in told[part].items() for name in names}

        return cls(by_name("not_applicable"), by_name("decided"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path, help="checkout of huggingface_hub")
    parser.add_argument("--write", action="store_true", help="put the table into docs/protocol.md")
    parser.add_argument("--only", nargs="*", default=FILES, help="such as hf_api file_download")
    arguments = parser.parse_args()
    suite = arguments.suite.resolve()
    version = version_of(suite)
    expected = Expected.read(HERE / "expected.yaml")
    environment = client_environment(
        f"suite-{version}", f"huggingface_hub=={version}", *REQUIREMENTS
    )
    with tempfile.TemporaryDirectory() as folder:
        constants = seed(Path(folder))
        with running_hub(Path(folder), gitattributes=True, workers=0) as hub:
            results = run(suite, environment, hub, constants, expected, arguments.only)
    text = table(results, expected, version)
    print(text)
    if arguments.write:
        write(text)
    return report(results, expected)


def version_of(suite: Path) -> str:
    """The release that a checkout is of."""
    source = (suite / "src" / "huggingface_hub" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([0-9.]+)"$', source, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{suite} is no checkout of a release of huggingface_hub")
    return found[1]


def seed(folder: Path) -> dict[str, str]:
    """Users and organisations of the suite; the constants of the suite that name them."""
    with (
        open_hub(Settings(data_dir=folder / "data", min_free_bytes=0)) as hub,
        hub.db.write() as session,
    ):
        made = {name: users.create_user(session, name) for name in (USER, OTHER, ENTERPRISE)}
        tokens = {
            name: users.issue_token(session, user, "suite", Scope.ADMIN)
            for name, user in made.items()
        }
        for name, (full_name, owner) in ORGANIZATIONS.items():
            organization = users.create_organization(session, name, made[owner])
            organization.full_name = full_name
    return {
        "USER": USER,
        "FULL_NAME": USER,
        "TOKEN": tokens[USER],
        "OTHER_USER": OTHER,
        "OTHER_TOKEN": tokens[OTHER],
        "ENTERPRISE_USER": ENTERPRISE,
        "ENTERPRISE_TOKEN": tokens[ENTERPRISE],
    }


def run(
    suite: Path,
    python: Path,
    hub: RunningHub,
    constants: Mapping[str, str],
    expected: Expected,
    only: Sequence[str],
) -> dict[str, str]:
    """What became of each test: passed, failed, skipped or deselected."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        inherited = {name: os.environ[name] for name in os.environ if name[:3] != "HF_"}
        environment = inherited | {
            "HF_ENDPOINT": hub.url,
            # Fresh: Xet's cache in it would refer to what an older hub had.
            "HF_HOME": f"{folder}/home",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": f"{suite}:{HERE}",
            "GRAFT_SUITE_RESULTS": str(results),
            "GRAFT_SUITE_CONSTANTS": json.dumps(constants),
            "GRAFT_SUITE_DESELECT": json.dumps(list(expected.not_applicable)),
        }
        files = [
            str(path) for name in only if (path := suite / "tests" / f"test_{name}.py").exists()
        ]
        command = [str(python), "-m", "pytest", "-p", "graft_endpoint", "-o", "addopts=", "-q"]
        command += ["--timeout=60", "--tb=short", "--continue-on-collection-errors", "-rfE"]
        subprocess.run([*command, *files], cwd=suite, env=environment, check=False)
        found: dict[str, str] = json.loads(results.read_text())
        return found


def table(results: Mapping[str, str], expected: Expected, version: str) -> str:
    """In Markdown, a row for each file."""
    counts: dict[str, Counter[str]] = {}
    for name, result in results.items():
        if result == "failed" and expected.is_decided(name):
            result = "decided"
        counts.setdefault(name.partition("::")[0], Counter())[result] += 1
    counts["**all**"] = sum(counts.values(), Counter())
    lines = [
        f"huggingface_hub {version} with its own tests:",
        "",
        "| file | passed | failed | decided otherwise | skipped by the suite | not applicable |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    order = ("passed", "failed", "decided", "skipped", "deselected")
    for file, count in counts.items():
        numbers = " | ".join(str(count[result]) for result in order)
        lines.append(f"| {file.removeprefix('test_').removesuffix('.py')} | {numbers} |")
    return "\n".join(lines) + "\n"


def write(text: str) -> None:
    whole = DOCUMENT.read_text(encoding="utf-8")
    assert TABLE.search(whole), f"{DOCUMENT} has no place for the table"
    DOCUMENT.write_text(TABLE.sub(lambda m: m[1] + text + m[2], whole), encoding="utf-8")


def report(results: Mapping[str, str], expected: Expected) -> int:
    """Print what is not as expected; the exit status."""
    wrong = [
        f"failed: {name}"
        for name, result in sorted(results.items())
        if result == "failed" and not expected.is_decided(name)
    ]
    files = {name.partition("::")[0] for name in results}
    for prefix in expected.decided:
        found = [result for name, result in results.items() if name.startswith(prefix)]
        if prefix.partition("::")[0] in files and "failed" not in found:
            wrong.append(f"passes now, take it off expected.yaml: {prefix}")
    print("\n".join(wrong) or "everything else passes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
