"""PEFT's rank_pattern and alpha_pattern: values for modules whose path ends in a pattern.

PEFT 0.21 takes the first pattern P, in the order of the file, for which `(.*\\.)?(P)$` matches the
path. Nearly all patterns are plain paths; those are looked up, so that a thousand patterns for a
thousand modules cost nothing. The rest are regular expressions from an untrusted file: those that
could take exponential time are refused.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from merge.errors import Unsupported
from merge.families.family import TEXT_MODEL

_PLAIN = re.compile(r"\^?(\w|-|\\?\.)+")
_QUANTIFIER = re.compile(r"[*+?{]")
_QUANTIFIED_GROUP = re.compile(r"\)[*+?{]")
_MOST_EXPRESSIONS = 64


class Patterns:
    """The patterns of one configuration; `name` is the file they are from."""

    def __init__(self, patterns: Mapping[str, Any], name: str) -> None:
        self._values = list(patterns.values())
        self._whole: dict[str, int] = {}  # path -> place of its pattern
        self._ends: dict[str, int] = {}  # end of a path -> place
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for place, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                path = pattern.removeprefix("^").replace("\\.", ".")
                (self._whole if pattern.startswith("^") else self._ends)[path] = place
            else:
                self._expressions.append((place, _compile(pattern, name)))
        if len(self._expressions) > _MOST_EXPRESSIONS:
            raise Unsupported(name, f"its configuration has {len(self._expressions)} patterns")

    def first(self, path: str, default: Any) -> Any:
        """The value of the first pattern that matches, written with or without `text_model.`."""
        places = [*self._places(path), *self._places(path.removeprefix(TEXT_MODEL))]
        return self._values[min(places)] if places else default

    def _places(self, path: str) -> Iterator[int]:
        if path in self._whole:
            yield self._whole[path]
        end = path
        while True:
            if end in self._ends:
                yield self._ends[end]
            _, dot, end = end.partition(".")
            if not dot:
                break
        yield from (place for place, pattern in self._expressions if pattern.match(path))


def _compile(pattern: str, name: str) -> re.Pattern[str]:
    is_costly = len(_QUANTIFIER.findall(pattern)) > 3 or _QUANTIFIED_GROUP.search(pattern)
    try:
        if is_costly or len(pattern) > 512:
            raise re.error("too costly to evaluate")
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        why = f"its configuration has the pattern {pattern!r}: {error}"
        raise Unsupported(name, why) from error
