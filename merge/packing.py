"""Factors of some layers as factors of others that hold the same rows: fused, split, permuted.

Code before diffusers keeps q, k and v as rows of one layer; diffusers has a layer for each, and
swaps the halves of some. What an adapter does to rows can be cut and put together exactly for most
algorithms, and nothing else is done here: NotExact says why where it cannot be.

Splitting shares the factors that act on inputs and cuts those that act on rows. Putting together is
the way back where those are the same bytes; otherwise LoRA and LoHa get a block for each part, so
that ranks add up. A layer made of such blocks is recognised by its zeros and split to the small
ranks it came from; `Notes` remember what zeros do not show.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from merge.algorithms import glora
from merge.algorithms import parts as joined_parts
from merge.algorithms.rows import fuse_rows, take_rows
from merge.families import Layer

BLOCKED = {
    "lora": (("up", "down"),),
    "loha": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
}
# Layouts whose missing rows may be filled with factors that change nothing.
_ADDITIVE = frozenset({"lora", "loha", "lokr", "full", "norm", "oft", "ia3"})
# Put together only as splitting a layer leaves them: all alike but what acts on rows.
_SHARED = frozenset({"lokr", "glora"})
# These stand beside the factors of the same layer.
_APART = frozenset({"full", "norm", "replacement"})


class NotExact(ValueError):
    """Why factors cannot be those of another layer, and what can be done instead."""


@dataclass(frozen=True, slots=True)
class Part:
    """One layer's factors, apart from any dialect.

    Where the layout multiplies by alpha / rank, `alpha` is the numerator, whatever the file called
    it, and `tensors["alpha"]` the tensor it was read from, if there was one. A magnitude of DoRA has
    the dimensions of the weight.
    """

    component: str
    layer: Layer
    layout: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None

    @property
    def name(self) -> str:
        return f"{self.component}.{self.layer.path}"

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None where the layout has no such number."""
        for role in _RANK.get(self.layout, ()):
            if role in self.tensors:
                return self.tensors[role].shape[0]
        return None


_RANK = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}


class Note(NamedTuple):
    """What a part was before it became a block of a packed layer: its rank, alpha and dtypes."""

    rank: int
    alpha: float
    up_dtype: str
    down_dtype: str


# Packed layer -> the layers it was packed of -> what they were, in the order of the blocks.
Notes = dict[str, dict[str, Note]]


class _Piece(NamedTuple):
    """`rows` rows of a target, from `begin`, that are the source's from `first`."""

    begin: int
    source: int
    first: int
    rows: int


def repack(
    parts: Sequence[Part], layers: Mapping[str, Mapping[str, Layer]], notes: Notes
) -> tuple[list[Part], Notes]:
    """The same change as parts of `layers`, component -> path -> layer; with the notes to go back.

    `notes` are those the parts came with. NotExact names the layer that cannot be made.
    """
    made: list[Part] = []
    written: Notes = {}
    for (component, kind), sources in _groups(parts).items():
        covers = _covers(sources, layers[component])
        cut = _cut(sources, covers, kind == "factors", notes)
        for layer, pieces in covers.items():
            inputs = [
                (cut[p.source, layer.path], p) for p in pieces if (p.source, layer.path) in cut
            ]
            if inputs:
                part, note = _joined(component, layer, inputs)
                made.append(part)
                if note:
                    written[part.name] = note
    return made, written


def _groups(parts: Sequence[Part]) -> dict[tuple[str, str], list[Part]]:
    """Parts that may share a layer: each component's factors, full differences, norms apart."""
    groups = defaultdict(list)
    for part in parts:
        kind = part.layout if part.layout in _APART else "factors"
        groups[part.component, kind].append(part)
    return dict(groups)


def _covers(sources: Sequence[Part], layers: Mapping[str, Layer]) -> dict[Layer, list[_Piece]]:
    """Which rows of which source each target is made of; targets without any are left out."""
    found: dict[Layer, list[_Piece]] = {}
    held: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
    for index, part in enumerate(sources):
        for run in part.layer.runs:
            held[run.module].append((run.first, run.rows, index, run.begin))
    placed: dict[int, int] = defaultdict(int)
    for layer in layers.values():
        pieces = []
        for run in layer.runs:
            for first, rows, index, begin in held.get(run.module, ()):
                low, high = max(first, run.first), min(first + rows, run.first + run.rows)
                if low < high:
                    at = run.begin + low - run.first
                    pieces.append(_Piece(at, index, begin + low - first, high - low))
                    placed[index] += high - low
        if pieces:
            found[layer] = sorted(pieces)
    for index, part in enumerate(sources):
        if placed[index] != part.layer.shape[0]:
            raise NotExact(f"{part.name} has no place in the other naming")
    return found


def _cut(
    sources: Sequence[Part],
    covers: Mapping[Layer, Sequence[_Piece]],
    may_be_blocks: bool,
    notes: Notes,
) -> dict[tuple[int, str], Part]:
    """(source, path of a target) -> the source's rows in that target, in the target's order."""
    takers: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(dict)
    for layer, pieces in covers.items():
        for piece in pieces:
            takers[piece.source].setdefault(layer.path, []).append((piece.first, piece.rows))
    found = {}
    for index, wanted in takers.items():
        part = sources[index]
        cuts = {path: _rows(part, segments) for path, segments in wanted.items()}
        if len(cuts) > 1:
            cuts = _unpacked(part, cuts, notes.get(part.name, {}))
        found.update({(index, path): cut for path, cut in cuts.items()})
    return found


def _rows(part: Part, segments: Sequence[tuple[int, int]]) -> Part:
    """A part of these rows, (first, count) each, in this order."""
    index = [row for first, n in segments for row in range(first, first + n)]
    shape = part.layer.shape
    if index == list(range(shape[0])):
        return part
    try:
        tensors = take_rows(part.layout, part.tensors, shape, index)
    except ValueError as error:
        raise NotExact(f"{part.name}: {error}") from error
    return replace(part, layer=replace(part.layer, shape=(len(index), *shape[1:])), tensors=tensors)


def _unpacked(part: Part, cuts: dict[str, Part], notes: Mapping[str, Note]) -> dict[str, Part]:
    """Parts that were blocks of a packed layer, at their own ranks; without those that do nothing."""
    if part.layout in _APART:
        alive = {
            path: cut
            for path, cut in cuts.items()
            if any(bool(t.any()) for t in cut.tensors.values())
        }
        return alive or cuts
    pairs = BLOCKED.get(part.layout)
    if pairs is None or part.alpha is None or not all(up in part.tensors for up, _ in pairs):
        return cuts
    if "mid" in part.tensors or "hada_t1" in part.tensors:
        return cuts
    ranges = _noted(part, cuts, notes) or _blocks(part, cuts)
    if ranges is None:
        return cuts
    rank = part.rank
    assert rank is not None
    found = {}
    for path, (begin, end) in ranges.items():
        cut = cuts[path]
        tensors = dict(cut.tensors)
        tensors.pop("alpha", None)
        for up, down in pairs:
            tensors[up] = cut.tensors[up][:, begin:end].contiguous()
            tensors[down] = cut.tensors[down][begin:end].contiguous()
        own = replace(cut, tensors=tensors, alpha=_share(part.alpha, rank, end - begin))
        found[path] = _as_noted(own, notes[path]) if path in notes else own
    return found


def _share(alpha: float, rank: int, its_rank: int) -> float:
    """The numerator that gives a part of rank `its_rank` the same scale."""
    return alpha if its_rank == rank else alpha * its_rank / rank


def _blocks(part: Part, cuts: Mapping[str, Part]) -> dict[str, tuple[int, int]] | None:
    """Path -> its columns, where no column of `up` has rows in two parts; None where one has."""
    pairs = BLOCKED[part.layout]
    used = {
        path: torch.stack([cut.tensors[up].flatten(1).any(0) for up, _ in pairs]).any(0)
        for path, cut in cuts.items()
    }
    alive = [path for path in cuts if bool(used[path].any())]
    if not alive or bool((torch.stack([used[path] for path in alive]).sum(0) > 1).any()):
        return None
    n_columns = len(used[alive[0]])
    for among in (list(cuts), alive):
        if n_columns % len(among) == 0:
            size = n_columns // len(among)
            ranges = {path: (i * size, (i + 1) * size) for i, path in enumerate(among)}
            if all(_within(used[path], ranges.get(path)) for path in cuts):
                return {path: ranges[path] for path in alive}
    spans = sorted((int(c[0]), int(c[-1]) + 1, p) for p in alive if len(c := used[p].nonzero()))
    if any(one[1] > two[0] for one, two in pairwise(spans)):
        return None
    # A column of zeros goes to the part before it.
    begins = [0, *(begin for begin, _, _ in spans[1:]), n_columns]
    return {path: (begins[i], begins[i + 1]) for i, (_, _, path) in enumerate(spans)}


def _within(used: Tensor, columns: tuple[int, int] | None) -> bool:
    outside = used.clone()
    if columns is not None:
        outside[columns[0] : columns[1]] = False
    return not bool(outside.any())


def _noted(
    part: Part, cuts: Mapping[str, Part], notes: Mapping[str, Note]
) -> dict[str, tuple[int, int]] | None:
    """The columns the notes say, if the factors bear them out: notes are text, zeros are facts."""
    if not notes or not set(notes) <= set(cuts) or sum(n.rank for n in notes.values()) != part.rank:
        return None
    ranges, begin = {}, 0
    for path, note in notes.items():
        ranges[path] = (begin, begin + note.rank)
        begin += note.rank
    for path, cut in cuts.items():
        for up, _ in BLOCKED[part.layout]:
            if not _within(cut.tensors[up].flatten(1).any(0), ranges.get(path)):
                return None
    return ranges


def _as_noted(part: Part, note: Note) -> Part:
    """The part with the alpha and dtypes it had, if packing it again would give the same numbers."""
    (up, down), *others = BLOCKED[part.layout]
    dtypes = [getattr(torch, name, None) for name in (note.up_dtype, note.down_dtype)]
    if others or not all(isinstance(d, torch.dtype) and d.is_floating_point for d in dtypes):
        return part
    scale = _scale(part)
    if not note.alpha or not scale:
        return part
    ratio = note.alpha / note.rank / scale
    was = (part.tensors[up].double() / ratio).to(dtypes[0])
    down_was = part.tensors[down].to(dtypes[1])
    stored, down_stored = part.tensors[up].double(), part.tensors[down]
    # float32 rounding of a scaled factor at most.
    is_it = torch.allclose(was.double() * ratio, stored, rtol=1e-6, atol=0)
    if not is_it or not torch.equal(down_was.to(down_stored.dtype), down_stored):
        return part
    return replace(part, tensors={**part.tensors, up: was, down: down_was}, alpha=note.alpha)


def _joined(
    component: str, layer: Layer, inputs: Sequence[tuple[Part, _Piece]]
) -> tuple[Part, dict[str, Note]]:
    """One part of a layer, from parts that have some of its rows each."""
    parts = list({id(part): part for part, _ in inputs}.values())
    first = parts[0]
    name = f"{component}.{layer.path}"
    covered = sum(piece.rows for _, piece in inputs)
    # A variant of the base may have more inputs than the family's table says.
    layer = replace(layer, shape=(layer.shape[0], *first.layer.shape[1:]))
    if len(parts) == 1 and covered == layer.shape[0]:
        return replace(first, component=component, layer=layer), {}
    layouts = sorted({part.layout for part in parts})
    if len(layouts) > 1:
        why = f"it is made of layers with {' and '.join(layouts)}"
        raise NotExact(f"{name}: {why}; --algorithm lora makes them one kind")
    if len({"dora_scale" in part.tensors for part in parts}) > 1:
        raise NotExact(f"{name}: only some of the layers it is made of have DoRA; bake it instead")
    if covered < layer.shape[0] and (
        first.layout not in _ADDITIVE or "dora_scale" in first.tensors
    ):
        why = "some of the layers it is made of are not in the file, and their rows would change"
        raise NotExact(f"{name}: {why}; bake it instead")
    try:
        joined = _side_by_side(component, layer, inputs)
    except ValueError as error:
        raise NotExact(f"{name}: {error}") from error
    return joined, _notes_of(joined, inputs)


def _side_by_side(component: str, layer: Layer, inputs: Sequence[tuple[Part, _Piece]]) -> Part:
    """The parts' rows at their places, nothing in between."""
    placed: list[tuple[int, Part | None]] = []
    at = 0
    for part, begin, n in _in_order(inputs):
        if begin > at:
            placed.append((begin - at, None))
        placed.append((n, part))
        at = begin + n
    if at < layer.shape[0]:
        placed.append((layer.shape[0] - at, None))
    parts = [part for _, part in placed if part is not None]
    first = parts[0]
    if first.layout in _SHARED:
        return _shared(component, layer, placed)
    scales = [_scale(part) for part in parts]
    given = [
        joined_parts.Part(n, None if part is None else _without_alpha(part), _facts(part))
        for n, part in placed
    ]
    tensors = fuse_rows(first.layout, given)
    joined = Part(component, layer, first.layout, tensors)
    if first.alpha is None:
        return joined
    tensors.pop("alpha")
    assert joined.rank is not None
    assert first.rank is not None
    if any(scale != scales[0] for scale in scales):
        alpha = float(joined.rank)  # the scales are in the factors now
    else:
        alpha = _share(first.alpha, first.rank, joined.rank)
    return replace(joined, alpha=alpha)


def _in_order(inputs: Sequence[tuple[Part, _Piece]]) -> Iterable[tuple[Part, int, int]]:
    """(part, first row in the target, rows) in the order of the target's rows."""
    taken: dict[int, int] = defaultdict(int)
    whole = {id(part): sum(p.rows for own, p in inputs if own is part) for part, _ in inputs}
    for part, piece in inputs:
        first = taken[id(part)]
        taken[id(part)] += piece.rows
        is_all = piece.rows == whole[id(part)]
        yield part if is_all else _rows(part, [(first, piece.rows)]), piece.begin, piece.rows


def _without_alpha(part: Part) -> dict[str, Tensor]:
    """An alpha that is no numerator, as the limit of a rotation, is a tensor like the others."""
    is_kept = part.alpha is None
    return {role: t for role, t in part.tensors.items() if is_kept or role != "alpha"}


def _facts(part: Part | None) -> dict[str, float]:
    return {} if part is None or part.alpha is None else {"scale": _scale(part)}


def _scale(part: Part) -> float:
    if part.alpha is None or part.rank is None:
        return 1.0
    return part.alpha / part.rank


def _shared(component: str, layer: Layer, placed: Sequence[tuple[int, Part | None]]) -> Part:
    """Parts that differ in what acts on rows alone, as splitting a layer leaves them."""
    parts = [part for _, part in placed if part is not None]
    first = parts[0]
    roles = _row_roles(first)
    same = first.tensors.keys() - set(roles) - {"alpha"}
    for part in parts:
        if part.alpha != first.alpha or not all(
            role in part.tensors and _same(part.tensors[role], first.tensors[role]) for role in same
        ):
            why = f"the {first.layout} factors of its parts differ and cannot be joined"
            raise NotExact(f"{why}; --algorithm lora can, where it is exact")
    tensors = dict(first.tensors)
    for role in roles:
        unit = first.layer.shape[0] // first.tensors[role].shape[0]
        if any(n % unit for n, _ in placed):
            raise NotExact(f"its rows can only be joined in blocks of {unit}; bake it instead")
        shape = first.tensors[role].shape[1:]
        tensors[role] = torch.cat(
            [
                first.tensors[role].new_zeros(n // unit, *shape)
                if part is None
                else part.tensors[role]
                for n, part in placed
            ]
        )
    return Part(component, layer, first.layout, tensors, first.alpha)


def _row_roles(part: Part) -> list[str]:
    if part.layout == "lokr":
        roles = ["lokr_w1" if "lokr_w1" in part.tensors else "lokr_w1_a"]
    else:
        shapes = [tuple(part.tensors[role].shape) for role in ("a1", "a2", "b1", "b2")]
        roles = ["b2" if glora.is_old(shapes, part.layer.shape) else "b1"]
    return [*roles, *(["dora_scale"] if "dora_scale" in part.tensors else [])]


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def _notes_of(joined: Part, inputs: Sequence[tuple[Part, _Piece]]) -> dict[str, Note]:
    """What zeros will not show when the layer is split again; nothing where they show it all."""
    if joined.layout not in BLOCKED:
        return {}
    parts = {part.layer.path: part for part, _ in inputs}
    cuts = {
        path: _rows(joined, [(p.begin, p.rows) for own, p in inputs if own is part])
        for path, part in parts.items()
    }
    again = _unpacked(joined, cuts, {}) if len(cuts) > 1 else cuts
    if all(_alike(again.get(path), part) for path, part in parts.items()):
        return {}
    up, down = BLOCKED[joined.layout][0]
    notes = {}
    for path, part in parts.items():
        assert part.alpha is not None
        dtypes = (str(part.tensors[role].dtype).removeprefix("torch.") for role in (up, down))
        notes[path] = Note(part.tensors[down].shape[0], part.alpha, *dtypes)
    return notes


def _alike(one: Part | None, two: Part) -> bool:
    if one is None or one.alpha != two.alpha:
        return False
    roles = two.tensors.keys() - {"alpha"}
    return one.tensors.keys() - {"alpha"} == roles and all(
        _same(one.tensors[role], two.tensors[role]) for role in roles
    )
