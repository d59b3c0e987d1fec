"""What a file was made of, as a tree for people and as JSON."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.tree import Tree

from cli.console import plain

if TYPE_CHECKING:
    from merge.recipe import Input, Recipe, Source

# Enough for the hub's look-up by hash.
_SHOWN_DIGITS = 16
_DEEPEST = 16


def as_tree(name: str, recipe: "Recipe", parents: "Mapping[str, Recipe]") -> Tree:
    """What was made is unfolded where it first occurs."""
    tree = Tree(f"[bold]{name}[/]  {plain(said(recipe))}", guide_style="dim")
    waiting = [(tree, recipe, 1)]
    unfolded: set[str] = set()
    while waiting:
        branch, its, depth = waiting.pop(0)
        for role, source in _sources(its):
            digest = source.sha256 or ""
            place = source.ref or f"sha256:{digest[:_SHOWN_DIGITS]}"
            made = parents.get(digest)
            words = f"  [dim]{plain(said(made))}[/]" if made is not None else ""
            if made is not None and (digest in unfolded or depth == _DEEPEST):
                words += "[dim], made of …[/]"
                made = None
            leaf = branch.add(f"{plain(role)} {plain(place)}{words}")
            if made is not None:
                unfolded.add(digest)
                waiting.append((leaf, made, depth + 1))
    return tree


def as_yaml(value: Any) -> str:
    """As one writes it in a recipe."""
    return value if isinstance(value, str) else json.dumps(value)


def said(recipe: "Recipe") -> str:
    """A recipe in a few words: kind, method with what was chosen, rank, output."""
    method = recipe.method.model_dump(mode="json", exclude_defaults=True)
    name = method.pop("name", recipe.method.name)
    chosen = ", ".join(f"{field} {as_yaml(value)}" for field, value in method.items())
    words = [f"{recipe.kind} by {name}" + (f" ({chosen})" if chosen else "")]
    if recipe.kind in ("extract", "resize"):
        words = [recipe.kind]
    rank = {k: v for k, v in recipe.rank.model_dump(exclude_none=True).items() if k != "exact"}
    words += [f"rank {value}" if k == "fixed" else f"{k} {value}" for k, value in rank.items()]
    words += [str(its) for its in (recipe.output.dialect,) if its is not None]
    words += [recipe.output.dtype] if recipe.output.dtype != "keep" else []
    words += [recipe.numerics] if recipe.numerics != "fast" else []
    return ", ".join(words)


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
    """The recipe, with those of what it was made of by SHA-256 as `parents`."""
    made = {sha256: _document(its) for sha256, its in parents.items()}
    return _document(recipe) | ({"parents": made} if made else {})


def _document(recipe: "Recipe") -> dict[str, Any]:
    document = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    document["inputs"] = [
        {field: value for field, value in its.items() if value not in ({}, [])}
        for its in document["inputs"]
    ]
    is_pinned = all(source.sha256 is not None for _, source in recipe.sources())
    return ({"digest": recipe.digest()} if is_pinned else {}) | document
