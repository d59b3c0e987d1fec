"""Base + strength * delta -> a checkpoint of the same layout, streamed.

A file is written in the order of its bytes by a few threads, in blocks (merge.blocks). Untouched
tensors are read into them as they are; touched ones go through tiles of 256 Ki elements that stay
in the processor's cache: read, widen, add the sum of all deltas, round once. Each thread's product
is single-threaded, because tiles are small and the file offers parallelism enough.
benchmarks/bake.py prints the ratio to a plain copy.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merge import provenance
from merge.algorithms import lora
from merge.bases import BaseFile
from merge.blocks import Options, copy_file, write_blocks
from merge.errors import NotFinite, Overflow
from merge.formats.reader import TensorFile
from merge.formats.writer import Layout, layout
from merge.inputs import Inputs, open_as_planned
from merge.methods import linear
from merge.plan import TILE_ELEMENTS, BakePlan, Patch

__all__ = ["Options", "bake"]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def bake(
    plan: BakePlan, out: Path, options: Options, *, tile: int = TILE_ELEMENTS
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the baked base to `out`, a file or a new folder, file by file.

    Gives the SHA-256 of each file by its relative name (empty without `digest`) and the certificate.
    The caller makes `out` appear as a whole if it is a folder.
    """
    tally = _Tally()
    digests: dict[str, str] = {}
    with Inputs(plan.adapters) as inputs:
        for name, file in plan.base.files.items():
            target = out / name if plan.base.layout == "folder" else out
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in plan.patches:
                work = _Rewrite(plan, file, plan.patches[name], inputs, tally, tile)
                digests[name] = work.write(target, options)
            else:
                digests[name] = copy_file(file.path, target, options)
        for name in plan.base.others:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            digests[name] = copy_file(plan.base.path / name, out / name, options)
    return (digests if options.digest else {}), tally.certificate(plan)


def output_bytes(plan: BakePlan) -> int:
    """The size of what `bake` writes, all files together."""
    rewritten = {name: _placed(plan, plan.base.files[name]).file_size for name in plan.patches}
    untouched = (f.header.file_size for n, f in plan.base.files.items() if n not in rewritten)
    others = ((plan.base.path / name).stat().st_size for name in plan.base.others)
    return sum(rewritten.values()) + sum(untouched) + sum(others)


def _placed(plan: BakePlan, file: BaseFile) -> Layout:
    tensors = [(key, info.dtype, info.shape) for key, info in file.header.tensors.items()]
    return layout(tensors, provenance.of_bake(plan, file.header.metadata))


class _Tally:
    """What happened to the elements that were touched, module by module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._elements: dict[str, int] = {}
        self._unchanged: dict[str, int] = {}
        self._norms: dict[str, float] = {}

    def add(self, module: str, elements: int, unchanged: int) -> None:
        with self._lock:
            self._elements[module] = self._elements.get(module, 0) + elements
            self._unchanged[module] = self._unchanged.get(module, 0) + unchanged

    def set_norm(self, module: str, norm: float) -> None:
        with self._lock:
            self._norms[module] = norm

    def certificate(self, plan: BakePlan) -> dict[str, Any]:
        elements, unchanged = sum(self._elements.values()), sum(self._unchanged.values())
        return {
            "kind": "bake",
            "numerics": plan.recipe.numerics,
            "elements": elements,
            "unchanged": unchanged / elements if elements else 0.0,
            "left_out": list(plan.left_out),
            "modules": {
                name: {
                    "norm": _digits(self._norms[name]),
                    "unchanged": _digits(self._unchanged[name] / touched),
                }
                for name, touched in sorted(self._elements.items())
            },
        }


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
            row_bytes = info.size_bytes // info.shape[0]
            first = patch.slice.first_row * row_bytes
            if first > at:
                yield _Segment(begin + at, begin + first, key, at, None)
            at = first + patch.slice.rows * row_bytes
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
        file: BaseFile,
        patches: Mapping[str, tuple[Patch, ...]],
        inputs: Inputs,
        tally: _Tally,
        tile: int,
    ) -> None:
        self._file, self._inputs, self._tally, self._tile = file, inputs, tally, tile
        reproducible = plan.recipe.numerics == "reproducible"
        self._working = torch.float64 if reproducible else torch.float32
        widest = max(patch.slice.columns for pieces in patches.values() for patch in pieces)
        self._scratch = _Scratch(max(tile, widest), self._working)
        self._layout = _placed(plan, file)
        self._segments = list(_segments(self._layout, patches))
        self._begins = [segment.begin for segment in self._segments]
        self._ready = _Ready()

    def write(self, target: Path, options: Options) -> str:
        """Write to `target`, whole or not at all; the SHA-256 in hex, or "" where none is wanted."""
        passed = 0

        def forget(end: int) -> None:
            nonlocal passed
            while passed < len(self._segments) and self._segments[passed].end <= end:
                self._ready.forget(passed)
                passed += 1

        with open_as_planned(self._file.path, self._file.header) as source:
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
        assert segment.patch is not None
        piece = segment.patch.slice
        factors = self._ready.get(index, lambda: self._prepare(segment.patch))  # type: ignore[arg-type]
        row_bytes = (segment.end - segment.begin) // piece.rows
        item = row_bytes // piece.columns
        stop = start + len(out)
        last, step = -(-stop // row_bytes), max(1, self._tile // piece.columns)
        touched = unchanged = 0
        for row in range(start // row_bytes, last, step):
            up = factors.up[row : min(row + step, last)]
            at = row * row_bytes
            tile, same = self._write_tile(segment.key, segment.start + at, up, factors.down, source)
            low, high = max(start, at), min(stop, at + len(tile))
            out[low - start : high - start] = _bytes(tile[low - at : high - at])
            # Every element is counted once, in the block in which it begins.
            counted = same[-(-(low - at) // item) : -(-(high - at) // item)]
            touched += len(counted)
            unchanged += int(np.count_nonzero(counted))
        self._tally.add(segment.patch.module.name, touched, unchanged)

    def _prepare(self, patch: Patch) -> lora.Factors:
        factors = linear.concatenate(*self._inputs.parts(patch.module, self._working))
        self._tally.set_norm(patch.module.name, lora.norm(factors))
        return lora.transposed(factors) if patch.slice.transposed else factors

    def _write_tile(
        self,
        key: str,
        start: int,
        up: torch.Tensor,
        down: torch.Tensor,
        source: TensorFile,
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The rows of `key` from byte `start` on with up @ down added, as they will be stored, and
        which elements stayed the same; valid until the thread's next tile.
        """
        dtype = _DTYPES[source.header.tensors[key].dtype]
        shape, elements = (up.shape[0], down.shape[1]), up.shape[0] * down.shape[1]
        scratch = self._scratch
        raw = scratch.raw[: elements * dtype.itemsize]
        rounded = scratch.rounded[: elements * dtype.itemsize]
        source.read_into(key, _bytes(raw.numpy()), start)
        total = scratch.sum[:elements].view(shape)
        total.copy_(raw.view(dtype).view(shape))
        total.addmm_(up, down)
        if self._working is torch.float64:
            # By way of float32, as torch itself casts float64 to a half; the recipe's promise is
            # about bytes, so the path is said here and not left to a library.
            single = scratch.single[:elements].view(shape)
            total = single.copy_(total)
        rounded.view(dtype).view(shape).copy_(total)
        before, after = raw.numpy(), rounded.numpy()
        if _holds_inf_or_nan(after, source.header.tensors[key].dtype):
            self._refuse(key, raw.view(dtype), source)
        same = scratch.same[:elements]
        bits = _UNSIGNED[dtype.itemsize]
        np.equal(before.view(bits), after.view(bits), out=same)
        return after, same

    def _refuse(self, key: str, before: torch.Tensor, source: TensorFile) -> None:
        if not before.isfinite().all():
            raise NotFinite(source.name, key)
        raise Overflow(source.name, key, source.header.tensors[key].dtype)


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


class _Ready:
    """What several threads need of a segment, computed by the first of them and then shared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, Future[lora.Factors]] = {}

    def get(self, index: int, compute: Callable[[], lora.Factors]) -> lora.Factors:
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
