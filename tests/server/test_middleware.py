"""AccessMiddleware in front of a small application, called by ASGI without a network."""

import asyncio
import json

import pytest

import server.middleware as middleware
from server.middleware import AccessMiddleware

LOCAL = {"host": "localhost:8000"}


async def echo(scope, receive, send):
    """Answers with the method and the length of the body."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{scope['method']} {len(body)}".encode()})


def call(app=echo, path="/v1/models", method="GET", headers=LOCAL, chunks=(b"",), leaves=False, **options):
    """(status, body) of one request. leaves: the client does, once it has sent everything."""
    sent, ended = [], []

    async def run():
        messages = [
            {"type": "http.request", "body": chunk, "more_body": i < len(chunks)}
            for i, chunk in enumerate(chunks, 1)
        ]

        async def receive():
            if messages:
                return messages.pop(0)
            if not leaves:
                await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": path, "method": method, "headers": pairs}
        guarded = AccessMiddleware(app, on_response=lambda *args: ended.append(args), **options)
        await guarded(scope, receive, send)

    asyncio.run(run())
    assert len(ended) == 1 and ended[0][0] is None
    return ended[0][1], b"".join(message.get("body", b"") for message in sent)


def code(body):
    return json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"host": "localhost"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, None),
        ({"host": "localhost:8000", "origin": "https://my.example"}, None),
        ({}, "foreign_host"),
        ({"host": "localhost.evil.example"}, "foreign_host"),
        ({"host": "my.example", "origin": "https://my.example"}, "foreign_host"),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, "foreign_origin"),
        ({"host": "localhost:8000", "origin": "null"}, "foreign_origin"),
    ],
)
def test_without_a_key_only_this_machine(headers, expected):
    status, body = call(headers=headers, origins=["https://my.example"])
    assert status == (403 if expected else 200)
    assert expected is None or code(body) == expected


@pytest.mark.parametrize(
    ("path", "given", "status"),
    [
        ("/v1/models", "Bearer secret", 200),
        ("/v1/models", "bearer  secret", 200),
        ("/v1/models", "Basic secret", 401),
        ("/v1/models", "Bearer secrets", 401),
        ("/v1/models", "", 401),
        ("/health", "", 200),
    ],
)
def test_with_a_key(path, given, status):
    headers = {"host": "anything.example", "authorization": given}
    assert call(path=path, headers=headers, api_key="secret")[0] == status


def test_a_head_request_becomes_get():
    assert call(method="HEAD") == (200, b"GET 0")


def test_bodies():
    assert call(chunks=[b"12", b"3"], method="POST") == (200, b"POST 3")
    too_long = [b"1" * 60_000] * 20
    assert call(chunks=too_long)[0] == 413
    for length in ("2000000", "9" * 20):
        assert call(headers={**LOCAL, "content-length": length})[0] == 413


def test_a_body_that_does_not_arrive(monkeypatch):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.05)
    status, body = call(chunks=())
    assert status == 408 and code(body) == "timeout"


def test_a_client_that_leaves():
    cancelled = []

    async def slow(scope, receive, send):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    assert call(slow, leaves=True) == (499, b"") and cancelled == [True]
    assert call(chunks=(), leaves=True) == (499, b"")
