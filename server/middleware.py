"""Who may come in: what stands between the network and the application of serve.py.

A server on a desk has three kinds of uninvited guests. Web pages that the same person has open, whose scripts
can reach 127.0.0.1: they are known by the names in Host and Origin. Strangers on the network: they lack the
key. And clients that would use up memory or sockets, by malice or mistake: what they send is measured, their
connections are counted.
"""

import asyncio
import json
import logging
import secrets
import time
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.openai_api import ApiError

MAX_HEAD = 1 << 16  # bytes
MAX_BODY = 1 << 20  # bytes; a context of 100,000 tokens is half of it
MAX_PARTS = 1 << 14  # chunks of a body: each takes as long as a thousand bytes
SECONDS = 20  # for a body to arrive, and for a connection to move at all
LOCAL = {"localhost", "127.0.0.1", "::1"}
OPEN = {"/", "/health", "/openapi.json"}  # without the key


class Gate:
    """ASGI middleware. Without a key, only what runs on this machine is let in.

    A browser lets any page send requests to any address, and a page may have its own name point to 127.0.0.1
    after it was loaded (DNS rebinding), so without a key the names in Host and Origin must be this machine's;
    pages of `origins` are let in, too. With a key neither matters: no page knows it, and no cookie carries
    it. on_end: told the route (None: it led to none) and the status of each request.
    """

    def __init__(self, app, api_key=None, origins=(), on_end=lambda route, status: None):
        self.app, self.api_key, self.origins, self.on_end = app, api_key, origins, on_end

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        status = 499  # what nginx calls it when the client has left
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves out the body

        async def told_send(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.let_in(scope, receive, told_send)
        finally:
            self.on_end(getattr(scope.get("route"), "path", None), status)

    async def let_in(self, scope, receive, send):
        try:
            headers = dict(scope["headers"])
            self.check_sender(scope["path"], headers)
            body = await self.read(headers, receive)
        except ApiError as error:
            await reply_with(send, error)
            return
        if body is not None:
            await self.pass_on(scope, body, receive, send)

    def check_sender(self, path, headers):
        if self.api_key:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            is_right = secrets.compare_digest(given.strip(), self.api_key.encode())
            if path not in OPEN and not (is_right and scheme.lower() == b"bearer"):
                message = "needs the server's key, as Authorization: Bearer KEY"
                raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            return
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if split("//" + host)[0] not in LOCAL:
            message = f"Host is {host!r}, not this machine: for other names set --api_key"
            raise ApiError(403, message, "foreign_host")
        if origin and origin not in self.origins and split(origin)[1] != host:
            message = f"a page of {origin} may not use this server, unless --cors names it"
            raise ApiError(403, message, "foreign_origin")

    async def read(self, headers, receive):
        """The whole body; None if the client has left."""

        async def read():  # raises nothing that would refer to the body
            body, message = bytearray(), {"more_body": True}
            while message.get("more_body") and len(body) <= MAX_BODY:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
            return body

        length = headers.get(b"content-length", b"")
        if len(length) > 15 or int(length or 0) > MAX_BODY:  # h11 has seen to it that it is a number
            raise too_large()
        reading = asyncio.ensure_future(read())
        try:
            await asyncio.wait({reading}, timeout=SECONDS)
            if not reading.done():
                raise ApiError(408, f"the body did not arrive within {SECONDS} s", "timeout")
            body = reading.result()
        finally:
            reading.cancel()
        if body and len(body) > MAX_BODY:
            raise too_large()
        return body

    async def pass_on(self, scope, body, receive, send):
        """Let the application answer, and cancel it if the client leaves before it has."""
        is_complete, has_left, bodies = False, asyncio.Event(), [body]

        async def replay():
            if bodies:
                return {"type": "http.request", "body": bytes(bodies.pop()), "more_body": False}
            await has_left.wait()
            return {"type": "http.disconnect"}

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


def too_large():
    return ApiError(413, f"a request may have {MAX_BODY:,} bytes", "request_too_large")


def split(url):
    """(the host's name in lower case, name:port) of a URL; None for both if it makes no sense."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, None


async def reply_with(send, error):
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


# ---- connections


class Parser(h11.Connection):
    """h11's own errors refer to themselves, by way of all that was received: here they are made anew.

    n_parts: how many chunks the body of the latest request has so far.
    """

    n_parts = 0

    def next_event(self):
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            error.with_traceback(None)
            raise h11.RemoteProtocolError(str(error), error.error_status_hint) from None
        self.n_parts = 0 if isinstance(event, h11.Request) else self.n_parts + isinstance(event, h11.Data)
        return event


class Connection(H11Protocol):
    """Uvicorn waits for ever for the end of a request's head, and for a client that has stopped reading.

    Here a connection that stands still for `SECONDS` is closed, unless it is the application that is awaited.
    """

    def connection_made(self, transport):
        super().connection_made(transport)
        self.conn = Parser(h11.SERVER, MAX_HEAD)
        transport.max_size = 1 << 16  # bytes taken apart at once; others have their turn in between
        self.since, self.is_cut_off = time.monotonic(), False
        self.look()

    def data_received(self, data):
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self.since = time.monotonic()
        if self.conn.n_parts > MAX_PARTS:
            self.cut_off()

    def on_response_complete(self):
        self.since = time.monotonic()
        super().on_response_complete()

    @property
    def n_unsent(self):
        return self.transport.get_write_buffer_size()

    @property
    def awaits_client(self):
        """Whether it is the client's turn: to send a request, the rest of it, or to read the answer."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body or self.n_unsent > 0

    def cut_off(self):
        self.is_cut_off = True
        self.transport.abort()

    def look(self, before=None):
        waits = self.cycle is None or self.cycle.response_complete
        unsent = self.n_unsent
        now = (self.cycle, unsent) if waits or unsent else None
        if now and now == before:
            self.cut_off()
        else:
            self.timer = self.loop.call_later(SECONDS, self.look, now)

    def connection_lost(self, exc):
        self.timer.cancel()
        super().connection_lost(exc)
        self.cycle = None  # which refers to this


class Sparing(logging.Filter):
    """Lets each line of code log ten times a minute; then it tells how often it was not let."""

    N, SECONDS = 10, 60

    def __init__(self):
        super().__init__()
        self.counts = {}  # of each line: (when its minute began, how often it has logged since)

    def filter(self, record):
        place, now = (record.pathname, record.lineno), time.monotonic()
        start, n = self.counts.get(place, (now, 0))
        if now - start > self.SECONDS:
            if n > self.N:
                record.msg, record.args = f"{record.getMessage()} ({n - self.N:,} more like it before)", ()
            start, n = now, 0
        self.counts[place] = start, n + 1
        return n < self.N
