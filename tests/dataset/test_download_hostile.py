"""The downloader against servers that lie, are too slow, never end or send nonsense: bytes on a socket."""

import collections
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import resource
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import run

ROOT = Path(__file__).resolve().parents[2]
BODY = random.Random(2).randbytes(300_000)
MAX_BYTES = 1_000_000  # bytes of a file of which nothing is known
ETAG, SHA256 = 'ETag: "one"', hashlib.sha256(BODY).hexdigest()
sleep = time.sleep

spec = importlib.util.spec_from_file_location("download", ROOT / "dataset" / "download.py")
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)


# ---- the server ----


def head(*lines, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def whole(*lines, body=BODY):
    """A correct response."""
    return head(f"Content-Length: {len(body)}", *lines) + body


def again(first, piece, pause=0.0):
    """`first`, and then `piece` forever."""
    yield first
    while True:
        yield piece
        sleep(pause)


def then_silence(answer):
    yield answer
    sleep(30)


class Server:
    """Each connection gets the next of `answers` (bytes, or an iterator of bytes); the last one repeats."""

    def __init__(self, *answers, host="127.0.0.1", context=None, speaks_first=False):
        self.answers, self.requests, self.sent = list(answers), [], 0
        self.context, self.speaks_first = context, speaks_first
        self.socket = socket.create_server((host, 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=(self.socket.accept()[0],), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            connection.settimeout(20)
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request and not self.speaks_first:
                data = connection.recv(65536)
                if not data:
                    return
                request += data
            self.requests.append(request.decode("latin-1"))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            answer = answer(request) if callable(answer) else answer
            for piece in [answer] if isinstance(answer, bytes) else answer:
                connection.sendall(piece)
                self.sent += len(piece)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


# ---- the command ----


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Shorten timeouts to seconds; define three sets of one small file each; use no proxies."""
    hurry_up(monkeypatch)


@pytest.fixture
def hurry_more(request, monkeypatch):
    """Shorten them to tenths of a second only for cases of waiting: others would fail on a busy machine."""
    if re.search("at a time|silence|extension", request.node.callspec.params["case"]):
        monkeypatch.setattr(download, "SPEED_WINDOW", 0.4)


def hurry_up(patch):
    limits = {"SPEED_WINDOW": 8, "CONNECT_TIMEOUT": 2, "MAX_BYTES": MAX_BYTES, "MIN_FREE": 0}
    for name, value in limits.items():
        patch.setattr(download, name, value)
    patch.setattr(download.time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    sets = {"known": (download.File("f", len(BODY), SHA256),), "unknown": (download.File("f"),), "listed": ()}
    mirrors = {"hf": "http://nano.invalid/a/b/resolve/main/"}
    for name, files in sets.items():
        patch.setitem(download.SETS, name, download.DataSet(name, "-", "-", "-", mirrors, files))
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "SSL_CERT_FILE":
            patch.delenv(name)


def get(port, out, *words, name="known", mirror=None):
    """Run the command in this process: exit code, stdout, stderr. Unexpected exceptions propagate."""
    mirror = mirror or f"http://127.0.0.1:{port}"
    printed, errors, code = io.StringIO(), io.StringIO(), 0
    arguments = ["download.py", name, "--mirror", mirror, "--out", str(out), *words]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            try:
                run(download.main)
            except SystemExit as end:
                code = end.code
    return SimpleNamespace(code=code, out=printed.getvalue(), err=errors.getvalue())


def on_disk(out):
    """{name: size} of the files in the folder."""
    return {path.name: path.stat().st_size for path in Path(out).iterdir()} if Path(out).exists() else {}


def fails(result, *words):
    assert result.code == 2, result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert result.err.rstrip("\n").isprintable() and len(result.err) < 1500, result.err
    for word in words:
        assert word in result.err, result.err


def arrived(result, out, body=BODY):
    assert result.code == 0, result.err
    assert on_disk(out) == {"f": len(body)} and (out / "f").read_bytes() == body


# ---- answers that cannot be had ----

CHUNKED = head("Transfer-Encoding: chunked", ETAG)
BOMB = gzip.compress(bytes(30_000_000))
REDIRECT = "302 Found"
NONSENSE = {  # name: (answer, what the sentence says)
    "endless body": (lambda r: again(head(), bytes(65536)), "more than the"),
    "endless chunks": (lambda r: again(CHUNKED, b"10000\r\n" + bytes(65536) + b"\r\n"), "more than the"),
    "endless chunk of 5,000 digits": (lambda r: again(CHUNKED + b"f" * 5000 + b"\r\n", bytes(65536)), ""),
    "bomb": (head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}") + BOMB, "packed"),
    "packed twice": (head("Content-Encoding: br", "Content-Encoding: identity") + BODY, "packed"),
    "packed for the journey": (head("Transfer-Encoding: gzip") + BOMB, ""),
    "two lengths": (head("Content-Length: 7", f"Content-Length: {len(BODY)}") + BODY, "Content-Length"),
    "length abc": (head("Content-Length: abc") + BODY, "Content-Length"),
    "length ²": (head("Content-Length: ²") + BODY, "Content-Length"),
    "length -1": (head("Content-Length: -1") + BODY, "Content-Length"),
    "length of 5,000 digits": (head("Content-Length: " + "9" * 5000) + BODY, ""),
    "length that no disk has": (head(f"Content-Length: {10**18}"), "1,000,000,000,000,000,000 b|1.0 EB"),
    "length that no file has": (head(f"Content-Length: {2 * MAX_BYTES}"), "2,000,000 bytes|more than any"),
    "empty": (whole(body=b""), "0 bytes|empty"),
    "nothing at all": (head(), "empty"),
    "a byte at a time": (lambda r: again(whole(body=b"")[:15] + b"\r\n\r\n", b"x", 0.02), "bytes a second"),
    "head a byte at a time": (lambda r: again(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.02), "bytes a second"),
    "a header at a time": (lambda r: again(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.02), "bytes a second"),
    "100 Continue at a time": (lambda r: again(b"", head(status="100 Continue"), 0.02), "bytes a second"),
    "trailer at a time": (lambda r: again(CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n", 0.02), "bytes a second"),
    "silence": (lambda r: then_silence(b""), "bytes a second"),
    "silence after the head": (lambda r: then_silence(whole()[: -len(BODY)]), "bytes a second"),
    "silence in the middle": (lambda r: then_silence(whole(ETAG)[:-1000]), "are kept"),
    "silence, and no way to go on": (lambda r: then_silence(whole()[:-1000]), "check the network"),
    "endless headers": (lambda r: again(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000), ""),
    "endless header": (lambda r: again(b"HTTP/1.1 200 OK\r\nX: ", bytes(65536)), ""),
    "endless status": (lambda r: again(b"HTTP/1.1 200 ", b"x" * 65536), ""),
    "endless 100 Continue": (lambda r: again(b"", head(status="100 Continue") * 100), ""),
    "endless trailers": (lambda r: again(CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n" * 1000), ""),
    "endless chunk extension": (lambda r: again(CHUNKED + b"1;", b"x" * 65536), ""),
    "chunk ²": (CHUNKED + "²\r\n".encode(), ""),
    "chunk -5": (CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", ""),
    "no answer": (b"", ""),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", ""),
    "garbage": (bytes(range(256)) * 100, ""),
    "no head": (BODY, ""),
    "status 99999": (b"HTTP/1.1 99999 What\r\n\r\n", "999"),
    "status abc": (b"HTTP/1.1 abc\r\n\r\n", ""),
    "reason on a terminal": (b"HTTP/1.1 404 \x1b[2J\x07gone" + b"x" * 5000 + b"\r\n\r\n", "404"),
    "204": (head(status="204 No Content"), "204"),
    "304": (head(status="304 Not Modified"), "304"),
    "202": (head("Content-Length: 4", status="202 Accepted") + b"soon", "202"),
    "206 unasked": (head("Content-Range: bytes 0-9/300000", status="206 Part") + BODY[:10], "not the one"),
    "416 unasked": (head("Content-Range: bytes */0", "Content-Length: 0", status="416 No"), "not the one"),
    "endless error": (lambda r: again(head(status="500 Oh"), bytes(65536)), "500"),
    "endless refusal": (lambda r: again(head(status="404 No"), bytes(65536)), "404"),
    "endless redirect": (lambda r: again(head("Location: /on", status=REDIRECT), bytes(65536)), "redirect"),
    "redirect to itself": (head("Location: /", "Content-Length: 0", status=REDIRECT), "redirect"),
    "redirect to a file": (head("Location: file:///etc/passwd", status=REDIRECT), "file:///etc/passwd"),
    "redirect to ftp": (head("Location: ftp://127.0.0.1/x", status=REDIRECT), "ftp:"),
    "redirect to junk": (head("Location: http://[::1", status=REDIRECT), "//.::1"),
    "redirect to bytes": (b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe.\x1b/\r\n\r\n", ""),
    "redirect to nowhere": (head(status=REDIRECT), "302"),
    "redirect to no port": (head("Location: http://127.0.0.1:99999/", status=REDIRECT), ""),
    "busy for ever": (head("Retry-After: ²", status="503 Busy"), "503"),
    "busy till doomsday": (head(f"Retry-After: {'9' * 5000}", status="429 Busy"), "429"),
    "too short": (whole("Last-Modified: yesterday")[:-1000], "are kept"),
    "too short, and no way to go on": (whole()[:-1000], "check the network"),
}


@pytest.mark.parametrize("name", ["known", "unknown"])
@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense(case, name, tmp_path, hurry_more):
    answer, word = NONSENSE[case]
    began = time.monotonic()
    with Server(answer) as server:
        result = get(server.port, tmp_path / "out", "--retries", "1", name=name)
    fails(result)
    assert re.search(word, result.err), result.err
    assert time.monotonic() - began < 20
    rest = on_disk(tmp_path / "out")
    assert rest.keys() <= {"f.part", "f.part.json"}
    assert rest.get("f.part", 0) <= (len(BODY) if name == "known" else MAX_BYTES)
    assert ("f.part" in rest) == ("are kept" in result.err)  # nothing is left without a word
    assert server.sent < 20 * MAX_BYTES or "chunk ext" in case  # nor read without end, and dropped


@pytest.mark.parametrize("name", ["known", "unknown"])
@pytest.mark.parametrize("answer", [
    whole(f"Content-Length: {len(BODY)}"), head(f"Content-Length: {len(BODY)}, {len(BODY)}") + BODY,
    whole() + b"and more", head() + BODY, head("Content-Encoding: identity") + BODY,
    head("Transfer-Encoding: chunked") + b"%x;a=b\r\n%s\r\n0\r\nETag: x\r\n\r\n" % (len(BODY), BODY),
    head(status="100 Continue") + head("Link: x", status="103 Early Hints") + whole(),
    whole("ETag: \xff\xfe", "Last-Modified: ²", "X-Linked-ETag: ²"), whole("etag:", "content-range: ²"),
    b"HTTP/1.0 200\r\n\r\n" + BODY,
])  # fmt: skip
def test_odd_but_fine(answer, name, tmp_path):
    with Server(answer) as server:
        arrived(get(server.port, tmp_path, "--retries", "0", name=name), tmp_path)
        assert len(server.requests) == 1


# ---- several answers ----


def part_of(request):
    """A server that resumes correctly."""
    start = int(request.partition(b"bytes=")[2].partition(b"-")[0] or 0)
    if not start:
        return whole(ETAG)
    span = f"Content-Range: bytes {start}-{len(BODY) - 1}/{len(BODY)}"
    return head(ETAG, span, f"Content-Length: {len(BODY) - start}", status="206 Part") + BODY[start:]


def one_more(request):
    """Send one more byte each time, and then close the connection."""
    answer, _, body = part_of(request).partition(b"\r\n\r\n")
    return answer + b"\r\n\r\n" + body[:1]


def test_patience_with_a_server_that_gives_a_byte_each_time(tmp_path):
    with Server(one_more) as server:
        fails(get(server.port, tmp_path, "--retries", "4"), "5 bytes are kept", "same command")
        assert len(server.requests) == 5
    with Server(part_of) as server:
        arrived(get(server.port, tmp_path), tmp_path)
        assert "bytes=5-" in server.requests[0] and 'If-Range: "one"' in server.requests[0]


def test_a_good_piece_each_time_needs_no_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MIN_SPEED", 1000)
    monkeypatch.setattr(download, "SPEED_WINDOW", 20)  # so 20,000 bytes are a good piece

    def piece(request):
        answer, _, body = part_of(request).partition(b"\r\n\r\n")
        return answer + b"\r\n\r\n" + body[:30_000]

    with Server(piece) as server:
        arrived(get(server.port, tmp_path, "--retries", "0"), tmp_path)
        assert len(server.requests) == 10


RANGES = {
    "abc": "abc", "²": "bytes ²-299999/300000", "digits": f"bytes {'9' * 5000}-1/{'9' * 5000}", "none": None,
    "before": "bytes 0-299999/300000", "after": "bytes 200000-299999/300000", "negative": "bytes -1--2/-3",
    "no total": "bytes 100000-299999/*", "another total": "bytes 100000-299999/400000",
    "nothing": "bytes */300000", "twice": "bytes 100000-299999/300000\r\nContent-Range: bytes 0-1/2",
}  # fmt: skip


@pytest.mark.parametrize("status", ["206 Partial Content", "416 Range Not Satisfiable"])
@pytest.mark.parametrize("case", RANGES)
def test_ranges_that_do_not_fit(case, status, tmp_path):
    """A part is never continued with bytes that do not belong to it."""
    lines = [f"Content-Range: {RANGES[case]}"] * (RANGES[case] is not None)
    odd = head(*lines, ETAG, "Content-Length: 200000", status=status) + bytes(200_000)
    with Server(whole(ETAG)[:-200_000], odd, part_of) as server:
        result = get(server.port, tmp_path, name="unknown")
        arrived(result, tmp_path)
        assert "starting over" in result.out and "Range" not in server.requests[2]


def test_more_than_the_range(tmp_path):
    """The 206 response is right, but its body is longer than announced."""
    odd = head(ETAG, "Content-Range: bytes 100000-299999/300000", status="206 Partial Content")
    with Server(whole(ETAG)[:-200_000], lambda _: again(odd, bytes(65536))) as server:
        fails(get(server.port, tmp_path, name="unknown"), "more than the 300,000 bytes", "--mirror")
    assert on_disk(tmp_path) == {}


@pytest.mark.parametrize("wait", ["²", "abc", "-1", "1e9", "9" * 5000, "Wed, 01 Jan 2098 00:00:00 GMT", ""])
def test_odd_waits(wait, tmp_path):
    with Server(head(f"Retry-After: {wait}", status="503 Busy"), whole()) as server:
        arrived(get(server.port, tmp_path), tmp_path)


@pytest.mark.parametrize("wait, seconds", [("7", 7), ("0", 0.5), ("86400", 60), ("9" * 19, 60)])
def test_waits_as_asked_but_never_long(wait, seconds, tmp_path):
    with Server(head(f"Retry-After: {wait}", status="503 Busy"), whole()) as server:
        assert f"again in {seconds} s" in get(server.port, tmp_path).out


def test_retries_without_end_do_not_overflow(tmp_path, monkeypatch):
    def drop(client, *_):
        client.has_answered = True
        raise download.TemporaryFailure("gone")

    monkeypatch.setattr(download, "receive", drop)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    result = get(1, tmp_path, "--retries", "1100")
    fails(result, "gone; check the network")
    assert result.out.count("again in 30 s") > 1000


@pytest.mark.parametrize("retries", ["-1", "²", "1e3", "9" * 5000, "many"])
def test_retries_that_are_no_number(retries, tmp_path):
    result = get(1, tmp_path, "--retries", retries)
    assert result.code == 2 and "whole number" in result.err


# ---- redirects ----


def test_redirect_to_another_host(tmp_path):
    with Server(whole()) as there:
        on = [f"HTTP://localhost:{there.port}/x?y={'z' * 3000}", "/hier/", "ü b"]
        on = [head(f"Location: {place}", "Content-Length: 0", status=REDIRECT) for place in reversed(on)]
        with Server(on[1], on[0], on[2]) as here:
            arrived(get(here.port, tmp_path), tmp_path)
            assert [request.split()[1] for request in here.requests[1:]] == ["/hier/", "/hier/%FC%20b"]
            assert "Cookie" not in there.requests[0] and "Authorization" not in there.requests[0]


def test_redirect_into_the_private_network(tmp_path, monkeypatch):
    """A public server (played by 127.0.0.1) cannot redirect to a router's page."""
    monkeypatch.setattr(download, "is_private", lambda address: address == "127.0.0.2")
    with Server(whole(), host="127.0.0.2") as there:
        on = head(f"Location: http://127.0.0.2:{there.port}/reboot", status=REDIRECT)
        with Server(on) as here:
            fails(get(here.port, tmp_path, "--retries", "0"), "private network", "127.0.0.2", "--mirror")
        assert there.requests == []


@pytest.mark.parametrize("address, expected", [
    ("127.0.0.1", True), ("::1", True), ("10.1.2.3", True), ("172.31.0.1", True), ("192.168.1.1", True),
    ("169.254.169.254", True), ("fe80::1%eth0", True), ("::ffff:10.0.0.1", True), ("0.0.0.0", True),
    ("8.8.8.8", False), ("172.32.0.1", False), ("2606:4700::1", False), ("198.18.0.7", False),
    ("fc00::1", False),
])  # fmt: skip
def test_private_addresses(address, expected):
    assert download.is_private(address) is expected


# ---- TLS and proxies ----

# Of this test alone: a key and its certificate for localhost and 127.0.0.1, from 2020 to 2120.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgKCNPTZE2FrIrT/ak
xftD56xebNpetTmOiyQLAzBG2k6hRANCAAQqHUInsud3zBbyJUKhiu7i4r4mgtp5
we5WAth/QdB5PQ+0pYS6G1Q5V8iPGGMG3/ItJ3py6lqunlkKjvByRsep
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBRzCB7qADAgECAgEBMAoGCCqGSM49BAMCMBQxEjAQBgNVBAMMCWxvY2FsaG9z
dDAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowFDESMBAGA1UEAwwJ
bG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEKh1CJ7Lnd8wW8iVC
oYru4uK+JoLaecHuVgLYf0HQeT0PtKWEuhtUOVfIjxhjBt/yLSd6cuparp5ZCo7w
ckbHqaMvMC0wGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMA8GA1UdEwEB/wQF
MAMBAf8wCgYIKoZIzj0EAwIDSAAwRQIhAOi+5mHjCaSCGdVcbq9/gqkSHCGoF7xm
erkWqSzGjCFWAiA3H4DUiGYFnhvUHtNmnnSAtxHT2YnY+YeWil/B8KDLvw==
-----END CERTIFICATE-----
"""


@pytest.fixture
def tls(tmp_path):
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return SimpleNamespace(path=path, context=context)


def test_certificate(tls, tmp_path, monkeypatch):
    """The certificate is not trusted; the advice in the message helps."""
    with Server(whole(), context=tls.context) as server:
        secure = f"https://127.0.0.1:{server.port}"
        fails(get(0, tmp_path / "out", mirror=secure), "certificate", "SSL_CERT_FILE")
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tls.path))
        arrived(get(0, tmp_path / "out", mirror=secure), tmp_path / "out")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
        fails(get(0, tmp_path / "other", mirror=secure), "SSL_CERT_FILE")


def test_never_from_https_to_http(tls, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.path))
    with Server(whole()) as there:
        on = head(f"Location: HTTP://127.0.0.1:{there.port}/", status=REDIRECT)
        with Server(on, context=tls.context) as here:
            fails(get(0, tmp_path / "out", mirror=f"https://localhost:{here.port}"), "not followed")
        assert there.requests == []


@pytest.mark.parametrize("answer", [bytes(1000), b"", head(status="400 Bad"), b"\x16\x03\x03\xff\xff" * 999])
def test_no_tls(answer, tmp_path):
    with Server(answer, speaks_first=True) as server:
        fails(get(0, tmp_path, mirror=f"https://127.0.0.1:{server.port}"), "no connection to 127.0.0.1")


PROXY_TALK = {
    "garbage": bytes(range(256)) * 1000, "nothing": b"", "text": b"go away\r\n",
    "refusal": head(status="403 No"), "endless": lambda _: again(b"", bytes(65536)),
    "silence": lambda _: then_silence(b""),
    "at a time": lambda _: again(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.02),
    "headers": lambda _: again(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    "socks 5": b"\x05\x00\x05\x00\x00\x03\xff", "socks 5 ": b"\x05\xff", "socks 4": b"\x00\x5b" + bytes(6),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("kind", ["http", "socks5h", "socks5", "socks4a"])
@pytest.mark.parametrize("case", PROXY_TALK)
def test_proxy_that_talks_nonsense(case, kind, scheme, tmp_path, hurry_more):
    began = time.monotonic()
    with Server(PROXY_TALK[case], speaks_first=True) as proxy:
        result = get(0, tmp_path / "out", "--proxy", f"{kind}://name:secret@127.0.0.1:{proxy.port}",
                     "--retries", "1", mirror=f"{scheme}://127.0.0.1:1")  # fmt: skip
    fails(result)
    assert "secret" not in result.err and time.monotonic() - began < 20
    assert on_disk(tmp_path / "out") == {}


def test_proxy_that_wants_a_password_for_https(tmp_path):
    with Server(head("Proxy-Authenticate: Basic realm=x", status="407 Who")) as proxy:
        words = "--proxy", f"http://a:secret@127.0.0.1:{proxy.port}"
        result = get(0, tmp_path, *words, mirror="https://nano.invalid")
    fails(result, "407", "NAME:PASSWORD")
    assert "secret" not in result.err


def test_proxies_of_the_environment(tmp_path, monkeypatch):
    with Server(whole()) as proxy, Server(whole()) as direct:
        address = f"http://127.0.0.1:{proxy.port}"
        monkeypatch.setenv("all_proxy", address)
        arrived(get(0, tmp_path / "a", mirror="http://nano.invalid"), tmp_path / "a")
        assert proxy.requests[0].startswith("GET http://nano.invalid/a/b/resolve/main/f ")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        arrived(get(direct.port, tmp_path / "b"), tmp_path / "b")
        assert len(proxy.requests) == len(direct.requests) == 1
        arrived(get(direct.port, tmp_path / "c", "--proxy", address), tmp_path / "c")  # what is said outright
        assert len(proxy.requests) == 2
        monkeypatch.setenv("all_proxy", "\udcff")
        fails(get(0, tmp_path / "d", mirror="http://nano.invalid"), "not the address of a proxy")


@pytest.mark.parametrize("place", ["127.0.0.1:99999", "127.0.0.1:1/\udcff", "127.0.0.1:1/a b", "镜像.invalid",
                                   "127.0.0.1:1/\x1b[2J", "a" * 9999])  # fmt: skip
def test_odd_mirrors(place, tmp_path):
    result = get(0, tmp_path, mirror=f"http://{place}")
    fails(result)
    assert result.out.rstrip("\n").isprintable()


# ---- listings ----


def entry(path="f", size=300_000, **more):
    return {"type": "file", "path": path, "size": size, "lfs": {"oid": SHA256}, **more}


def listing(text):
    return whole(body=text if isinstance(text, bytes) else json.dumps(text).encode())


LISTINGS = {
    "endless": lambda _: again(head(), b"[" * 65536),
    "endless list": lambda _: again(head() + b"[", b'{"a":1},' * 999),
    "a byte at a time": lambda _: again(head() + b"[", b" ", 0.02),
    "bomb": head("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}") + BOMB,
    "deep": listing(b"[" * 100_000), "deep objects": listing(b'{"a":' * 100_000),
    "digits": listing(b"9" * 100_000), "size 1e400": listing(b'[{"type":"file","path":"f","size":1e400}]'),
    "size of 5,000 digits": listing(b'[{"type":"file","path":"f","size":%s}]' % (b"9" * 5000)),
    **{f"size {size}": listing([entry(size=size)]) for size in (float("nan"), "²", -1, 1.5, None, "5", [])},
    "empty file": listing([entry(size=0)]), "half": listing([entry()])[:-5], "bytes": listing(bytes(99)),
    "no UTF-8": listing(b"[\xff]"), "UTF-16": listing("[1".encode("utf-16")), "nothing": listing(b""),
    **{f"{value!r}"[:20]: listing(value) for value in (5, "x", None, [], [[[]], 1, None], {"a": "x" * 999})},
    "names": listing([entry(path) for path in (
        "..", "../x", "/x", "a/b", "", "a" * 999, "a\0", "x\ny", "\ud800", ".x", "x.part", "x.part.json",
        "C:\\x", 5, None, ["f"], {})]), "error": head(status="500 Oh"),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTINGS)
def test_listings(case, tmp_path, hurry_more):
    began = time.monotonic()
    with Server(LISTINGS[case], b"") as server:
        fails(get(server.port, tmp_path / "out", "--retries", "0", name="listed"))
        assert server.sent < 20 * MAX_BYTES
    assert time.monotonic() - began < 20 and on_disk(tmp_path / "out") == {}


def test_listing_with_odd_neighbours(tmp_path):
    odd = [{"type": "file"}, 7, entry(size=[]), entry(path="../f"), entry(path=".gitattributes")]
    for good in (entry(), entry(lfs="²"), entry(lfs={"oid": 5}), entry(lfs=None)):
        with Server(listing([*odd, good, good]), whole()) as server:
            arrived(get(server.port, tmp_path, name="listed"), tmp_path)
        (tmp_path / "f").unlink()


def test_listing_of_more_than_any_set_has(tmp_path):
    half = MAX_BYTES // 2
    for entries in ([entry(f"f{i}", half) for i in range(3)], [entry(f"f{i}", 0) for i in range(2000)]):
        with Server(listing(entries)) as server:
            fails(get(server.port, tmp_path, name="listed"), "more than any set")


# ---- what lies on the disk ----

NOTES = [
    b"", b"{", b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"null", b"[]", b"5", b'"x"', b"{}", bytes(10**6),
    b'{"validator": 5, "sha256": 5, "total": "x"}', b'{"validator": "\\r\\nX: y", "sha256": null}',
    b'{"validator": null, "sha256": null, "total": 1e400}', b'{"validator": "\\ud800", "total": []}',
    b'{"validator": "%s", "sha256": "", "total": null}' % (b"x" * 9000),
]  # fmt: skip


@pytest.mark.parametrize("note", NOTES)
def test_damaged_notes(note, tmp_path):
    (tmp_path / "f.part").write_bytes(b"of something else")
    (tmp_path / "f.part.json").write_bytes(note)
    with Server(part_of) as server:
        result = get(server.port, tmp_path, name="unknown")
        arrived(result, tmp_path)
        assert "starting over" in result.out
        [request] = server.requests
        assert "Range" not in request and "X: y" not in request


@pytest.mark.parametrize("note", [{"total": "²"}, {"total": None}, {"sha256": "²"}, {}])
def test_notes_of_which_enough_is_good(note, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY[:1000])
    (tmp_path / "f.part.json").write_text(json.dumps({"validator": '"one"', **note}))
    with Server(part_of) as server:
        arrived(get(server.port, tmp_path), tmp_path)
        assert "Range: bytes=1000-" in server.requests[0]


@pytest.mark.parametrize("name", ["f", "f.part", "f.part.json", "f.part.lock"])
def test_folders_in_the_way(name, tmp_path):
    (tmp_path / name).mkdir()
    with Server(part_of) as server:
        fails(get(server.port, tmp_path, name="unknown"), "folder" if name == "f" else "directory", name)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name]


def test_disk_fills_up_meanwhile(tmp_path, monkeypatch):
    """Without an announced length, some space always stays free."""
    rooms = iter([10**9, 500_000, 400_000, 200_000])
    monkeypatch.setattr(download, "MIN_FREE", 300_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(rooms)))
    with Server(head(ETAG) + BODY) as server:
        fails(get(server.port, tmp_path, name="unknown"), "does not say how much", "free some space")
    kept = on_disk(tmp_path)["f.part"]
    assert 0 < kept < len(BODY)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch, Server(part_of) as server:
        hurry_up(patch)
        arrived(get(server.port, tmp_path, name="unknown"), tmp_path)
        assert f"bytes={kept}-" in server.requests[0]


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and a limit on the size of files")
def test_write_fails_in_the_middle(tmp_path):
    """As on a full disk: what could be written is kept, and the same command continues."""
    with Server(part_of) as server:
        code, _, errors = in_a_fork(
            lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                     resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
                     get(server.port, tmp_path))[-1])  # fmt: skip
        assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
        assert on_disk(tmp_path)["f.part"] == 100_000
        arrived(get(server.port, tmp_path), tmp_path)
        assert "Range: bytes=100000-" in server.requests[1]


def in_a_fork(work):
    """Run `work() -> code, out, err` in a copy of this process; None if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(list(vars(work()).values())).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as pipe:
        return json.loads(pipe.read() or "null")


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_line(stride, tmp_path, monkeypatch):
    """kill -9 before any line involved: the same command always continues, and the file is right."""
    body = BODY[:50_000]
    monkeypatch.setitem(download.SETS, "small", download.SETS["unknown"]._replace(
        files=(download.File("f", len(body)),)))  # fmt: skip

    def small(request):
        answer = part_of(request).replace(b"300000", b"50000").replace(b"299999", b"49999")
        answer, _, rest = answer.partition(b"\r\n\r\n")
        have = len(BODY) - len(rest)
        answer = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % (len(body) - have), answer)
        rest = body[have:] if have else body[:20_000]  # the first time, the line is cut
        return answer + b"\r\n\r\n" + rest

    def until_line(number):
        """Kill it at the n-th executed line of these functions; each line counts at most twice."""
        count, seen = 0, collections.Counter()

        def trace(frame, event, _):
            nonlocal count
            if frame.f_code.co_filename != download.__file__ or frame.f_code.co_name not in names:
                return None
            seen[frame.f_lineno] += event == "line"
            count += event == "line" and seen[frame.f_lineno] <= 2
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        return get(server.port, out, name="small")

    names = {"fetch", "locked", "receive_all", "receive", "sha256_of", "discard"}
    with Server(small) as server:
        for number in range(1, 1000, stride):
            out = tmp_path / str(number)
            ended = in_a_fork(lambda number=number: until_line(number))
            here = on_disk(out)
            assert here.get("f", len(body)) == len(body)
            if (part := out / "f.part").exists():
                assert body.startswith(part.read_bytes())
            result = get(server.port, out, name="small")
            assert result.code == 0 and (out / "f").read_bytes() == body, (number, result)
            assert "f.part" not in on_disk(out)
            if ended:
                break
    assert 60 < number < 999 and ended[0] == 0


# ---- two at once, and Ctrl-C ----


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_two_at_once(tmp_path):
    """The second one reports it and leaves the part alone; a lock left by a killed one is ignored."""
    go_on = threading.Event()

    def slow(request):
        yield whole(ETAG)[:-1000]
        go_on.wait(20)
        yield BODY[-1000:]

    with Server(slow, part_of) as server:
        first, results = threading.Thread(target=lambda: results.append(in_a_fork(
            lambda: get(server.port, tmp_path)))), []  # fmt: skip
        first.start()
        while on_disk(tmp_path).get("f.part", 0) < 100_000:
            sleep(0.01)
        fails(get(server.port, tmp_path), "being downloaded already", "wait", "--out")
        arrived(get(server.port, tmp_path / "elsewhere"), tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "f").unlink()
        (tmp_path / "elsewhere").rmdir()
        go_on.set()
        first.join()
        assert results[0][0] == 0, results
        assert on_disk(tmp_path) == {"f": len(BODY)}
        (tmp_path / "f").unlink()
        (tmp_path / "f.part.lock").write_text("")
        arrived(get(server.port, tmp_path), tmp_path)


def test_the_other_one_was_faster(tmp_path, monkeypatch):
    """The file arrives between the check and the lock."""

    @contextlib.contextmanager
    def other(target):
        target.write_bytes(BODY)
        yield

    monkeypatch.setattr(download, "locked", other)
    result = get(1, tmp_path)
    arrived(result, tmp_path)
    assert "already here" in result.out


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("where", ["name", "head", "body"])
def test_ctrl_c_wherever_it_waits(where, tmp_path):
    talk = {"name": b"", "head": b"HTTP/1.1 200 OK\r\n", "body": whole(ETAG)[:-1000]}[where]

    def press(request):
        yield talk
        sleep(0.2)
        os.kill(child[0], signal.SIGINT)
        sleep(20)

    def work():
        os.write(writing, b"%d\n" % os.getpid())
        patch = pytest.MonkeyPatch()
        patch.setattr(download, "SPEED_WINDOW", 60)
        return get(server.port, tmp_path)

    child, (reading, writing) = [], os.pipe()
    with Server(press) as server, open(reading) as pipe:
        threading.Thread(target=lambda: child.append(int(pipe.readline()))).start()
        began = time.monotonic()
        code, printed, errors = in_a_fork(work)
    os.close(writing)
    assert code == 130 and not errors and "same command" in printed
    assert time.monotonic() - began < 15
    assert "f.part.lock" not in on_disk(tmp_path) and "f" not in on_disk(tmp_path)


# ---- whatever comes ----

texts = st.sampled_from
numbers = st.one_of(
    texts(["0", "1", "300000", "-1", "²", "1e9", "9" * 30, "9" * 5000, "", "x", "0x10", "1_0", " 7 "]),
    st.integers(-10, 400_000).map(str))  # fmt: skip
values = st.one_of(
    numbers, st.builds("bytes {}-{}/{}".format, numbers, numbers, numbers),
    texts(["chunked", "gzip", "identity", "close", "keep-alive", "/", "/f", "//", "http://[", "text/html"]),
    texts(['"one"', 'W/"one"', "bytes */300000", f'"{"0" * 64}"', SHA256]),
    st.text(st.characters(max_codepoint=255), max_size=20))  # fmt: skip
names = st.one_of(
    texts(["Content-Length", "Content-Range", "Content-Encoding", "Content-Type", "Transfer-Encoding"]),
    texts(["ETag", "Last-Modified", "Location", "Retry-After", "X-Linked-ETag", "Connection", "Trailer"]),
    texts(["HTTP/1.1 200 x", "", " ", "é"]))  # fmt: skip
statuses = st.one_of(
    texts([100, 103, 200, 204, 206, 206, 301, 304, 307, 404, 407, 416, 429, 503]), st.integers(0, 99999),
    st.text(max_size=5))  # fmt: skip
bodies = st.one_of(
    st.just(BODY), st.integers(0, len(BODY)).map(lambda n: BODY[n:]), st.binary(max_size=200),
    st.integers(0, len(BODY)).map(lambda n: BODY[:n]), st.just(bytes(2 * MAX_BYTES)),
    st.just(b"%x\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(BODY), BODY)))  # fmt: skip


@st.composite
def answers(draw):
    lines = [f"{name}: {value}" for name, value in draw(st.lists(st.tuples(names, values), max_size=5))]
    if draw(st.booleans()):
        lines.append('ETag: "one"')
    answer = head(*lines, status=f"{draw(statuses)} x".encode().decode("latin-1")) + draw(bodies)
    if draw(st.integers(0, 9)) == 0:  # a few bytes fall out
        cut = draw(st.integers(0, 200))
        answer = answer[:cut] + draw(st.binary(max_size=3)) + answer[cut + 1 :]
    return answer


whatever = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@whatever
@given(st.lists(st.one_of(answers(), st.just(part_of)), min_size=1, max_size=4), texts(["known", "unknown"]),
       texts([None, *NOTES, b'{"validator": "\\"one\\""}']), st.integers(0, len(BODY)))  # fmt: skip
def test_whatever_a_server_says(talk, name, note, have):
    """It ends, with a message or the file, and never with more on the disk than allowed."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as out, Server(*talk) as server:
        hurry_up(patch)
        if note is not None:
            Path(out, "f.part").write_bytes(BODY[:have])
            Path(out, "f.part.json").write_bytes(note)
        result = get(server.port, out, "--retries", "2", name=name)
        here = on_disk(out)
        assert here.get("f", 0) + here.get("f.part", 0) <= MAX_BYTES
        if result.code:
            fails(result)
            assert here.keys() <= {"f.part", "f.part.json"}
        else:
            assert here.keys() == {"f"} and here["f"]
            assert name == "unknown" or Path(out, "f").read_bytes() == BODY


keys = texts(["type", "path", "size", "lfs", "oid"])
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), texts(["file"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(keys | st.text(max_size=4), inner, max_size=5)),
    max_leaves=20)  # fmt: skip
entries = st.builds(lambda base, more: {**base, **more}, st.just(entry()), st.dictionaries(
    st.sampled_from(["type", "path", "size", "lfs"]), json_values, max_size=2))  # fmt: skip


@whatever
@given(st.one_of(json_values, st.lists(st.one_of(entries, json_values), max_size=5)))
def test_whatever_is_listed(value):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as out:
        hurry_up(patch)
        with Server(listing(value), whole()) as server:
            result = get(server.port, out, "--retries", "0", name="listed")
        if result.code:
            fails(result)
        assert all(path.is_file() for path in Path(out).iterdir()) and sum(on_disk(out).values()) <= MAX_BYTES
