"""How often, and how much at once, one caller may ask: a token bucket for each, in this process.

A caller is a token that was accepted before, else an address: whoever makes tokens up is limited
by where they come from. Requests from this machine itself are not limited; behind a proxy the
address is what `X-Forwarded-For` says, see docs/operations.md.
"""

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from math import ceil

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.users.throttle import network_of

WINDOW_S = 60
# Callers that are remembered; a forgotten one begins with a full bucket.
MAX_CALLERS = 20_000
# What probes and pages ask for by themselves, answered from memory or the disk.
FREE = ("/healthz", "/readyz", "/static/")
# Of `request.state`: set by whoever found the token of the request to be somebody's.
ACCEPTED = "token_accepted"


@dataclass(frozen=True, slots=True)
class Answer:
    """`wait_s` is 0 if the request may pass; `full_s` is how long until nothing counts any more."""

    remaining: int
    wait_s: int
    full_s: int


class Buckets:
    """Buckets of `limit` requests that fill again within WINDOW_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._filled: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str, limit: int) -> Answer:
        """Count one request; what is refused is not counted."""
        moment = self._clock()
        left, since = self._filled.pop(caller, (float(limit), moment))
        per_s = limit / WINDOW_S
        left = min(float(limit), left + (moment - since) * per_s)
        allowed = left >= 1
        left -= allowed
        self._filled[caller] = left, moment
        if len(self._filled) > MAX_CALLERS:
            self._filled.popitem(last=False)
        wait_s = 0 if allowed else max(1, ceil((1 - left) / per_s))
        return Answer(int(left), wait_s, ceil((limit - left) / per_s))


class RateLimits:
    """ASGI middleware. `per_token` and `per_address` are requests a minute, `at_once` those that a
    caller may have open; 0 is no limit."""

    def __init__(self, app: ASGIApp, per_token: int, per_address: int, at_once: int) -> None:
        self._app = app
        self._limits = {True: per_token, False: per_address}
        self._at_once = at_once
        self._buckets = Buckets()
        self._accepted: OrderedDict[str, None] = OrderedDict()
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope.get("client") or ("", 0))[0]
        if scope["type"] != "http" or _is_here(address) or scope["path"].startswith(FREE):
            await self._app(scope, receive, send)
            return
        token = _token(Headers(scope=scope))
        by_token = token is not None and token in self._accepted
        caller = token if token is not None and by_token else f"address:{network_of(address)}"
        limit = self._limits[by_token]
        answer = self._buckets.take(caller, limit) if limit else None
        if answer is not None and answer.wait_s:
            await _refusal("too many requests", answer.wait_s, answer, limit)(scope, receive, send)
            return
        if self._at_once and self._open[caller] >= self._at_once:
            what = f"more than {self._at_once} requests at once"
            await _refusal(what, 1, answer, limit)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if token is not None and scope["state"].get(ACCEPTED):
                    self._accept(token)
                MutableHeaders(scope=message).update(_headers(answer, limit))
            await send(message)

        scope.setdefault("state", {})
        self._open[caller] += 1
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]

    def _accept(self, token: str) -> None:
        self._accepted[token] = None
        self._accepted.move_to_end(token)
        if len(self._accepted) > MAX_CALLERS:
            self._accepted.popitem(last=False)


def _is_here(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a socket without an address, or a name
        return False


def _token(headers: Headers) -> str | None:
    """Never the secret itself: what is kept in memory may end in a dump."""
    secret = headers.get("Authorization")
    return None if secret is None else hashlib.sha256(secret.encode("latin-1")).hexdigest()


def _headers(answer: Answer | None, limit: int) -> dict[str, str]:
    """draft-ietf-httpapi-ratelimit-headers-09, in the words that huggingface_hub reads."""
    if answer is None:
        return {}
    seconds = answer.wait_s or answer.full_s
    return {
        "RateLimit": f'"api";r={answer.remaining};t={seconds}',
        "RateLimit-Policy": f'"fixed window";"api";q={limit};w={WINDOW_S}',
    }


def _refusal(what: str, wait_s: int, answer: Answer | None, limit: int) -> JSONResponse:
    message = f"{what}; try again in {wait_s} s"
    error = {"code": "TooManyRequests", "message": message, "param": None}
    headers = {"Retry-After": str(wait_s), "X-Error-Message": message}
    return JSONResponse(
        {"error": error}, HTTPStatus.TOO_MANY_REQUESTS, headers | _headers(answer, limit)
    )
