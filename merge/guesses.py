"""Which families of base models a file fits, how surely, and why: for people, never for merging.

Names and shapes decide. Where they leave several families, all are named; what the metadata says is
a hint that puts one of them first, with its source.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.families import FAMILIES
from merge.families.fingerprints import Fingerprint, recognise
from merge.families.language import language_models
from merge.families.stated import BASE_MODEL, Statement, statements
from merge.formats.keys import Group
from merge.formats.lookup import Fit

_SURE, _STATED, _SHARED, _UNMEASURED = 0.99, 0.9, 0.5, 0.7
_AGREED, _LOOKS_LIKE, _ONLY_STATED = 0.8, 0.6, 0.4


@dataclass(frozen=True, slots=True)
class FamilyGuess:
    """A family the file fits, how surely, and the evidence in words."""

    name: str
    confidence: float
    why: str


def guess(
    metadata: Mapping[str, str],
    groups: Sequence[Group],
    extents: Sequence[tuple[int, int] | None],
    fits: Iterable[Fit],
    config: Mapping[str, Any] | None = None,
) -> tuple[FamilyGuess, ...]:
    """Families the adapter may be for, likeliest first; none where nothing speaks for any."""
    n = len(groups)
    said = statements(metadata, config)
    fits = list(fits)
    whole = [fit for fit in fits if fit.is_whole]
    if whole:
        guesses = [_whole_guess(fit, n, whole, said) for fit in whole]
        return tuple(sorted(guesses, key=lambda guess: -guess.confidence))
    most = max((fit.n_fitting for fit in fits), default=0)
    if most > n / 2:
        why = f"{most} of {n} modules have its names and shapes"
        best = [fit for fit in fits if fit.n_fitting == most]
        return tuple(
            FamilyGuess(fit.family.name, round(0.8 * most / n / len(best), 2), why) for fit in best
        )
    return outside_guesses(metadata, groups, extents, config)


def _whole_guess(fit: Fit, n: int, whole: Sequence[Fit], said: Iterable[Statement]) -> FamilyGuess:
    family = fit.family
    modules = f"all {n} modules have" if n > 1 else "its only module has"
    if fit.n_measured:
        confidence, why = _SURE, f"{modules} its names and shapes"
    else:
        confidence, why = _UNMEASURED, f"{modules} its names; their shapes say nothing"
    others = [other.family.title for other in whole if other is not fit]
    if others:
        confidence = _SHARED
        why += f", and those of {_listed(others)}"
    if family.alike:
        why += f"; {family.alike} have the same"
    for statement in said:
        if family.name in statement.families:
            confidence = max(confidence, _STATED)
            why += f"; {statement}"
        elif not others:
            why += f", though {statement}"
    return FamilyGuess(family.name, confidence, why)


def outside_guesses(
    metadata: Mapping[str, str],
    groups: Sequence[Group],
    extents: Sequence[tuple[int, int] | None],
    config: Mapping[str, Any] | None = None,
) -> tuple[FamilyGuess, ...]:
    """For files of families without a table of ours."""
    paths = {
        group.location.path.replace(".", "_"): extent
        for group, extent in zip(groups, extents, strict=True)
    }
    stated: dict[str, list[str]] = {}
    for statement in statements(metadata, config):
        for name in statement.families:
            stated.setdefault(name, []).append(str(statement))
    fingerprint = recognise(paths)
    if fingerprint is None:
        return tuple(FamilyGuess(n, _ONLY_STATED, "; ".join(said)) for n, said in stated.items())
    look = _look(fingerprint, paths, config or {})
    # "sd3" is how the layers look, and a name like "sd35-large" says more.
    agreed = [name for name in stated if name.startswith(fingerprint.name)]
    return (
        *(FamilyGuess(name, _AGREED, "; ".join((look, *stated[name]))) for name in agreed),
        *([] if agreed else [FamilyGuess(fingerprint.name, _LOOKS_LIKE, look)]),
        *(
            FamilyGuess(name, _ONLY_STATED, "; ".join(said))
            for name, said in stated.items()
            if name not in agreed
        ),
    )


def _look(
    fingerprint: Fingerprint,
    extents: Mapping[str, tuple[int, int] | None],
    config: Mapping[str, Any],
) -> str:
    why = f"its module names look like {fingerprint.title}"
    models = language_models(extents) if fingerprint.name == "llm" else ()
    if models:
        why += f" as wide as {_listed(models, 'or')}"
    if fingerprint.name not in FAMILIES and config.get(BASE_MODEL):
        why += f"; {BASE_MODEL} says {config[BASE_MODEL]}"
    return why


def _listed(words: Sequence[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
