"""`graft merge --auto`: what the report on the merge suggests, in place of what nobody said."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.arguments import as_typed, make_recipe
from cli.console import CommandError, err, out, plain

if TYPE_CHECKING:
    from merge.recipe import Recipe
    from merge.reports.report import Suggestion


def filled_in(
    document: Mapping[str, Any], inputs: Sequence[str], said: Collection[str], *, as_json: bool
) -> "Recipe":
    """The recipe with the suggested strengths, method and rank, but for those that were `said`.

    Prints the reasons, beside the one document that a script reads.
    """
    recipe = make_recipe(dict(document), inputs)
    found = _suggested(recipe, inputs)
    reasons = [found.reasons[0]]
    if "strengths" in said:
        reasons = ["strengths: as you chose them"]
    elif found.strengths != tuple(source.strength for source in recipe.inputs):
        pairs = zip(document["inputs"], found.strengths, strict=True)
        changed = [{**source, "strength": strength} for source, strength in pairs]
        document = {**document, "inputs": changed}
        # What combines them best, and in how much room, depends on how strong they are.
        found = _suggested(make_recipe(document, inputs), inputs)
    own = {"method": found.method, "rank": found.rank}
    for name, reason in zip(own, found.reasons[1:3], strict=True):
        if name in said:
            own[name] = document[name]
            reasons.append(f"{name}: as you chose it")
        else:
            reasons.append(reason)
    for reason in (*reasons, *found.reasons[3:]):
        (err if as_json else out).print(f"[dim]auto[/]    {plain(reason)}")
    return make_recipe({**document, **own}, inputs)


def _suggested(recipe: "Recipe", inputs: Sequence[str]) -> "Suggestion":
    from cli.report import measured

    with as_typed(inputs):
        report, _ = measured(recipe)
    if report.suggestion is None:
        why = "; ".join(report.notes) or "the inputs change nothing"
        raise CommandError(f"--auto has nothing to suggest: {why}")
    return report.suggestion
