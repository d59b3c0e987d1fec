"""Named places at which a test can end the process, or make the next step fail.

`GRAFT_FAILPOINT=name:action[:nth]` arms one of them, for the nth time it is reached (1).
Actions: `kill` (SIGKILL to this process), `raise`, `nospace` (ENOSPC). Without the variable
reaching a point costs one comparison. Tests that use servers add actions of their own.

The names are the steps of docs/operations.md: U upload, S its way into a bucket, X Xet upload,
J job, G collection.
"""

import errno
import os
import signal
from collections.abc import Callable

POINTS = {
    "U1": "bytes are about to arrive",
    "U2": "the temporary file is there, and empty",
    "U3": "some bytes are written",
    "U4": "all bytes are written and have the right hash",
    "U5": "the temporary file is durable",
    "U6": "the folders of the blob are there",
    "U7": "the blob has its name, which is not durable yet",
    "U8": "the blob is durable, and nothing refers to it",
    "U9": "the rows of a commit are written and not committed",
    "U10": "the commit is durable, and nobody was told",
    "S1": "bytes are about to arrive for a bucket",
    "S2": "an upload in parts has begun",
    "S3": "a part of it is on its way",
    "S4": "all its parts are there",
    "S5": "the blob is at its key, and nothing refers to it",
    "X1": "a xorb is durable, and nothing refers to it",
    "X2": "its rows are not committed",
    "X3": "the xorbs of a file are held, and nothing of the file is written",
    "X4": "the file is durable, and nothing refers to it",
    "X5": "its hold is not committed",
    "J1": "the rows of a job are written and not committed",
    "J2": "a job is claimed",
    "J3": "its process has started",
    "J4": "its process has made progress",
    "J5": "its process has written the result and ended",
    "J6": "the result is checked",
    "J7": "the result is a blob",
    "J8": "result, lineage and end of the job are written and not committed",
    "J9": "they are durable, and the scratch folder is still there",
    "G1": "blobs are marked as condemned and that is not committed",
    "G2": "blobs are condemned",
    "G3": "a blob is marked as being deleted",
    "G4": "its bytes are gone, and its row does not say so",
    "G5": "its row says so",
}


class Reached(RuntimeError):
    """What the action `raise` raises."""


def _kill() -> None:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _raise() -> None:
    raise Reached


ACTIONS: dict[str, Callable[[], None]] = {"kill": _kill, "raise": _raise, "nospace": _no_space}


class _Armed:
    def __init__(self, text: str) -> None:
        self.name, self.action, *nth = text.split(":")
        self.left = int(nth[0]) if nth else 1
        if self.name not in POINTS or self.action not in ACTIONS:
            raise ValueError(f"GRAFT_FAILPOINT: {text!r} names no point or no action")


_armed: _Armed | None = None


def arm(text: str | None) -> None:
    """As the environment variable does; None disarms."""
    global _armed
    _armed = _Armed(text) if text else None


def reach(name: str) -> None:
    """Nothing, unless this point is armed and its time has come."""
    if _armed is None or _armed.name != name:
        return
    _armed.left -= 1
    if _armed.left == 0:
        ACTIONS[_armed.action]()


arm(os.environ.get("GRAFT_FAILPOINT"))
