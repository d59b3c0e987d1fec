"""`graft merge --auto`: what the report on the merge suggests, in place of what nobody said."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.arguments import as_typed, make_recipe
from cli.console import CommandError, err, out, plain

if TYPE_CHECKING:
    from merge.recipe import Recipe
    from merge.reports.report import Report, Suggestion


def filled_in(
    document: Mapping[str, Any], inputs: Sequence[str], said: Collection[str], *, as_json: bool
) -> "Recipe":
    """The recipe with the suggested strengths, method and rank, but for those that were `said`.

    Prints the reasons, beside the one document that a script reads.
    """
    from merge.reports.suggest import least_loss, suggest_rank

    method = document["method"]["name"]
    if "rank" not in said:
        document = {**document, "rank": least_loss(method)}
    recipe = make_recipe(dict(document), inputs)
    report, found = _suggested(recipe, inputs)
    reasons = [found.reasons[0]]
    if "strengths" in said:
        reasons = ["strengths: as you chose them"]
    elif found.strengths != tuple(source.strength for source in recipe.inputs):
        pairs = zip(document["inputs"], found.strengths, strict=True)
        changed = [{**source, "strength": strength} for source, strength in pairs]
        document = {**document, "inputs": changed}
        # What combines them best, and in how much room, depends on how strong they are.
        report, found = _suggested(make_recipe(document, inputs), inputs)
    rank, why_rank = found.rank, found.reasons[2]
    if "method" in said:
        rank, why_rank = suggest_rank(report, method)
    own = {"method": found.method, "rank": rank}
    for name, reason in zip(own, (found.reasons[1], why_rank), strict=True):
        if name in said:
            own[name] = document[name]
            reasons.append(f"{name}: as you chose it")
        else:
            reasons.append(reason)
    for reason in (*reasons, *found.reasons[3:]):
        (err if as_json else out).print(f"[dim]auto[/]    {plain(reason)}")
    return make_recipe({**document, **own}, inputs)


def _suggested(recipe: "Recipe", inputs: Sequence[str]) -> tuple["Report", "Suggestion"]:
    from cli.report import measured

    with as_typed(inputs):
        report, _ = measured(recipe)
    if report.suggestion is None:
        why = "; ".join(report.notes) or "the inputs change nothing"
        raise CommandError(f"--auto has nothing to suggest: {why}")
    return report, report.suggestion
