"""The web process's part that sends webhooks, and only to where they may go."""

import logging
from functools import partial
from typing import TypeVar

import anyio
import httpx2
from anyio import CapacityLimiter, create_task_group, fail_after, move_on_after
from starlette.concurrency import run_in_threadpool

from hub.context import Hub
from hub.db import UNREACHABLE, why
from hub.errors import UpstreamFailed
from hub.mirror.upstream import Pinned, certificates, pinned
from hub.webhooks import queue
from hub.webhooks.queue import Outcome, Sending

log = logging.getLogger(__name__)
T = TypeVar("T")

AT_ONCE = 8
# Looking for something to do costs two reads of the catalogue.
EVERY_S = 1.0
DEADLINE_S = 15.0
MAX_ERROR = 300


async def run(hub: Hub) -> None:
    """Deliver until cancelled."""
    settings = hub.settings
    base = (settings.public_url or f"http://{settings.host}:{settings.port}").rstrip("/")
    # Names are looked up by threads that a slow resolver may keep, and nobody else waits for.
    resolvers = CapacityLimiter(AT_ONCE)
    done = anyio.Event()
    under_way = 0

    async def deliver(sending: Sending) -> None:
        nonlocal under_way
        outcome = await post(sending, settings.webhook_private, resolvers)
        await _tried(partial(queue.finish, hub, sending, outcome))
        under_way -= 1
        done.set()

    async with create_task_group() as group:
        while True:
            done = anyio.Event()
            await _tried(partial(queue.spread, hub))
            room = AT_ONCE - under_way
            for sending in await _tried(partial(queue.claim, hub, base, room)) or []:
                under_way += 1
                group.start_soon(deliver, sending)
            with move_on_after(EVERY_S):
                await done.wait()


async def post(sending: Sending, allow_private: bool, resolvers: CapacityLimiter) -> Outcome:
    """Send once: no redirect is followed, and nothing of the answer but its status is kept."""
    try:
        with fail_after(DEADLINE_S):
            url = httpx2.URL(sending.url)
            to = Pinned(url, {}, {})
            if not allow_private:
                if url.scheme != "https":
                    return Outcome(None, "the address is not https")
                to = await anyio.to_thread.run_sync(
                    pinned, url, abandon_on_cancel=True, limiter=resolvers
                )
            async with (
                httpx2.AsyncClient(
                    timeout=DEADLINE_S, trust_env=False, verify=certificates()
                ) as client,
                client.stream(
                    "POST",
                    to.url,
                    content=sending.body,
                    headers=sending.headers | to.headers,
                    extensions=to.extensions,
                ) as answer,
            ):
                status = answer.status_code
    except TimeoutError:
        return Outcome(None, f"no answer within {DEADLINE_S:g} s")
    except UpstreamFailed as refused:
        return Outcome(None, refused.message[:MAX_ERROR])
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        return Outcome(None, (str(error) or type(error).__name__)[:MAX_ERROR])
    if 200 <= status < 300:
        return Outcome(status, None)
    return Outcome(status, f"the receiver answers with status {status}")


async def _tried(step: "partial[T]") -> T | None:
    try:
        return await run_in_threadpool(step)
    except UNREACHABLE as error:
        log.warning("webhooks wait for the database: %s", why(error))
    except Exception:  # one event that cannot be told must not end the server
        log.exception("webhooks failed")
    return None
