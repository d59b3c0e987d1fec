"""What a file's own words say about its base: a hint with its source, never truth."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge.families import FAMILIES
from merge.formats.metadata import ARCHITECTURE, BASE_VERSION

BASE_MODEL = "base_model_name_or_path"
# Families that have no table, by the beginnings of what trainers call them.
_OTHERS = {
    "ace": "ace-step",
    "anima": "anima",
    "hidream": "hidream",
    "hunyuan-image": "hunyuan-image",
    "hunyuan-video-1.5": "hunyuan-video-1.5",
    "hunyuan_video_1_5": "hunyuan-video-1.5",
    "kandinsky": "kandinsky",
    "krea2": "krea2",
    "ltx2": "ltx2",
    "stable-cascade": "cascade",
}
_EXACT = 10_000  # longer than any beginning


@dataclass(frozen=True, slots=True)
class Statement:
    """`source` says that the base is `value`, which names `families`: several where it is vague."""

    source: str
    value: str
    families: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source} says {self.value}"


def statements(
    metadata: Mapping[str, str], config: Mapping[str, Any] | None = None
) -> tuple[Statement, ...]:
    """Everything in a file's metadata and PEFT configuration that names families we know of."""
    return tuple(said for said in _statements(metadata, config or {}) if said.families)


def _statements(metadata: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[Statement]:
    for source, value in (
        (BASE_VERSION, metadata.get(BASE_VERSION, "")),
        (ARCHITECTURE, metadata.get(ARCHITECTURE, "").partition("/")[0]),
    ):
        yield Statement(source, value, named_families(value))
    base = config.get(BASE_MODEL)
    if isinstance(base, str):
        yield Statement(BASE_MODEL, base, named_families(base.rpartition("/")[2]))


def named_families(value: str) -> tuple[str, ...]:
    """The families that a trainer's name of a base model means; the closest names count."""
    value = value.strip().lower()
    if not value:
        return ()
    closeness = {name: _closeness(value, hints) for name, hints in _hints()}
    most = max(closeness.values())
    return tuple(name for name, n in closeness.items() if n == most) if most else ()


def _hints() -> Iterator[tuple[str, tuple[frozenset[str], tuple[str, ...]]]]:
    """(family, (names, beginnings of names))."""
    for family in FAMILIES.values():
        names = {name.lower() for name in (family.architecture, *family.base_versions)}
        yield family.name, (frozenset(names), family.hints)
    for beginning, name in _OTHERS.items():
        yield name, (frozenset(), (beginning,))


def _closeness(value: str, hints: tuple[frozenset[str], tuple[str, ...]]) -> int:
    names, beginnings = hints
    if value in names:
        return _EXACT
    return max((len(hint) for hint in beginnings if value.startswith(hint)), default=0)
