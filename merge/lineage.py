"""What a file says it was made of: the recipe in its header, and the recipes of its inputs.

A recipe names its inputs by SHA-256. Where an input was itself made by a recipe, that recipe is kept
in `graft.parents`, and so are those of its own inputs: whoever has the files that nobody made from
others (the leaves) can make all the rest again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import BadHistory, BadRecipe
from merge.formats import metadata as names
from merge.formats.header import read_header
from merge.recipe import Recipe

# Far more than any person combines, and far less than a header may hold.
MAX_PARENTS_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class History:
    """The recipe of a file, those of files it was made of by their SHA-256, and the engine that ran."""

    recipe: Recipe
    parents: Mapping[str, Recipe]
    engine: str


def read_history(metadata: Mapping[str, str], file: str) -> History | None:
    """What the `__metadata__` of a file says it was made of; None where it says nothing.

    BadHistory where the recipe is not the one that its digest names, or cannot be read.
    """
    text = metadata.get(names.GRAFT_RECIPE)
    if text is None:
        return None
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    said = metadata.get(names.GRAFT_RECIPE_DIGEST)
    if said != digest:
        detail = f"its recipe is {digest} and not, as it says, {said}: one of them was changed"
        raise BadHistory(file, detail)
    recipe = _parse(text, file, "its recipe")
    parents = _read_parents(metadata.get(names.GRAFT_PARENTS, "{}"), file)
    return History(recipe, parents, metadata.get(names.GRAFT_VERSION, ""))


def history_of_files(metadata: Mapping[str, Mapping[str, str]], name: str) -> History | None:
    """The same of a folder, from what each of its files says.

    A bake copies the files that it does not change, with the recipe of an earlier bake in them:
    the last one is the one that all others are parents of.
    """
    found = {}
    for file, its in metadata.items():
        history = read_history(its, f"{name}/{file}")
        if history is not None:
            found[history.recipe.digest()] = history
    if len(found) < 2:
        return next(iter(found.values()), None)
    earlier = {its.digest() for history in found.values() for its in history.parents.values()}
    last = [history for digest, history in found.items() if digest not in earlier]
    if len(last) != 1:
        raise BadHistory(name, f"its files were made by {len(found)} recipes: {_some(found)}")
    return last[0]


def read(path: Path) -> History:
    """What a file, or the files of a folder, say they were made of; BadHistory where nothing does."""
    files = {"": path}
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*.safetensors")) if file.is_file()]
        files = {file.relative_to(path).as_posix(): file for file in inside}
    found = {name: read_header(file).metadata for name, file in files.items()}
    history = (
        history_of_files(found, path.name) if path.is_dir() else read_history(found[""], path.name)
    )
    if history is None:
        raise BadHistory(path.name, "it carries no recipe, so nothing says what it was made of")
    return history


def parents_of(recipe: Recipe, histories: Mapping[str, History | None]) -> dict[str, Any]:
    """`graft.parents` of what `recipe` makes: SHA-256 -> recipe, of everything it was made of that was
    itself made; `histories` has what each source says about itself.
    """
    known = {sha256: its.recipe for sha256, its in histories.items() if its is not None}
    for history in histories.values():
        if history is not None:
            known = {**history.parents, **known}
    found: dict[str, Any] = {}
    waiting = _digests(recipe)
    while waiting:
        sha256 = waiting.pop()
        if sha256 in known and sha256 not in found:
            found[sha256] = json.loads(known[sha256].canonical_json())
            waiting += _digests(known[sha256])
    size = len(write_parents(found))
    if size > MAX_PARENTS_BYTES:
        detail = f"the recipes they were made by take {size} bytes, more than {MAX_PARENTS_BYTES}"
        raise BadRecipe("inputs", detail)
    return found


def believed(metadata: Mapping[str, Mapping[str, str]], name: str) -> History | None:
    """The same, of an input. One whose recipe does not hold is a leaf, as it were without any."""
    try:
        return history_of_files(metadata, name)
    except BadHistory:
        return None


def write_parents(found: Mapping[str, Any]) -> str:
    return json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digests(recipe: Recipe) -> list[str]:
    return [source.sha256 or "" for _, source in recipe.sources()]


def _read_parents(text: str, file: str) -> dict[str, Recipe]:
    if len(text) > MAX_PARENTS_BYTES:
        raise BadHistory(file, f"{names.GRAFT_PARENTS} is longer than any that is written")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadHistory(file, f"{names.GRAFT_PARENTS} is not JSON") from error
    if not isinstance(found, dict):
        raise BadHistory(file, f"{names.GRAFT_PARENTS} is not an object")
    return {
        sha256: _parse(json.dumps(recipe), file, f"the recipe of its parent {sha256}")
        for sha256, recipe in found.items()
    }


def _parse(text: str, file: str, what: str) -> Recipe:
    try:
        recipe = Recipe.load(text)
        recipe.canonical_json()
    except BadRecipe as error:
        why = f"{what} cannot be read, it may be of a newer version: {error}"
        raise BadHistory(file, why) from error
    return recipe


def _some(digests: Iterable[str]) -> str:
    return ", ".join(sorted(digests))
