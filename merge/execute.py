"""Run a plan: tensors in files -> tensors in files, whole or not at all.

Memory above the imports, with w worker threads:
an extraction holds its output twice and, per worker, the subspace of a layer (merge.rangefinder);
a merge holds its output and, per worker, six copies of the largest module's stacked factors (or
six matrices as large as its change, where that is no low-rank product);
a bake holds, per worker and once more, three copies of the largest patch's stacked factors (or four
matrices as large as its weight, where the change is no low-rank product), one set of tile buffers
(29 bytes for each of 256 Ki elements) and a block of 8 MiB, and for all of them two blocks more,
however large the base is; blocks for another place may be larger, and more (its Target says);
a method of the core takes eight copies of a unit's stacked factors in float64 more per worker, and
what is made of units that several layers share is kept for eight of them (merge.units).
`plan.cost.memory_bytes` is this bound for two workers.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from merge.bake import Options, bake, output_bytes
from merge.blocks import copy_file
from merge.combine import combine
from merge.errors import CannotWrite
from merge.extract import extract
from merge.extract_plan import ExtractPlan
from merge.formats.folders import digest_of_files, folder_digest
from merge.formats.hashes import sha256_file
from merge.formats.positioned import sync_folder
from merge.formats.targets import Target
from merge.plan import BakePlan, MergePlan, Plan
from merge.threads import Cancelled, default_workers

__all__ = ["Cancelled", "Outcome", "execute"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written. `sha256` is that of the file, or a folder's digest as merge.formats.folders
    defines it; None where it was not asked for. `size` is in bytes.
    """

    sha256: str | None
    size: int
    certificate: dict[str, Any]
    recipe_digest: str


def execute(
    plan: Plan,
    out: Path | Target,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    *,
    workers: int | None = None,
    digest: bool = True,
) -> Outcome:
    """Write the result of a plan to `out`: a file, or a folder here where `plan.writes_folder`.

    `progress(done, total)` counts the modules of a merge, the steps of an extraction and the bytes of a bake; it is called in
    this thread. `cancelled()` is asked between steps, from any thread; then Cancelled is raised.
    A file that is at `out` already is replaced at the very end; a folder there is refused.
    """
    recipe_digest = plan.recipe.digest()
    report = progress or (lambda done, total: None)
    stop = cancelled or (lambda: False)
    threads = workers or default_workers()
    _check_target(plan, out)
    if isinstance(plan, BakePlan):
        with nullcontext(out) if not plan.writes_folder else new_folder(_here(out)) as target:
            size = output_bytes(plan)
            count = _Count(report, size)
            digests, certificate = bake(plan, target, Options(threads, digest, count.add, stop))
            sha256 = digest_of_files(digests) if plan.writes_folder else "".join(digests.values())
    else:
        with _small(plan, out, stop) as target:
            if isinstance(plan, ExtractPlan):
                certificate = extract(plan, target, out.name, threads, report, stop)
            else:
                certificate = combine(plan, target, out.name, threads, report, stop)
            sha256 = folder_digest(target) if plan.writes_folder else sha256_file(target)
            size = _size(target)
    return Outcome(sha256 if digest else None, size, certificate, recipe_digest)


@contextmanager
def _small(
    plan: MergePlan | ExtractPlan, out: Path | Target, stop: Callable[[], bool]
) -> Iterator[Path]:
    """Where an adapter is written; what shall be elsewhere is sent there when it is whole."""
    if plan.writes_folder:
        with new_folder(_here(out)) as folder:
            yield folder
    elif isinstance(out, Path):
        yield out
    else:
        with TemporaryDirectory() as scratch:
            made = Path(scratch, PurePosixPath(out.name).name)
            yield made
            copy_file(made, out, Options(1, False, lambda size: None, stop))


class _Count:
    """Steps of bytes, reported as a running sum."""

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def add(self, step: int) -> None:
        self._done += step
        self._report(self._done, self._total)


def _here(out: Path | Target) -> Path:
    """A folder is made of many files, which appear as a whole only where they can be renamed."""
    if isinstance(out, Path):
        return out
    raise CannotWrite(out.name, "the result is a folder, which can only be written to a disk here")


def _check_target(plan: Plan, out: Path | Target) -> None:
    """What can be known to fail is refused before anything is computed."""
    sources = [adapter.path for adapter in plan.adapters]
    if isinstance(plan, BakePlan):
        sources += [file.path for file in plan.base.files.values()]
    if isinstance(plan, ExtractPlan):
        both = (plan.pair.base, plan.pair.tuned)
        sources += [file.path for base in both for file in base.files.values()]
    if plan.writes_folder:
        out = _here(out)
    if not isinstance(out, Path):
        if any(out.name == file.name for file in sources if not isinstance(file, Path)):
            raise CannotWrite(out.name, "is an input of the recipe itself")
        return
    if not out.parent.is_dir():
        raise CannotWrite(out.name, f"the folder {out.parent} does not exist")
    if out.is_dir():
        raise CannotWrite(out.name, "a folder of this name exists")
    if out.exists() and plan.writes_folder:
        raise CannotWrite(out.name, "a file of this name exists")
    here = [file for file in sources if isinstance(file, Path)]
    if out.exists() and any(out.samefile(file) for file in here):
        raise CannotWrite(out.name, "is an input of the recipe itself")
    free = shutil.disk_usage(out.parent).free
    if free < plan.cost.bytes_to_write:
        detail = f"needs {plan.cost.bytes_to_write} bytes where {free} are free"
        raise CannotWrite(out.name, detail) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name at the end, or goes if anything fails."""
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.part")
    try:
        temporary.mkdir()
        yield temporary
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            sync_folder(folder)
        temporary.rename(out)
        sync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CannotWrite(out.name, error.strerror or str(error)) from error
        raise


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
