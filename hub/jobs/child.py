"""`python -m hub.jobs.child`: plan and execute one recipe in a process of its own.

It never opens the database or the blob store.
Its first line on stdin is a JSON `Spec`; stdin then stays open as the sign that the parent lives.
On stdout it writes JSON lines: `{"progress": {...}}` any number of times, then at most one of
`{"result": {...}}` or `{"error": {...}}`. Whatever else is printed goes to stderr.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict

from hub.jobs.confine import (
    be_modest,
    die_with_parent,
    die_with_pipe,
    limit_files,
    limit_memory,
)
from hub.jobs.scratch import Input, lay_out
from merge.errors import CannotWrite, MergeError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REPORT_EVERY_S = 0.1


class Spec(BaseModel):
    """One attempt of one job, as data: paths are local, names are the files' own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parent: int
    scratch: Path
    recipe: str
    inputs: list[Input]
    output: str
    memory_bytes: int
    file_bytes: int
    threads: int
    niceness: int = 10


class OutOfMemory(Exception):
    """An allocation went beyond the job's memory limit."""


def main() -> int:
    """Run the attempt that stdin describes; 0 with a result, 1 with an error line."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # a library that prints must not speak in the protocol's place
    spec = Spec.model_validate_json(sys.stdin.buffer.readline())
    die_with_pipe(sys.stdin.fileno())
    die_with_parent(spec.parent)
    be_modest(spec.niceness)
    limit_files(spec.file_bytes)
    try:
        _say(channel, result=_run(spec, channel))
    except MergeError as error:
        _say(channel, error=described(error))
        return 1
    except (MemoryError, OutOfMemory):
        message = f"the job needs more memory than the {spec.memory_bytes:,} bytes it may take"
        _say(channel, error={"code": "OutOfMemory", "message": message, "param": None})
        return 1
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _say(channel, error={"code": "NoSpace", "message": _no_space(error), "param": None})
        return 1
    return 0


def _run(spec: Spec, channel: TextIO) -> dict[str, object]:
    # Imported before the memory limit is set: the limit is for the job, not for torch itself.
    from merge.execute import execute
    from merge.plan import plan
    from merge.recipe import Recipe

    limit_memory(spec.memory_bytes)
    recipe = Recipe.load(spec.recipe)
    files = lay_out(spec.scratch / "inputs", spec.inputs)
    out = spec.scratch / "output" / spec.output
    out.parent.mkdir()
    try:
        outcome = execute(plan(recipe, files), out, _reporter(channel), workers=spec.threads)
    except RuntimeError as error:
        if not is_allocation_failure(error):
            raise
        raise OutOfMemory from error
    return {
        "sha256": outcome.sha256,
        "size": outcome.size,
        "recipe_digest": outcome.recipe_digest,
        "certificate": outcome.certificate,
    }


def _reporter(channel: TextIO) -> Callable[[int, int], None]:
    spoken = 0.0

    def report(done: int, total: int) -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken >= _REPORT_EVERY_S or done == total:
            spoken = now
            _say(channel, progress={"done": done, "total": total})

    return report


def _say(channel: TextIO, **message: object) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def described(error: MergeError) -> dict[str, object]:
    """{code, message, param}, as a job's error."""
    cause = error.__cause__
    if isinstance(error, CannotWrite) and isinstance(cause, OSError) and cause.errno in _FULL:
        return {"code": "NoSpace", "message": _no_space(cause), "param": None}
    fields = ("param", "module", "key", "file")
    param = next((getattr(error, name) for name in fields if hasattr(error, name)), None)
    return {"code": error.code, "message": str(error), "param": param}


def _no_space(error: OSError) -> str:
    if error.errno == errno.EFBIG:
        return "the output grew beyond the size its plan announced; nothing was written"
    return "the hub's disk is full; nothing was written"


def is_allocation_failure(error: RuntimeError) -> bool:
    """Whether torch wanted memory that there is not."""
    # torch's CPU allocator (c10/core/impl/alloc_cpu.cpp) has no exception class of its own,
    # and a thread needs memory for its stack.
    signs = ("can't allocate memory", "bad_alloc", "can't start new thread")
    return any(sign in str(error) for sign in signs)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # All that matters is on disk and said; unloading torch takes seconds on a busy machine.
    os._exit(status)
