"""What the tables and the page of a report have in common: names, numbers, meanings, colours."""

import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge.reports.report import Choice, Group, Report

# Okabe & Ito 2008, told apart with any colour vision; the order keeps neighbours apart in print too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8A8A", "#B8A800")
_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "fp8 e4m3",
    "F8_E5M2": "fp8 e5m2",
}
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
    """The block where a component has several of them, else the component."""
    block = group.block.removeprefix("text_model.encoder.")
    if not block:
        return group.component
    is_denoiser = not group.component.startswith("text_encoder")
    return block if is_denoiser else f"{group.component.replace('text_encoder', 'te')} {block}"


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
    return f"{100 * share:.{digits}f} %".replace("-0 %", "0 %")


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
        "inputs": "norm is how much an adapter changes at its strength; energy is its square.",
        "coverage": (
            "after the dot: modules that no other adapter changes."
            if several
            else "how many modules of each part of the model it changes."
        ),
        "pairs": (
            "cosine is 1 for the same, 0 for unrelated, -1 for opposite; adds and cancels are shares "
            "of all energy; output and input say how far they write and read the same directions, "
            "beyond chance; leak is how much of each lies in the other's main layers."
        ),
        "blocks": (
            f"the sum has {percent(ratio, 1)} of the energy that the adapters have apart{scale}."
            if several
            else "where in the model the adapter works."
        ),
        "ranks": (
            "error is the share of the sum that a lower rank leaves out; shared takes as many "
            "numbers and gives them to the layers that need them."
        ),
        "dtypes": "",
    }
    if report.storage is not None:
        sampled = f"factors: error of rounding them, measured on {report.storage.modules} layers"
        if report.storage.bake:
            change = report.storage.relative_change
            size = "" if change is None else f"; the change is {percent(change, 2)} of the base"
            sampled += (
                f"; baked: how much of the change arrives, what is wrong with it and which values "
                f"stay as they were, on {report.storage.values:,} values of the base{size}"
            )
        found["dtypes"] = sampled + "."
    return found
