"""What other programs write beside an adapter: its name, words, description, where it came from.

Read as AUTOMATIC1111, ComfyUI-Lora-Manager, StabilityMatrix and the Civitai helpers write them:
docs/import.md has the fields.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

PICTURES = (".png", ".webp", ".jpg", ".jpeg")
MAX_SIDECAR_BYTES = 4 * 2**20


class BadSidecar(Exception):
    """A sidecar that cannot be read; the message says what in which file."""


@dataclass(frozen=True, slots=True)
class Words:
    """What is known of an adapter besides its tensors; "" and () where nobody said anything."""

    title: str = ""
    version: str = ""
    author: str = ""
    description: str = ""
    notes: str = ""
    base: str = ""
    url: str = ""
    negative: str = ""
    strength: float | None = None
    trigger_words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    sha256: str = ""


def sidecars_of(adapter: Path, names: Iterable[str]) -> list[Path]:
    """Sidecars and pictures of a file among the names in its folder, what speaks first first."""
    stem, there = adapter.name.removesuffix(adapter.suffix), set(names)
    wanted = [f"{stem}{suffix}" for suffix in READERS]
    wanted += [f"{stem}.preview{suffix}" for suffix in PICTURES]
    wanted += [f"{stem}{suffix}" for suffix in PICTURES]
    return [adapter.with_name(name) for name in wanted if name in there]


def read_words(sidecars: Iterable[Path]) -> Words:
    """The words of all sidecars: lists are joined, elsewhere the first that says something counts.

    `sidecars` as `sidecars_of` sorts them: what a person typed comes before what a site said.
    BadSidecar.
    """
    said = [_read(path, reader) for path in sidecars if (reader := _reader(path.name))]
    return _joined(said)


def published(sidecar: Path) -> bytes | None:
    """A sidecar as strangers may have it: without paths of this machine. None: as it is."""
    if not sidecar.name.endswith(".metadata.json"):
        return None
    data = _load(sidecar)
    for field in ("file_path", "preview_url"):
        if isinstance(data.get(field), str) and "://" not in data[field]:
            data[field] = data[field].replace("\\", "/").rpartition("/")[2]
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _reader(name: str) -> "_Reader | None":
    # The longest ending: `.metadata.json` ends in `.json` too.
    return next((READERS[s] for s in _LONGEST_FIRST if name.endswith(s)), None)


def _read(path: Path, reader: "_Reader") -> Words:
    try:
        return reader(_Fields(path.name, _load(path)))
    except RecursionError:
        raise BadSidecar(f"{path.name} is nested too deep") from None


def _load(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise BadSidecar(f"{path.name} has more than {MAX_SIDECAR_BYTES // 2**20} MiB")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadSidecar(f"{path.name} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadSidecar(f"{path.name} is not a JSON object")
    return data


@dataclass(frozen=True, slots=True)
class _Fields:
    """The object in a sidecar; a field of another type than its program writes is a BadSidecar."""

    place: str
    data: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of these fields that says something; the programs write null for nothing."""
        for name in names:
            value = self.data.get(name)
            if not isinstance(value, str | None):
                raise BadSidecar(f"{self.place}: {name} is not a text")
            if value and value.strip():
                return value.strip()
        return ""

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.data.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadSidecar(f"{self.place}: {name} is not a list of texts")
        return tuple(item.strip() for item in value if item.strip())

    def number(self, name: str) -> float | None:
        value = self.data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadSidecar(f"{self.place}: {name} is not a number")
        return float(value)

    def id(self, name: str) -> int | None:
        value = self.number(name)
        return int(value) if value else None

    def inner(self, name: str) -> "_Fields":
        value = self.data.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise BadSidecar(f"{self.place}: {name} is not an object")
        return _Fields(f"{self.place}: {name}", value)

    def inner_list(self, name: str) -> "list[_Fields]":
        value = self.data.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise BadSidecar(f"{self.place}: {name} is not a list of objects")
        return [_Fields(f"{self.place}: {name}", item) for item in value]


_Reader = Callable[[_Fields], Words]


def _a1111(its: _Fields) -> Words:
    return Words(
        description=its.text("description"),
        notes=its.text("notes"),
        base=_base(its.text("sd version")),
        negative=its.text("negative text"),
        # The editor of the web UI writes 0 for "not set".
        strength=its.number("preferred weight") or None,
        trigger_words=_split([its.text("activation text")]),
    )


def _lora_manager(its: _Fields) -> Words:
    of_civitai = _civitai(its.inner("civitai"))
    tips: dict[str, Any] = {}
    if text := its.text("usage_tips"):
        try:
            tips = json.loads(text)
        except ValueError:
            raise BadSidecar(f"{its.place}: usage_tips is no JSON") from None
    mine = Words(
        title=its.text("model_name"),
        description=_plain(its.text("modelDescription")),
        notes=_plain(its.text("notes")),
        base=_base(its.text("base_model")),
        strength=_Fields(f"{its.place}: usage_tips", tips).number("strength"),
        tags=its.texts("tags"),
        sha256=its.text("sha256").lower(),
    )
    return _joined([mine, of_civitai])


def _stability_matrix(its: _Fields) -> Words:
    return Words(
        title=its.text("UserTitle", "ModelName"),
        version=its.text("VersionName"),
        author=its.text("AuthorUsername"),
        description=_plain(its.text("ModelDescription")),
        notes=_plain(its.text("VersionDescription")),
        base=_base(its.text("BaseModel")),
        url=its.text("SourceUrl") or _address(its.id("ModelId"), its.id("VersionId")),
        trigger_words=_split(its.texts("TrainedWords")),
        tags=its.texts("Tags"),
        sha256=its.inner("Hashes").text("SHA256").lower(),
    )


def _civitai(its: _Fields) -> Words:
    """A version as Civitai's API answers it, with some of its model."""
    model = its.inner("model")
    hashes = [file.inner("hashes").text("SHA256").lower() for file in its.inner_list("files")[:1]]
    return Words(
        title=model.text("name"),
        version=its.text("name"),
        author=its.inner("creator").text("username"),
        description=_plain(model.text("description")),
        notes=_plain(its.text("description")),
        base=_base(its.text("baseModel")),
        url=_address(its.id("modelId"), its.id("id")),
        trigger_words=_split(its.texts("trainedWords")),
        tags=model.texts("tags"),
        sha256=next(iter(hashes), ""),
    )


# In the order in which they are believed.
READERS: Mapping[str, _Reader] = {
    ".json": _a1111,
    ".metadata.json": _lora_manager,
    ".cm-info.json": _stability_matrix,
    ".civitai.info": _civitai,
}
_LONGEST_FIRST = sorted(READERS, key=len, reverse=True)


def _joined(said: Iterable[Words]) -> Words:
    found: dict[str, Any] = {}
    for words in said:
        for field in fields(Words):
            value, before = getattr(words, field.name), found.get(field.name)
            if isinstance(value, tuple):
                found[field.name] = tuple(dict.fromkeys((before or ()) + value))
            elif before in (None, ""):
                found[field.name] = value
    return Words(**found)


def _split(texts: Iterable[str]) -> tuple[str, ...]:
    """One element may be a comma list: what one outfit of a character is called by."""
    words = (word.strip() for text in texts for word in text.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def _base(text: str) -> str:
    return "" if text.lower() in ("unknown", "other") else text


def _address(model: int | None, version: int | None) -> str:
    if model is None:
        return ""
    page = f"https://civitai.com/models/{model}"
    return f"{page}?modelVersionId={version}" if version is not None else page


def _plain(html: str) -> str:
    """Paragraphs of the HTML that the sites' editors write; Markdown marks in them are escaped."""
    reader = _Text()
    reader.feed(html)
    reader.close()
    paragraphs = "".join(reader.pieces).split("\n\n")
    lines = ("\n".join(" ".join(x.split()) for x in p.strip().split("\n")) for p in paragraphs)
    return "\n\n".join(line for line in lines if line)


class _Text(HTMLParser):
    _BLOCKS = frozenset(("p", "div", "ul", "ol", "h1", "h2", "h3", "h4", "blockquote", "pre"))

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._address: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._BLOCKS:
            self.pieces.append("\n\n")
        elif tag == "br":
            self.pieces.append("\n")
        elif tag == "li":
            self.pieces.append("\n- ")
        elif tag == "a":
            address = dict(attrs).get("href") or ""
            self._address = address if address.startswith(("https://", "http://")) else None

    def handle_endtag(self, tag: str) -> None:
        if tag in self._BLOCKS:
            self.pieces.append("\n\n")
        elif tag == "a" and self._address:
            self.pieces.append(f" <{self._address}>")
            self._address = None

    def handle_data(self, data: str) -> None:
        self.pieces.append("".join(f"\\{c}" if c in "\\`*_[]<>#" else c for c in data))
