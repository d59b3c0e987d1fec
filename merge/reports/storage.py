"""What it costs to write a merge in a dtype: measured on samples, with the numbers of both.

Factors: some layers are merged as they will be and rounded. A bake: a few rows of every weight that
changes are computed and rounded, each standing for its whole weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from zlib import crc32

import torch
from torch import Tensor

from merge.algorithms import lora
from merge.combine import stored_alpha
from merge.errors import NotFinite
from merge.formats.adapters import Entry
from merge.formats.header import DTYPE_BITS
from merge.inputs import Inputs, OpenBase
from merge.methods import linear
from merge.methods.draws import Draws
from merge.modules import Module
from merge.patches import Patch
from merge.plan import BakePlan, MergePlan
from merge.quantised import FP8, as_groups, read_scale, spread
from merge.rangefinder import approximate
from merge.reports.report import BakeLoss, Rounding, Storage
from merge.tiles import prepare

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, **FP8}
_OF_FACTORS = ("F32", "F16", "BF16")
_OF_BASES = ("F32", "F16", "BF16", "F8_E4M3")
MOST_MODULES = 48
_TILE_VALUES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Rounded:
    """Of one layer: the norm of its change and of what rounding does to it, by dtype."""

    norm: float
    lost: dict[str, float]


def sampled(modules: Sequence[Module]) -> list[int]:
    """Indices of at most MOST_MODULES layers, at equal distances."""
    count = min(len(modules), MOST_MODULES)
    return [round(i * (len(modules) - 1) / max(count - 1, 1)) for i in range(count)]


def round_factors(plan: MergePlan, module: Module, rank: int, inputs: Inputs) -> Rounded:
    """One layer's factors at `rank`, as a merge would write them."""
    norms: list[float] = []
    lost: dict[str, list[float]] = {dtype: [] for dtype in _OF_FACTORS}
    if module.terms:
        exact, norm = _exact(plan, module, rank, inputs)
        share = exact.rank / stored_alpha(plan, exact.rank) if exact.rank else 1.0
        stored = linear.times(exact, share)
        tensors = lora.write(stored, module.kernel)
        norms.append(norm)
        for dtype, its in lost.items():
            cast = {role: tensors[role].to(_DTYPES[dtype]) for role in ("up", "down")}
            is_finite = all(bool(tensor.isfinite().all()) for tensor in cast.values())
            its.append(lora.distance(stored, cast) / share if is_finite else float("inf"))
    wholes = []
    if module.differences:
        wholes.append(inputs.summed(module.differences, module.shape, torch.float32))
    if module.biases:
        wholes.append(inputs.summed_biases(module.biases, module.shape[0], torch.float32))
    for whole in wholes:
        norms.append(torch.linalg.vector_norm(whole.double()).item())
        for dtype, its in lost.items():
            its.append(_distance(whole, whole.to(_DTYPES[dtype])))
    return Rounded(hypot(*norms), {dtype: hypot(*its) for dtype, its in lost.items()})


def _exact(
    plan: MergePlan, module: Module, rank: int, inputs: Inputs
) -> tuple[lora.Factors, float]:
    """What a merge rounds, and the norm of the sum before it was truncated to that.

    Of a large dense change, whose rank is not known, a few directions.
    """
    if module.is_dense:
        draws = Draws(plan.recipe.seed, module.name, ("range",))
        found = approximate(inputs.delta(module, torch.float32), draws, rank or _FEW)
        return linear.truncate(found.spectrum, len(found.spectrum.values)), found.norm
    parts = inputs.parts(module, torch.float32)
    if plan.recipe.rank.exact:
        exact = linear.concatenate(*parts)
        return exact, lora.norm(exact)
    spectrum = linear.decompose(*parts)
    return linear.truncate(spectrum, rank), linear.lost(spectrum.values, 0)


_FEW = 16


def _distance(exact: Tensor, stored: Tensor) -> float:
    if not stored.isfinite().all():
        return float("inf")
    return float(torch.linalg.vector_norm(exact.double() - stored.double()))


def roundings(found: Sequence[Rounded], asked: str) -> tuple[Rounding, ...]:
    """Over all samples; one that overflows is left out of the error, and said."""
    result = []
    for dtype in _OF_FACTORS:
        fits = [its for its in found if its.lost[dtype] != float("inf")]
        norm = hypot(*(its.norm for its in fits))
        error = hypot(*(its.lost[dtype] for its in fits)) / norm if norm else 0.0
        result.append(Rounding(dtype, error, dtype == asked, len(fits) < len(found)))
    return tuple(result)


@dataclass(slots=True)
class Sums:
    """Of sampled values of a base, each counted as often as it stands for others."""

    values: int = 0
    elements: float = 0.0
    base: float = 0.0
    wanted: float = 0.0
    kept: float = 0.0
    wrong: float = 0.0
    unchanged: float = 0.0
    n_too_large: int = 0  # weights of which a value does not fit, and which count in nothing else

    def add(self, other: "Sums") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def patches_of(plan: BakePlan) -> list[tuple[str, str, Patch]]:
    """(file, key, patch) of everything that changes, but for copies."""
    return [
        (file, key, patch)
        for file, keys in plan.patches.items()
        for key, patches in keys.items()
        for patch in patches
        if patch.terms and not patch.is_copy and key in plan.base.files[file].header.tensors
    ]


def round_base(
    place: tuple[str, str, Patch], inputs: Inputs, base: OpenBase
) -> tuple[str, dict[str, Sums]]:
    """A few rows of one patch in every dtype, and the dtype they are stored in."""
    file, key, patch = place
    opened = base.file(file)
    info = opened.header.tensors[key]
    dtype = _DTYPES[info.dtype]
    rows = min(max(1, _TILE_VALUES // patch.columns), patch.rows)
    row = crc32(patch.name.encode()) % (patch.rows - rows + 1)
    item = DTYPE_BITS[info.dtype] // 8
    raw = bytearray(rows * patch.columns * item)
    opened.read_into(key, memoryview(raw), (patch.first_row + row) * patch.columns * item)
    before = torch.frombuffer(raw, dtype=dtype).view(rows, patch.columns).float()
    scales = None
    if patch.scale is not None:
        groups = as_groups(read_scale(opened, patch.scale), patch.scale)
        scales = spread(groups, patch.scale, patch.first_row + row, before)
        before = before * scales
    if not before.isfinite().all():
        raise NotFinite(opened.name, key)

    def read_base(entry: Entry, parameter: str, is_copy: bool) -> Tensor | None:
        return base.read(entry, parameter, torch.float32, is_copy=is_copy)

    ready = prepare(patch, inputs, read_base, torch.float32)
    if ready.norm is None:
        delta = ready.add(before.clone(), row)
        assert delta is not None, "a change of unknown norm is given back"
    else:  # a product, whatever it is added to
        delta = torch.zeros_like(before)
        ready.add(delta, row)
    stands_for = patch.rows / rows
    names = {*_OF_BASES, info.dtype}
    return info.dtype, {
        name: _sums(before, delta, name, scales if name == info.dtype else None, stands_for)
        for name in names
    }


def _sums(base: Tensor, delta: Tensor, dtype: str, scales: Tensor | None, factor: float) -> Sums:
    """The base is first rounded to the dtype itself: what a checkpoint in it would hold."""
    # A scale of 0 is that of zeros.
    scale = torch.ones(()) if scales is None else scales.masked_fill(scales == 0, 1.0)

    def stored(values: Tensor) -> Tensor:
        limit = torch.finfo(_DTYPES[dtype]).max if dtype in FP8 else float("inf")
        return (values / scale).clamp(-limit, limit).to(_DTYPES[dtype]).float() * scale

    before = stored(base)
    after = stored(before + delta)
    if not after.isfinite().all():
        return Sums(n_too_large=1)
    arrived = (after - before).double()
    exact = delta.double()
    return Sums(
        values=delta.numel(),
        elements=factor * delta.numel(),
        base=factor * base.double().square().sum().item(),
        wanted=factor * exact.square().sum().item(),
        kept=factor * (arrived * exact).sum().item(),
        wrong=factor * (arrived - exact).square().sum().item(),
        unchanged=factor * (after == before).sum().item(),
    )


def with_bake(stored: Storage | None, found: Sequence[tuple[str, dict[str, Sums]]]) -> Storage:
    """`stored`, and the losses of a bake by dtype."""
    own = Sums()
    totals: dict[str, Sums] = {}
    for stored_as, sums in found:
        own.add(sums[stored_as])
        for dtype, its in sums.items():
            totals.setdefault(dtype, Sums()).add(its)
    dtypes = {stored_as for stored_as, _ in found}
    if len(dtypes) > 1:
        totals = {dtype: its for dtype, its in totals.items() if dtype in _OF_BASES}
        totals[_MIXED] = own
    losses = [
        _loss(dtype, totals[dtype], dtype == _MIXED or dtypes == {dtype})
        for dtype in (*_OF_BASES, "F8_E5M2", _MIXED)
        if dtype in totals
    ]
    factors, modules = ((), 0) if stored is None else (stored.factors, stored.modules)
    change = sqrt(own.wanted / own.base) if own.base else None
    return Storage(factors, modules, tuple(losses), own.values, change)


_MIXED = "as stored"


def _loss(dtype: str, its: Sums, is_base: bool) -> BakeLoss:
    return BakeLoss(
        dtype,
        its.kept / its.wanted if its.wanted else 1.0,
        sqrt(its.wrong / its.wanted) if its.wanted else 0.0,
        its.unchanged / its.elements if its.elements else 0.0,
        is_base,
        its.n_too_large > 0,
    )
