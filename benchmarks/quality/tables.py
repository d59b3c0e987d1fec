"""Scores of many pairs -> the two markdown tables of the report."""

from collections.abc import Mapping, Sequence

from .statistics import Estimate, difference, estimate
from .study import TUNING_SEED, Pair
from .variants import Variant

COLUMNS = ("style", "concept", "both", "kept", "content", "overall")
REFERENCE = Variant("linear")

Results = Mapping[str, Mapping[Pair, Mapping[str, float]]]
"""Variant's name -> pair -> scores."""


def report(
    plain: Sequence[Variant],
    tuned: Mapping[str, Variant],
    results: Results,
    sizes: Mapping[str, int],
    pairs: Sequence[Pair],
) -> str:
    """What is not merged comes first, then the best overall score."""
    unmerged = [variant for variant in plain if variant.size == "unmerged"]
    merged = [variant for variant in plain if variant.size != "unmerged"]
    rows = unmerged + by_score(merged, results, pairs)
    text = "As they are, on every pair:\n\n" + _table(rows, REFERENCE, results, sizes, pairs)
    if tuned:
        others = [pair for pair in pairs if pair.seed != TUNING_SEED]
        rows = by_score([REFERENCE, *tuned.values()], results, others)
        text += (
            "\n\nAt the size of both inputs and the strength that was best on the pairs of one training "
            "seed, on the other pairs:\n\n"
        )
        text += _table(rows, tuned["linear"], results, sizes, others)
    return text


def by_score(
    rows: Sequence[Variant], results: Results, pairs: Sequence[Pair], score: str = "overall"
) -> list[Variant]:
    return sorted(rows, key=lambda row: -column(results, row, score, pairs).mean)


def column(results: Results, row: Variant, score: str, pairs: Sequence[Pair]) -> Estimate:
    return estimate([results[row.name][pair][score] for pair in pairs])


def against(
    results: Results, row: Variant, other: Variant, score: str, pairs: Sequence[Pair]
) -> Estimate:
    """How much better the row is than the other."""
    one, two = results[row.name], results[other.name]
    return difference([one[pair][score] for pair in pairs], [two[pair][score] for pair in pairs])


def _table(
    rows: Sequence[Variant],
    reference: Variant,
    results: Results,
    sizes: Mapping[str, int],
    pairs: Sequence[Pair],
) -> str:
    lines = [
        f"| method | size | KB | {' | '.join(COLUMNS)} | overall against {reference.label} |",
        "|" + "---|" * (len(COLUMNS) + 4),
    ]
    for row in rows:
        cells = [row.label, row.size, f"{sizes[row.name] / 1000:.0f}"]
        cells += [str(column(results, row, score, pairs)) for score in COLUMNS]
        cells.append(_signed(against(results, row, reference, "overall", pairs)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _signed(estimate: Estimate) -> str:
    """In bold where the interval does not hold 0."""
    text = f"{estimate.mean:+.2f} ± {estimate.half:.2f}"
    return f"**{text}**" if estimate.is_apart_from_zero else text
