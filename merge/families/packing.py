"""The layers of a naming, from its rules and our own modules."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from merge.families import ldm
from merge.families.layers import PARAMETER, Layer, Run
from merge.families.originals import ORIGINALS, Rules

LDM = "ldm"  # names that no list of rules can say: the blocks are numbered anew
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FLAT_NUMBER = re.compile(r"_\d+(?=_|$)")
_BRACES = re.compile(r"(.*)\{(.*)\}")
_SWAPPED = "~"


@dataclass(frozen=True, slots=True)
class _Target:
    path: str  # in the original naming, with the rule's # or $
    position: int
    is_swapped: bool


def pack(rules: str | Rules, naming: str, own: Mapping[str, Layer]) -> dict[str, Layer]:
    """Path -> layer in a naming, by its rules or what they are called, for layers in our own."""
    targets = ldm.names(own) if rules == LDM else {}
    if targets:
        placed = [(targets[path], 0, False, layer) for path, layer in own.items()]
    else:
        placed = list(_placed(_index(rules), own))
    groups: dict[str, list[tuple[int, bool, Layer]]] = defaultdict(list)
    for path, position, is_swapped, layer in placed:
        groups[path].append((position, is_swapped, layer))
    return {path: _packed(naming, path, parts) for path, parts in groups.items()}


def beginnings(rules: str | Rules) -> frozenset[str]:
    """`beginning_of` all paths that the rules name."""
    if rules == LDM:
        return ldm.TOPS
    paths = ORIGINALS[rules] if isinstance(rules, str) else rules
    return frozenset(map(beginning_of, paths))


def without_numbers(flat_path: str) -> str:
    """Numbers between underscores as #, those at the ends of names too."""
    return _FLAT_NUMBER.sub("_#", flat_path)


def beginning_of(path: str) -> str:
    """Flattened, and cut after the second part that is no number; numbers are #."""
    first, *parts = path.split(".")
    for part in parts:
        is_number = part.isdecimal() or part in ("#", "$")
        first += "_#" if is_number else f"_{part}"
        if not is_number:
            break
    return first


def _placed(
    index: Mapping[str, _Target], own: Mapping[str, Layer]
) -> Iterator[tuple[str, int, bool, Layer]]:
    """(original path, position in it, is swapped, layer) of every layer."""
    last = _last_numbers(own)
    for path, layer in own.items():
        match = _NUMBER.search(path)
        number, target = "", index.get(path)
        if target is None and match is not None:
            number = match[0]
            head, tail = path[: match.start()], path[match.end() :]
            target = index.get(f"{head}#{tail}")
            if last[head] == int(number):
                target = index.get(f"{head}${tail}", target)
        if target is None:
            yield path, 0, False, layer
            continue
        packed = target.path.replace("#", number).replace("$", number)
        yield packed, target.position, target.is_swapped, layer


def _last_numbers(paths: Iterable[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for path in paths:
        match = _NUMBER.search(path)
        if match is not None:
            head = path[: match.start()]
            last[head] = max(last.get(head, 0), int(match[0]))
    return last


def _index(rules: str | Rules) -> Mapping[str, _Target]:
    return _named_index(rules) if isinstance(rules, str) else _as_index(rules)


@cache
def _named_index(name: str) -> Mapping[str, _Target]:
    return _as_index(ORIGINALS[name])


def _as_index(rules: Rules) -> dict[str, _Target]:
    """Our path -> where it goes."""
    index: dict[str, _Target] = {}
    for path, ours in rules.items():
        is_swapped = ours.endswith(_SWAPPED)
        ours = ours.removesuffix(_SWAPPED)
        braces = _BRACES.fullmatch(ours)
        parts = [ours] if braces is None else [braces[1] + part for part in braces[2].split(",")]
        for position, part in enumerate(parts):
            assert part not in index, f"two rules name {part}"
            index[part] = _Target(path, position, is_swapped)
    return index


def _packed(naming: str, path: str, parts: list[tuple[int, bool, Layer]]) -> Layer:
    runs: list[Run] = []
    begin = 0
    for _, is_swapped, layer in sorted(parts, key=lambda part: part[0]):
        rows = layer.shape[0]
        halves = ((rows // 2, rows - rows // 2), (0, rows // 2)) if is_swapped else ((0, rows),)
        for first, n in halves:
            runs.append(Run(layer.path, first, begin, n))
            begin += n
    layer = parts[0][2]
    kind = PARAMETER if path.endswith(".scale") else layer.kind
    return Layer(naming, path, kind, (begin, *layer.shape[1:]), layer.has_bias, tuple(runs))
