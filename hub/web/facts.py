"""The facts of a file in the words of the page, each with where it comes from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub.adapters.items import KIND_TITLES, AdapterDetails, family_title
from hub.adapters.models import Kind, Source
from hub.web.gallery import ALGORITHM_TITLES
from hub.web.render import size

SOURCES = {
    Source.TENSORS: "Read from the tensors in the file",
    Source.METADATA: "Stated in the file's metadata by the program that wrote it",
    Source.CARD: "Stated in README.md",
    Source.PERSON: "Set by a person",
}
HASH_TITLES = {
    "sha256": "SHA-256",
    "autov1": "AutoV1",
    "autov2": "AutoV2",
    "autov3": "AutoV3",
    "blake3": "BLAKE3",
    "crc32": "CRC32",
}
DIALECTS = {
    "kohya": "kohya",
    "diffusers": "diffusers",
    "diffusers_old": "diffusers, before 0.19",
    "peft": "PEFT",
    "comfy": "ComfyUI",
}
COMPONENTS = {
    "unet": "UNet",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "transformer": "transformer",
    "vae": "VAE",
}
MAX_METADATA = 400
MAX_VALUE = 600


@dataclass(frozen=True, slots=True)
class FactRow:
    """One line: `detail` is said more quietly, `source` on hover."""

    name: str
    value: str
    detail: str = ""
    source: str = ""
    url: str | None = None


@dataclass(frozen=True, slots=True)
class HashRow:
    title: str
    value: str


def rows(adapter: AdapterDetails, is_here: Callable[[str], bool]) -> list[FactRow]:
    """What people compare first stands first; `is_here` says whether a repo can be linked to."""
    return [row for row in _rows(adapter, is_here) if row.value]


def brief(document: Mapping[str, Any]) -> dict[str, str]:
    """What an identification says in a few words, for comparing two versions of a file."""
    families = [family["name"] for family in document.get("families") or ()]
    modules = document.get("modules") or 0
    found = {
        "Kind": KIND_TITLES[Kind(document["kind"])],
        "Base": (family_title(families[0]) or families[0]) if families else "",
        "Algorithm": _algorithms(document.get("algorithms") or []),
        "Rank": _range(document.get("ranks")),
        "Alpha": _range(document.get("alphas")),
        "Modules": f"{modules:,}" if modules else "",
        "Parameters": _parameters(document.get("parameters") or 0),
        "Precision": ", ".join(document.get("dtypes") or {}),
        "Layout": DIALECTS.get(document.get("dialect") or "", document.get("dialect") or ""),
    }
    return {name: value for name, value in found.items() if value}


def hashes(adapter: AdapterDetails) -> list[HashRow]:
    """Every hash the file has, the one that names it first."""
    found = ((HASH_TITLES.get(k, k), value) for k, value in adapter.hashes.items())
    return [HashRow(title, value) for title, value in found if value]


def metadata(adapter: AdapterDetails) -> list[tuple[str, str]]:
    """The file's own metadata, long values cut."""
    found = sorted(adapter.metadata.items())[:MAX_METADATA]
    return [(k, v if len(v) <= MAX_VALUE else v[:MAX_VALUE] + " …") for k, v in found]


def _rows(adapter: AdapterDetails, is_here: Callable[[str], bool]) -> Iterator[FactRow]:
    known: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for fact in sorted(adapter.facts, key=lambda fact: fact.confidence):
        known[fact.name], sources[fact.name] = fact.value, SOURCES[Source(fact.source)]
    tensors = SOURCES[Source.TENSORS]
    if adapter.kind != Kind.ADAPTER:
        yield FactRow("Kind", KIND_TITLES[Kind(adapter.kind)], source=tensors)
    yield _family(known, tensors)
    base = str(known.get("base_model", ""))
    url = f"/{base}" if base.count("/") == 1 and is_here(base) else None
    yield FactRow("Trained on", base, source=sources.get("base_model", ""), url=url)
    yield FactRow("Algorithm", _algorithms(known.get("algorithms", [])), source=tensors)
    yield FactRow("Rank", _range(known.get("ranks")), source=tensors)
    yield FactRow("Alpha", _range(known.get("alphas")), source=tensors)
    parts = known.get("components", {})
    detail = ", ".join(f"{COMPONENTS.get(part, part)} {n:,}" for part, n in parts.items())
    modules = known.get("modules") or 0
    yield FactRow("Modules", f"{modules:,}" if modules else "", detail, tensors)
    yield FactRow("Targets", _targets(known.get("targets", [])), source=tensors)
    yield FactRow("Parameters", _parameters(adapter.parameters), source=tensors)
    dtypes = known.get("dtypes", {})
    yield FactRow("Precision", ", ".join(dtypes), source=tensors)
    yield FactRow("Layout", DIALECTS.get(adapter.dialect or "", adapter.dialect or ""), "", tensors)
    exact = f"{adapter.size_bytes:,} bytes" if adapter.size_bytes >= 1000 else ""
    yield FactRow("Size", size(adapter.size_bytes), exact)
    yield FactRow("Licence", str(known.get("license", "")), source=sources.get("license", ""))
    yield FactRow("Use", str(known.get("usage_hint", "")), source=sources.get("usage_hint", ""))
    digest = str(known.get("recipe_digest", ""))
    yield FactRow(
        "Recipe",
        digest.removeprefix("sha256:")[:12],
        "rebuilds this file" if digest else "",
        sources.get("recipe_digest", ""),
        f"/api/recipes/{digest}" if digest else None,
    )


def _family(known: dict[str, Any], tensors: str) -> FactRow:
    families = known.get("families") or []
    if not families:
        return FactRow("Base", "")
    first = families[0]
    sure = first.get("confidence", 1.0)
    detail = "" if sure >= 0.95 else f"{sure:.0%} sure"
    why = str(first.get("why", ""))
    title = family_title(first["name"]) or first["name"]
    return FactRow("Base", title, detail, f"{tensors}: {why}" if why else tensors)


def _algorithms(names: Sequence[str]) -> str:
    return ", ".join(ALGORITHM_TITLES.get(name, name) for name in names)


def _range(value: Any) -> str:
    if not isinstance(value, dict) or value.get("min") is None:
        return ""
    low, high = (f"{number:g}" for number in (value["min"], value["max"]))
    return low if low == high else f"{low} – {high}"


def _targets(targets: list[str]) -> str:
    shown = ", ".join(targets[:8])
    return f"{shown} and {len(targets) - 8} more" if len(targets) > 8 else shown


def _parameters(n: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return str(n or "")
