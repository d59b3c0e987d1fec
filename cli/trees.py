"""What a file was made of, as a tree for people and as JSON."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.tree import Tree

from cli.console import plain

if TYPE_CHECKING:
    from merge.recipe import Input, Recipe, Source

# Enough for the hub's look-up by hash.
_SHOWN_DIGITS = 16


def as_tree(name: str, recipe: "Recipe", parents: "Mapping[str, Recipe]") -> Tree:
    tree = Tree(f"[bold]{name}[/]  {plain(said(recipe))}", guide_style="dim")
    _grow(tree, recipe, parents, ())
    return tree


def said(recipe: "Recipe") -> str:
    """A recipe in a few words: kind, method with what was chosen, rank, output."""
    method = recipe.method.model_dump(mode="json", exclude_defaults=True)
    name = method.pop("name", recipe.method.name)
    chosen = ", ".join(f"{field} {value}" for field, value in method.items())
    words = [f"{recipe.kind} by {name}" + (f" ({chosen})" if chosen else "")]
    if recipe.kind in ("extract", "resize"):
        words = [recipe.kind]
    rank = {k: v for k, v in recipe.rank.model_dump(exclude_none=True).items() if k != "exact"}
    words += [f"rank {value}" if k == "fixed" else f"{k} {value}" for k, value in rank.items()]
    words += [str(its) for its in (recipe.output.dialect,) if its is not None]
    words += [recipe.output.dtype] if recipe.output.dtype != "keep" else []
    words += [recipe.numerics] if recipe.numerics != "fast" else []
    return ", ".join(words)


def _grow(
    tree: Tree, recipe: "Recipe", parents: "Mapping[str, Recipe]", within: tuple[str, ...]
) -> None:
    for role, source in _sources(recipe):
        digest = source.sha256 or ""
        name = source.ref or f"sha256:{digest[:_SHOWN_DIGITS]}"
        made = parents.get(digest) if digest not in within else None
        words = f"  [dim]{plain(said(made))}[/]" if made is not None else ""
        branch = tree.add(f"{plain(role)} {plain(name)}{words}")
        if made is not None:
            _grow(branch, made, parents, (*within, digest))


def _sources(recipe: "Recipe") -> "list[tuple[str, Source]]":
    """Every file that a recipe names, with its part in it."""
    found: list[tuple[str, Source]] = []
    if recipe.base is not None:
        found.append(("base", recipe.base))
    if recipe.tuned is not None:
        found.append(("tuned", recipe.tuned))
    for its in recipe.inputs:
        found.append((f"{its.strength:g} ×{_where(its)}", its))
        if its.vectors is not None:
            found.append(("vectors", its.vectors))
    return found


def _where(source: "Input") -> str:
    """Where an input takes part otherwise than at its strength."""
    words = [f"{name} {strength:g}" for name, strength in source.components.items()]
    words += [f"{glob} × {factor:g}" for glob, factor in source.blocks.items()]
    words += [f"without {glob}" for glob in source.leave_out]
    words += [f"only {glob}" for glob in source.only]
    return f" ({', '.join(words)})" if words else ""


def as_document(recipe: "Recipe", parents: "Mapping[str, Recipe]") -> dict[str, Any]:
    """The same as nested objects: a recipe whose sources have `made_by` where they were made."""
    return _document(recipe, parents, ())


def _document(
    recipe: "Recipe", parents: "Mapping[str, Recipe]", within: tuple[str, ...]
) -> dict[str, Any]:
    document = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    document["inputs"] = [
        {field: value for field, value in its.items() if value not in ({}, [])}
        for its in document["inputs"]
    ]
    places = [document[role] for role in ("base", "tuned") if role in document]
    for place in [*places, *document["inputs"]]:
        digest = place.get("sha256", "")
        if digest in parents and digest not in within:
            place["made_by"] = _document(parents[digest], parents, (*within, digest))
    is_pinned = all(source.sha256 is not None for _, source in recipe.sources())
    return ({"digest": recipe.digest()} if is_pinned else {}) | document
