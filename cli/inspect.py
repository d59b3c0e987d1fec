"""`graft inspect`: what a file is, from its header."""

import gc
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.text import Text

from cli.console import byte_progress, out, print_json
from cli.ranges import Blocks
from cli.refs import adapter_in, open_ref

if TYPE_CHECKING:
    from merge.formats.sources import File
    from merge.identify import Identification, Span

_LONGEST_VALUE = 160
# kohya writes some 60 settings of the training; where there are more than a few, those that say
# least share a paragraph.
_SETTING = "ss_"
_MOST_SETTINGS = 8
_LONGEST_SETTING = 24
_TELLING = {
    *("ss_base_model_version", "ss_sd_model_name", "ss_output_name", "ss_training_comment"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha"),
}
_WIDEST_LABEL = 32
_TITLES = {"llm": "a language model"}
_NO_AUTOV1 = "none: the file ends before the 64 KiB that it hashes"


def register(app: typer.Typer) -> None:
    app.command()(inspect)


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            help="a safetensors file or a folder with one: a path, namespace/name[@revision][:file], hf://, s3:// or https://",
            metavar="FILE",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    hashes: Annotated[
        bool, typer.Option("--hashes/--no-hashes", help="hash the whole file, or read its header")
    ] = True,
) -> None:
    """What a file is: algorithm, family, ranks, alphas, targets, hashes, metadata, warnings."""
    # Thousands of small objects that all live until the answer: looking for garbage among them
    # would take a tenth of the command.
    gc.disable()
    try:
        with Blocks() as blocks:
            named = open_ref(file, blocks)
            if isinstance(named, Path):
                named = adapter_in(named, file)
            found = _identify(named, hashes=hashes)
    finally:
        gc.enable()
    if as_json:
        print_json(found.to_json())
        return
    _print(named.name, found)


def _identify(file: "File", *, hashes: bool) -> "Identification":
    from merge.formats.adapters import read_config
    from merge.formats.hashes import hash_file
    from merge.formats.reader import TensorFile
    from merge.identify import identify_file

    with TensorFile(file) as opened:
        computed = None
        if hashes:
            with byte_progress("hashing", opened.header.file_size, is_kept=False) as progress:
                computed = hash_file(
                    file,
                    opened.header.data_offset,
                    progress=lambda n: progress.advance(progress.task_ids[0], n),
                )
        return identify_file(opened, hashes=computed, config=read_config(file))


def _print(name: str, found: "Identification") -> None:
    out.print(Text(_printable(name), style="bold"), Text(_headline(found)), sep="  ")
    _print_rows(_facts(found))
    if found.hashes is not None:
        out.print()
        hashes = found.hashes.to_json() | {"autov1": found.hashes.autov1 or _NO_AUTOV1}
        _print_rows([(kind, value or "") for kind, value in hashes.items()])
    if found.metadata:
        out.print()
        _print_metadata(found.metadata)
    if found.warnings:
        out.print()
    for warning in found.warnings:
        out.print(Text("warning", style="yellow"), Text(_printable(warning.message)))


def _print_metadata(metadata: Mapping[str, str]) -> None:
    """A line for each entry; the many settings of a training together."""
    folded = {key: " ".join(value.split()) for key, value in sorted(metadata.items())}
    settings = {
        key.removeprefix(_SETTING): value
        for key, value in folded.items()
        if key.startswith(_SETTING) and key not in _TELLING and len(value) <= _LONGEST_SETTING
    }
    if len(settings) <= _MOST_SETTINGS:
        settings = {}
    rows = [(k, v) for k, v in folded.items() if k.removeprefix(_SETTING) not in settings]
    said = [f"{name} {value}" for name, value in settings.items() if value not in ("", "None")]
    indent = _indent([*(label for label, _ in rows), _SETTING + "…"])
    longest = max(out.width - indent, 20) if out.is_terminal else _LONGEST_VALUE
    cut = [(key, _shortened(value, longest)) for key, value in rows]
    _print_rows([*cut, (_SETTING + "…", ", ".join(said))], indent)
    if cut != rows or len(said) < len(settings):
        out.print(Text("--json prints all of it", style="dim"))


def _indent(labels: list[str]) -> int:
    return min(max((len(_printable(label)) for label in labels), default=0), _WIDEST_LABEL) + 2


def _print_rows(rows: list[tuple[str, str]], indent: int | None = None) -> None:
    """Two columns; wrapped in a terminal, one line per row for a program that reads them."""
    shown = [(_printable(label), _printable(value)) for label, value in rows if value]
    indent = indent or _indent([label for label, _ in shown])
    for label, value in shown:
        width = max(out.width - indent, 20) if out.is_terminal else len(value) or 1
        lines = textwrap.wrap(value, width, break_on_hyphens=False) or [""]
        text = Text(label.ljust(indent), style="dim")
        if len(label) >= indent:
            text.append("  ")
        out.print(text, Text(f"\n{' ' * indent}".join(lines)), sep="")


def _headline(found: "Identification") -> str:
    from merge.families import FAMILIES

    what = [found.kind]
    if found.algorithms:
        what = [" + ".join(found.algorithms), found.kind]
    if found.families:
        best = found.families[0]
        title = (
            FAMILIES[best.name].title
            if best.name in FAMILIES
            else _TITLES.get(best.name, best.name)
        )
        what.append(f"for {title}" if found.kind == "adapter" else f"of {title}")
    if found.dialect:
        what.append(f"in {found.dialect} names" if found.kind == "adapter" else found.dialect)
    return " ".join(what)


def _facts(found: "Identification") -> list[tuple[str, str]]:
    return [
        ("size", f"{decimal(found.size_bytes)}, {found.parameters:,} parameters"),
        ("dtypes", ", ".join(f"{dtype} × {n}" for dtype, n in found.dtypes.items())),
        ("modules", _counts(found)),
        ("targets", ", ".join(found.targets)),
        ("rank", _span(found.ranks)),
        ("alpha", _span(found.alphas)),
        ("trigger words", ", ".join(found.trigger_words)),
        *(
            ("family", f"{family.name} ({family.confidence:.0%}): {family.why}")
            for family in found.families
        ),
    ]


def _counts(found: "Identification") -> str:
    if not found.modules:
        return ""
    parts = ", ".join(f"{name} {n}" for name, n in found.components.items())
    return f"{found.modules} ({parts})" if parts else str(found.modules)


def _span(span: "Span | None") -> str:
    if span is None:
        return ""
    return f"{span.min:g}" if span.min == span.max else f"{span.min:g} to {span.max:g}"


def _shortened(value: str, longest: int) -> str:
    if len(value) <= longest:
        return value
    rest = f"… ({len(value):,} characters)"
    return value[: max(longest - len(rest), 0)] + rest


def _printable(text: str) -> str:
    """Metadata comes from strangers: control characters would steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
