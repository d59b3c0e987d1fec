"""What a repo's page says of how a file was made, whoever wrote its header."""

import hashlib
import json
import re
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hub.context import Hub
from hub.users.service import Viewer
from merge.execute import execute
from merge.formats.header import read_header
from merge.plan import plan
from merge.recipe import Pinned, Recipe
from tests.fixtures.catalogue import publish_files
from tests.fixtures.tiny_files import write_lora
from tests.hub.conftest import bearer


def made(folder: Path, name: str, document: dict[str, Any]) -> Path:
    """What the engine makes of the files in `folder`, which the inputs name."""
    recipe = Recipe.parse(document)
    files = {ref: folder / f"{ref}.safetensors" for ref in recipe.refs()}
    digests = {ref: hashlib.sha256(file.read_bytes()).hexdigest() for ref, file in files.items()}
    pinned = recipe.pin({ref: Pinned(sha256=digest) for ref, digest in digests.items()})
    execute(plan(pinned, files), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture
def folder(hub: Hub, admin: Viewer, tmp_path: Path) -> Path:
    """admin/both is a merge of ink and the private robot, admin/three one of both and cat."""
    for seed, name in enumerate(("ink", "robot", "cat")):
        write_lora(tmp_path / f"{name}.safetensors", seed, rank=2)
    both = [{"ref": "ink", "strength": 0.7}, {"ref": "robot", "strength": -0.5}]
    made(tmp_path, "both", {"kind": "merge", "inputs": both, "rank": {"fixed": 3}})
    three = [{"ref": "both"}, {"ref": "cat", "blocks": {"*": 0.5}}, {"ref": "ink"}]
    method = {"name": "ties", "density": 0.4}
    rank = {"fixed": 2}
    made(tmp_path, "three", {"kind": "merge", "inputs": three, "method": method, "rank": rank})
    for name in ("ink", "robot", "both", "three"):
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        files = {f"{name}.safetensors": content, "README.md": f"# The {name}\n".encode()}
        publish_files(hub, admin, f"admin/{name}", files, private=name == "robot")
    return tmp_path


def page_of(client: TestClient, name: str, token: str | None = None) -> str:
    answer = client.get(f"/admin/{name}", headers=bearer(token) if token else {})
    assert answer.status_code == 200, answer.text
    return unescape(answer.text)


def test_the_page_of_a_merge_says_what_it_was_made_of(
    client: TestClient, hub: Hub, folder: Path
) -> None:
    metadata = read_header(folder / "both.safetensors").metadata
    text = page_of(client, "both", hub.admin_token)
    certificate = json.loads(metadata["graft.certificate"])
    for words in (
        "Merged from 2 adapters, at rank 3.",
        'href="/admin/ink?file=ink.safetensors">The ink</a>',
        'href="/admin/robot?file=robot.safetensors">The robot</a>',
        '<td class="num">0.7</td><td class="size">28</td>',
        '<td class="num">-0.5</td>',
        f"<dt>{certificate['error'] * 100:.0f} %</dt><dd>away from the exact result",
        f'data-copy="{metadata["graft.recipe_digest"]}"',
        "graft verify admin/both:both.safetensors",
        "/bench?add=admin/",
    ):
        assert words in text, words


def test_what_one_may_not_read_is_not_named(client: TestClient, folder: Path) -> None:
    text = page_of(client, "both")
    assert "The ink" in text
    assert "The robot" not in text
    assert "admin/robot" not in text
    assert "not on this hub" in text
    assert "Open on the bench" not in text


def test_merges_of_merges_are_drawn_with_each_file_once(client: TestClient, folder: Path) -> None:
    text = page_of(client, "three")
    graph = text[text.index('<svg class="lineage"') :].partition("</svg>")[0]
    assert graph.count("<rect") == 5  # three <- both, cat, ink; both <- ink, robot
    assert graph.count("<path") == 5
    assert graph.count(">The ink<") == 1
    assert ">merge, TIES<" in graph
    assert ">0.5*<" not in graph
    assert graph.count("not on this hub") == 2
    assert "Merged from 3 adapters by TIES (density 0.4" in text
    assert "strengths of its own for some parts" in text


def test_a_file_that_nobody_made_says_nothing_of_its_origin(
    client: TestClient, hub: Hub, folder: Path
) -> None:
    assert "How it was made" not in page_of(client, "robot", hub.admin_token)


def with_metadata(file: Path, changes: Mapping[str, str]) -> bytes:
    """The same tensors under a header that says something else."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def test_a_recipe_that_was_changed_is_not_believed(
    client: TestClient, hub: Hub, admin: Viewer, folder: Path
) -> None:
    lie = with_metadata(folder / "both.safetensors", {"graft.recipe_digest": "sha256:" + "0" * 64})
    publish_files(hub, admin, "admin/lie", {"lie.safetensors": lie})
    text = page_of(client, "lie")
    assert "one of them was changed" in text
    assert "graft verify" not in text


@pytest.mark.parametrize("certificate", ["[", "[]", '{"error": "<b>", "modules": 3}', "{}"])
def test_a_certificate_that_is_none_is_left_out(
    client: TestClient, hub: Hub, admin: Viewer, folder: Path, certificate: str
) -> None:
    odd = with_metadata(folder / "both.safetensors", {"graft.certificate": certificate})
    publish_files(hub, admin, "admin/odd", {"odd.safetensors": odd})
    text = page_of(client, "odd")
    assert "Merged from 2 adapters" in text
    assert "away from the exact result" not in text


@pytest.mark.parametrize(("leaf", "between"), [("0" * 64, "f" * 64), ("f" * 64, "0" * 64)])
def test_lines_lead_from_left_to_right_also_over_a_shortcut(
    client: TestClient, hub: Hub, admin: Viewer, folder: Path, leaf: str, between: str
) -> None:
    """The file is made of a leaf and of something that was itself made of that leaf."""
    parent, recipe = (
        Recipe.parse({"kind": "merge", "inputs": [{"sha256": sha256} for sha256 in inputs]})
        for inputs in ([leaf], [leaf, between])
    )
    changes = {
        "graft.recipe": recipe.canonical_json(),
        "graft.recipe_digest": recipe.digest(),
        "graft.parents": json.dumps({between: json.loads(parent.canonical_json())}),
    }
    odd = with_metadata(folder / "both.safetensors", changes)
    publish_files(hub, admin, "admin/odd", {"odd.safetensors": odd})
    lines = re.findall(r'd="M(\d+) \d+C[\d ]* (\d+) \d+"', page_of(client, "odd"))
    assert len(lines) == 3
    assert all(int(start) < int(end) for start, end in lines)


def test_parents_that_claim_to_be_made_of_each_other_are_drawn_and_end(
    client: TestClient, hub: Hub, admin: Viewer, folder: Path
) -> None:
    metadata = read_header(folder / "both.safetensors").metadata
    ink, robot = (
        hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in ("ink", "robot")
    )
    recipe = json.loads(metadata["graft.recipe"])
    ring = {
        one: recipe | {"inputs": [{"sha256": other, "strength": 1.0}]}
        for one, other in ((ink, robot), (robot, ink))
    }
    odd = with_metadata(folder / "both.safetensors", {"graft.parents": json.dumps(ring)})
    publish_files(hub, admin, "admin/ring", {"ring.safetensors": odd})
    text = page_of(client, "ring")
    assert text.partition('<svg class="lineage"')[2].partition("</svg>")[0].count("<rect") == 3
