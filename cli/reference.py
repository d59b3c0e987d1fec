"""Documents that are written from code: `python -m cli.reference --write`, or check without it.

To add one: a function that gives its whole text, and its row in `DOCUMENTS`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]


def settings() -> str:
    """The environment of the hub."""
    from hub.settings import Settings

    rows = [
        f"| `GRAFT_{name.upper()}` | {_default(name, field.get_default())} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        [
            "# Settings",
            "",
            "Environment variables of `graft serve` and `graft worker`.",
            "Options of a command win over them.",
            "",
            "| variable | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def methods() -> str:
    """Every merge method with its parameters and its source."""
    from merge.methods import METHODS

    lines = ["# Merge methods", "", "What `method:` in a recipe and `graft merge --method` take."]
    lines += ["Pages: [which when](merging.md#which-method-when), [compared](methods_compared.md)."]
    for method in METHODS.values():
        lines += ["", f"## {method.name}", "", method.summary, method.exactness, ""]
        lines += [*method.when, ""] if method.when else []
        fields = [
            f"| `{name}` | {_default(name, field.get_default())} | {field.description} |"
            for name, field in method.parameters.model_fields.items()
            if name != "name"
        ]
        head = ["| parameter | default | meaning |", "|---|---|---|"]
        lines += [*head, *fields] if fields else ["It has no parameters."]
        deviation = [f"Where it departs: {method.deviation}"] if method.deviation else []
        lines += ["", f"Source: {method.reference}.", *deviation]
    return "\n".join([*lines, ""])


def dialects() -> str:
    """What `graft convert` makes of what: the page as it is, with its table written anew."""
    from merge.formats.dialects import SUFFIXES, WRITABLE_DIALECTS

    layouts = dict.fromkeys(layout for held in SUFFIXES.values() for layout in held)
    rows = [
        f"| {_ALGORITHMS[layout]} | "
        + " | ".join("yes" if layout in SUFFIXES[dialect] else "" for dialect in WRITABLE_DIALECTS)
        + f" | {_AS_LORA.get(layout, '')} |"
        for layout in layouts
    ]
    table = [
        _TABLE,
        f"| algorithm | {' | '.join(WRITABLE_DIALECTS)} | as plain LoRA |",
        "|---|" + "---|" * (len(WRITABLE_DIALECTS) + 1),
        *rows,
    ]
    before, _, after = (_present("docs/formats/dialects.md") or "").partition(_TABLE)
    return before + "\n".join(table) + "\n\n" + after.partition("\n\n")[2]


_TABLE = "<!-- written by `make docs` -->"
_ALGORITHMS = {
    "lora": "LoRA, LoCon; with DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA of LyCORIS",
    "oft": "Diag-OFT",
    "boft": "BOFT",
    "oft-legacy": "Diag-OFT before LyCORIS 2",
    "ia3": "IA3 of LyCORIS",
    "full": "full differences",
    "norm": "differences of norms",
    "replacement": "replaced weights (`set_weight`)",
}
_AS_LORA = {
    "lora": "it is; a Tucker core folds in; DoRA no",
    "loha": "rank r²",
    "lokr": "the product of both sides' ranks; two whole sides no",
    "glora": "rank 2r, given `--base`",
}


def openapi() -> str:
    """Our own HTTP API; the Hugging Face protocol is described by its owners."""
    from hub.app import create_app
    from hub.settings import Settings

    description = create_app(Settings()).openapi()
    return json.dumps(description, indent=1, ensure_ascii=False) + "\n"


def training_config() -> str:
    """Every field of a training configuration."""
    from train.config import ClassImages, Dataset, Output, Samples, TrainConfig

    parts = ["# Training configuration", ""]
    parts += ["A YAML file for `graft train`; [Training](training.md) shows one.", ""]
    parts += ["Unknown fields are refused.", ""]
    sections: list[tuple[str, type[BaseModel]]] = [("", TrainConfig)]
    sections += [("dataset", Dataset), ("class_images", ClassImages)]
    sections += [("samples", Samples), ("output", Output)]
    for title, section in sections:
        parts += [f"## `{title}`", ""] if title else []
        parts += ["| field | default | meaning |", "|---|---|---|"]
        for name, field in section.model_fields.items():
            is_section = field.default_factory is not None
            default = "required" if field.is_required() else _default(name, field.get_default())
            shown = "see below" if is_section else default
            parts.append(f"| `{name}` | {shown} | {field.description} |")
        parts.append("")
    return "\n".join(parts)


DOCUMENTS: Mapping[str, Callable[[], str]] = {
    "docs/formats/dialects.md": dialects,
    "docs/methods.md": methods,
    "docs/openapi.json": openapi,
    "docs/settings.md": settings,
    "docs/training_config.md": training_config,
}


def stale() -> list[str]:
    """The documents that no longer say what the code says."""
    return [name for name, text in DOCUMENTS.items() if _present(name) != text()]


def write() -> None:
    for name, text in DOCUMENTS.items():
        (ROOT / name).write_text(text(), encoding="utf-8")


def _present(name: str) -> str | None:
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.exists() else None


def _default(name: str, value: Any) -> str:
    if value is None or value in ((), ""):
        return ""
    if name.endswith("_bytes"):
        units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
        size, unit = next((size, unit) for size, unit in units if value % size == 0)
        return f"`{value}` ({value // size} {unit})"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write()
    elif old := stale():
        sys.exit(f"stale: {', '.join(old)}; run `make docs`")
