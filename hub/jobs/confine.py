"""What a child process does to itself before it touches a file: limits, and dying with its parent.

What only Linux has is a function of its own, and does nothing elsewhere.
"""

import ctypes
import os
import signal
import sys
import threading

if sys.platform != "win32":
    import resource

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def be_modest(niceness: int) -> None:
    """Leave the processor to whoever answers requests."""
    if hasattr(os, "nice"):
        os.nice(niceness)


def limit_memory(more_bytes: int) -> None:
    """Let this process take `more_bytes` of private writable memory beyond what it has now.

    Allocations beyond fail inside the process (MemoryError, or torch's RuntimeError).
    RLIMIT_DATA counts private writable pages since Linux 4.7; RLIMIT_AS would count reserved
    address space too, of which torch takes gigabytes it never touches.
    """
    if sys.platform == "linux":
        _lower(resource.RLIMIT_DATA, _data_bytes() + more_bytes)


def limit_files(max_bytes: int) -> None:
    """No file of this process grows beyond `max_bytes`; writes beyond fail with EFBIG."""
    if sys.platform != "win32":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _lower(resource.RLIMIT_FSIZE, max_bytes)


def die_with_pipe(pipe: int) -> None:
    """End this process at the end of the descriptor `pipe`, which only its parent holds open."""
    threading.Thread(target=_exit_at_end_of, args=(pipe,), daemon=True).start()


def die_with_parent(parent: int) -> None:
    """End this process when `parent` does, even inside native code; only Linux can do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call above
            os._exit(1)


def _exit_at_end_of(pipe: int) -> None:
    # Not a file object: one that a thread is reading cannot be closed when the interpreter ends.
    while os.read(pipe, 1):
        pass
    os._exit(1)


def _lower(which: int, wanted: int) -> None:
    soft, hard = resource.getrlimit(which)
    known = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(which, (min(known), hard))


def _data_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData line")
