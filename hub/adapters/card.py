"""README.md: YAML front matter under limits, and what the catalogue takes from it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

MAX_CARD_BYTES = 1024 * 1024
MAX_FRONT_MATTER = 64 * 1024
# model-index, the deepest thing in the cards of others, needs ten.
MAX_DEPTH = 16
MAX_TAGS = 64
MAX_WORD = 100
MAX_PROMPT = 2000
# Python writes no integer of more than 4300 digits, and hexadecimal ones are read of any length.
MAX_INT_BITS = 1024

_FENCE = re.compile(
    r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")
_HEADING = re.compile(r"\A\s*#[ \t]+(.+?)[ \t]*#*[ \t]*(?:\r?\n|\Z)")


@dataclass(frozen=True, slots=True)
class Widget:
    """A picture that the card shows, with the text that made it."""

    path: str
    prompt: str | None
    negative_prompt: str | None


@dataclass(frozen=True, slots=True)
class ParsedCard:
    """`body` is Markdown without front matter and without the heading that became `title`."""

    title: str | None = None
    summary: str | None = None
    license: str | None = None
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    widgets: tuple[Widget, ...] = ()
    body: str = ""
    problem: str | None = None
    front_matter: Mapping[str, Any] = field(default_factory=dict)


class _BadFrontMatter(Exception):
    """Front matter that is refused; the message names the rule."""


class _Loader(yaml.SafeLoader):
    """Safe types only, no aliases (they multiply), bounded depth, and what JSON can say again."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _BadFrontMatter("YAML aliases are not allowed")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _BadFrontMatter(f"it is nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if _HALF_OF_A_PAIR.search(value):
            line = node.start_mark.line + 2
            raise _BadFrontMatter(f"line {line}: a text holds half of a surrogate pair")
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > MAX_INT_BITS:
            line = node.start_mark.line + 2
            raise _BadFrontMatter(f"line {line}: a number has more than {MAX_INT_BITS} bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


# The heading of the template that peft saves beside every adapter.
_UNNAMED = "Model Card for Model ID"


def parse_card(data: bytes) -> ParsedCard:
    """Never raises: what cannot be read is told in `problem`, and the text is kept."""
    text = data[:MAX_CARD_BYTES].decode("utf-8", errors="replace")
    found = _FENCE.match(text)
    body = text[found.end() :] if found else text
    problem, matter = None, {}
    if found:
        try:
            matter = _front_matter(found[1])
        except _BadFrontMatter as error:
            problem = str(error)
    heading = _HEADING.match(body)
    rest = body[heading.end() :] if heading else body
    title = _plain(heading[1])[:200] if heading else ""
    return ParsedCard(
        title=None if title in ("", _UNNAMED) else title,
        summary=_summary(rest),
        license=_text(matter.get("license")),
        base_model=next(_texts(matter.get("base_model")), None),
        tags=tuple(dict.fromkeys(tag.lower() for tag in _texts(matter.get("tags"))))[:MAX_TAGS],
        trigger_words=tuple(dict.fromkeys(_triggers(matter)))[:MAX_TAGS],
        widgets=tuple(_widgets(matter.get("widget")))[:MAX_TAGS],
        body=rest,
        problem=problem,
        front_matter=matter,
    )


def _front_matter(text: str) -> dict[str, Any]:
    if len(text) > MAX_FRONT_MATTER:
        raise _BadFrontMatter(f"it is longer than {MAX_FRONT_MATTER // 1024} KiB")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 2 if error.problem_mark else 1
        raise _BadFrontMatter(f"line {line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: SafeLoader builds dates such as 2024-99-99 by datetime.date().
        raise _BadFrontMatter(str(error).splitlines()[0]) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _BadFrontMatter("it is not a mapping of names to values")
    return {str(key): item for key, item in value.items()}


def _text(value: Any) -> str | None:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return " ".join(str(value).split())[:MAX_WORD] or None
    return None


def _texts(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        if (text := _text(item)) is not None:
            yield text


def _triggers(matter: Mapping[str, Any]) -> Iterator[str]:
    for name in ("trigger_words", "trigger_word", "trigger", "instance_prompt"):
        for text in _texts(matter.get(name)):
            yield from (word.strip() for word in text.split(",") if word.strip())


def _widgets(value: Any) -> Iterator[Widget]:
    for item in value if isinstance(value, list) else []:
        output = item.get("output") if isinstance(item, dict) else None
        url = output.get("url") if isinstance(output, dict) else None
        if not isinstance(url, str) or "://" in url:
            continue
        parameters = item.get("parameters")
        negative = parameters.get("negative_prompt") if isinstance(parameters, dict) else None
        yield Widget(str(PurePosixPath(url)), _prompt(item.get("text")), _prompt(negative))


def _prompt(value: Any) -> str | None:
    # "-" is what the Hugging Face card editor writes for a picture without a prompt.
    return (
        value.strip()[:MAX_PROMPT]
        if isinstance(value, str) and value.strip() not in ("", "-")
        else None
    )


def _summary(body: str) -> str | None:
    for paragraph in re.split(r"\n\s*\n", body[:20_000]):
        text = _plain(paragraph)
        if text and not paragraph.lstrip().startswith(("#", "|", "```", "<", "!", "-", "*", ">")):
            return text if len(text) <= 240 else text[:240].rsplit(" ", 1)[0] + "…"
    return None


def _plain(markdown: str) -> str:
    """Markdown as a line of plain text: good enough for a title, not a renderer."""
    text = re.sub(r"!?\[([^\]]{0,200})\]\([^)]{0,500}\)", r"\1", markdown)
    text = re.sub(r"(?<!\w)[*_`]{1,3}|[*_`]{1,3}(?!\w)", "", text)
    return " ".join(text.split())
