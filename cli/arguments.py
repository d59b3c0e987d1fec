"""Recipes that a command line makes, and their refusals in terms of what was typed."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from cli.console import CommandError, WrongUsage

if TYPE_CHECKING:
    from merge.errors import BadRecipe
    from merge.recipe import Recipe

# A rank that no option said is --exact, which what is refused is not.
_OPTIONS = {
    "method.name": "--method",
    "rank": "--rank, --energy, --budget, --shared",
    "rank.fixed": "--rank",
    "rank.energy": "--energy",
    "rank.budget_bytes": "--budget",
    "rank.shared": "--shared",
    "method.normalise": "--normalise",
    "base": "--base",
    "seed": "--seed",
    "output": "--dtype",
    "output.dialect": "--to",
    "output.dtype": "--dtype",
    "output.allow_loss": "--allow-loss",
}
_SELECTORS = {
    "blocks": "--block",
    "components": "--component",
    "leave_out": "--leave-out",
    "only": "--only",
    "vectors": "--vectors",
}
_TUNED = re.compile(r"tuned\.(\w+)\.(.+)", re.DOTALL)
_INPUT = re.compile(r"inputs\[(\d+)\]\.(\w+)(?:\.(.+)|\[.*)?", re.DOTALL)


def make_recipe(document: dict[str, Any], inputs: Sequence[str]) -> "Recipe":
    """The recipe that the arguments say; WrongUsage names the one that cannot be meant."""
    from merge.errors import BadRecipe
    from merge.recipe import Recipe

    try:
        return Recipe.parse(document)
    except BadRecipe as error:
        raise WrongUsage(_explain(error, inputs)) from error


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given, be it as its default is."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def as_typed(inputs: Sequence[str] | None, file: str = "the recipe") -> Iterator[None]:
    """Refusals of a recipe in words of the arguments `inputs`, or of the `file` that holds it."""
    from merge.errors import BadRecipe

    try:
        yield
    except BadRecipe as error:
        if inputs is not None:
            raise CommandError(_explain(error, inputs)) from error
        where = ": ".join(filter(None, (file, error.param)))
        is_named = not error.param and file in error.detail
        raise CommandError(error.detail if is_named else f"{where}: {error.detail}") from error


def _explain(error: "BadRecipe", inputs: Sequence[str]) -> str:
    where = _argument(error.param, inputs)
    return f"{where}: {error.detail}" if where else error.detail


def _argument(param: str, inputs: Sequence[str]) -> str:
    """What was typed for a field; "" where the detail names it, or where it is about all inputs."""
    found = _INPUT.fullmatch(param)
    tuned = _TUNED.fullmatch(param)
    if tuned is not None:
        return f"{_SELECTORS[tuned[1]]} {tuned[2]}"
    if found is None:
        field = param.removeprefix("method.")
        return _OPTIONS.get(param, f"--param {field}" if field != param else "")
    index, field, key = found.groups()
    if field not in _SELECTORS:
        return inputs[int(index)]
    if field == "only" and not key:  # about a preset, which both may have said
        return "--only, --style-content"
    return f"{_SELECTORS[field]} {key}" if key else _SELECTORS[field]
