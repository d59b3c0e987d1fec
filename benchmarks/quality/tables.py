"""Scores of many pairs -> the two markdown tables of the report."""

from collections.abc import Mapping, Sequence

from .statistics import Estimate, difference, estimate
from .study import RANK, TUNING_SEED, Pair
from .variants import Variant

COLUMNS = ("style", "concept", "both", "kept", "content", "overall")
REFERENCE = Variant("linear")
BOTH_INPUTS = ("unmerged", "whole", f"rank {2 * RANK}")
"""Sizes that are those of both inputs together: one of them is a method's row."""

Results = Mapping[str, Mapping[Pair, Mapping[str, float]]]
"""Variant's name -> pair -> scores."""


def report(
    plain: Sequence[Variant],
    tuned: Mapping[str, Variant],
    results: Results,
    pairs: Sequence[Pair],
) -> str:
    """One row for each way to combine; what is not merged comes first, then the best overall."""
    rows = [variant for variant in plain if variant.size in BOTH_INPUTS]
    unmerged = [row for row in rows if row.size == "unmerged"]
    merged = by_score([row for row in rows if row.size != "unmerged"], results, pairs)
    table = _table(unmerged + merged, REFERENCE, results, pairs, (f"rank {RANK}", "baked"))
    text = f"As they are, at the size of both inputs, on {len(pairs)} pairs:\n\n{table}"
    if tuned:
        others = [pair for pair in pairs if pair.seed != TUNING_SEED]
        rows = by_score(list(tuned.values()), results, others)
        table = _table(rows, tuned["linear"], results, others)
        text += (
            "\n\nAt the strength that was best on the pairs of one training seed, on the other "
            f"{len(others)} pairs:\n\n{table}"
        )
    return text


def by_score(
    rows: Sequence[Variant], results: Results, pairs: Sequence[Pair], score: str = "overall"
) -> list[Variant]:
    return sorted(rows, key=lambda row: -column(results, row.name, score, pairs).mean)


def column(results: Results, name: str, score: str, pairs: Sequence[Pair]) -> Estimate:
    return estimate([results[name][pair][score] for pair in pairs])


def _table(
    rows: Sequence[Variant],
    reference: Variant,
    results: Results,
    pairs: Sequence[Pair],
    other_sizes: Sequence[str] = (),
) -> str:
    """`other_sizes` are columns with the overall score of the same method at another size."""
    titles = ["method", *COLUMNS, f"against {reference.label}", *other_sizes]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row.label]
        cells += [str(column(results, row.name, score, pairs)) for score in COLUMNS]
        cells.append(_against(results[row.name], results[reference.name], pairs))
        for size in other_sizes:
            name = f"{row.label}, {size}"
            known = name in results
            cells.append(str(column(results, name, "overall", pairs)) if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(
    found: Mapping[Pair, Mapping[str, float]],
    reference: Mapping[Pair, Mapping[str, float]],
    pairs: Sequence[Pair],
) -> str:
    """The difference of the overall scores, in bold where its interval does not hold 0."""
    gain = difference(
        *([scores[pair]["overall"] for pair in pairs] for scores in (found, reference))
    )
    text = f"{gain.mean:+.2f} ± {gain.half:.2f}"
    return f"**{text}**" if gain.is_apart_from_zero else text
