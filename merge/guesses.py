"""Which families of base models a file fits, how surely, and why: for people, never for merging."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from merge.families.fingerprints import recognise, stated_family
from merge.formats.keys import Group
from merge.formats.lookup import Fit, is_hinted
from merge.formats.metadata import ARCHITECTURE, BASE_VERSION


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
) -> tuple[FamilyGuess, ...]:
    """Families the adapter may be for, likeliest first; none where nothing speaks for any."""
    n = len(groups)
    whole = [f for f in fits if f.is_whole]
    if whole:
        guesses = [_whole_guess(fit, n, len(whole), metadata) for fit in whole]
        return tuple(sorted(guesses, key=lambda guess: -guess.confidence))
    partial = [f for f in fits if f.n_fitting > n / 2]
    if partial:
        best = max(partial, key=lambda fit: fit.n_fitting)
        why = f"{best.n_fitting} of {n} modules have its names and shapes"
        return (FamilyGuess(best.family.name, round(0.8 * best.n_fitting / n, 2), why),)
    return outside_guesses(metadata, groups, extents)


def _whole_guess(fit: Fit, n: int, n_fits: int, metadata: Mapping[str, str]) -> FamilyGuess:
    if fit.n_measured:
        confidence, why = 0.99, f"all {n} modules have its names and shapes"
    else:
        confidence, why = 0.7, f"all {n} modules have its names; their shapes say nothing"
    if n_fits > 1:
        confidence = 0.5
        why += f", and those of {n_fits - 1} more"
    if is_hinted(fit.family, metadata):
        confidence = max(confidence, 0.9)
        why += "; the metadata names it"
    return FamilyGuess(fit.family.name, confidence, why)


def outside_guesses(
    metadata: Mapping[str, str],
    groups: Sequence[Group],
    extents: Sequence[tuple[int, int] | None],
) -> tuple[FamilyGuess, ...]:
    """For files of families without a table of ours."""
    guesses: dict[str, FamilyGuess] = {}
    paths = {
        group.location.path.replace(".", "_"): extent
        for group, extent in zip(groups, extents, strict=True)
    }
    fingerprint = recognise(paths)
    if fingerprint is not None:
        why = f"its module names look like {fingerprint.title}"
        guesses[fingerprint.name] = FamilyGuess(fingerprint.name, 0.6, why)
    for key in (BASE_VERSION, ARCHITECTURE):
        stated = stated_family(metadata.get(key, ""))
        if stated is None:
            continue
        why = f"{key} says {metadata[key]}"
        if stated in guesses and fingerprint is not None:
            why = f"its module names look like {fingerprint.title}, and {why}"
            guesses[stated] = FamilyGuess(stated, 0.8, why)
        else:
            guesses[stated] = FamilyGuess(stated, 0.4, why)
    return tuple(sorted(guesses.values(), key=lambda guess: -guess.confidence))
