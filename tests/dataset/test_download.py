"""The downloader's command line against local servers, both well-behaved and misbehaving."""

import ctypes
import hashlib
import http.client
import importlib.util
import json
import os
import random
import re
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dataset" / "download.py"
BYTES = random.Random(0).randbytes(3_000_000)
OTHER = random.Random(1).randbytes(2_500_000)
CHUNK = 1 << 16  # what the downloader takes at a time; less than one is lost with a connection
SHA256 = hashlib.sha256(BYTES).hexdigest()
SET, FILE = "minimind-pretrain-mini", "pretrain_t2t_mini.jsonl"
PATH = f"/datasets/jingyaogong/minimind_dataset/resolve/main/{FILE}"


# ---- servers ----


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; the server's attributes say how it misbehaves."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.seen.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if server.answers:
            status, headers, body = server.answers.pop(0)
            return self.reply(status, headers, body)
        if self.path in server.redirects:
            location, headers = server.redirects[self.path]
            return self.reply(302, {"Location": location, **headers}, b"")
        body = server.files.get(self.path)
        if body is None:
            return self.reply(404, {}, b"not here")
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        headers, status = {"ETag": etag} if server.etags else {"Last-Modified": server.date}, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if asked and server.ranges and (server.deaf or condition in (None, etag, server.date)):
            start = int(asked[1])
            if start >= len(body):
                return self.reply(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        self.reply(status, headers, body, server.drops.pop(0) if server.drops else None)
        if server.swap:
            server.files, server.swap = server.swap, None

    def reply(self, status, headers, body, drop=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" in headers:
            pass
        elif self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body if drop is None else body[:drop]
        for start in range(0, len(body), 200_000):
            piece = body[start : start + 200_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if self.server.chunked else piece)
            if self.server.slow:
                self.wfile.flush()
                time.sleep(0.05)
        if self.server.chunked and drop is None:
            self.wfile.write(b"0\r\n\r\n")
        if drop is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *_):
        pass


class Proxy(BaseHTTPRequestHandler):
    """A forwarding HTTP proxy for http addresses; only it can resolve nano.invalid."""

    def do_GET(self):
        self.server.seen.append(self.path)
        if self.server.closed:
            return self.send_error(407)
        target = urlsplit(self.path)
        host = "127.0.0.1" if target.hostname == "nano.invalid" else target.hostname
        connection = http.client.HTTPConnection(host, target.port)
        connection.request("GET", target.path, headers={k: v for k, v in self.headers.items() if k != "Host"})
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())

    def log_message(self, *_):
        pass


class Socks5(socketserver.BaseRequestHandler):
    """A SOCKS5 proxy: RFC 1928 (CONNECT only) and RFC 1929 passwords; only it can resolve nano.invalid."""

    def handle(self):
        stream = self.request.makefile("rb")
        _, n_methods = stream.read(2)
        methods = stream.read(n_methods)
        if self.server.password:
            if 2 not in methods:
                return self.request.sendall(b"\x05\xff")
            self.request.sendall(b"\x05\x02")
            stream.read(1)
            words = [stream.read(stream.read(1)[0]).decode() for _ in range(2)]
            right = ":".join(words) == self.server.password
            self.request.sendall(b"\x01\x00" if right else b"\x01\x01")
            if not right:
                return
        else:
            self.request.sendall(b"\x05\x00")
        kind = stream.read(4)[3]
        host = stream.read(stream.read(1)[0]).decode() if kind == 3 else socket.inet_ntoa(stream.read(4))
        port = int.from_bytes(stream.read(2), "big")
        self.server.seen.append((kind, host))
        try:
            there = socket.create_connection(("127.0.0.1" if host == "nano.invalid" else host, port))
        except OSError:
            return self.request.sendall(b"\x05\x04\x00\x01" + bytes(6))  # host unreachable
        with there:
            self.request.sendall(b"\x05\x00\x00\x01" + bytes(6))
            ends = {self.request: there, there: self.request}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    ends[end].sendall(data)


class SocksServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

    def handle_error(self, *_):  # a client that is killed is no news
        pass


class WebServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


@pytest.fixture
def start():
    servers = []

    def run_server(kind, handler, **attributes):
        server = kind(("127.0.0.1", 0), handler)
        for name, value in {"seen": [], **attributes}.items():
            setattr(server, name, value)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        server.port = server.server_address[1]
        servers.append(server)
        return server

    yield run_server
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def web(start):
    return start(
        WebServer,
        Handler,
        files={PATH: BYTES},
        redirects={},
        answers=[],
        drops=[],
        ranges=True,
        etags=True,
        deaf=False,
        slow=False,
        chunked=False,
        swap=None,
        date="Wed, 01 Jan 2025 00:00:00 GMT",
    )


# ---- the command line ----


def environment(**extra):
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return {**kept, "PYTHONIOENCODING": "utf-8", **extra}


def command(*words):
    return [sys.executable, str(SCRIPT), *map(str, words)]


def call(*words, env=None, **options):
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env=environment(**(env or {})),
        **options,
    )


def get(web, out, *words, name=SET, host="127.0.0.1", **options):
    return call(name, "--mirror", f"http://{host}:{web.port}", "--out", out, *words, **options)


def arrived(out, body=BYTES, file=FILE):
    """The folder contains only the finished file, with these bytes."""
    return [path.name for path in out.iterdir()] == [file] and (out / file).read_bytes() == body


def fails(result, *words):
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_whole_file_and_then_nothing_to_do(web, tmp_path):
    out = tmp_path / "数据 and more"
    result = get(web, out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert arrived(out) and SHA256 in result.stdout
    assert f'next: python data.py --pretrain "{out / FILE}"' in result.stdout
    assert f"but {out / FILE} holds NUL bytes" in result.stdout
    assert "\x1b" not in result.stdout
    web.seen.clear()
    again = get(web, out)
    assert again.returncode == 0 and "already here" in again.stdout and not web.seen


@pytest.mark.parametrize("etags", [True, False])
def test_dropped_twice_is_resumed(web, tmp_path, etags):
    web.etags, web.drops = etags, [18 * CHUNK, 12 * CHUNK]
    result = get(web, tmp_path)
    assert result.returncode == 0 and arrived(tmp_path), result.stderr
    assert "trying again" in result.stdout
    starts = [int(asked[6:-1]) if asked else 0 for _, asked, _ in web.seen]
    assert starts == sorted(set(starts)) and len(starts) == 3
    assert all(condition for _, _, condition in web.seen[1:])


def test_killed_and_resumed(web, tmp_path):
    web.slow = True
    process = subprocess.Popen(
        command(SET, "--mirror", f"http://127.0.0.1:{web.port}", "--out", tmp_path),
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    part = tmp_path / f"{FILE}.part"
    limit = time.monotonic() + 20
    while (not part.exists() or part.stat().st_size < 1_000_000) and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    here = part.stat().st_size
    assert 1_000_000 <= here < len(BYTES) and not (tmp_path / FILE).exists()
    web.slow = False
    assert get(web, tmp_path).returncode == 0 and arrived(tmp_path)
    assert web.seen[-1][1] == f"bytes={here}-"


def test_killed_before_the_rename(web, tmp_path):
    etag = f'"{hashlib.md5(BYTES).hexdigest()}"'
    (tmp_path / f"{FILE}.part").write_bytes(BYTES)
    (tmp_path / f"{FILE}.part.json").write_text(
        json.dumps({"validator": etag, "sha256": None, "total": len(BYTES)})
    )
    assert get(web, tmp_path).returncode == 0 and arrived(tmp_path)
    assert len(web.seen) == 1


@pytest.mark.parametrize(
    "rest, note",
    [
        (b"x" * 4_000_000, None),
        (b"x" * 100, "{"),
        (b"x" * 100, '{"validator": "\\"another\\"", "sha256": null, "total": 9}'),
    ],
)
def test_a_part_of_something_else(web, tmp_path, rest, note):
    (tmp_path / f"{FILE}.part").write_bytes(rest)
    if note:
        (tmp_path / f"{FILE}.part.json").write_text(note)
    assert get(web, tmp_path).returncode == 0 and arrived(tmp_path)


def test_part_longer_than_the_file(web, tmp_path):
    etag = f'"{hashlib.md5(BYTES).hexdigest()}"'
    (tmp_path / f"{FILE}.part").write_bytes(BYTES + b"more")
    (tmp_path / f"{FILE}.part.json").write_text(json.dumps({"validator": etag, "sha256": None, "total": 5}))
    result = get(web, tmp_path)
    assert result.returncode == 0 and arrived(tmp_path) and "starting over" in result.stdout


def test_server_without_ranges_starts_over(web, tmp_path):
    web.ranges, web.drops = False, [18 * CHUNK]
    result = get(web, tmp_path)
    assert result.returncode == 0 and arrived(tmp_path) and "the whole file" in result.stdout


@pytest.mark.parametrize("deaf", [False, True])  # deaf: honours Range, but not If-Range
def test_file_changes_in_between(web, tmp_path, deaf):
    web.deaf, web.drops, web.swap = deaf, [18 * CHUNK], {PATH: OTHER}
    result = get(web, tmp_path)
    assert result.returncode == 0 and arrived(tmp_path, OTHER), result.stderr


def test_chunked_answer_of_unknown_length(web, tmp_path):
    web.chunked, web.drops = True, [18 * CHUNK]
    assert get(web, tmp_path).returncode == 0 and arrived(tmp_path)


def test_busy_server_is_asked_again(web, tmp_path):
    web.answers = [(503, {"Retry-After": "1"}, b""), (429, {}, b"")]
    begin = time.monotonic()
    result = get(web, tmp_path)
    assert result.returncode == 0 and arrived(tmp_path) and "503" in result.stdout and "429" in result.stdout
    assert time.monotonic() - begin > 1


def test_gives_up_and_keeps_what_is_here(web, tmp_path):
    web.ranges, web.drops = False, [18 * CHUNK] * 9
    fails(get(web, tmp_path, "--retries", 1), "1.2 MB are kept", "same command")
    assert (tmp_path / f"{FILE}.part").stat().st_size == 18 * CHUNK
    web.ranges, web.drops = True, []
    assert get(web, tmp_path).returncode == 0 and arrived(tmp_path)
    assert web.seen[-1][1] == f"bytes={18 * CHUNK}-"


def hugging_face(web, sha256):
    """A redirect that states the SHA-256, then the file on another server, as on the Hub."""
    web.redirects[PATH] = "/cdn/7", {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(BYTES))}
    web.files = {"/cdn/7": BYTES}


def test_stated_sha256(web, tmp_path):
    hugging_face(web, SHA256)
    web.drops = [18 * CHUNK]
    result = get(web, tmp_path)
    assert result.returncode == 0 and arrived(tmp_path) and "as expected" in result.stdout
    assert web.seen[-1][:2] == ("/cdn/7", f"bytes={18 * CHUNK}-")


def test_wrong_sha256(web, tmp_path):
    hugging_face(web, "0" * 64)
    fails(get(web, tmp_path), SHA256, "0" * 64, "thrown away")
    assert not list(tmp_path.iterdir())
    hugging_face(web, SHA256)
    assert get(web, tmp_path).returncode == 0 and arrived(tmp_path)


def test_known_sha256_and_size(web, tmp_path):
    path = "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    web.files = {path: BYTES[:1_115_394]}
    fails(get(web, tmp_path, name="tinyshakespeare"), "86c4e6aa9db7c042", "tinyshakespeare.txt")
    web.files = {path: BYTES}
    fails(get(web, tmp_path, name="tinyshakespeare"), "3,000,000 bytes instead of 1,115,394")
    (tmp_path / "tinyshakespeare.txt").write_text("something else")
    fails(get(web, tmp_path, name="tinyshakespeare"), "14 bytes instead of 1,115,394", "move it away")


def test_names_asked_from_the_hub(web, tmp_path):
    entries = [
        {"type": "file", "path": ".gitattributes", "size": 9},
        {"type": "directory", "path": "x", "size": 0},
        {"type": "file", "path": "../../escape.7z", "size": 9},
        {"type": "file", "path": "README.md", "size": 9},
        {"type": "file", "path": "nano 2024.7z", "size": len(BYTES), "lfs": {"oid": SHA256}},
    ]
    web.files = {
        "/api/models/bd4sur/nano_dataset/tree/main": json.dumps(entries).encode(),
        "/bd4sur/nano_dataset/resolve/main/nano%202024.7z": BYTES,
    }
    result = get(web, tmp_path, name="nano")
    assert result.returncode == 0 and arrived(tmp_path, file="nano 2024.7z"), result.stderr
    assert "as expected" in result.stdout and "7z x -pnano" in result.stdout
    for answer in (b"<html>", json.dumps(entries[:4]).encode()):
        web.answers = [(200, {}, answer)]
        fails(get(web, tmp_path, name="nano"), "does not list")


# ---- proxies ----


def test_http_proxy(web, start, tmp_path):
    proxy = start(WebServer, Proxy, closed=False)
    address = f"http://127.0.0.1:{proxy.port}"
    assert get(web, tmp_path / "a", "--proxy", address, host="nano.invalid").returncode == 0
    assert (
        get(
            web, tmp_path / "b", host="nano.invalid", env={"HTTP_PROXY": address, "http_proxy": address}
        ).returncode
        == 0
    )
    assert arrived(tmp_path / "a") and arrived(tmp_path / "b")
    assert proxy.seen == [f"http://nano.invalid:{web.port}{PATH}"] * 2
    proxy.closed = True
    fails(get(web, tmp_path / "c", "--proxy", address, host="nano.invalid"), "407", "PASSWORD")


def test_socks5_proxy(web, start, tmp_path):
    proxy = start(SocksServer, Socks5, password=None)
    address = f"socks5h://127.0.0.1:{proxy.port}"
    web.drops = [18 * CHUNK]
    assert get(web, tmp_path / "a", "--proxy", address, host="nano.invalid").returncode == 0
    assert proxy.seen == [(3, "nano.invalid")] * 2  # the name went to the proxy, and was never looked up here
    proxy.seen.clear()
    assert get(web, tmp_path / "b", host="nano.invalid", env={"ALL_PROXY": address}).returncode == 0
    assert proxy.seen == [(3, "nano.invalid")]
    proxy.seen.clear()
    local = address.replace("socks5h", "socks5")
    assert get(web, tmp_path / "c", "--proxy", local, host="localhost").returncode == 0
    assert proxy.seen == [(1, "127.0.0.1")]
    assert all(arrived(tmp_path / folder) for folder in "abc")
    result = call(SET, "--mirror", "http://127.0.0.1:1", "--proxy", address, "--out", tmp_path / "d")
    fails(result, "through the proxy")


def test_socks5_password(web, start, tmp_path):
    proxy = start(SocksServer, Socks5, password="nano:secret")
    address = f"@127.0.0.1:{proxy.port}"
    assert get(web, tmp_path, "--proxy", "socks5h://nano:secret" + address).returncode == 0
    assert arrived(tmp_path)
    result = get(web, tmp_path / "b", "--proxy", "socks5h://nano:guessed" + address)
    fails(result, "through the proxy socks5h://127.0.0.1")
    assert "guessed" not in result.stderr


@pytest.mark.parametrize(
    "proxy", ["127.0.0.1:1080", "socks://127.0.0.1:1", "http://127.0.0.1:99999", "socks5h://127.0.0.1:none"]
)
def test_impossible_proxy(web, tmp_path, proxy):
    fails(get(web, tmp_path, "--proxy", proxy))
    assert not web.seen
    if proxy.startswith("socks"):
        fails(get(web, tmp_path, host="nano.invalid", env={"ALL_PROXY": proxy}))


@pytest.mark.parametrize("kind", ["http", "socks5h"])
def test_dead_proxy(web, tmp_path, kind):
    result = get(web, tmp_path, "--proxy", f"{kind}://127.0.0.1:1")
    fails(result, f"through the proxy {kind}://127.0.0.1:1", "refused")


# ---- mistakes ----


def test_unreachable(web, tmp_path):
    out = ("--out", tmp_path)
    fails(call(SET, "--mirror", "http://nano.invalid", *out), "no connection to nano.invalid", "--proxy")
    fails(call(SET, "--mirror", "http://127.0.0.1:1", *out), "refused")
    fails(call(SET, "--mirror", f"https://127.0.0.1:{web.port}", *out), "no connection to 127.0.0.1")
    fails(call(SET, "--mirror", "http://[::1", *out))


def test_refused_by_the_server(web, tmp_path):
    web.files = {}
    fails(get(web, tmp_path), "404", PATH)
    web.answers = [(401, {}, b"")]
    fails(get(web, tmp_path), "401")
    web.answers = [(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>please log in</html>")]
    fails(get(web, tmp_path), "a web page")
    assert not list(tmp_path.iterdir())


def test_names():
    fails(call("tinystory"), "no set tinystory", "did you mean tinystories?")
    fails(call("qqqqq"), "--list")
    fails(call("tinystories", "--mirror", "modelscope"), "hf, hf-mirror")
    result = call()
    assert result.returncode == 2 and "--list" in result.stderr


def test_list_and_help():
    result = call("--list", env={"COLUMNS": "80"})
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("tinyshakespeare", "tinystories-v2", "minimind-sft-mini"))
    assert "examples:" in call("--help").stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full(web, tmp_path):
    (tmp_path / f"{FILE}.part").symlink_to("/dev/full")
    fails(get(web, tmp_path), "disk is full")


def test_too_little_room(web, tmp_path):
    web.answers = [(200, {"Content-Length": str(10**18)}, b"")]
    result = get(web, tmp_path)
    fails(result, "1.0 EB", "free")
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(web, tmp_path):
    (tmp_path / "x").write_text("a file")
    fails(get(web, tmp_path / "x"), str(tmp_path / "x"))


def without_roots_right():
    """Called before a new program starts: takes away root's right to write into read-only folders."""
    if os.geteuid() == 0:
        drop, write_everywhere = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        assert ctypes.CDLL(None).prctl(drop, write_everywhere, 0, 0, 0) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="takes a right from root as Linux does it")
def test_no_permission(web, tmp_path):
    tmp_path.chmod(0o500)
    fails(get(web, tmp_path / "y", preexec_fn=without_roots_right), "permission denied")
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_keeps_the_part(web, tmp_path):
    web.slow = True
    process = subprocess.Popen(
        command(SET, "--mirror", f"http://127.0.0.1:{web.port}", "--out", tmp_path),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    part = tmp_path / f"{FILE}.part"
    limit = time.monotonic() + 20
    while (not part.exists() or not part.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "same command" in printed
    web.slow = False
    assert get(web, tmp_path).returncode == 0 and arrived(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_bar_in_a_terminal(web, tmp_path):
    pexpect = pytest.importorskip("pexpect")
    web.slow = True
    screen = pexpect.run(
        " ".join(command(SET, "--mirror", f"http://127.0.0.1:{web.port}", "--out", tmp_path)),
        env=environment(TERM="xterm-256color", COLUMNS="100"),
        timeout=30,
        encoding="utf-8",
    )
    assert "MB/s" in screen and "3.0/3.0 MB" in screen
    assert arrived(tmp_path)


def test_catalogue():
    """Addresses, checksums and mirrors in the table are well-formed."""
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.SETS:
        for mirror in module.SETS[name].mirrors:
            assert re.fullmatch(r"https://[a-z.-]+/[\w./-]+/", module.folder_url(name, mirror))
        for file in module.SETS[name].files:
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert "/" not in file.path
        assert module.folder_url(name, "https://my.mirror/hub/").startswith("https://my.mirror/hub/")
    assert module.folder_url("minimind-sft", "modelscope") == (
        "https://www.modelscope.cn/datasets/gongjy/minimind_dataset/resolve/master/"
    )
