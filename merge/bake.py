"""Base + strength * delta -> a checkpoint of the same layout, streamed.

A file is written in the order of its bytes by a few threads, in blocks (merge.blocks). Untouched
tensors are read into them as they are; touched ones go through tiles of 256 Ki elements that stay
in the processor's cache: read, widen, add the sum of all deltas, round once. Each thread's product
is single-threaded, because tiles are small and the file offers parallelism enough.
benchmarks/bake.py prints the ratio to a plain copy.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from merge import provenance
from merge.bases import Scale
from merge.blocks import Options, copy_file, write_blocks
from merge.errors import NotFinite, Overflow
from merge.formats.adapters import Entry
from merge.formats.header import DTYPE_BITS
from merge.formats.reader import TensorFile
from merge.formats.targets import Target
from merge.formats.writer import Layout, layout, raw_bytes
from merge.inputs import Inputs, OpenBase
from merge.patches import Patch
from merge.plan import TILE_ELEMENTS, BakePlan
from merge.quantised import FP8, TOO_LARGE, Scales, as_groups, new_scales, read_scale
from merge.tally import Tally, Touched
from merge.threads import Shared
from merge.tiles import Ready, prepare

__all__ = ["Options", "bake"]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, **FP8}


def bake(
    plan: BakePlan, out: Path | Target, options: Options, *, tile: int = TILE_ELEMENTS
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the baked base to `out`, a file or a new folder, file by file.

    Gives the SHA-256 of each file by its relative name (empty without `digest`) and the certificate.
    The caller makes `out` appear as a whole if it is a folder.
    """
    tally = Tally()
    digests: dict[str, str] = {}
    with OpenBase(plan.base) as base, Inputs(plan.adapters, plan.recipe, base) as inputs:
        for name, file in plan.base.files.items():
            target = _place(out, name) if plan.writes_folder else out
            if _is_rewritten(plan, name):
                work = _Rewrite(plan, name, inputs, base, tally, tile)
                digests[name] = work.write(target, options)
            else:
                digests[name] = copy_file(file.path, target, options)
        texts = plan.additions.texts()
        for name in plan.base.others:
            if name in texts:
                digests[name] = _write_text(_place(out, name), texts[name], options)
            else:
                digests[name] = copy_file(plan.base.folder / name, _place(out, name), options)
    tally.check(plan)
    certificate = tally.certificate(plan, inputs.coefficients)
    return (digests if options.digest else {}), certificate


def _place(folder: Path | Target, name: str) -> Path:
    assert isinstance(folder, Path), "only here are there folders"
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _write_text(target: Path, text: bytes, options: Options) -> str:
    def fill(buffer: memoryview, offset: int) -> None:
        buffer[:] = text[offset : offset + len(buffer)]

    return write_blocks(target, len(text), fill, options)


def output_bytes(plan: BakePlan) -> int:
    """The size of what `bake` writes, all files together."""
    texts = plan.additions.texts()
    return (
        sum(
            _placed(plan, name).file_size if _is_rewritten(plan, name) else file.header.file_size
            for name, file in plan.base.files.items()
        )
        + sum(len(text) for text in texts.values())
        + sum((plan.base.folder / n).stat().st_size for n in plan.base.others if n not in texts)
    )


def _is_rewritten(plan: BakePlan, name: str) -> bool:
    return name in plan.patches or name in plan.additions.tensors


def _placed(plan: BakePlan, name: str) -> Layout:
    """Header and offsets of a file of the output: the base's tensors, then those that are added."""
    header = plan.base.files[name].header
    tensors = [(key, info.dtype, info.shape) for key, info in header.tensors.items()]
    added = plan.additions.tensors.get(name, {})
    tensors += [(key, its.dtype, its.shape) for key, its in added.items()]
    return layout(tensors, provenance.of_bake(plan, header.metadata))


@dataclass(frozen=True, slots=True)
class _Segment:
    """Bytes `begin` to `end` of the output: those of `key` from its byte `start` on, as they are in
    the base or changed by a patch. `scales` is the key of the fp8 weight whose scale they are.
    """

    begin: int
    end: int
    key: str
    start: int
    patch: Patch | None
    scales: str | None = None


def _segments(placed: Layout, patches: Mapping[str, tuple[Patch, ...]]) -> Iterator[_Segment]:
    """Everything behind the header in the order of its bytes, every byte in one segment."""
    scales = {its[0].scale.key: key for key, its in patches.items() if its[0].scale is not None}
    for key, info in placed.tensors.items():
        begin = len(placed.head) + info.begin
        at = 0
        if key in scales:
            yield _Segment(begin, begin + info.size_bytes, key, 0, None, scales[key])
            continue
        for patch in patches.get(key, ()):
            row_bytes = patch.columns * (DTYPE_BITS[info.dtype] // 8)
            first = patch.first_row * row_bytes
            if first > at:
                yield _Segment(begin + at, begin + first, key, at, None)
            at = first + patch.rows * row_bytes
            yield _Segment(begin + first, begin + at, key, first, patch)
        if info.size_bytes > at:
            yield _Segment(begin + at, begin + info.size_bytes, key, at, None)


class _Scratch(threading.local):
    """Buffers of one thread, allocated once: a page that is touched first costs as much as a tile."""

    def __init__(self, elements: int, working: torch.dtype) -> None:
        self.raw = torch.empty(elements * 4, dtype=torch.uint8)
        self.sum = torch.empty(elements, dtype=working)
        self.single = torch.empty(elements, dtype=torch.float32)
        self.rounded = torch.empty(elements * 4, dtype=torch.uint8)
        self.same = np.empty(elements, dtype=np.bool_)


class _Rewrite:
    """One file of the base, written anew with its patches applied."""

    def __init__(
        self,
        plan: BakePlan,
        name: str,
        inputs: Inputs,
        base: OpenBase,
        tally: Tally,
        tile: int,
    ) -> None:
        self._plan, self._name = plan, name
        self._inputs, self._base, self._tally, self._tile = inputs, base, tally, tile
        reproducible = plan.recipe.numerics == "reproducible"
        self._working = torch.float64 if reproducible else torch.float32
        patches = plan.patches.get(name, {})
        widest = max((p.columns for pieces in patches.values() for p in pieces), default=0)
        self._scratch = _Scratch(max(tile, widest), self._working)
        self._layout = _placed(plan, name)
        self._added = plan.additions.tensors.get(name, {})
        self._segments = list(_segments(self._layout, patches))
        self._begins = [segment.begin for segment in self._segments]
        self._ready: Shared[int, Ready] = Shared()
        self._new_scales: Shared[str, Scales] = Shared()

    def write(self, target: Path | Target, options: Options) -> str:
        """Write to `target`, whole or not at all; the SHA-256 in hex, or "" where none is wanted."""
        passed = 0

        def forget(end: int) -> None:
            nonlocal passed
            while passed < len(self._segments) and self._segments[passed].end <= end:
                self._ready.forget(passed)
                passed += 1
            if end == self._layout.file_size and not self._plan.writes_folder:
                self._tally.check(self._plan)

        source = self._base.file(self._name)
        return write_blocks(
            target,
            self._layout.file_size,
            lambda buffer, offset: self._fill(buffer, offset, source),
            options,
            forget,
        )

    def _fill(self, buffer: memoryview, offset: int, source: TensorFile) -> None:
        head = self._layout.head[offset : offset + len(buffer)]
        buffer[: len(head)] = head
        at, end = offset + len(head), offset + len(buffer)
        index = bisect_right(self._begins, at) - 1
        while at < end:
            segment = self._segments[index]
            stop = min(end, segment.end)
            part = buffer[at - offset : stop - offset]
            if segment.scales is not None:
                part[:] = self._scale_bytes(segment)[at - segment.begin : stop - segment.begin]
            elif segment.patch is None:
                self._read(segment.key, part, segment.start + at - segment.begin, source)
            else:
                self._compute(index, part, at - segment.begin, source)
            at = stop
            index += 1

    def _read(self, key: str, buffer: memoryview, start: int, source: TensorFile) -> None:
        """Bytes of a tensor of the output as they are before any patch."""
        added = self._added.get(key)
        if added is None:
            source.read_into(key, buffer, start)
        elif added.source is None:
            buffer[:] = bytes(len(buffer))
        else:
            source.read_into(added.source, buffer, start)

    def _compute(self, index: int, out: memoryview, start: int, source: TensorFile) -> None:
        """Fill `out` with the patched bytes of a segment from its byte `start` on.

        Where a block begins or ends inside a row, all of the row is computed and a part is taken.
        How many rows a product has may show in its last bits, and in float32 in what is stored:
        reproducible tiles are the same wherever blocks begin and end.
        """
        segment = self._segments[index]
        patch = segment.patch
        assert patch is not None
        ready = self._prepared(index, patch)
        row_bytes = (segment.end - segment.begin) // patch.rows
        item = row_bytes // patch.columns
        stop = start + len(out)
        last, step = -(-stop // row_bytes), max(1, self._tile // patch.columns)
        first, end = start // row_bytes, last
        if self._working is torch.float64:
            first, end = first - first % step, patch.rows
        found = Touched()
        for row in range(first, last, step):
            at = row * row_bytes
            rows = min(step, end - row)
            tile = self._compute_tile(segment, patch, ready, row, rows, source)
            low, high = max(start, at), min(stop, at + len(tile.stored))
            out[low - start : high - start] = _bytes(tile.stored[low - at : high - at])
            # Every element is counted once, in the block in which it begins.
            counted = slice(-(-(low - at) // item), -(-(high - at) // item))
            found.add(tile.counted(counted, has_norm=ready.norm is None and not patch.is_copy))
        if ready.norm is not None and start == 0 and not patch.is_copy:
            found.squared = ready.norm**2
        if patch.terms:
            is_bias = patch.parameter == "bias"
            self._tally.add(f"{patch.name}.bias" if is_bias else patch.name, found)

    def _prepare(self, patch: Patch) -> Ready:
        def read_base(entry: Entry, parameter: str, is_copy: bool) -> torch.Tensor | None:
            return self._base.read(entry, parameter, self._working, is_copy=is_copy)

        ready = prepare(patch, self._inputs, read_base, self._working)
        self._inputs.forget(patch.terms, self._working)
        return ready

    def _compute_tile(
        self,
        segment: _Segment,
        patch: Patch,
        ready: Ready,
        row: int,
        rows: int,
        source: TensorFile,
    ) -> "_Tile":
        """`rows` rows of a patch from its row `row` on, as they will be stored."""
        stored_as = self._layout.tensors[segment.key].dtype
        dtype, is_fp8 = _DTYPES[stored_as], stored_as in FP8
        scales = self._scales(segment.key, patch.scale, source) if patch.scale else None
        total, raw = self._widened(segment, patch, row, rows, source)
        if scales is not None:
            scales.widen(total, patch.first_row + row)
        before = total.clone() if is_fp8 else None
        delta = ready.add(total, row)
        if before is not None:
            delta = total - before
        if self._working is torch.float64:
            # By way of float32, as torch itself casts float64 to a half; the recipe's promise is
            # about bytes, so the path is said here and not left to a library.
            single = self._scratch.single[: total.numel()].view(total.shape)
            total = single.copy_(total)
        if scales is not None:
            scales.narrow(total, patch.first_row + row)
        rounded = self._scratch.rounded[: len(raw)].view(dtype).view(total.shape)
        rounded.copy_(total)
        stored = self._scratch.rounded[: len(raw)].numpy()
        # Casting to E4M3 gives NaN or the largest number, as the library pleases.
        is_clipped = is_fp8 and bool(total.abs().max() >= TOO_LARGE[stored_as])
        if is_clipped or _holds_inf_or_nan(stored, stored_as):
            self._refuse(segment.key, raw.view(dtype), source)
        if is_fp8:
            assert before is not None
            after = rounded.to(before.dtype)
            if scales is not None:
                after = scales.restore(after, patch.first_row + row)
            return _Tile(stored, (after == before).view(-1).numpy(), delta, after.sub_(before))
        same = self._scratch.same[: total.numel()]
        bits = _UNSIGNED[dtype.itemsize]
        np.equal(raw.numpy().view(bits), stored.view(bits), out=same)
        return _Tile(stored, same, delta, None)

    def _widened(
        self, segment: _Segment, patch: Patch, row: int, rows: int, source: TensorFile
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a patch in the working dtype, and the bytes they are stored as."""
        dtype = _DTYPES[self._layout.tensors[segment.key].dtype]
        elements = rows * patch.columns
        raw = self._scratch.raw[: elements * dtype.itemsize]
        start = segment.start + row * patch.columns * dtype.itemsize
        self._read(segment.key, _bytes(raw.numpy()), start, source)
        total = self._scratch.sum[:elements].view(rows, patch.columns)
        return total.copy_(raw.view(dtype).view(total.shape)), raw

    def _scales(self, key: str, scale: Scale, source: TensorFile) -> Scales:
        """The scales of an fp8 weight: all of its new values are looked at before the first is
        rounded.
        """
        return self._new_scales.get(key, lambda: self._find_scales(key, scale, source))

    def _scale_bytes(self, segment: _Segment) -> bytes:
        assert segment.scales is not None
        source = self._base.file(self._name)
        patch = self._plan.patches[self._name][segment.scales][0]
        assert patch.scale is not None
        scales = self._scales(segment.scales, patch.scale, source)
        stored = source.read_tensor(segment.key)
        return bytes(raw_bytes(scales.new.to(stored.dtype).reshape(stored.shape)))

    def _find_scales(self, key: str, scale: Scale, source: TensorFile) -> Scales:
        stored = read_scale(source, scale)
        old = Scales(scale, as_groups(stored, scale), as_groups(stored, scale))

        def values() -> Iterator[tuple[int, torch.Tensor]]:
            for index, segment in enumerate(self._segments):
                patch = segment.patch
                if segment.key != key or patch is None:
                    continue
                ready = self._prepared(index, patch)
                step = max(1, self._tile // patch.columns)
                for row in range(0, patch.rows, step):
                    rows = min(step, patch.rows - row)
                    total, _ = self._widened(segment, patch, row, rows, source)
                    old.widen(total, patch.first_row + row)
                    if not total.isfinite().all():
                        raise NotFinite(source.name, key)
                    ready.add(total, row)
                    yield patch.first_row + row, total

        return new_scales(scale, stored, source.header.tensors[key].dtype, values())

    def _prepared(self, index: int, patch: Patch) -> Ready:
        return self._ready.get(index, lambda: self._prepare(patch))

    def _refuse(self, key: str, before: torch.Tensor, source: TensorFile) -> None:
        if not before.float().isfinite().all():  # isfinite itself knows no fp8
            raise NotFinite(source.name, key)
        raise Overflow(source.name, key, self._layout.tensors[key].dtype)


class _Tile(NamedTuple):
    """Valid until the thread's next tile. `delta` is the change where somebody asks for it, `kept`
    what became of it in fp8.
    """

    stored: NDArray[np.uint8]
    same: NDArray[np.bool_]
    delta: torch.Tensor | None
    kept: torch.Tensor | None

    def counted(self, elements: slice, *, has_norm: bool) -> Touched:
        """What happened to some of its elements."""
        found = Touched(elements.stop - elements.start, int(np.count_nonzero(self.same[elements])))
        if self.delta is None:
            return found
        delta = self.delta.view(-1)[elements]
        squared = torch.dot(delta, delta).item()
        if has_norm:
            found.squared = squared
        if self.kept is not None:
            found.is_fp8, found.wanted = True, squared
            found.kept = torch.dot(self.kept.view(-1)[elements], delta).item()
        return found


_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {1: np.int8, 2: np.int16, 4: np.int32}
# Bits of +Inf: those of NaN are above it, of every finite number below it. E4M3 has NaN alone.
_INF = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F}


def _holds_inf_or_nan(stored: NDArray[np.uint8], dtype: str) -> bool:
    """Two integer maxima are a quarter of the work of asking the numbers (torch.aminmax)."""
    width = _DTYPES[dtype].itemsize
    sign = 1 << (8 * width - 1)
    # As signed integers negative numbers are below all others, as unsigned ones above.
    positive = stored.view(_SIGNED[width]).max()
    negative = stored.view(_UNSIGNED[width]).max()
    return bool(positive >= _INF[dtype] or negative >= sign + _INF[dtype])


def _bytes(array: NDArray[np.uint8]) -> memoryview:
    view: Any = array
    return memoryview(view)
