"""What outputs say about what they were made of: certificates, and the recipes of their inputs."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cli.trees import as_tree
from merge.errors import BadHistory
from merge.families import Family
from merge.formats.hashes import sha256_file
from merge.leaves import search
from merge.lineage import History, history_of_files, read_history
from merge.recipe import Recipe, Source
from tests.fixtures.engine import family_of, make_adapter, run, some_of

FAMILY = family_of("tiny-sd")
NAMES = some_of(FAMILY)
PIPELINE = Path(__file__).parents[2] / "train" / "tiny" / "pipeline"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def certificate_of(path: Path) -> Any:
    return json.loads(metadata_of(path)["graft.certificate"])


def adapters(folder: Path, family: Family = FAMILY) -> list[Path]:
    """Three adapters: of everything, of everything, of the UNet alone."""
    unet = [name for name in NAMES if name[0] == "unet"]
    every = [("a", NAMES), ("b", NAMES), ("c", unet)]
    return [
        make_adapter(folder / f"{name}.safetensors", family, names, rank=2, seed=seed).path
        for seed, (name, names) in enumerate(every)
    ]


def test_a_certificate_names_inputs_by_content_with_coverage_and_strengths(tmp_path: Path) -> None:
    a, _, c = adapters(tmp_path)
    factor = {"*.attn1.*": 0.5}
    wanted = {"strength": 0.8, "blocks": factor, "components": {"text_encoder": 0.4}}
    outcome = run(tmp_path / "out.safetensors", [{"ref": str(a), **wanted}, (c, -1.0)])
    found = certificate_of(tmp_path / "out.safetensors")
    assert found == outcome.certificate
    assert found["engine"] == metadata_of(tmp_path / "out.safetensors")["graft.version"]
    assert found["method"] == {"name": "linear"}
    order = sorted([(sha256_file(a), a, 0.8), (sha256_file(c), c, -1.0)], key=lambda its: its[2])
    order = order if found["inputs"][0]["strength"] < 0 else order[::-1]
    assert found["inputs"] == [
        {"sha256": digest, "size_bytes": path.stat().st_size, "strength": strength}
        for digest, path, strength in order
    ]
    at = [path for _, path, _ in order].index(a)
    count = {c: sum(name[0] == c for name in NAMES) for c in ("text_encoder", "unet")}
    covers = {"text_encoder": [count["text_encoder"], 0], "unet": [count["unet"]] * 2}
    assert found["coverage"] == {name: row[:: 1 if at == 0 else -1] for name, row in covers.items()}
    strengths = {
        module: row["of_inputs"][at] for row in found["strengths"] for module in row["modules"]
    }
    attn1 = {f"unet.{module}": 0.4 for c, module in NAMES if c == "unet" and ".attn1." in module}
    assert attn1
    assert strengths == {"text_encoder.*": 0.4, **attn1}
    assert all(row["of_inputs"][1 - at] in (None, -1.0) for row in found["strengths"])


def test_a_bakes_certificate_says_the_same(tmp_path: Path) -> None:
    a, b, _ = adapters(tmp_path)
    found = run(tmp_path / "out", [(a, 0.5), (b, 1.0)], base=PIPELINE).certificate
    assert sorted(its["strength"] for its in found["inputs"]) == [0.5, 1.0]
    assert found["coverage"]["unet"] == [sum(name[0] == "unet" for name in NAMES)] * 2
    assert found["method"] == {"name": "linear"}
    assert "strengths" not in found


def merged_twice(folder: Path) -> tuple[Path, Path, list[Path]]:
    """(A + B, (A + B) + C, [A, B, C])."""
    a, b, c = adapters(folder)
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    run(first, [(a, 0.7), (b, 0.5)])
    run(second, [(first, 1.0), (c, -0.5)])
    return first, second, [a, b, c]


def history_of(path: Path) -> History:
    found = read_history(metadata_of(path), path.name)
    assert found is not None
    return found


def test_a_merge_of_merges_remembers_the_recipes_of_its_inputs(tmp_path: Path) -> None:
    first, second, (a, _, c) = merged_twice(tmp_path)
    assert history_of(first).parents == {}
    parents = history_of(second).parents
    assert {sha256: recipe.digest() for sha256, recipe in parents.items()} == {
        sha256_file(first): history_of(first).recipe.digest()
    }
    third = tmp_path / "third.safetensors"
    run(third, [(second, 0.5), (a, 0.1)])
    assert set(history_of(third).parents) == {sha256_file(first), sha256_file(second)}
    run(tmp_path / "baked", [(third, 1.0)], base=PIPELINE)
    run(tmp_path / "again", [(c, 1.0)], base=tmp_path / "baked")
    files = {p.name: metadata_of(p) for p in (tmp_path / "again").rglob("*.safetensors")}
    history = history_of_files(files, "again")
    assert history is not None
    assert history.recipe.base is not None
    made = {sha256_file(first), sha256_file(second), sha256_file(third)}
    assert set(history.parents) == made | {history.recipe.base.sha256}


def changed(path: Path, key: str, text: str | None) -> Path:
    """The same tensors under other metadata."""
    metadata = metadata_of(path) | ({} if text is None else {key: text})
    if text is None:
        del metadata[key]
    save_file(load_file(path), path.with_name("changed.safetensors"), metadata)
    return path.with_name("changed.safetensors")


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("graft.recipe", '{"kind":"merge","inputs":[]}', "and not, as it says, sha256:"),
        ("graft.recipe_digest", None, "and not, as it says, None"),
        ("graft.parents", "[", "graft.parents is not JSON"),
        ("graft.parents", "[]", "graft.parents is not an object"),
        ("graft.parents", "[" + " " * 2**21 + "]", "graft.parents is longer than any"),
        ("graft.parents", '{"0":{"kind":"weld"}}', "the recipe of its parent 0 cannot be read"),
    ],
)
def test_a_history_that_does_not_hold_is_named(
    tmp_path: Path, key: str, text: str | None, says: str
) -> None:
    _, second, (a, *_) = merged_twice(tmp_path)
    path = changed(second, key, text)
    with pytest.raises(BadHistory, match=says):
        history_of(path)
    # As an input it is a leaf.
    run(tmp_path / "out.safetensors", [(path, 1.0), (a, 1.0)])
    assert history_of(tmp_path / "out.safetensors").parents == {}


def test_a_file_that_nobody_made_has_no_history(tmp_path: Path) -> None:
    a, *_ = adapters(tmp_path)
    assert read_history(metadata_of(a), "a") is None


def digest(number: int) -> str:
    return f"{number:064x}"


def recipe_of(*digests: str) -> Recipe:
    return Recipe.parse({"kind": "merge", "inputs": [{"sha256": its} for its in digests]})


def test_a_long_line_of_merges_is_followed_to_its_leaf() -> None:
    made = {digest(i): recipe_of(digest(i + 1)) for i in range(3000)}
    leaf = Path("leaf.safetensors")

    def find(source: Source) -> Path | None:
        return leaf if source.sha256 == digest(3000) else None

    found = search(recipe_of(digest(0)), made, find, "x")
    assert found.files == {f"sha256:{digest(3000)}": leaf}
    assert [source.sha256 for source, _ in found.steps] == [digest(i) for i in range(2999, -1, -1)]
    as_tree("x", recipe_of(digest(0)), made)


def test_what_is_in_a_merge_by_many_ways_is_made_and_shown_once() -> None:
    made = {digest(i): recipe_of(digest(i + 1), digest(i + 1)) for i in range(40)}
    asked = []

    def find(source: Source) -> Path | None:
        asked.append(source.sha256)
        return Path("leaf") if source.sha256 == digest(40) else None

    found = search(recipe_of(digest(0)), made, find, "x")
    assert len(found.steps) == 40
    assert asked == [digest(i) for i in range(41)]
    assert len(list(as_tree("x", recipe_of(digest(0)), made).children)) == 1
