"""What of a base a bake changes: runs of stored rows, each with its list of contributions.

Overlapping contributions are cut at their boundaries, so that every stored row is in one patch.
All that can be impossible about a bake is found here, from headers and configurations.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import NamedTuple

from merge.additions import Additions
from merge.bases import Base, Experts, Scale, Slice
from merge.errors import ShapeMismatch, UnknownModules, Unsupported
from merge.families import Run
from merge.formats.adapters import Entry
from merge.terms import Name, Source, Term, terms_in

_EXPERTS, _TOKENS, _REPLACEMENT = "lora-experts", "tokens", "replacement"
# Roles that give a bias to a layer without one; others (IA3, GLoRA's D) scale what is there.
_ADDS_BIAS = frozenset(
    {
        *("up_bias", "diff_b", "b_norm", "bias", "ln_tuning_bias"),
        *(f"glora_{letter}.{part}" for letter in "CE" for part in ("Xd", "Xu", "X")),
        *("glora_Cd", "glora_Cu", "glora_E"),
    }
)


@dataclass(frozen=True, slots=True)
class Patch:
    """Rows of a stored matrix and what is added to them: strength * the rows of each term.

    A term whose weight has fewer columns changes the first ones: a base whose first layer has more
    inputs keeps the rest. For a transposed tensor the terms' rows are its columns. Terms of packed
    experts count the rows of all their matrices. Rows that share an fp8 `scale` with changed ones
    are patches without terms.
    """

    name: str
    parameter: str
    first_row: int
    rows: int
    columns: int
    terms: tuple[Term, ...]
    is_transposed: bool = False
    is_copy: bool = False
    scale: Scale | None = None

    @property
    def working_elements(self) -> int:
        """Elements of what a thread holds to compute it, at most: three copies of low-rank factors,
        or four matrices as large as the weight (itself, its change and what that takes to compute).
        """
        held = 0
        for term in self.terms:
            out, inner = term.entry.layer.extent
            if term.entry.needs == "nothing" and term.entry.exact_rank is not None:
                held += 3 * (self.rows + self.columns) * term.entry.exact_rank
            else:
                held += 4 * out * inner
        return held


@dataclass(frozen=True, slots=True)
class Found:
    """`patches`: file of the base -> key -> its patches by first row; `notes` for the certificate."""

    patches: Mapping[str, Mapping[str, tuple[Patch, ...]]]
    additions: Additions
    notes: tuple[str, ...]


class _Piece(NamedTuple):
    name: str
    parameter: str
    is_copy: bool
    term: Term  # `begin` counts the stored tensor's rows, or its columns if it is transposed


@dataclass(frozen=True, slots=True)
class _Target:
    """One stored tensor, seen as a matrix, and everything that changes it."""

    rows: int
    columns: int
    is_transposed: bool = False
    scale: Scale | None = None
    pieces: list[_Piece] = field(default_factory=list)


def find_patches(
    base: Base, sources: Mapping[Name, Sequence[Source]], adapters: Sequence[str]
) -> Found:
    """Every row of the base that something changes; `adapters` are their names for messages."""
    finder = _Finder(base, adapters)
    for (component, module), its in sorted(sources.items()):
        if active := [source for source in its if source.strength != 0]:
            finder.add(component, module, active)
    return finder.finish()


class _Finder:
    def __init__(self, base: Base, adapters: Sequence[str]) -> None:
        self._base, self._adapters = base, adapters
        self._additions = Additions(base)
        self._targets: dict[tuple[str, str], _Target] = {}
        self._missing: dict[int, list[str]] = defaultdict(list)
        self._notes: set[str] = set()

    def add(self, component: str, module: str, sources: Sequence[Source]) -> None:
        """What `sources` change of one module."""
        kind = sources[0].entry.layer.kind
        name = f"{component}.{module}"
        if any(_is_expert(source.entry) for source in sources):
            self._add_experts(component, module, sources)
            return
        on_weight = [source for source in sources if source.entry.touches_weight]
        on_bias = [source for source in sources if source.entry.touches_bias]
        pieces = self._base.find(component, module, kind=kind) or self._added_head(
            module, on_weight
        )
        if not pieces:
            self._miss(name, sources)
            return
        self._check_replaced(module, on_weight)
        # New rows of tokens are for both ends of a tied model, as they are while PEFT trains them.
        tokens = [source for source in on_weight if source.entry.layout == _TOKENS]
        if len(tokens) < len(on_weight):
            self._additions.keep_head(module)
        shape = self._base.shape(component, module, kind=kind)
        on_weight = [resolved(source, shape) for source in on_weight]
        self._check_rows(name, on_weight, pieces)
        for piece in pieces:
            self._add_piece(name, "weight", piece, on_weight)
        if tokens and (head := self._additions.copy_of(module)) is not None:
            self._add_piece(name, "weight", head, [resolved(source, shape) for source in tokens])
        if on_bias:
            self._add_bias(component, module, [resolved(source, shape) for source in on_bias])

    def _check_replaced(self, module: str, sources: Sequence[Source]) -> None:
        """New values for a Conv1D are stored as it is itself, which no shape says of a square one."""
        for source in sources:
            if source.entry.layout == _REPLACEMENT and self._base.is_conv1d(module):
                why = f"{source.entry.name} replaces a Conv1D, whose matrix is stored as (in, out)"
                raise Unsupported(self._adapters[source.adapter], why)

    def _added_head(self, module: str, sources: Sequence[Source]) -> tuple[Slice, ...]:
        """The output layer of a model whose embedding it was."""
        piece = self._additions.head(module)
        if piece is None:
            return ()
        for source in sources:
            if source.entry.needs == "whole":
                why = f"{source.entry.name} is tied to the embedding, and its change needs it whole"
                raise Unsupported(self._adapters[source.adapter], why)
        return (piece,)

    def _miss(self, name: str, sources: Sequence[Source]) -> None:
        for index in {source.adapter for source in sources}:
            self._missing[index].append(name)

    def finish(self) -> Found:
        for index, names in self._missing.items():
            raise UnknownModules(self._adapters[index], names, f"the base {self._base.path.name}")
        patches: dict[str, dict[str, tuple[Patch, ...]]] = defaultdict(dict)
        for (file, key), target in self._targets.items():
            if cut := tuple(_cut(target)):
                patches[file][key] = cut if target.scale is None else _without_gaps(cut, target)
        return Found(patches, self._additions, tuple(sorted(self._notes)))

    def _add_bias(self, component: str, module: str, sources: Sequence[Source]) -> None:
        name = f"{component}.{module}"
        pieces = self._base.find(component, module, "bias")
        if pieces:
            self._check_rows(f"{name}.bias", sources, pieces)
            for piece in pieces:
                self._add_piece(name, "bias", piece, sources)
            return
        adding = [source for source in sources if adds_bias(source.entry)]
        if not adding:
            return
        added = self._additions.bias(module)
        if added is None:
            why = (
                f"it gives {name} a bias, which that layer does not have in "
                f"{self._base.path.name}, and the model's own code would not load one"
            )
            raise Unsupported(self._adapters[adding[0].adapter], why)
        self._add_piece(name, "bias", added, sources)

    def _add_piece(
        self, name: str, parameter: str, piece: Slice, sources: Sequence[Source]
    ) -> None:
        for source in sources:
            self._check_columns(name, parameter, source, piece)
        target = self._target(piece, piece.columns, piece.is_transposed)
        rows, begin = (piece.columns, 0) if piece.is_transposed else (piece.rows, piece.first_row)
        for term in terms_in(sources, piece.first, rows, begin):
            target.pieces.append(_Piece(name, parameter, piece.is_copy, term))

    def _add_experts(self, component: str, module: str, sources: Sequence[Source]) -> None:
        name = f"{component}.{module}"
        experts = self._base.find_experts(component, module)
        if experts is None:
            self._miss(name, sources)
            return
        for source in sources:
            if not _is_expert(source.entry):
                why = f"packed experts ({name}) take low-rank factors of every expert and no other"
                raise Unsupported(self._adapters[source.adapter], why)
            self._check_experts(name, source, experts)
        whole = [resolved(source, experts.shape) for source in sources]
        rows = experts.shape[0] * experts.shape[1]
        runs = [replace(source, run=Run(module, 0, 0, rows)) for source in whole]
        for piece in experts.slices:
            target = self._target(piece, piece.columns, False)
            for term in terms_in(runs, piece.first, piece.rows, piece.first_row):
                target.pieces.extend(
                    _Piece(name, "weight", False, part) for part in _by_expert(term)
                )

    def _check_experts(self, name: str, source: Source, experts: Experts) -> None:
        held, found = source.entry.layer.shape[0], experts.shape[0]
        if held != found:
            detail = f"the factors are those of {held} experts, and the base has {found}"
            raise ShapeMismatch(self._adapters[source.adapter], name, detail)

    def _target(self, piece: Slice, columns: int, is_transposed: bool) -> _Target:
        if (known := self._targets.get((piece.file, piece.key))) is not None:
            return known
        added = self._additions.tensors.get(piece.file, {}).get(piece.key)
        shape = self._base.info(piece).shape if added is None else added.shape
        scale = self._base.scale(piece) if added is None else None
        new = _Target(prod(shape) // columns, columns, is_transposed, scale)
        self._targets[piece.file, piece.key] = new
        return new

    def _check_rows(self, name: str, sources: Sequence[Source], pieces: Sequence[Slice]) -> None:
        """The rows that the sources change are all there, and a whole layer is a whole layer."""
        held = sum(
            piece.columns if piece.is_transposed else piece.rows
            for piece in pieces
            if not piece.is_copy
        )
        for source in sources:
            run, layer = source.run, source.entry.layer
            is_whole = layer.module is not None
            if run.first + run.rows > held or (is_whole and run.rows != held):
                self._refuse_shape(name, source, pieces[0])

    def _check_columns(self, name: str, parameter: str, source: Source, piece: Slice) -> None:
        inner = prod(source.entry.layer.shape[1:]) if parameter == "weight" else 1
        found = piece.rows if piece.is_transposed else piece.columns
        if inner == found:
            return
        layer = source.entry.layer
        added = self._additions.tensors.get(piece.file, {}).get(piece.key)
        shape = self._base.info(piece).shape if added is None else added.shape
        is_wider = (
            *(len(shape) == len(layer.shape) > 2, shape[2:] == layer.shape[2:]),
            *(shape[0] == layer.shape[0], len(shape) > 1 and shape[1] > layer.shape[1]),
        )
        if parameter != "weight" or not all(is_wider) or source.entry.needs == "whole":
            self._refuse_shape(name, source, piece)
        self._notes.add(
            f"{name} has {shape[1]} inputs in the base and {layer.shape[1]} in "
            f"{self._adapters[source.adapter]}: the others stay as they are"
        )

    def _refuse_shape(self, name: str, source: Source, piece: Slice) -> None:
        found = (piece.columns, piece.rows) if piece.is_transposed else (piece.rows, piece.columns)
        detail = (
            f"the change is {source.entry.layer.extent}, "
            f"{piece.key} in {self._base.path.name} takes {found}"
        )
        raise ShapeMismatch(self._adapters[source.adapter], name, detail)


def adds_bias(entry: Entry) -> bool:
    """Whether a layer without a bias would get one."""
    return bool(_ADDS_BIAS & entry.keys.keys())


def resolved(source: Source, shape: tuple[int, ...] | None) -> Source:
    """The source with the base's shape, which factors show a side of, or all but the kernel."""
    layer = source.entry.layer
    is_open = 0 in layer.shape or source.entry.layout == _EXPERTS
    if shape is None or layer.module is None:
        return source
    if not is_open and (shape[0] != layer.shape[0] or prod(shape) != prod(layer.shape)):
        return source
    run = Run(source.run.module, 0, 0, shape[0])
    entry = replace(source.entry, layer=replace(layer, shape=shape, runs=(run,)))
    return replace(source, entry=entry, run=run)


def _cut(target: _Target) -> Iterator[Patch]:
    """Patches in the order of their rows, each with all terms that cover it."""
    if target.is_transposed:
        if target.pieces:
            yield _patch(target, target.pieces, 0, target.rows)
        return
    edges = sorted({edge for p in target.pieces for edge in (p.term.begin, _end(p.term))})
    for low, high in pairwise(edges):
        covering = [p for p in target.pieces if p.term.begin <= low and high <= _end(p.term)]
        if covering:
            yield _patch(target, [_cut_to(piece, low, high) for piece in covering], low, high)


def _without_gaps(patches: Sequence[Patch], target: _Target) -> tuple[Patch, ...]:
    """All rows of the tensor, because a new scale is also that of rows that do not change."""
    found: list[Patch] = []
    edges = [
        0,
        *(edge for p in patches for edge in (p.first_row, p.first_row + p.rows)),
        target.rows,
    ]
    for low, high in zip(edges[::2], edges[1::2], strict=True):
        found.append(replace(patches[0], first_row=low, rows=high - low, terms=()))
    return tuple(
        sorted(
            (patch for patch in (*patches, *found) if patch.rows), key=lambda patch: patch.first_row
        )
    )


def _end(term: Term) -> int:
    return term.begin + term.rows


def _cut_to(piece: _Piece, low: int, high: int) -> _Piece:
    term = piece.term
    first = term.first + low - term.begin
    return piece._replace(term=replace(term, first=first, begin=0, rows=high - low))


def _by_expert(term: Term) -> Iterator[Term]:
    """The term cut where one expert's rows end and the next one's begin."""
    size = term.entry.layer.shape[1]
    at = 0
    while at < term.rows:
        rows = min(size - (term.first + at) % size, term.rows - at)
        yield replace(term, first=term.first + at, begin=term.begin + at, rows=rows)
        at += rows


def _is_expert(entry: Entry) -> bool:
    return entry.layout == _EXPERTS


def _patch(target: _Target, pieces: Sequence[_Piece], low: int, high: int) -> Patch:
    first = pieces[0]
    return Patch(
        name=first.name,
        parameter=first.parameter,
        first_row=low,
        rows=high - low,
        columns=target.columns,
        terms=tuple(piece.term for piece in pieces),
        is_transposed=target.is_transposed,
        is_copy=first.is_copy,
        scale=target.scale,
    )
