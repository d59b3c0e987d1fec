"""What every response carries, and what every request is measured by."""

import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from threading import Lock

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

NOT_STARTED = 0

# A response that says otherwise keeps what it says.
DEFAULT_HEADERS = {
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Traffic:
    """Counts for `/metrics`: requests by route, method and status, and their time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, method, status] += 1
            self._seconds[route] += seconds  # type: ignore[assignment]

    def text(self) -> str:
        """In the text format of Prometheus."""
        with self._lock:
            requests, seconds = dict(self._requests), dict(self._seconds)
        lines = ["# TYPE graft_requests_total counter"]
        lines += [
            f'graft_requests_total{{route="{route}",method="{method}",status="{status}"}} {n}'
            for (route, method, status), n in sorted(requests.items())
        ]
        lines += ["# TYPE graft_request_seconds_total counter"]
        lines += [
            f'graft_request_seconds_total{{route="{route}"}} {total:.6f}'
            for route, total in sorted(seconds.items())
        ]
        return "\n".join(lines) + "\n"


class EveryResponse:
    """Adds a request id and the security headers, refuses encoded bodies, counts.

    `bug_page` gives what people see of an error of ours, or None for programs.
    """

    def __init__(
        self, app: ASGIApp, traffic: Traffic, bug_page: Callable[[Request], Response | None]
    ) -> None:
        self._app = app
        self._traffic = traffic
        self._bug_page = bug_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request = Headers(scope=scope)
        request_id = _request_id(request)
        status = NOT_STARTED

        replaced = b""

        async def send_with_headers(message: Message) -> None:
            nonlocal status, replaced
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in DEFAULT_HEADERS.items():
                    headers.setdefault(name, value)
                # Starlette's body limit answers in plain text where it reads Content-Length.
                if status == 413 and headers.get("Content-Type", "").startswith("text/plain"):
                    answer = _error("TooLarge", "the body of the request is too large", 413)
                    replaced = bytes(answer.body)
                    headers.update(answer.headers)
            elif replaced:
                message = {**message, "body": replaced}
            await send(message)

        # A compressed body would pass every limit on its size.
        app = self._app
        if request.get("Content-Encoding", "identity").lower() != "identity":
            app = _error("BadRequest", "send bodies without Content-Encoding", 415)
        # No name here has one, and PostgreSQL refuses it in any text.
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            app = _error("BadRequest", "an address holds no NUL character", 400)
        try:
            await app(scope, receive, send_with_headers)
        except Exception:
            log.error("request %s: %s failed", request_id, scope["method"])
            if status == NOT_STARTED:
                told = _error("InternalError", "the hub made an error; its log says which", 500)
                answer = self._bug_page(Request(scope)) or told
                await answer(scope, receive, send_with_headers)
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._traffic.count(route, scope["method"], status, time.perf_counter() - started)


def _error(code: str, message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message, "param": None}}, status)


def _request_id(headers: Headers) -> str:
    # huggingface_hub sends the second one and prints it with its errors.
    for name in ("X-Request-Id", "X-Amzn-Trace-Id"):
        if (value := headers.get(name)) is not None and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex
