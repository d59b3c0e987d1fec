"""What stands on the bench: read from an address or a form, written as an address and as a recipe.

An address is `add=REF=STRENGTH` for every adapter (`REF=0.7,0.4`: the text encoders' after the
comma), then only what is not the default. A form has the same fields apart: `ref`, `strength` and
`text` once for each adapter. What a person typed stays as it was typed, so that it can be shown again.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlencode

from pydantic.fields import FieldInfo
from starlette.datastructures import ImmutableMultiDict

from hub.reports.service import MAX_INPUTS
from merge.method_parameters import Method, Parameters, Space

MAX_TEXT = 1200
_PARAMETER = "with."
_SWITCH = {"true": True, "false": False}
RANKS = {
    "exact": ("Exact", "Ranks add up and nothing is lost."),
    "fixed": ("At most", "The best result of this rank in every layer."),
    "shared": ("Shared", "As many numbers as this rank everywhere, spread where they matter."),
    "energy": ("Energy", "Keep this share of every layer's squared norm."),
    "budget_bytes": ("Budget", "The best ranks within so many bytes."),
}
_USUAL = {"fixed": "16", "shared": "16", "energy": "0.99", "budget_bytes": "20000000"}
DIALECTS = ("kohya", "diffusers", "comfy", "peft")
DTYPES = ("float16", "bfloat16", "float32")
_INPUT = re.compile(r"inputs\[(\d+)\](?:\.(\w+).*)?")
_NAMES = {
    "method": "Method",
    "rank": "Rank",
    "base": "Base",
    "output.dialect": "Layout",
    "output.dtype": "Precision",
}
# Title, and what it does; docs/methods.md has the formulas.
METHODS = {
    "linear": ("Sum", "Adds up every change times its strength."),
    "slerp": ("Slerp", "Turns from one change to the other; strengths are shares."),
    "karcher": ("Karcher mean", "Slerp for any number of adapters; strengths are shares."),
    "model_stock": ("Model Stock", "Shrinks the mean by how much the adapters disagree."),
    "svc": ("SVC", "A sum that does not count twice what several adapters share."),
    "cart": ("CART", "The mean, and of each adapter only what is strong about it."),
    "tsv": ("TSV-M", "Makes the adapters' directions independent before they are added."),
    "iso_c": ("Iso-C", "Gives every direction of the sum the same weight."),
    "iso_cts": ("Iso-CTS", "As Iso-C, with directions kept for each adapter alone."),
    "ctm": ("CtM", "Finds one small basis for all adapters and merges in it."),
    "knots_ties": ("KnOTS-TIES", "TIES in a basis that the adapters share."),
    "knots_dare": ("KnOTS-DARE", "DARE in a basis that the adapters share."),
    "core_ties": ("Core-TIES", "TIES on the small cores of the factors."),
    "core_dare": ("Core-DARE", "DARE on the small cores of the factors."),
    "ties": ("TIES", "Keeps large values, and where signs differ the stronger side."),
    "dare": ("DARE", "Drops values at random and enlarges the others."),
    "della": ("DELLA", "As DARE, but small values are dropped more often."),
    "magnitude": ("Magnitude", "Keeps the largest values of every change."),
    "breadcrumbs": ("Breadcrumbs", "Drops the largest and the smallest values."),
}


@cache
def methods() -> Mapping[str, type[Parameters]]:
    """Every method that a recipe can name, with its parameters."""
    union, _ = get_args(Method)
    return {get_args(cls.model_fields["name"].annotation)[0]: cls for cls in get_args(union)}


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter; `text` is the strength of its text encoders where that is another."""

    ref: str
    strength: str = "1"
    text: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A parameter of the chosen method as a form shows it: a number, or one of `options`."""

    name: str
    field: str
    value: str
    help: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bench:
    """`rank` is a field of a recipe's rank and `amount` its number, "" for exact."""

    rows: tuple[Row, ...] = ()
    method: str = "linear"
    parameters: Mapping[str, str] = field(default_factory=dict)
    rank: str = "exact"
    amount: str = ""
    base: str = ""
    dialect: str = ""
    dtype: str = ""
    repo: str = ""
    path: str = ""

    @property
    def is_full(self) -> bool:
        """Whether the method makes changes of full rank, of which only a part can be kept."""
        return self.method in methods() and methods()[self.method].space is Space.ELEMENTS

    def with_adapter(self, ref: str) -> "Bench":
        """With one more, at strength 1; one that is there already stays as it is."""
        if ref in (row.ref for row in self.rows):
            return self
        return replace(self, rows=(*self.rows, Row(ref))[:MAX_INPUTS])

    def address(self, **changes: str) -> str:
        """Where this bench is found again."""
        fields: list[tuple[str, str]] = [("add", _joined(row)) for row in self.rows]
        rank = f"{self.rank}:{self.amount}" if self.amount else self.rank
        named = {
            "method": "" if self.method == "linear" else self.method,
            **{_PARAMETER + name: value for name, value in self.parameters.items()},
            "rank": "" if rank == "exact" else rank,
            "base": self.base,
            "dialect": self.dialect,
            "dtype": self.dtype,
            "repo": self.repo,
            "path": self.path,
        } | changes
        fields += [(name, value) for name, value in named.items() if value]
        return "/bench?" + urlencode(fields, safe=":/=,") if fields else "/bench"

    def recipe(self, text_encoders: Mapping[str, tuple[str, ...]], kind: str = "merge") -> Any:
        """A document for `merge.recipe`; what is no number stays text, and is refused there.

        `text_encoders` are the components that a REF's text strength is for.
        """
        document: dict[str, Any] = {
            "kind": kind,
            "inputs": [
                _input(row, text_encoders.get(row.ref) or ("text_encoder",)) for row in self.rows
            ],
            "method": {"name": self.method} | dict(self._typed()),
        }
        if self.base:
            document["base"] = {"ref": self.base}
        if kind == "merge":
            said = True if self.rank == "exact" else _number(self.amount)
            document["rank"] = {self.rank: said}
            chosen = {"dialect": self.dialect, "dtype": self.dtype}
            document["output"] = {name: value for name, value in chosen.items() if value}
        return document

    def named(self, param: str) -> str:
        """What the page calls a field of the recipe; "" for what is not on it."""
        found = _INPUT.fullmatch(param)
        if found is not None and int(found[1]) < len(self.rows):
            ref = self.rows[int(found[1])].ref
            return f"{ref}, {found[2]}" if found[2] == "strength" else ref
        part, _, name = param.partition(".")
        if part == "method" and name not in ("", "name"):
            return name.replace("_", " ").capitalize()
        return _NAMES.get(param, _NAMES.get(part, ""))

    def choices(self) -> Iterator[Choice]:
        """The parameters of the method, each with the value in force."""
        for name, info in self._fields():
            value = self.parameters.get(name, _shown(info.default))
            title, words = name.replace("_", " "), info.description or ""
            yield Choice(title, _PARAMETER + name, value, words, _options(info))

    def _fields(self) -> Iterator[tuple[str, FieldInfo]]:
        cls = methods().get(self.method)
        for name, info in cls.model_fields.items() if cls is not None else ():
            if name != "name":
                yield name, info

    def _typed(self) -> Iterator[tuple[str, Any]]:
        for name, info in self._fields():
            if name not in self.parameters:
                continue
            said = self.parameters[name]
            if info.annotation is bool and said in _SWITCH:
                yield name, _SWITCH[said]
            elif _options(info):
                yield name, said or None
            elif said:
                yield name, _number(said)


def read(fields: ImmutableMultiDict[str, Any]) -> Bench:
    """From an address or a form; nothing is checked but lengths."""
    rows = [_split(text) for text in _texts(fields, "add")]
    refs, strengths, texts = (_texts(fields, name) for name in ("ref", "strength", "text"))
    for n, ref in enumerate(refs):
        rows.insert(n, Row(ref, _at(strengths, n) or "1", _at(texts, n)))
    dropped = _text(fields, "drop")
    kept = (row for n, row in enumerate(rows) if str(n) != dropped and row.ref)
    method = _text(fields, "method") or "linear"
    said = {
        name.removeprefix(_PARAMETER): text[-1]
        for name in fields
        if name.startswith(_PARAMETER) and (text := _texts(fields, name))
    }
    bench = Bench(
        rows=tuple(kept)[:MAX_INPUTS],
        method=method,
        base=_text(fields, "base"),
        dialect=_text(fields, "dialect"),
        dtype=_text(fields, "dtype"),
        repo=_text(fields, "repo"),
        path=_text(fields, "path"),
    )
    return _with_rank(_with_parameters(bench, said), fields)


def _with_parameters(bench: Bench, said: Mapping[str, str]) -> Bench:
    """Only those of the method, and not what it would take anyway: another one has others."""
    kept = {
        name: said[name]
        for name, info in bench._fields()
        if name in said and said[name] != _shown(info.default)
    }
    return replace(bench, parameters=kept)


def _with_rank(bench: Bench, fields: ImmutableMultiDict[str, Any]) -> Bench:
    rank, _, amount = _text(fields, "rank").partition(":")
    amount = amount or _text(fields, "amount")
    if rank not in RANKS or (rank == "exact" and bench.is_full):
        rank = "fixed" if bench.is_full else "exact"
    if rank == "exact":
        return replace(bench, rank=rank)
    # A number left over from another choice is of no use to this one.
    if _text(fields, "rank_was") not in ("", rank) or not amount:
        amount = _USUAL[rank]
    return replace(bench, rank=rank, amount=amount)


def _split(text: str) -> Row:
    """`REF`, `REF=0.7` or `REF=0.7,0.4`."""
    ref, is_said, strengths = text.rpartition("=")
    if not is_said:
        return Row(text)
    strength, _, text = strengths.partition(",")
    return Row(ref, strength or "1", text)


def _joined(row: Row) -> str:
    return f"{row.ref}={row.strength}" + (f",{row.text}" if row.text else "")


def _input(row: Row, text_encoders: tuple[str, ...]) -> dict[str, Any]:
    document: dict[str, Any] = {"ref": row.ref, "strength": _number(row.strength)}
    if row.text:
        document["components"] = {name: _number(row.text) for name in text_encoders}
    return document


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _options(info: FieldInfo) -> tuple[str, ...]:
    """Of a `Literal`, with "" for none, or of a switch."""
    if info.annotation is bool:
        return tuple(_SWITCH)
    parts = get_args(info.annotation) if get_origin(info.annotation) is not Literal else ()
    literals = [part for part in (info.annotation, *parts) if get_origin(part) is Literal]
    found = tuple(str(value) for part in literals for value in get_args(part))
    return ("", *found) if found and type(None) in parts else found


def _shown(default: Any) -> str:
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def _texts(fields: ImmutableMultiDict[str, Any], name: str) -> list[str]:
    """Files sent in their place are nothing that anybody meant."""
    values = (value for value in fields.getlist(name) if isinstance(value, str))
    return [value.strip()[:MAX_TEXT] for value in values]


def _text(fields: ImmutableMultiDict[str, Any], name: str) -> str:
    return next(iter(_texts(fields, name)), "")


def _at(values: list[str], n: int) -> str:
    return values[n] if n < len(values) else ""
