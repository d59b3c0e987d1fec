"""The front matter of a README.md, as Hugging Face clients want to see it."""

import datetime
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hub.adapters.card import MAX_FRONT_MATTER, parse_card
from hub.blobs.store import BlobStore, Sha256
from hub.repos.models import CommitEntry

# The front matter with its fences; what follows is not asked for.
_HEAD = MAX_FRONT_MATTER + 16


def card_at(store: BlobStore, entries: Iterable[CommitEntry]) -> dict[str, Any] | None:
    """The data of the README.md among these files; a card that cannot be read says nothing."""
    readme = next((entry for entry in entries if entry.path == "README.md"), None)
    if readme is None:
        return None
    return _card(b"".join(store.open(Sha256(readme.sha256), 0, _HEAD))) or None


@lru_cache(256)
def _card(head: bytes) -> dict[str, Any]:
    return {name: as_json(value) for name, value in parse_card(head).front_matter.items()}


def as_json(value: Any) -> Any:
    """What YAML knows and JSON does not, in a form that clients can read back."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_json(item) for item in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@dataclass(frozen=True, slots=True)
class Validation:
    """What is wrong with a card: with errors an upload is refused, warnings are shown."""

    errors: list[str]
    warnings: list[str]


def validate(content: str) -> Validation:
    """The front matter of a README.md, by the types that clients and this hub read it with."""
    card = parse_card(content.encode("utf-8", "replace"))
    if card.problem is not None:
        return Validation([f"Invalid YAML front matter: {card.problem}"], [])
    matter = card.front_matter
    if not matter:
        return Validation([], ["empty or missing yaml metadata in repo card"])
    wrong = [
        f'"{name}" has to be {what}'
        for name, (fits, what) in _FIELDS.items()
        if name in matter and matter[name] is not None and not fits(matter[name])
    ]
    return Validation(wrong, [])


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _are_words(value: Any) -> bool:
    return _is_word(value) or (isinstance(value, list) and all(map(_is_word, value)))


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


_WORDS = (_are_words, "a text or a list of texts")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model": _WORDS,
    "datasets": _WORDS,
    "language": _WORDS,
    "library_name": (_is_word, "a text"),
    "license": _WORDS,
    "metrics": _WORDS,
    "model-index": (_are_mappings, "a list of results"),
    "pipeline_tag": (_is_word, "a text"),
    "tags": _WORDS,
}


def card_tags(card: dict[str, Any]) -> list[str]:
    """The tags that huggingface.co derives from a card, its own first."""
    tags = [str(tag) for tag in _listed(card.get("tags"))]
    for name in ("library_name", "pipeline_tag"):
        tags += [str(value) for value in _listed(card.get(name))]
    for base in _listed(card.get("base_model")):
        relation = card.get("base_model_relation")
        tags.append(f"base_model:{base}")
        if isinstance(relation, str):
            tags.append(f"base_model:{relation}:{base}")
    tags += [str(value) for value in _listed(card.get("language"))]
    tags += [f"license:{value}" for value in _listed(card.get("license"))]
    tags += [f"dataset:{value}" for value in _listed(card.get("datasets"))]
    return list(dict.fromkeys(tags))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
