"""Access control in front of the application: who may send a request, and how large it may be.

A server on a desk has three kinds of unwanted guests. Web pages that the same person has open, whose scripts
can reach 127.0.0.1: the Host and Origin headers give them away. Strangers on the network: they do not have
the key. And clients that would use up memory, by malice or by mistake: their bodies are limited here, their
connections in connections.py.
"""

import asyncio
import secrets
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.openai_api import ApiError

MAX_BODY = 1 << 20  # bytes; a prompt of 100,000 tokens takes half of it
BODY_TIMEOUT = 20  # seconds for a body to arrive
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
PUBLIC_PATHS = {"/", "/health", "/openapi.json"}  # need no key


class AccessMiddleware:
    """ASGI middleware that checks each request and reads its body. HEAD becomes GET.

    Without a key, only this machine has access. A browser lets any page send requests to any address, and a
    page can make its own name point to 127.0.0.1 after it was loaded (DNS rebinding). So the name in Host
    must be this machine's, and Origin must be the server's own or one of `origins`. With a key, neither is
    checked: no page knows the key, and no cookie carries it.

    on_response: called with the route's path (None if no route matched) and the status of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None = None,
        origins: Collection[str] = (),
        on_response: Callable[[str | None, int], None] = lambda route, status: None,
    ) -> None:
        self.app, self.api_key, self.origins, self.on_response = app, api_key, origins, on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status = 499  # nginx's number for a client that left before the response
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves the body out

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._handle(scope, receive, send_and_note_status)
        finally:
            self.on_response(getattr(scope.get("route"), "path", None), status)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = dict(scope["headers"])
            self._check_access(scope["path"], headers)
            body = await self._read_body(headers, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is not None:
            await self._run_app(scope, body, receive, send)

    def _check_access(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.api_key:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            is_valid = secrets.compare_digest(key.strip(), self.api_key.encode())
            if path not in PUBLIC_PATHS and not (is_valid and scheme.lower() == b"bearer"):
                message = "the server's key is needed, as Authorization: Bearer KEY"
                raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            return
        # Not Starlette's TrustedHostMiddleware: it ignores Origin, and that of 0.51 cannot read [::1]:8000.
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if _host_and_netloc("//" + host)[0] not in LOCAL_HOSTS:
            message = f"Host is {host!r}, not this machine: other names need --api_key"
            raise ApiError(403, message, "foreign_host")
        if origin and origin not in self.origins and _host_and_netloc(origin)[1] != host:
            message = f"a page from {origin} may not use this server, unless --cors names it"
            raise ApiError(403, message, "foreign_origin")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytearray | None:
        """The whole body, or None if the client has left. Raises ApiError if it is too large or too slow."""
        # Not Starlette's RequestBodyLimitMiddleware: it has no timeout, and 0.51 does not have it yet.

        async def read() -> bytearray | None:  # raises nothing, because an exception would refer to the body
            body, more = bytearray(), True
            while more and len(body) <= MAX_BODY:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                more = message.get("more_body", False)
            return body

        length = headers.get(b"content-length", b"")
        if len(length) > 15 or int(length or 0) > MAX_BODY:  # h11 has checked that it is a number
            raise _too_large()
        reading = asyncio.ensure_future(read())
        try:
            await asyncio.wait({reading}, timeout=BODY_TIMEOUT)
            if not reading.done():
                raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT} s", "timeout")
            body = reading.result()
        finally:
            reading.cancel()
        if body and len(body) > MAX_BODY:
            raise _too_large()
        return body

    async def _run_app(self, scope: Scope, body: bytearray, receive: Receive, send: Send) -> None:
        """Run the application, and cancel it if the client leaves before the response is complete."""
        is_complete, has_left, bodies = False, asyncio.Event(), [body]

        async def replay() -> Message:
            if bodies:
                return {"type": "http.request", "body": bytes(bodies.pop()), "more_body": False}
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send_and_note_end(message: Message) -> None:
            nonlocal is_complete
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            has_left.set()

        async def run() -> None:
            await self.app(scope, replay, send_and_note_end)

        response, watcher = asyncio.ensure_future(run()), asyncio.ensure_future(watch())
        try:
            await asyncio.wait({response, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if response.done() or is_complete:
                await response
        finally:
            watcher.cancel()
            response.cancel()
            await asyncio.wait({response})
            if not response.cancelled():
                response.exception()  # mark it as seen: nobody is left to report it to


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _too_large() -> ApiError:
    return ApiError(413, f"a request may have {MAX_BODY:,} bytes", "request_too_large")


def _host_and_netloc(url: str) -> tuple[str | None, str | None]:
    """(host name in lower case, name:port) of a URL, or (None, None) if it is malformed."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, None
