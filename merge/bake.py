"""Base + strength * delta -> a checkpoint of the same layout, streamed.

A file is rewritten in the order of its bytes by a few worker threads. Untouched tensors are copied
by the kernel where it can; a touched tensor goes through tiles of 256 Ki elements that stay in the
cache: read, widen, add the sum of all deltas, round once, write. Each thread's product is
single-threaded, because tiles are small and the file offers parallelism enough.
benchmarks/bake.py prints the ratio to a plain copy.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge import provenance
from merge.algorithms import lora
from merge.bases import BaseFile
from merge.errors import CannotWrite, NotFinite, Overflow
from merge.formats.header import Header
from merge.formats.positioned import begin_writeback, copy_between, read_at
from merge.formats.reader import TensorFile
from merge.formats.writer import FileWriter
from merge.inputs import Inputs, open_as_planned
from merge.methods import linear
from merge.plan import TILE_ELEMENTS, BakePlan, Patch
from merge.threads import Cancelled, run_in_order

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_BITS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
_HASH_BYTES = 2**20
_COPY_BYTES = 64 * 2**20
_SEND_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """How, not what: none of these changes a byte of a reproducible bake."""

    workers: int
    digest: bool
    progress: Callable[[int], None]  # bytes just finished
    cancelled: Callable[[], bool]
    tile: int = TILE_ELEMENTS


def bake(plan: BakePlan, out: Path, options: Options) -> tuple[dict[str, str], dict[str, Any]]:
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
                work = _Rewrite(plan, file, plan.patches[name], inputs, tally, options)
                digests[name] = work.write(target)
            else:
                digests[name] = copy_file(file.path, target, options)
        for name in plan.base.others:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            digests[name] = copy_file(plan.base.path / name, out / name, options)
    return (digests if options.digest else {}), tally.certificate(plan)


class _Tally:
    """What happened to the elements that were touched, module by module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._modules: dict[str, tuple[int, int, float]] = {}

    def add(self, module: str, elements: int, unchanged: int, norm: float) -> None:
        with self._lock:
            before, same, _ = self._modules.get(module, (0, 0, 0.0))
            self._modules[module] = (before + elements, same + unchanged, norm)

    def certificate(self, plan: BakePlan) -> dict[str, Any]:
        elements = sum(touched for touched, _, _ in self._modules.values())
        unchanged = sum(same for _, same, _ in self._modules.values())
        return {
            "kind": "bake",
            "numerics": plan.recipe.numerics,
            "elements": elements,
            "unchanged": unchanged / elements if elements else 0.0,
            "left_out": list(plan.left_out),
            "modules": {
                name: {"norm": _digits(norm), "unchanged": _digits(same / touched)}
                for name, (touched, same, norm) in sorted(self._modules.items())
            },
        }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True, slots=True)
class _Step:
    """Bytes `start` to `start + size` of a tensor: to copy, or with a patch to compute."""

    key: str
    start: int
    size: int
    patch: Patch | None


def _steps(header: Header, patches: Mapping[str, tuple[Patch, ...]]) -> Iterator[_Step]:
    """The data region in the order of its bytes, every byte in one step."""
    for key, info in header.tensors.items():
        at = 0
        for patch in patches.get(key, ()):
            row_bytes = info.size_bytes // info.shape[0]
            begin = patch.slice.first_row * row_bytes
            yield from _copies(key, at, begin)
            at = begin + patch.slice.rows * row_bytes
            yield _Step(key, begin, at - begin, patch)
        yield from _copies(key, at, info.size_bytes)


def _copies(key: str, begin: int, end: int) -> Iterator[_Step]:
    for start in range(begin, end, _COPY_BYTES):
        yield _Step(key, start, min(_COPY_BYTES, end - start), None)


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
        options: Options,
    ) -> None:
        self._plan, self._file, self._patches = plan, file, patches
        self._inputs, self._tally, self._options = inputs, tally, options
        reproducible = plan.recipe.numerics == "reproducible"
        self._working = torch.float64 if reproducible else torch.float32
        widest = max(patch.slice.columns for pieces in patches.values() for patch in pieces)
        self._scratch = _Scratch(max(options.tile, widest), self._working)

    def write(self, target: Path) -> str:
        """Write to `target`, whole or not at all; the SHA-256 in hex, or "" where none is wanted.

        The digest is read back from the page cache behind the writers, while they are at work.
        """
        header = self._file.header
        tensors = [(key, info.dtype, info.shape) for key, info in header.tensors.items()]
        metadata = provenance.of_bake(self._plan, header.metadata)
        steps = list(_steps(header, self._patches))
        with (
            open_as_planned(self._file.path, header) as source,
            FileWriter(target, tensors, metadata) as writer,
        ):
            behind = _Behind(writer.fileno(), target.name, self._options.digest)
            behind.advance(writer.data_offset)
            self._options.progress(header.data_offset)

            def finished(index: int) -> None:
                behind.advance(steps[index].size)
                self._options.progress(steps[index].size)

            run_in_order(
                steps,
                lambda step: self._write_step(step, source, writer),
                workers=self._options.workers,
                finished=finished,
                cancelled=self._options.cancelled,
            )
        return behind.hexdigest()

    def _write_step(self, step: _Step, source: TensorFile, writer: FileWriter) -> None:
        if step.patch is None:
            begin = source.header.data_offset + source.header.tensors[step.key].begin
            writer.copy(step.key, source.fileno(), begin + step.start, step.start, step.size)
            return
        piece, module = step.patch.slice, step.patch.module
        factors = linear.concatenate(*self._inputs.parts(module, self._working))
        oriented = lora.transposed(factors) if piece.transposed else factors
        unchanged = 0
        rows = max(1, self._options.tile // piece.columns)
        row_bytes = step.size // piece.rows
        for first in range(0, piece.rows, rows):
            up = oriented.up[first : first + rows]
            start = step.start + first * row_bytes
            unchanged += self._write_tile(step.key, start, up, oriented.down, source, writer)
        elements = piece.rows * piece.columns
        self._tally.add(module.name, elements, unchanged, lora.norm(factors))

    def _write_tile(
        self,
        key: str,
        start: int,
        up: torch.Tensor,
        down: torch.Tensor,
        source: TensorFile,
        writer: FileWriter,
    ) -> int:
        """Add up @ down to the rows of `key` at byte `start`; how many elements stayed the same."""
        dtype = _DTYPES[source.header.tensors[key].dtype]
        shape, elements = (up.shape[0], down.shape[1]), up.shape[0] * down.shape[1]
        scratch = self._scratch
        raw = scratch.raw[: elements * dtype.itemsize]
        rounded = scratch.rounded[: elements * dtype.itemsize]
        source.read_into(key, _bytes(raw), start)
        total = scratch.sum[:elements].view(shape)
        total.copy_(raw.view(dtype).view(shape))
        total.addmm_(up, down)
        if self._working is torch.float64:
            # By way of float32, as torch itself casts float64 to a half; the recipe's promise is
            # about bytes, so the path is said here and not left to a library.
            single = scratch.single[:elements].view(shape)
            total = single.copy_(total)
        stored = rounded.view(dtype)
        stored.view(shape).copy_(total)
        low, high = torch.aminmax(stored)
        if not (low > -torch.inf and high < torch.inf):  # false for NaN too
            self._refuse(key, raw.view(dtype), source)
        writer.write(key, _bytes(rounded), start)
        bits = _BITS[dtype.itemsize]
        same = scratch.same[:elements]
        np.equal(raw.numpy().view(bits), rounded.numpy().view(bits), out=same)
        return int(np.count_nonzero(same))

    def _refuse(self, key: str, before: torch.Tensor, source: TensorFile) -> None:
        if not before.isfinite().all():
            raise NotFinite(source.name, key)
        raise Overflow(source.name, key, source.header.tensors[key].dtype)


def _bytes(buffer: torch.Tensor) -> memoryview:
    array: Any = buffer.numpy()
    return memoryview(array)


class _Behind:
    """Follows the writers of a file, in order: takes its SHA-256 and sends it on to the disk."""

    def __init__(self, fd: int, name: str, digest: bool) -> None:
        self._fd, self._name, self._wants_digest = fd, name, digest
        self._digest = hashlib.sha256()
        self._at = self._sent = 0
        self._buffer = memoryview(bytearray(_HASH_BYTES))

    def advance(self, size: int) -> None:
        """The next `size` bytes of the file are final."""
        end = self._at + size
        while self._wants_digest and self._at < end:
            chunk = self._buffer[: min(len(self._buffer), end - self._at)]
            if read_at(self._fd, chunk, self._at) != len(chunk):
                raise CannotWrite(self._name, "the file became shorter while it was written")
            self._digest.update(chunk)
            self._at += len(chunk)
        self._at = end
        if self._at - self._sent >= _SEND_BYTES:
            begin_writeback(self._fd, self._sent, self._at - self._sent)
            self._sent = self._at

    def hexdigest(self) -> str:
        """The SHA-256 of everything so far, or "" where none is wanted."""
        return self._digest.hexdigest() if self._wants_digest else ""


def copy_file(source: Path, target: Path, options: Options) -> str:
    """Copy a file that nothing changes, durably; its SHA-256 in hex, or "" where none is wanted."""
    try:
        with source.open("rb") as reading, target.open("x+b") as writing:
            behind = _Behind(writing.fileno(), target.name, options.digest)
            at, size = 0, source.stat().st_size
            while at < size:
                if options.cancelled():
                    raise Cancelled
                step = min(_COPY_BYTES, size - at)
                if copy_between(reading.fileno(), at, writing.fileno(), at, step) != step:
                    raise CannotWrite(target.name, f"{source.name} became shorter while copied")
                behind.advance(step)
                options.progress(step)
                at += step
            os.fsync(writing.fileno())
    except OSError as error:
        raise CannotWrite(target.name, error.strerror or str(error)) from error
    return behind.hexdigest()
