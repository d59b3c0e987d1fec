"""Which rows an adapter changes, how strongly, and where they lie in something else that holds them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from merge.families import Run
from merge.formats.adapters import AdapterLayout, Entry
from merge.recipe import Input

Name = tuple[str, str]  # component, module


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of a module (`run`) that one entry of one adapter changes, all with one strength."""

    adapter: int
    entry: Entry
    run: Run
    strength: float


@dataclass(frozen=True, slots=True)
class Term:
    """strength * rows `first` to `first + rows` of an entry's layer, added to a target's from `begin`."""

    adapter: int
    entry: Entry
    strength: float
    first: int
    begin: int
    rows: int


def gather(
    inputs: Iterable[Input], layouts: Sequence[AdapterLayout]
) -> tuple[dict[Name, list[Source]], set[str]]:
    """What changes each module, in the order of the inputs, and the names of what is left out.

    A recipe's names are those of our own modules, so a glob on to_q reaches only q's rows of a
    packed projection.
    """
    found: dict[Name, list[Source]] = defaultdict(list)
    left_out: set[str] = set()
    for index, (wanted, layout) in enumerate(zip(inputs, layouts, strict=True)):
        for entry in layout.entries:
            for run in entry.layer.runs:
                if wanted.leaves_out(entry.component, run.module):
                    left_out.add(f"{entry.component}.{run.module}")
                    continue
                strength = wanted.strength_at(entry.component, run.module)
                found[entry.component, run.module].append(Source(index, entry, run, strength))
    return found, left_out


def terms_in(sources: Iterable[Source], first: int, rows: int, begin: int) -> Iterator[Term]:
    """The contributions to a target whose rows from `begin` are the module's from `first`."""
    for source in sources:
        run = source.run
        low, high = max(run.first, first), min(run.first + run.rows, first + rows)
        if low < high:
            yield Term(
                source.adapter,
                source.entry,
                source.strength,
                run.begin + low - run.first,
                begin + low - first,
                high - low,
            )
