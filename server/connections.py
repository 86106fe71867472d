"""Limits on connections: uvicorn with timeouts, a bounded number of open files, and a bounded log.

uvicorn waits forever for the end of a request's head and for a client that has stopped reading, and it
accepts connections until no more files can be opened. Its own `limit_concurrency` refuses newcomers, so
silent clients could keep everyone out; `Listener` closes the silent ones instead.
"""

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Collection
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import UserError, describe_os_error
from common.hardware import return_freed_memory

MAX_HEAD = 1 << 16  # bytes of a request's head
MAX_CHUNKS = 1 << 14  # of a body: parsing a chunk takes as long as a thousand bytes
IDLE_TIMEOUT = 20  # seconds that a client may take to send the rest of a request, or to read on
RESERVED_FILES = 32  # files that may be open besides connections


class ChunkCounter(h11.Connection):
    """h11's parser. n_chunks: how many chunks of the current request's body it has parsed.

    h11's exceptions refer to themselves through the data received, so they are replaced by new ones: the
    data would stay in memory until the garbage collector runs.
    """

    n_chunks: int = 0

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            error.with_traceback(None)
            raise h11.RemoteProtocolError(str(error), error.error_status_hint) from None
        self.n_chunks = 0 if isinstance(event, h11.Request) else self.n_chunks + isinstance(event, h11.Data)
        return event


class IdleTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes a connection whose client has done nothing for IDLE_TIMEOUT.

    waiting_since: when the client's turn last began (time.monotonic()). is_aborted: closed by the server.
    """

    conn: ChunkCounter

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self.conn = ChunkCounter(h11.SERVER, MAX_HEAD)
        # Bytes read at once (asyncio's transports have it): other connections get their turn in between.
        cast(Any, transport).max_size = 1 << 16
        self.waiting_since, self.is_aborted = time.monotonic(), False
        self._check_progress()

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:
            self.waiting_since = time.monotonic()
        if self.conn.n_chunks > MAX_CHUNKS:
            self.abort()

    def on_response_complete(self) -> None:
        self.waiting_since = time.monotonic()
        super().on_response_complete()

    @property
    def n_unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    @property
    def is_waiting_for_client(self) -> bool:
        """Whether it is the client's turn to send a request, or the rest of one, or to read the response."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body or self.n_unsent_bytes > 0

    def abort(self) -> None:
        self.is_aborted = True
        self.transport.abort()

    def _check_progress(self, previous: object = None) -> None:
        is_idle, n_unsent = self.cycle is None or self.cycle.response_complete, self.n_unsent_bytes
        state = (self.cycle, n_unsent) if is_idle or n_unsent else None  # None: the application's turn
        if state and state == previous:
            self.abort()
        else:
            self._timer = self.loop.call_later(IDLE_TIMEOUT, self._check_progress, state)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)
        self.cycle = None  # type: ignore[assignment]  # it refers to this object


class Listener(socket.socket):
    """A listening socket that never lets connections use up the files that the process may open.

    With `limit` connections open, the one that has waited longest for its client is closed to make room for a
    new one. If none is waiting, because all are being answered, the new one is closed.
    """

    limit: int | None = None
    protocols: Collection[IdleTimeoutProtocol] = ()  # uvicorn's set of open connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._accepted: set[socket.socket] = set()
        self._skip_next = False

    def accept(self) -> tuple[socket.socket, Any]:
        # asyncio calls this in a loop until it raises; connections are closed only after the loop.
        if self._skip_next:
            self._skip_next = False
            raise BlockingIOError
        try:
            connection, address = super().accept()
        except OSError as error:
            # asyncio retries in a second, but finishes its loop first, with a line in the log each time.
            self._skip_next = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            raise
        if self.limit and len(self._accepted) >= self.limit:
            self._accepted = {accepted for accepted in self._accepted if accepted.fileno() >= 0}
        if self.limit and len(self._accepted) >= self.limit:
            self._skip_next = True
            waiting = [one for one in self.protocols if one.is_waiting_for_client and not one.is_aborted]
            if not waiting:
                connection.close()
                raise ConnectionAbortedError
            min(waiting, key=lambda protocol: protocol.waiting_since).abort()
        self._accepted.add(connection)
        return connection, address


def bind(host: str, port: int) -> Listener:
    """Listen at an address. Raises UserError, before a model is loaded, if the port is in use."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: there is no such address") from None
    listener = Listener(family, socket.SOCK_STREAM)
    if os.name == "posix":  # on Windows, two servers could share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        reason = describe_os_error(error)
        raise UserError(
            f"cannot listen on port {port} of {host}: {reason}; choose another with --port"
        ) from None
    return listener


def connection_limit(wanted: int) -> int:
    """`wanted`, or fewer if this process may not open as many files (`ulimit -n`)."""
    try:
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        n_open = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # not POSIX
        return wanted
    return wanted if files == resource.RLIM_INFINITY else min(wanted, files - n_open - RESERVED_FILES)


class RateLimitFilter(logging.Filter):
    """Lets each line of code log ten times a minute, and then says how many records were dropped."""

    N, SECONDS = 10, 60

    def __init__(self) -> None:
        super().__init__()
        # By line of code: when its current minute began, and how often it has logged since.
        self._counts: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        line, now = (record.pathname, record.lineno), time.monotonic()
        start, n = self._counts.get(line, (now, 0))
        if now - start > self.SECONDS:
            if n > self.N:
                record.msg, record.args = f"{record.getMessage()} ({n - self.N:,} more like it before)", ()
            start, n = now, 0
        self._counts[line] = start, n + 1
        return n < self.N


class Server(uvicorn.Server):
    """uvicorn, which finishes the answers in progress and returns normally on SIGTERM or Ctrl-C."""

    def handle_exit(self, sig: int, frame: object) -> None:
        self.force_exit = self.should_exit  # the second signal ends it at once
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % 100 == 99:  # every ten seconds
            asyncio.get_running_loop().run_in_executor(None, return_freed_memory)
        return await super().on_tick(counter)


def make_server(app: ASGIApp, listener: Listener, n_answers: int, timeout: int) -> Server:
    """Serve `app` at `listener`. Raises UserError if the process may open too few files.

    n_answers: how many may run or wait. timeout: seconds that answers in progress may take at shutdown.
    """
    config = uvicorn.Config(
        app,
        http=IdleTimeoutProtocol,
        loop="asyncio",  # which calls Listener.accept
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=timeout,
    )
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).filters = [RateLimitFilter()]
    server = Server(config)
    listener.protocols = cast(Collection[IdleTimeoutProtocol], server.server_state.connections)
    listener.limit = connection_limit(n_answers + 256)
    if listener.limit < 8:
        raise UserError("this process may open too few files for connections; raise the limit (`ulimit -n`)")
    if listener.limit < n_answers:
        print(f"Only {listener.limit} connections fit in the limit of open files; `ulimit -n` raises it.")
    return server
