"""Every key of an adapter is claimed once, and no row of the base twice, or the file is refused."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from merge.errors import BadAdapter, MissingKeys, UnknownKeys, Unsupported
from merge.formats.keys import Group, Survey

if TYPE_CHECKING:
    from merge.formats.adapters import Entry


def check_survey(found: Survey, name: str) -> None:
    """Every key belongs to a whole module of an algorithm that is read, each once."""
    matches = [(group, group.match) for group in found.groups]
    refused = Counter((match.name, match.why) for _, match in matches if match.why)
    if refused:
        (what, why), n = refused.most_common(1)[0]
        raise Unsupported(name, f"it uses {what} ({n} modules): {why}")
    if found.unknown:
        raise UnknownKeys(name, found.unknown)
    if found.bundled:
        why = f"{len(found.bundled)} word vectors are packed with it ({found.bundled[0]})"
        raise Unsupported(name, f"{why}; they are no change of weights, so take them out first")
    if len(found.adapter_names) > 1:
        names = ", ".join(found.adapter_names)
        raise Unsupported(name, f"it holds several adapters ({names}); split it first")
    for group in found.groups:
        for key in group.repeated:
            others = ", ".join(sorted(group.keys.values()))
            raise BadAdapter(name, f"{group.location.path} is there twice: {key} beside {others}")
    missing = [
        f"{_partner(group)} ({', '.join(sorted(match.missing))})"
        for group, match in matches
        if match.missing
    ]
    if missing:
        raise MissingKeys(name, missing)
    extra = [group.keys[role] for group, match in matches for role in sorted(match.extra)]
    if extra:
        raise UnknownKeys(name, extra)


def _partner(group: Group) -> str:
    """The key that the others of a module are looked for beside."""
    return min(group.keys.items(), key=lambda its: (its[0] == "alpha", its))[1]


def check_unique(entries: Iterable["Entry"], name: str) -> None:
    """No row of a weight and no bias is changed twice, in whatever naming."""
    seen: dict[tuple[str, str, str], list[tuple[int, float, Entry]]] = defaultdict(list)
    for entry in entries:
        for parameter in _parameters(entry):
            for run in entry.layer.runs:
                place = seen[entry.component, run.module, parameter]
                end = run.first + run.rows if run.rows else float("inf")
                for first, last, other in place:
                    if first < end and run.first < last:
                        _refuse_twice(other, entry, name)
                place.append((run.first, end, entry))


def _parameters(entry: "Entry") -> Iterator[str]:
    if entry.touches_weight:
        # Embeddings of a resized vocabulary are saved whole beside factors that change them.
        yield "replaced" if entry.layout == "replacement" else "weight"
    if entry.touches_bias:
        yield "bias"


def _refuse_twice(one: "Entry", two: "Entry", name: str) -> None:
    keys = f"{min(one.keys.values())} and {min(two.keys.values())}"
    raise BadAdapter(name, f"{two.name} is there twice: {keys}")
