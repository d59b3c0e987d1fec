"""Front matter of a model card: the YAML between the first two `---` lines of README.md."""

import datetime
import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import yaml

from hub.blobs.store import BlobStore, Sha256
from hub.repos.models import CommitEntry

MAX_BYTES = 2**16

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


class BadCard(Exception):
    """The front matter is not what a card may hold; the message says where."""


class _Loader(yaml.SafeLoader):
    """Without aliases: a few hundred bytes of them unfold to gigabytes of JSON."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise BadCard("aliases (*name) are not accepted in the front matter")
        return super().compose_node(parent, index)


def front_matter(text: str) -> dict[str, Any] | None:
    """The card's data as JSON values, or None without front matter; BadCard if it is not a map."""
    found = _FRONT.match(text[:MAX_BYTES])
    return _data(found[1]) if found is not None else None


@lru_cache(512)
def _data(text: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 2}" if mark else ""
        raise BadCard(f"{getattr(error, 'problem', None) or 'not YAML'}{where}") from error
    except (ValueError, RecursionError) as error:
        raise BadCard(f"not readable: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadCard("it is not a map of names to values")
    return {str(name): _json(value) for name, value in data.items()}


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json(item) for item in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def card_at(store: BlobStore, entries: Iterable[CommitEntry]) -> dict[str, Any] | None:
    """The data of the README.md among these files; a card that cannot be read says nothing."""
    readme = next((entry for entry in entries if entry.path == "README.md"), None)
    if readme is None:
        return None
    text = b"".join(store.open(Sha256(readme.sha256), 0, MAX_BYTES)).decode("utf-8", "replace")
    try:
        return front_matter(text)
    except BadCard:
        return None


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
