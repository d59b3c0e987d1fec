"""What the tables and the page of a report have in common: names, numbers, meanings, colours."""

import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge.reports.report import Choice, Group, Report, Storage

# Okabe & Ito 2008, told apart with any colour vision; the order keeps neighbours apart in print too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8A8A", "#B8A800")
_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "fp8 e4m3",
    "F8_E5M2": "fp8 e5m2",
}
_MOST_BLOCKS = 24
_GENERIC = {"adapter_model", "pytorch_lora_weights", "model"}


def labels(report: "Report") -> list[str]:
    """A short name for each input, no two alike."""
    names = [_short(its.name) for its in report.inputs]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def _short(ref: str) -> str:
    path = PurePath(ref.replace("\\", "/").rstrip("/"))
    name = path.name.rpartition(":")[2].removesuffix(".safetensors")
    shown = path.parent.name if name in _GENERIC and path.parent.name else name
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def pair_name(names: Sequence[str], i: int, j: int) -> str:
    return f"{names[i]} \N{MULTIPLICATION SIGN} {names[j]}"


def block_name(group: "Group") -> str:
    """The block, or the component where it stands for all of one."""
    name = group.block.removeprefix("text_model.encoder.").replace("transformer_blocks", "blocks")
    return name or group.component


def shown_blocks(report: "Report") -> list["Group"]:
    """Rows for a chart: blocks of the model that makes the image or the text, neighbours together
    where they are many, and text encoders as a whole.
    """
    found: list[Group] = []
    for component in report.components:
        blocks = [its for its in report.blocks if its.component == component.component]
        if component.component.startswith("text_encoder") or len(blocks) == 1:
            found.append(component)
        elif len(blocks) <= _MOST_BLOCKS:
            found += blocks
        else:
            found += _neighbours(report, blocks)
    return found


def _neighbours(report: "Report", blocks: Sequence["Group"]) -> list["Group"]:
    """Blocks of one name and following numbers, a few together."""
    from merge.reports.report import group

    step = -(-len(blocks) // _MOST_BLOCKS) + 1
    found = []
    for stem, its in groupby(blocks, lambda block: block.block.rpartition(".")[0]):
        same = list(its)
        for first in range(0, len(same), step):
            some = [block.block for block in same[first : first + step]]
            places = [
                place
                for place in report.places
                if place.component == same[0].component and place.block in some
            ]
            numbers = [block.rpartition(".")[2] for block in some]
            name = f"{stem}.{numbers[0]}–{numbers[-1]}" if len(some) > 1 else some[0]
            found.append(group(same[0].component, name, places, len(report.inputs)))
    return found


def dtype_name(dtype: str) -> str:
    return _DTYPES.get(dtype, dtype)


def rank_name(choice: "Choice") -> str:
    if choice.name == "exact":
        low, high = choice.ranks
        return f"exact ({low}–{high})" if low != high else f"exact ({high})"
    if choice.name == "budget_bytes":
        return "budget"
    if choice.name == "energy":
        return f"energy {choice.value:g}"
    return f"shared {choice.value:g}" if choice.name == "shared" else f"{choice.value:g}"


def percent(share: float | None, digits: int) -> str:
    """A dash where there is none; what is too small to be shown is not called zero."""
    if share is None:
        return "–"
    least = 10.0**-digits
    if 0 < 100 * share < least / 2:
        return f"<{least:g} %"
    return f"{round(100 * share, digits) + 0.0:.{digits}f} %"


def number(value: float) -> str:
    """Three digits, and no powers of ten where people count."""
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def command(report: "Report") -> str:
    """The merge that the suggestion speaks for, to be typed."""
    found = report.suggestion
    assert found is not None, "there is a suggestion where something was measured"
    words = ["graft", "merge"]
    for its, strength in zip(report.inputs, found.strengths, strict=True):
        words.append(f"{its.name}={strength:g}")
    method = dict(found.method)
    name = method.pop("name")
    if name != "linear":
        words += ["--method", name]
    for option, value in method.items():
        words += (
            ["--normalise", str(value)]
            if option == "normalise"
            else ["--param", f"{option}={value}"]
        )
    words += [] if report.base is None else ["--base", report.base]
    ((kind, value),) = found.rank.items()
    words += [] if kind == "exact" else [f"--{kind}", f"{value:g}"]
    return " ".join(map(shlex.quote, [*words, "-o", "merged.safetensors"]))


def meanings(report: "Report") -> dict[str, str]:
    """One sentence below each table and chart."""
    several = len(report.inputs) > 1
    total = report.total
    ratio = total.norm**2 / total.apart if total.apart else 0.0
    scale = "" if total.scale is None else f"; λ = {total.scale:.3g} would restore it"
    found = {
        "inputs": "Norm is how much an adapter changes at its strength; energy is its square.",
        "coverage": (
            "After the dot: modules that no other adapter changes."
            if several
            else "How many modules of each part of the model it changes."
        ),
        "pairs": (
            "Cosine is 1 for the same, 0 for unrelated, -1 for opposite; adds and cancels are shares "
            "of all energy; output and input say how far they write and read the same directions, "
            "beyond chance; leak is how much of each lies in the other's main layers."
        ),
        "blocks": (
            f"The sum has {percent(ratio, 1)} of the energy that the adapters have apart{scale}."
            if several
            else "Where in the model the adapter works."
        ),
        "ranks": (
            "Error is the share of the sum that a lower rank leaves out; shared takes as many "
            "numbers and gives them to the layers that need them."
        ),
        "dtypes": "",
    }
    if report.storage is not None:
        found["dtypes"] = " ".join(_sampled(report.storage))
    return found


def _sampled(stored: "Storage") -> Iterator[str]:
    if stored.modules:
        yield f"Factors: error of rounding them, measured on {stored.modules} layers."
    if stored.bake:
        change = stored.relative_change
        size = "" if change is None else f"; the change is {percent(change, 2)} of the base"
        yield (
            "Baked: how much of the change arrives, what is wrong with it and which values stay as "
            f"they were, on {stored.values:,} values of the base{size}."
        )


def recipe_text(report: "Report") -> str:
    """The same as a recipe file."""
    from merge.recipe import Recipe

    found = report.suggestion
    assert found is not None, "there is a suggestion where something was measured"
    inputs = [
        {"ref": its.name, "strength": strength}
        for its, strength in zip(report.inputs, found.strengths, strict=True)
    ]
    document = {"kind": "merge", "inputs": inputs, "method": found.method, "rank": found.rank}
    document |= {} if report.base is None else {"base": {"ref": report.base}}
    return Recipe.parse(document).to_yaml()
