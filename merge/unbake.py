"""Undo a bake, exactly: by the base that its recipe names, and never by subtracting.

A baked weight is round(W + delta): what rounding took does not come back by subtracting delta, and
in bfloat16 one bake and its inverse leave 3 % of all values different.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from merge.blocks import Options, copy_file
from merge.errors import BadHistory, BadRecipe
from merge.execute import new_folder
from merge.formats.folders import digest_of_files
from merge.formats.targets import Target
from merge.recipe import Recipe
from merge.threads import default_workers


def require_base(recipe: Recipe, found_sha256: str, file: str, base: str) -> None:
    """BadHistory unless the file is a bake, and into a base of this SHA-256."""
    require_bake(recipe, file)
    assert recipe.base is not None  # a bake without a base is no recipe
    if recipe.base.sha256 != found_sha256:
        detail = f"it was baked into sha256:{recipe.base.sha256}, and {base} is sha256:"
        raise BadHistory(file, detail + found_sha256)


def require_bake(recipe: Recipe, file: str) -> None:
    """BadHistory unless the file is a bake."""
    if recipe.kind != "bake":
        raise BadHistory(
            file, f"it was made by a {recipe.kind}; only a bake has a base to go back to"
        )


def without(recipe: Recipe, digests: Sequence[str]) -> Recipe | None:
    """The bake of all other inputs; None where no input is left. BadRecipe where one is not in it."""
    present = [its.sha256 for its in recipe.inputs]
    for digest in digests:
        if digest not in present:
            inside = ", ".join(f"sha256:{its}" for its in present)
            raise BadRecipe("inputs", f"sha256:{digest} is not among them; they are {inside}")
    left = tuple(its for its in recipe.inputs if its.sha256 not in digests)
    return recipe.model_copy(update={"inputs": left}) if left else None


def restore(base: Path, out: Path | Target, progress: Callable[[int], None]) -> str:
    """Write the base's own bytes, a file or a folder; the SHA-256 of what was written."""
    options = Options(default_workers(), True, progress, lambda: False)
    if base.is_file():
        return copy_file(base, out, options)
    assert isinstance(out, Path), "only here are there folders"
    digests = {}
    with new_folder(out) as folder:
        for file in sorted(path for path in base.rglob("*") if path.is_file()):
            name = file.relative_to(base)
            if not any(part.startswith(".") for part in name.parts):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                digests[name.as_posix()] = copy_file(file, folder / name, options)
    return digest_of_files(digests)
