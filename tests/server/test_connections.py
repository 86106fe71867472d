"""Connections and log records within limits; tests/test_serve.py has clients that misbehave."""

import errno
import logging
import resource
import socket
from types import SimpleNamespace

import pytest

import server.connections as connections
from common.errors import UserError
from server.connections import RateLimitFilter, bind, connection_limit


def test_a_port_that_is_in_use():
    with bind("127.0.0.1", 0) as listener:
        with pytest.raises(UserError, match="address already in use.*--port"):
            bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(UserError, match="no such address"):
        bind("no.such.host.invalid", 0)


def test_the_limit_of_open_files():
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert connection_limit(3) == 3
    if files != resource.RLIM_INFINITY:
        assert 0 < connection_limit(10**9) < files


def test_the_client_that_has_waited_longest_makes_room():
    def protocol(since, waits=True):
        one = SimpleNamespace(waiting_since=since, is_waiting_for_client=waits, is_aborted=False)
        one.abort = lambda: setattr(one, "is_aborted", True)
        return one

    with bind("127.0.0.1", 0) as listener:
        listener.limit = 2
        listener.protocols = busy, oldest, newer = protocol(1, waits=False), protocol(2), protocol(3)
        clients = [socket.create_connection(listener.getsockname()) for _ in range(5)]
        accepted = [listener.accept()[0] for _ in range(3)]
        assert [one.is_aborted for one in (busy, oldest, newer)] == [False, True, False]
        with pytest.raises(BlockingIOError):  # so that asyncio closes it before it accepts the next
            listener.accept()
        listener.protocols = [busy]
        with pytest.raises(ConnectionAbortedError):
            listener.accept()
        for connection in (*accepted, *clients):
            connection.close()


def test_it_rests_when_no_file_can_be_opened(monkeypatch):
    def fails(listener):
        raise OSError(errno.EMFILE, "Too many open files")

    with bind("127.0.0.1", 0) as listener:
        monkeypatch.setattr(socket.socket, "accept", fails)
        with pytest.raises(OSError, match="Too many"):
            listener.accept()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_line_of_code_logs_ten_times_a_minute(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    logger = logging.getLogger("a test's")
    logger.addFilter(RateLimitFilter())

    def complain(n):
        for i in range(n):
            logger.warning("number %d", i)

    complain(500)
    logger.warning("another")
    assert [record.getMessage() for record in caplog.records] == [f"number {i}" for i in range(10)] + [
        "another"
    ]
    caplog.clear()
    now[0] = 61.0
    complain(3)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["number 0 (490 more like it before)", "number 1", "number 2"]
