"""One job's changes as server-sent events.

Every event carries the job as it is: `state` when the state changed since the event before,
`progress` otherwise. Its id is the job's change counter, so a reader that comes back with
`Last-Event-ID` gets what it missed as one event, and nothing when it missed nothing.
The stream ends after the event of a terminal state.
Format: WHATWG HTML, "Server-sent events".
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from hub.jobs.models import TERMINAL, Job
from hub.jobs.schemas import JobPublic

_LOOK_EVERY_S = 0.2
_COMMENT_EVERY_S = 15.0  # proxies close connections on which nothing moves for 30-60 s


def is_over(job: Job, seen: int | None) -> bool:
    """Whether a reader that has seen change `seen` has nothing to wait for."""
    return job.state in TERMINAL and seen is not None and seen >= job.sequence


async def stream(
    read: Callable[[], Job], seen: int | None, is_stopping: Callable[[], bool]
) -> AsyncIterator[str]:
    """Events after change `seen` until the job is over or the server stops."""
    yield "retry: 2000\n\n"
    state: str | None = None
    spoken = time.monotonic()
    while not is_stopping():
        job = await asyncio.to_thread(read)
        if seen is None or job.sequence > seen:
            yield _event(job, "progress" if job.state == state else "state")
            seen, state, spoken = job.sequence, job.state, time.monotonic()
        elif time.monotonic() - spoken > _COMMENT_EVERY_S:
            yield ": still here\n\n"
            spoken = time.monotonic()
        if job.state in TERMINAL:
            return
        await asyncio.sleep(_LOOK_EVERY_S)


def _event(job: Job, name: str) -> str:
    return f"id: {job.sequence}\nevent: {name}\ndata: {JobPublic.of(job).model_dump_json()}\n\n"
