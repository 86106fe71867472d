"""Who may come in: what stands between the network and the application of serve.py.

A server on a desk has three kinds of uninvited guests. Web pages that the same person has open, whose scripts
can reach 127.0.0.1: they are known by the names in Host and Origin. Strangers on the network: they lack the
key. And clients that would use up memory or sockets, by malice or mistake: what they send is measured.
"""

import asyncio
import json
import secrets
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.wire import error_body

MAX_BODY = 1 << 20  # bytes; a context of 100,000 tokens is half of it
SECONDS = 20  # for a body to arrive, and for a connection to move at all
LOCAL = {"localhost", "127.0.0.1", "::1"}


class Refused(Exception):
    """(status, code, message, further headers)"""


TOO_LARGE = Refused(413, "request_too_large", f"a request may have {MAX_BODY:,} bytes")


class Gate:
    """ASGI middleware, the outermost. Without a key, only what runs on this machine is let in.

    A browser lets any page send requests to any address, and a page may have its own name point to 127.0.0.1
    after it was loaded (DNS rebinding), so without a key the names in Host and Origin must be this machine's.
    With a key neither matters: no page knows it, and no cookie carries it. No CORS header is ever sent, so
    pages from elsewhere cannot read a reply.
    """

    def __init__(self, app, api_key=None):
        self.app, self.api_key = app, api_key

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        try:
            headers = dict(scope["headers"])
            self.check_sender(scope["path"], headers)
            body = await self.read(headers, receive)
        except Refused as refusal:
            status, code, message, *more = refusal.args
            await reply_with_error(send, status, code, message, more)
            return
        if body is not None:
            await self.pass_on(scope, body, receive, send)

    def check_sender(self, path, headers):
        if self.api_key:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            is_right = secrets.compare_digest(given.strip(), self.api_key.encode())
            if path.startswith("/v1") and not (is_right and scheme.lower() == b"bearer"):
                raise Refused(
                    401, "invalid_api_key", "needs the server's key, as Authorization: Bearer KEY",
                    (b"www-authenticate", b"Bearer"),
                )  # fmt: skip
            return
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if split("//" + host)[0] not in LOCAL:
            raise Refused(
                403, "foreign_host", f"Host is {host!r}, not this machine: for other names set --api_key"
            )
        if origin and split(origin)[1] != host:
            raise Refused(403, "foreign_origin", f"a page of {origin} may not use this server")

    async def read(self, headers, receive):
        """The whole body; None if the client has left."""
        length = headers.get(b"content-length", b"")
        if len(length) > 15 or int(length or 0) > MAX_BODY:  # h11 has seen to it that it is a number
            raise TOO_LARGE

        async def read():
            body, message = bytearray(), {"more_body": True}
            while message.get("more_body"):
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise TOO_LARGE
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), SECONDS)
        except asyncio.TimeoutError:
            raise Refused(408, "timeout", f"the body did not arrive within {SECONDS} s") from None

    async def pass_on(self, scope, body, receive, send):
        """Let the application answer, and cancel it if the client leaves before it has."""
        is_read, is_complete, has_left = False, False, asyncio.Event()

        async def replay():
            nonlocal is_read
            if is_read:
                await has_left.wait()
                return {"type": "http.disconnect"}
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watched_send(message):
            nonlocal is_complete
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        async def watch():
            while (await receive())["type"] != "http.disconnect":
                pass
            has_left.set()

        answer = asyncio.ensure_future(self.app(scope, replay, watched_send))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({answer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done() or is_complete:
                await answer
        finally:
            watcher.cancel()
            answer.cancel()
            await asyncio.wait({answer})
            if not answer.cancelled():
                answer.exception()  # nobody is left to hear of it


def split(url):
    """(the host's name in lower case, name:port) of a URL; None for both if it makes no sense."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, None


async def reply_with_error(send, status, code, message, headers=()):
    kind = {401: "authentication_error", 403: "permission_error"}.get(status, "invalid_request_error")
    body = json.dumps(error_body(message, kind, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Connection(H11Protocol):
    """Uvicorn waits for ever for the end of a request's head, and for a client that has stopped reading.

    Here a connection that stands still for `SECONDS` is closed, unless it is the application that is awaited.
    """

    def connection_made(self, transport):
        super().connection_made(transport)
        self.look()

    def look(self, before=None):
        waits = self.cycle is None or self.cycle.response_complete
        unsent = self.transport.get_write_buffer_size()
        now = (self.cycle, unsent) if waits or unsent else None
        if now and now == before:
            self.transport.abort()
        else:
            self.timer = self.loop.call_later(SECONDS, self.look, now)

    def connection_lost(self, exc):
        self.timer.cancel()
        super().connection_lost(exc)
