"""The parent's side of a child process: start it, hear it line by line, end it with all it started."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

# Nothing else of the server's environment reaches a child: tokens and passwords live there.
_KEPT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")

COMMAND = (sys.executable, "-m", "hub.jobs.child")


class Child:
    """One running child process; `hear` gives its messages, `kill` ends its whole group."""

    def __init__(self, command: Sequence[str], spec: str, scratch: Path, threads: int) -> None:
        """Start `command` and send it `spec` (one line of JSON)."""
        self._errors = scratch / "stderr.log"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(scratch, threads),
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        threading.Thread(
            target=_pump, args=(self._process.stdout, self._lines), daemon=True
        ).start()
        self.send(spec)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, line: str) -> None:
        """One line to its stdin."""
        with suppress(BrokenPipeError):  # it died at once; `hear` and `wait` will tell
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, or None when there is none within `timeout_s`; EOFError at the end."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
            raise EOFError
        message: dict[str, Any] = json.loads(line)
        return message

    def wait(self, timeout_s: float = 40) -> int:
        """Its exit status, negative for the signal that ended it; called once it has hung up.

        On a machine with more work than cores, unloading torch alone can take many seconds;
        less than a lease, because nobody extends it meanwhile.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def kill(self) -> None:
        """End it and everything in its process group, and wait until it is gone."""
        if self._process.poll() is not None:
            return  # its number may belong to another process by now
        if os.name == "posix":
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Release the pipes; ends the child if it still runs."""
        self.kill()
        with suppress(BrokenPipeError):  # a spec that was never read
            self._stdin.close()

    def last_words(self, max_bytes: int = 4000) -> str:
        """The end of what it wrote to stderr."""
        with self._errors.open("rb") as errors:
            errors.seek(0, os.SEEK_END)
            errors.seek(max(0, errors.tell() - max_bytes))
            return errors.read().decode("utf-8", "replace").strip()


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 if unknown."""
    try:
        with open("/proc/vmstat", encoding="ascii") as counters:
            for line in counters:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except FileNotFoundError:
        pass
    return 0


def _environment(scratch: Path, threads: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    count = str(threads)
    return kept | {
        "TMPDIR": str(scratch),
        "HOME": str(scratch),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PYTHONUNBUFFERED": "1",
    }


def _pump(stdout: IO[bytes], lines: "queue.SimpleQueue[bytes | None]") -> None:
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put(None)
