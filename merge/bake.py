"""Base + strength * delta -> a checkpoint of the same layout, streamed.

A file is written in the order of its bytes by a few threads, in blocks (merge.blocks). Untouched
tensors are read into them as they are; touched ones go through tiles of 256 Ki elements that stay
in the processor's cache: read, widen, add the sum of all deltas, round once. Each thread's product
is single-threaded, because tiles are small and the file offers parallelism enough.
benchmarks/bake.py prints the ratio to a plain copy.
"""

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from merge import provenance
from merge.bases import BaseFile
from merge.blocks import Options, copy_file, write_blocks
from merge.errors import NotFinite, Overflow
from merge.formats.adapters import Entry
from merge.formats.header import DTYPE_BITS
from merge.formats.reader import TensorFile
from merge.formats.targets import Target
from merge.formats.writer import Layout, layout
from merge.inputs import Inputs, OpenBase
from merge.patches import Patch
from merge.plan import TILE_ELEMENTS, BakePlan
from merge.tiles import Ready, prepare

__all__ = ["Options", "bake"]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def bake(
    plan: BakePlan, out: Path | Target, options: Options, *, tile: int = TILE_ELEMENTS
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the baked base to `out`, a file or a new folder, file by file.

    Gives the SHA-256 of each file by its relative name (empty without `digest`) and the certificate.
    The caller makes `out` appear as a whole if it is a folder.
    """
    tally = _Tally()
    digests: dict[str, str] = {}
    with Inputs(plan.adapters) as inputs, OpenBase(plan.base) as base:
        for name, file in plan.base.files.items():
            target = _place(out, name) if plan.writes_folder else out
            if name in plan.patches:
                work = _Rewrite(plan, name, inputs, base, tally, tile)
                digests[name] = work.write(target, options)
            else:
                digests[name] = copy_file(file.path, target, options)
        for name in plan.base.others:
            digests[name] = copy_file(plan.base.folder / name, _place(out, name), options)
    return (digests if options.digest else {}), tally.certificate(plan)


def _place(folder: Path | Target, name: str) -> Path:
    assert isinstance(folder, Path), "only here are there folders"
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def output_bytes(plan: BakePlan) -> int:
    """The size of what `bake` writes, all files together."""
    rewritten = {name: _placed(plan, plan.base.files[name]).file_size for name in plan.patches}
    untouched = (f.header.file_size for n, f in plan.base.files.items() if n not in rewritten)
    others = ((plan.base.folder / name).stat().st_size for name in plan.base.others)
    return sum(rewritten.values()) + sum(untouched) + sum(others)


def _placed(plan: BakePlan, file: BaseFile) -> Layout:
    tensors = [(key, info.dtype, info.shape) for key, info in file.header.tensors.items()]
    return layout(tensors, provenance.of_bake(plan, file.header.metadata))


class _Tally:
    """What happened to the elements that were touched, by parameter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, _Touched] = defaultdict(_Touched)

    def add(self, name: str, elements: int, unchanged: int, squared: float) -> None:
        """`squared` is a sum over these elements, of the change itself."""
        with self._lock:
            touched = self._found[name]
            touched.elements += elements
            touched.unchanged += unchanged
            touched.squared += squared

    def certificate(self, plan: BakePlan) -> dict[str, Any]:
        elements = sum(touched.elements for touched in self._found.values())
        unchanged = sum(touched.unchanged for touched in self._found.values())
        return {
            "kind": "bake",
            "numerics": plan.recipe.numerics,
            "elements": elements,
            "unchanged": unchanged / elements if elements else 0.0,
            "left_out": list(plan.left_out),
            "notes": list(plan.notes),
            "modules": {
                name: {
                    "norm": _digits(sqrt(touched.squared)),
                    "unchanged": _digits(touched.unchanged / touched.elements),
                }
                for name, touched in sorted(self._found.items())
            },
        }


@dataclass(slots=True)
class _Touched:
    elements: int = 0
    unchanged: int = 0
    squared: float = 0.0


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True, slots=True)
class _Segment:
    """Bytes `begin` to `end` of the output: those of `key` from its byte `start` on, as they are in
    the base or changed by a patch.
    """

    begin: int
    end: int
    key: str
    start: int
    patch: Patch | None


def _segments(placed: Layout, patches: Mapping[str, tuple[Patch, ...]]) -> Iterator[_Segment]:
    """Everything behind the header in the order of its bytes, every byte in one segment."""
    for key, info in placed.tensors.items():
        begin = len(placed.head) + info.begin
        at = 0
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
        tally: _Tally,
        tile: int,
    ) -> None:
        self._plan, self._name = plan, name
        self._inputs, self._base, self._tally, self._tile = inputs, base, tally, tile
        reproducible = plan.recipe.numerics == "reproducible"
        self._working = torch.float64 if reproducible else torch.float32
        patches = plan.patches[name]
        widest = max(patch.columns for pieces in patches.values() for patch in pieces)
        self._scratch = _Scratch(max(tile, widest), self._working)
        self._layout = _placed(plan, plan.base.files[name])
        self._segments = list(_segments(self._layout, patches))
        self._begins = [segment.begin for segment in self._segments]
        self._ready = _Shared()

    def write(self, target: Path | Target, options: Options) -> str:
        """Write to `target`, whole or not at all; the SHA-256 in hex, or "" where none is wanted."""
        passed = 0

        def forget(end: int) -> None:
            nonlocal passed
            while passed < len(self._segments) and self._segments[passed].end <= end:
                self._ready.forget(passed)
                passed += 1

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
            if segment.patch is None:
                source.read_into(segment.key, part, segment.start + at - segment.begin)
            else:
                self._compute(index, part, at - segment.begin, source)
            at = stop
            index += 1

    def _compute(self, index: int, out: memoryview, start: int, source: TensorFile) -> None:
        """Fill `out` with the patched bytes of a segment from its byte `start` on.

        Where a block begins or ends inside a row, all of the row is computed and a part is taken.
        """
        segment = self._segments[index]
        patch = segment.patch
        assert patch is not None
        ready = self._ready.get(index, lambda: self._prepare(patch))
        row_bytes = (segment.end - segment.begin) // patch.rows
        item = row_bytes // patch.columns
        stop = start + len(out)
        last, step = -(-stop // row_bytes), max(1, self._tile // patch.columns)
        touched, unchanged, squared = 0, 0, 0.0
        for row in range(start // row_bytes, last, step):
            at = row * row_bytes
            rows = min(step, last - row)
            tile = self._compute_tile(segment, patch, ready, row, rows, source)
            low, high = max(start, at), min(stop, at + len(tile.stored))
            out[low - start : high - start] = _bytes(tile.stored[low - at : high - at])
            # Every element is counted once, in the block in which it begins.
            counted = slice(-(-(low - at) // item), -(-(high - at) // item))
            touched += counted.stop - counted.start
            unchanged += int(np.count_nonzero(tile.same[counted]))
            if tile.delta is not None and not patch.is_copy:
                squared += tile.delta.view(-1)[counted].square().sum(dtype=torch.float64).item()
        if ready.norm is not None and start == 0 and not patch.is_copy:
            squared = ready.norm**2
        is_bias = patch.parameter == "bias"
        name = f"{patch.name}.bias" if is_bias else patch.name
        self._tally.add(name, touched, unchanged, squared)

    def _prepare(self, patch: Patch) -> Ready:
        def read_base(entry: Entry, parameter: str, is_copy: bool) -> torch.Tensor | None:
            return self._base.read(entry, parameter, self._working, is_copy=is_copy)

        return prepare(patch, self._inputs, read_base, self._working)

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
        stored_as = source.header.tensors[segment.key].dtype
        dtype = _DTYPES[stored_as]
        shape, elements = (rows, patch.columns), rows * patch.columns
        scratch = self._scratch
        raw = scratch.raw[: elements * dtype.itemsize]
        rounded = scratch.rounded[: elements * dtype.itemsize]
        start = segment.start + row * patch.columns * dtype.itemsize
        source.read_into(segment.key, _bytes(raw.numpy()), start)
        total = scratch.sum[:elements].view(shape)
        total.copy_(raw.view(dtype).view(shape))
        before = None if ready.norm is not None else total.clone()
        ready.add(total, row)
        delta = None if before is None else total - before
        if self._working is torch.float64:
            # By way of float32, as torch itself casts float64 to a half; the recipe's promise is
            # about bytes, so the path is said here and not left to a library.
            single = scratch.single[:elements].view(shape)
            total = single.copy_(total)
        rounded.view(dtype).view(shape).copy_(total)
        stored = rounded.numpy()
        if _holds_inf_or_nan(stored, stored_as):
            self._refuse(segment.key, raw.view(dtype), source)
        same = scratch.same[:elements]
        bits = _UNSIGNED[dtype.itemsize]
        np.equal(raw.numpy().view(bits), stored.view(bits), out=same)
        return _Tile(stored, same, delta)

    def _refuse(self, key: str, before: torch.Tensor, source: TensorFile) -> None:
        if not before.isfinite().all():
            raise NotFinite(source.name, key)
        raise Overflow(source.name, key, source.header.tensors[key].dtype)


class _Tile(NamedTuple):
    """Valid until the thread's next tile. `delta` is None where its norm is known otherwise."""

    stored: NDArray[np.uint8]
    same: NDArray[np.bool_]
    delta: torch.Tensor | None


_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {2: np.int16, 4: np.int32}
# Bits of +Inf: those of NaN are above it, of every finite number below it.
_INF = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000}


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


class _Shared:
    """What several threads need of a segment, computed by the first of them and then shared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, Future[Ready]] = {}

    def get(self, index: int, compute: Callable[[], Ready]) -> Ready:
        with self._lock:
            future = self._held.get(index)
            if is_first := future is None:
                future = self._held[index] = Future()
        if is_first:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()

    def forget(self, index: int) -> None:
        self._held.pop(index, None)
