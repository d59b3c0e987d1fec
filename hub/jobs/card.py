"""The part of a repo's README that tells what a result was made of.

A card that people wrote stays as it is: our part sits between two comments that name the file,
and only front-matter keys that the card lacks are added.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from hub.adapters.card import parse_card

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One file a result was made from, and its part in it: a strength, or what else it was.

    `file` is empty for a whole folder.
    """

    repo: str
    commit: str
    file: str
    sha256: str
    part: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card says of one published result."""

    kind: str
    path: str
    ingredients: Sequence[Ingredient]
    method: str
    triggers: Sequence[str]
    losses: Sequence[str]
    licenses: Sequence[str]
    recipe_digest: str


def write_card(existing: str | None, front: Mapping[str, Any], facts: Facts, title: str) -> str:
    """The README with the section on `facts` put in or brought up to date."""
    start = f"# {title}\n" if existing is None else existing
    return _with_section(_with_front(start, front), facts)


def _with_front(text: str, front: Mapping[str, Any]) -> str:
    fence = _FRONT.match(text)
    if fence is None:
        return f"---\n{_dump(front)}---\n\n{text}"
    card = parse_card(text.encode())
    if card.problem is not None:
        return text  # its author's to repair
    missing = {key: value for key, value in front.items() if key not in card.front_matter}
    longer = text[: fence.end(1)] + _dump(missing) + text[fence.end(1) :]
    # Lines cannot be added to a map in braces.
    return longer if parse_card(longer.encode()).problem is None else text


def _dump(front: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True) if front else ""


def _with_section(text: str, facts: Facts) -> str:
    start, end = f"<!-- graft: {quote(facts.path) or 'pipeline'} -->", "<!-- /graft -->"
    section = f"{start}\n{_section(facts)}\n{end}"
    old = re.search(re.escape(start) + r".*?" + re.escape(end), text, re.DOTALL)
    if old is not None:
        return text[: old.start()] + section + text[old.end() :]
    return text.rstrip("\n") + f"\n\n{section}\n"


_MADE = {
    "merge": "Merged from",
    "bake": "Baked from",
    "extract": "Extracted from",
    "resize": "Resized from",
}


def _section(facts: Facts) -> str:
    made = _MADE[facts.kind]
    name = code(facts.path) if facts.path else "This pipeline"
    lines = [f"## {name}", "", f"{made}:", "", "| file | strength | SHA-256 |", "|---|---|---|"]
    lines += [
        f"| {_link(item)} | {item.part} | `{item.sha256[:16]}…` |" for item in facts.ingredients
    ]
    lines += ["", f"Method: {facts.method}."]
    lines += [f"- {loss}" for loss in facts.losses]
    if facts.triggers:
        words = ", ".join(code(word) for word in facts.triggers)
        lines += ["", f"Trigger words: {words}."]
    if facts.licenses:
        names = ", ".join(code(name) for name in facts.licenses)
        lines += ["", f"Licences of what it was made from: {names}."]
    lines += ["", f"Recipe: `{facts.recipe_digest}`; it is also in the file's metadata."]
    return "\n".join(lines)


def _link(item: Ingredient) -> str:
    shown = f"{item.repo}:{item.file}" if item.file else item.repo
    return f"[{code(shown)}](/{item.repo}) at `{item.commit[:7]}`"


def code(text: str) -> str:
    # Names and words come from files: nothing in them may end the code span or the table cell.
    plain = "".join(c if c.isprintable() else " " for c in text)
    return "`" + plain.replace("`", "'").replace("|", "/") + "`"
