"""Bodies that stop arriving: their request ends, so that nobody holds a worker by sending nothing."""

import asyncio
from http import HTTPStatus

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class IdleLimit:
    """ASGI middleware: 408 when no piece of a body comes for `idle_s` seconds."""

    def __init__(self, app: ASGIApp, idle_s: float) -> None:
        self._app = app
        self._idle_s = idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = gave_up = started = False

        async def receive_in_time() -> Message:
            nonlocal arrived, gave_up
            if gave_up:
                return {"type": "http.disconnect"}
            if arrived:  # what follows the body is the end of the connection, whenever it comes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._idle_s)
            except TimeoutError:
                gave_up = True
                return {"type": "http.disconnect"}
            arrived = not message.get("more_body", False)
            return message

        async def send_once(message: Message) -> None:
            nonlocal started
            if gave_up and not started:
                return
            started = True
            await send(message)

        try:
            await self._app(scope, receive_in_time, send_once)
        except ClientDisconnect:
            if not gave_up:
                raise
        if gave_up and not started:
            message = f"nothing more of the body came for {self._idle_s:g} s"
            error = {"code": "RequestTimeout", "message": message, "param": None}
            headers = {"Connection": "close"}
            answer = JSONResponse({"error": error}, HTTPStatus.REQUEST_TIMEOUT, headers)
            await answer(scope, receive, send)
