"""Download well-known public text: TinyStories, tiny Shakespeare, the Nano and MiniMind sets.

    python dataset/download.py --list
    python dataset/download.py tinyshakespeare                          # -> dataset/downloads/
    python dataset/download.py tinystories --mirror hf-mirror
    python dataset/download.py minimind-sft-mini --mirror modelscope --proxy socks5h://127.0.0.1:1080

Bytes that have arrived are kept in `NAME.part`, and the ETag of the file they belong to in `NAME.part.json`.
So an interrupted download continues where it stopped, even after `kill -9`, and never joins parts of two
versions of a file. A file gets its final name only when it is complete, of the announced length, and has the
right SHA-256 (listed here, or stated by Hugging Face).

Written by hand on libcurl: pooch cannot resume, huggingface_hub neither verifies SHA-256 nor knows other
servers, and both wait forever for a server that sends a byte now and then, and accept files of any size.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import ipaddress
import itertools
import json
import os
import re
import shutil
import string
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UserError, run  # first: it explains an import that fails

# isort: split
import pycurl
from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

CONNECT_TIMEOUT = 30  # seconds to connect, including name lookup, proxy and TLS
MIN_SPEED, SPEED_WINDOW = 1000, 60  # bytes per second, averaged over this many seconds; less is a failure
MAX_BYTES = 50 * 10**9  # of a file, whatever a server announces
MAX_LISTING_BYTES = 10**6  # of the list of files in a repository
# A name from the network becomes a file name here: only plain names, and none that looks like a part.
FILE_NAME = r"(?!.*\.part)\w[\w .()-]{,150}(?<!\.md)"
MIN_FREE = 10**9  # bytes to leave free on the disk if a server does not announce the length
MAX_REDIRECTS = 10
CHUNK_BYTES = 1 << 16  # read from disk at a time


@functools.cache
def console() -> Console:
    """Created on first use, after `run` has corrected environment variables that confuse rich."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def report(text: str) -> None:
    console().print(text)


# ---- The data sets. A checksum is listed only if the file is known not to change any more. ----


class File(NamedTuple):
    path: str  # on the server
    size: int | None = None  # bytes
    sha256: str | None = None
    save_as: str = ""


class DataSet(NamedTuple):
    description: str
    language: str
    size: str
    licence: str
    mirrors: dict[str, str]  # name: URL of the folder that contains the files; the first is the default
    files: tuple[File, ...]  # empty: all files that the Hub lists in the repository
    next_step: str = "python data.py --pretrain {first}"


def hub_mirrors(repository: str, modelscope: str | None = None) -> dict[str, str]:
    """The URLs of a Hugging Face repository, its public mirror, and its copy on ModelScope."""
    mirrors = {"hf": f"https://huggingface.co/{repository}/resolve/main/",
              "hf-mirror": f"https://hf-mirror.com/{repository}/resolve/main/"}
    if modelscope:
        mirrors["modelscope"] = f"https://www.modelscope.cn/{modelscope}/resolve/master/"
    return mirrors


def minimind(description: str, size: str, file: str, *next_step: str) -> DataSet:
    mirrors = hub_mirrors("datasets/jingyaogong/minimind_dataset", "datasets/gongjy/minimind_dataset")
    return DataSet(description, "zh, en", size, "several", mirrors, (File(file),), *next_step)


STORIES = hub_mirrors("datasets/roneneldan/TinyStories")
# Both texts together, so that they share a tokenizer. data.py has to skip the lines that call tools.
FOR_SFT = "python data.py --pretrain PRETRAINING_TEXT --sft {first} --skip-bad-lines"
SETS = {
    "tinyshakespeare": DataSet(
        "40,000 lines of his plays", "en", "1.1 MB", "public domain",
        {"github": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"},
        (File("input.txt", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
              "tinyshakespeare.txt"),)),
    "tinystories": DataSet(
        "stories in a small child's words (arXiv 2305.07759)", "en", "1.9 GB", "CDLA-Sharing-1.0", STORIES,
        (File("TinyStories-train.txt", 1_924_281_556,
              "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
         File("TinyStories-valid.txt", 19_447_282,
              "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4"))),
    "tinystories-v2": DataSet(
        "such stories, all by GPT-4", "en", "2.3 GB", "CDLA-Sharing-1.0", STORIES,
        (File("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
              "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
         File("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
              "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"))),
    "nano": DataSet(
        "Nano's pretrain.txt and sft.jsonl (archive, password: nano)", "zh", "?", "not stated",
        hub_mirrors("bd4sur/nano_dataset"), (), "7z x -pnano -o{dataset} {first} && python data.py"),
    "nano-pt-10g": DataSet(
        "Nano's later pretraining text (7z, password: nano)", "zh", "6.9 GB", "not stated",
        hub_mirrors("datasets/bd4sur/Nano-PT-10G"),
        tuple(File(f"pretrain_20241018_25G.7z.00{volume}") for volume in range(1, 8)),
        "7z x -pnano -o{dataset} {first}, then python data.py --pretrain with the text file it holds"),
    "minimind-pretrain": minimind("MiniMind-3 pretraining", "10 GB", "pretrain_t2t.jsonl"),
    "minimind-pretrain-mini": minimind("MiniMind-3 pretraining, small", "1.2 GB", "pretrain_t2t_mini.jsonl"),
    "minimind-sft": minimind("MiniMind-3 conversations", "14 GB", "sft_t2t.jsonl", FOR_SFT),
    "minimind-sft-mini": minimind("MiniMind-3 conversations, small", "1.6 GB", "sft_t2t_mini.jsonl", FOR_SFT),
    "minimind2-pretrain": minimind("MiniMind2 pretraining", "1.6 GB", "pretrain_hq.jsonl"),
    "minimind2-sft-mini": minimind("MiniMind2 conversations, short", "1.2 GB", "sft_mini_512.jsonl", FOR_SFT),
}


def folder_url(name: str, mirror: str | None) -> str:
    """The URL of the folder with the files of a set. A mirror that is a URL replaces scheme and host."""
    mirrors = SETS[name].mirrors
    home = next(iter(mirrors.values()))
    if mirror is None or mirror in mirrors:
        return mirrors[mirror] if mirror else home
    if re.match(r"https?://[\w.-]+(:\d+)?(/|$)", mirror):
        return mirror.rstrip("/") + urlsplit(home).path
    raise UserError(f"--mirror {mirror}: {name} is on {', '.join(mirrors)}, or give an address (https://...)")


# ---- HTTP ----


class TemporaryFailure(Exception):
    """No answer, or an incomplete one: retrying may help. `wait`: seconds that the server asks to wait."""

    wait = 0


class BadResponse(UserError):
    """The server is at fault, and retrying does not help."""

    def __init__(self, sentence: str):
        super().__init__(f"{sentence}; try another --mirror")


# Whatever comes from a server or from NAME.part.json passes through one of these four functions.
SHA256, HEADER = "[0-9a-f]{64}", "[ -~]{1,200}"


def as_count(value: object) -> int | None:
    """A number of bytes or seconds, given as text or number; None if it is not a valid one."""
    return int(str(value)) if re.fullmatch("[0-9]{1,19}", str(value)) else None


def matching(pattern: str, value: object) -> str | None:
    """`value` if it is text that matches the pattern, else None."""
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def parse_json(text: bytes | bytearray) -> Any:
    """Parse JSON, with None in place of numbers that are not counts; None if it is not valid JSON."""
    try:
        return json.loads(text, parse_int=as_count, parse_float=as_count, parse_constant=as_count)
    except (ValueError, RecursionError):
        return None


def one_line(text: str) -> str:
    """Text that is safe to print on one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


# Not ip.is_private: VPN programs that tunnel all traffic resolve every name to 198.18.0.0/15 or fc00::/7.
PRIVATE = [*map(ipaddress.ip_network, ("0.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))]


def is_private(address: str) -> bool:
    """Whether an IP address belongs to this machine or its private network."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_link_local or any(ip in network for network in PRIVATE)


PROXY_PASSWORD_HINT = "the proxy needs NAME:PASSWORD@HOST:PORT"
CERTIFICATE_HINT = ("try another --mirror; or, if your own network inspects all traffic, set SSL_CERT_FILE "
                    "to a file that contains its certificate")


class Client:
    """GET requests through a proxy (default: ALL_PROXY, HTTPS_PROXY, ... in the environment).

    has_answered: whether any server has answered yet.
    """

    def __init__(self, proxy: str | None = None):
        self.proxy, self.has_answered = proxy, False

    @contextlib.contextmanager
    def get(self, url: str, *headers: str) -> Iterator[Response]:
        """Follow redirects and yield the final Response, its body still unread.

        Raises TemporaryFailure if retrying may help, else UserError.
        """
        linked_sha256, may_be_private = None, True
        for _ in range(MAX_REDIRECTS + 1):
            with contextlib.closing(Response(url, headers, self.proxy_for(url), may_be_private)) as response:
                response.read_head()
                self.has_answered = True
                etag = response.headers.get("x-linked-etag", "").strip('"')
                linked_sha256 = linked_sha256 or matching(SHA256, etag)
                if not response.redirect:
                    self.check_status(response)
                    response.linked_sha256 = linked_sha256
                    yield response
                    return
                url, may_be_private = self.redirect_target(url, response.redirect), response.may_be_private
        raise BadResponse(f"{one_line(url)} is one more redirect after {MAX_REDIRECTS}")

    def redirect_target(self, url: str, target: str) -> str:
        """The URL that a redirect leads to. Any host is allowed, because no secrets are sent, but a change
        from https to http is not."""
        with contextlib.suppress(ValueError):
            target = urljoin(url, target)
        safe = "https://" if url.lower().startswith("https:") else "https?://"
        if not re.match(safe, target, re.IGNORECASE):
            raise BadResponse(f"{one_line(url)} leads to {one_line(target)}, which is less secure and is not "
                              "followed")
        return target

    def check_status(self, response: Response) -> None:
        """Raise an error if the response does not contain the file."""
        code, answer = response.status, f"{one_line(response.url)} answers {response.answer}"
        if code in (408, 429) or code >= 500:
            failure = TemporaryFailure(answer)
            failure.wait = min(as_count(response.headers.get("retry-after")) or 0, 60)
            raise failure
        if code == 407:
            raise UserError(f"{answer}: {PROXY_PASSWORD_HINT}")
        if code not in (200, 206, 416):
            raise BadResponse(f"{answer}: the file may have moved or be closed")
        packed = response.headers.get("content-encoding", "identity")
        if packed.lower() != "identity":
            raise BadResponse(f"{one_line(response.url)} sends a packed file ({one_line(packed)}), although "
                              "asked not to")

    def proxy_for(self, url: str) -> str:
        """The URL of the proxy for a URL, "" for none."""
        try:
            parts = urlsplit(url)
            proxies = {} if self.proxy or proxy_bypass(parts.hostname or "") else getproxies()
        except ValueError as error:
            raise BadResponse(f"{one_line(url)} is not a valid address: {error}") from None
        proxy = self.proxy or proxies.get(parts.scheme) or proxies.get("all") or ""
        if proxy and not re.match(r"(https?|socks4a?|socks5h?)://[^/:]", proxy):
            raise UserError(f"{without_password(proxy)} is not the address of a proxy; "
                            "write socks5h://127.0.0.1:1080 or http://127.0.0.1:8080")
        return proxy


def without_password(proxy: str) -> str:
    return one_line(re.sub(r"^(\w+://)?.*@", r"\1", proxy))


class Response:
    """The response to one GET request.

    `read_head` sets `status`, `answer` ("404 Not Found"), `headers` (names in lower case), `length` of the
    body (None: not announced) and `redirect` (None: there is none).

    linked_sha256: the SHA-256 that the redirects to it have stated, or None.

    Methods raise TemporaryFailure or UserError. The callbacks given to libcurl are methods of lists, because
    libcurl would swallow a KeyboardInterrupt that is raised in Python code.
    """

    status: int
    answer: str
    length: int | None
    redirect: str | None

    def __init__(self, url: str, headers: Iterable[str], proxy: str, may_be_private: bool):
        """may_be_private: whether the server may be in the private network. It may if the user has named it,
        or if a server there redirects to it."""
        self.url, self.proxy = url, proxy
        self.linked_sha256: str | None = None
        self.lines: list[bytes] = []
        self.body: list[bytes] = []
        self.failure: Exception | None = None
        self.ended, self.headers = False, dict[str, str]()
        self.since, self.count = time.monotonic(), 0
        self.curl, self.multi = pycurl.Curl(), pycurl.CurlMulti()
        options = {
            pycurl.URL: quote(url, string.punctuation, errors="surrogateescape"),
            pycurl.HTTPHEADER: ["Accept-Encoding: identity", *headers], pycurl.USERAGENT: "nano-download",
            pycurl.PROXY: os.fsencode(proxy), pycurl.NOPROXY: "", pycurl.CONNECTTIMEOUT: CONNECT_TIMEOUT,
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.MAXFILESIZE_LARGE: 2**63 - 1,  # otherwise libcurl ignores larger lengths
            pycurl.HEADERFUNCTION: self.lines.append, pycurl.WRITEFUNCTION: self.body.append,
        }  # fmt: skip
        if proxy.startswith("socks5:"):  # the name is resolved here, and only its first address is used
            options[pycurl.IPRESOLVE] = pycurl.IPRESOLVE_V4
        if not may_be_private and not proxy:
            options[pycurl.PREREQFUNCTION] = lambda address, *_: is_private(address)  # true: abort
        if file := os.environ.get("SSL_CERT_FILE"):
            options |= {pycurl.CAINFO: os.fsencode(file), pycurl.PROXY_CAINFO: os.fsencode(file)}
        for option, value in options.items():
            self.curl.setopt(option, value)
        self.multi.add_handle(self.curl)

    def read_head(self) -> None:
        """Wait for the status and headers."""
        # The heads of a proxy (status 0) and of 100 Continue may come before, and trailers after the body.
        while self.curl.getinfo(pycurl.RESPONSE_CODE) < 200 or self.lines[-1].strip():
            if self.ended:
                raise self.failure or TemporaryFailure(f"{self.host()} sent a bad response: half a head")
            self.poll()
        first = max(i for i, line in enumerate(self.lines) if line.startswith(b"HTTP/"))
        head = itertools.takewhile(bytes.strip, self.lines[first:])
        status, *lines = (line.decode(errors="surrogateescape").strip() for line in head)
        self.status, self.answer = self.curl.getinfo(pycurl.RESPONSE_CODE), one_line(status[9:])
        for name, _, value in (line.partition(":") for line in lines):
            earlier = self.headers.get(name.lower())
            self.headers[name.lower()] = f"{earlier}, {value.strip()}" if earlier else value.strip()
        self.length = as_count(self.curl.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T))
        self.redirect = self.headers.get("location") if self.status in (301, 302, 303, 307, 308) else None
        self.may_be_private = not self.proxy and is_private(self.curl.getinfo(pycurl.PRIMARY_IP))

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in chunks."""
        while self.body or not self.ended:
            while self.body:
                chunk = self.body.pop(0)
                self.count += len(chunk)
                yield chunk
            if not self.ended:
                self.poll()
        if self.failure:
            raise self.failure

    def poll(self) -> None:
        """Let libcurl work for a moment, and check the speed."""
        self.ended = not self.multi.perform()[1]
        for _, code, message in self.multi.info_read()[2]:
            self.failure = self.error_for(code, message)
        if not self.ended and not self.body and self.multi.select(0.2) < 0:
            time.sleep(0.02)  # no socket yet: the name is being resolved
        seconds = time.monotonic() - self.since
        if seconds > SPEED_WINDOW:
            if self.count < MIN_SPEED * seconds and not self.ended:
                text = f"{self.host()} sent less than {MIN_SPEED:,} bytes a second for {seconds:.0f} seconds"
                self.failure, self.ended = TemporaryFailure(text), True
            self.since, self.count = time.monotonic(), 0

    def error_for(self, code: int, message: str) -> Exception:
        """The TemporaryFailure or UserError for an error of libcurl."""
        if code == pycurl.E_ABORTED_BY_CALLBACK:
            return UserError(f"a redirect leads into the private network, to {self.host()}, and is not "
                             "followed; if that is the right server, name it with --mirror")
        if self.curl.getinfo(pycurl.HTTP_CONNECTCODE) == 407:
            return UserError(f"{without_password(self.proxy)} answers 407: {PROXY_PASSWORD_HINT}")
        number = self.curl.getinfo(pycurl.OS_ERRNO)
        if code == pycurl.E_COULDNT_CONNECT and number:
            message = os.strerror(number)  # libcurl gives no reason
        what = f"{self.host()} sent a bad response" if self.lines else f"no connection to {self.host()}"
        sentence = f"{what}: {one_line(message)}"
        if code in (pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT_BADFILE):
            return UserError(f"{sentence}; {CERTIFICATE_HINT}")
        permanent = pycurl.E_URL_MALFORMAT, pycurl.E_UNSUPPORTED_PROTOCOL, pycurl.E_FILESIZE_EXCEEDED
        return (BadResponse if code in permanent else TemporaryFailure)(sentence)

    def host(self) -> str:
        """The host and proxy, for messages."""
        through = f" through the proxy {without_password(self.proxy)}" if self.proxy else ""
        return one_line(urlsplit(self.url).hostname or "") + through

    def close(self) -> None:
        self.multi.remove_handle(self.curl)
        self.multi.close()
        self.curl.close()


def listed_files(client: Client, folder: str) -> list[File]:
    """The files of a Hugging Face repository, from the Hub's list, which has their sizes and SHA-256."""
    url = re.sub(r"/([^/]+/[^/]+)/resolve/main/$", r"/api/models/\1/tree/main", folder)
    text, files = bytearray(), list[File]()
    try:
        with client.get(url) as response:
            for chunk in response.chunks():
                text += chunk
                if len(text) > MAX_LISTING_BYTES:
                    raise BadResponse(f"{url} lists more than {decimal(MAX_LISTING_BYTES)}")
    except TemporaryFailure as failure:
        raise BadResponse(f"{url} does not answer: {failure}") from failure
    entries = parse_json(text)
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"type": "file", "path": str(path), "size": int(size)} if re.fullmatch(FILE_NAME, path):
                lfs = entry.get("lfs")
                sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
                files.append(File(path, size, matching(SHA256, sha256)))
    if not files:
        raise BadResponse(f"{url} does not list the files to download")
    size = sum(file.size or 0 for file in files)
    if len(files) > 1000 or size > MAX_BYTES:
        raise BadResponse(f"{url} lists {len(files):,} files of {decimal(size)}, more than any set has")
    return files


# ---- Receiving ----


class PartInfo(NamedTuple):
    """Which file a part belongs to; None for what is unknown."""

    validator: str | None  # strong ETag, or date, for If-Range
    sha256: str | None  # of the complete file, as stated by Hugging Face
    total: int | None  # bytes of the complete file


def read_part_info(path: Path) -> PartInfo:
    """The PartInfo in a file; all None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            found = parse_json(file.read(10_000))
    except FileNotFoundError:
        found = None
    found = found if isinstance(found, dict) else {}
    validator, sha256, total = map(found.get, PartInfo._fields)
    return PartInfo(matching(HEADER, validator), matching(SHA256, sha256), as_count(total))


def fetch(client: Client, url: str, file: File, target: Path, retries: int) -> None:
    """Download `url` to `target`, continuing an earlier part; only a complete, verified file gets there."""
    part, info_path = Path(f"{target}.part"), Path(f"{target}.part.json")
    try:
        with locked(target):
            if is_here(file, target):  # another download has finished in the meantime
                return
            stated = receive_all(client, url, file, part, info_path, retries)
            found, expected = sha256_of(part), file.sha256 or stated
            if expected and found != expected:
                discard(part, info_path)
                raise UserError(f"{target.name} has SHA-256 {found} instead of {expected} and was thrown "
                                "away; run the same command again, or try another --mirror")
            os.replace(part, target)
            info_path.unlink(missing_ok=True)
    except KeyboardInterrupt:
        report("stopped; run the same command again to continue")
        raise
    report(f"{target}: {decimal(size_of(target))}, SHA-256 {found}"
        f" ({'as expected' if expected else 'not verified, because none is known'})")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Lock a file against other downloads of it. Raises UserError if there is one already."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.part.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{target} is being downloaded already; wait until that ends, or choose another --out"
                        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # on Windows, only release() can remove it
            os.unlink(lock.lock_file)
        lock.release()


def receive_all(
    client: Client, url: str, file: File, part: Path, info_path: Path, retries: int
) -> str | None:
    """Repeat requests until `part` is complete. Returns the SHA-256 that Hugging Face states, or None."""
    most, failures = size_of(part), 0
    with ProgressMeter(part.stem) as meter:
        while True:
            try:
                return receive(client, url, file, part, info_path, meter)
            except TemporaryFailure as failure:
                # Only much more than ever before counts as progress. Otherwise a server that sends a byte at
                # a time, or always stops half-way and cannot resume, would keep this loop running forever.
                have = size_of(part)
                failures = 0 if have - most >= MIN_SPEED * SPEED_WINDOW else failures + 1
                most = max(most, have)
                if failures > retries or not client.has_answered:
                    hint = "check the network, or try --proxy or another --mirror"
                    if have and read_part_info(info_path).validator:
                        hint = f"{decimal(have)} are kept: run the same command again to continue"
                    elif info_path.exists():
                        discard(part, info_path)  # it cannot be continued
                    raise UserError(f"{failure}; {hint}") from failure
                pause = max(failure.wait, min(0.25 * 2 ** min(failures, 10), 30.0))
                report(f"{failure}; trying again in {pause:g} s")
            time.sleep(pause)


def receive(
    client: Client, url: str, file: File, part: Path, info_path: Path, meter: ProgressMeter
) -> str | None:
    """One request: append the missing bytes to `part`. Returns the SHA-256 that Hugging Face states, or None.

    Range asks for the rest. With If-Range, a server sends the whole file (200 instead of 206) if its ETag or
    Last-Modified is not the one in `info_path` any more (RFC 9110, sections 13.1.5 and 14).
    """
    before, have = read_part_info(info_path), size_of(part)
    resume = have > 0 and before.validator is not None
    headers = [f"Range: bytes={have}-", f"If-Range: {before.validator}"] if resume else []
    with client.get(url, *headers) as response:
        start, total = (None, response.length) if response.status == 200 else content_range(response)
        now = PartInfo(validator_of(response), response.linked_sha256, total)
        if response.status == 416 and resume and have == before.total == total:
            return before.sha256  # it was stopped between the last byte and the renaming
        same = now[:2] == before[:2] and before.total in (None, total)
        fits = resume and same and start == have and total
        if response.status == 416 or (response.status == 206 and not fits):
            discard(part, info_path)
            raise TemporaryFailure("the file on the server is not the one that was begun; starting over")
        if response.status == 200 and have:
            report("the server sends the whole file: it has changed, or the server cannot resume"
                   if resume else f"{part.name} belongs to an unknown file: starting over")
            have = 0
        if response.headers.get("content-type", "").startswith("text/html"):
            raise BadResponse(f"{url} sends a web page instead of the file")
        if file.size and total is not None and total != file.size:
            raise BadResponse(f"{url} has {total:,} bytes instead of {file.size:,}")
        total = file.size if total is None else total
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise UserError(f"{decimal(total - have)} are missing, but {part.parent} has only {decimal(free)}"
                            " free; free some space, or choose another --out")
        if total and total > MAX_BYTES:
            raise BadResponse(f"{url} announces {decimal(total)}, more than any file in these sets")
        with open(part, "ab" if have else "wb") as out:
            if not have:  # while the part is empty, so that it always matches its info
                info_path.write_text(json.dumps(now._asdict()), "utf-8")
            have = save(response, out, have, total, meter)
    limit = total or MAX_BYTES
    if have > limit or not have:
        discard(part, info_path)
        what = f"sends more than the {limit:,} bytes allowed" if have else "sends an empty file"
        raise BadResponse(f"{url} {what}")
    if total is not None and have != total:
        raise TemporaryFailure(f"received {have:,} bytes instead of {total:,}")
    return now.sha256


def save(response: Response, out: BinaryIO, have: int, total: int | None, meter: ProgressMeter) -> int:
    """Append the body to the file `out`, which has `have` bytes of `total` (None: unknown).

    Returns the new number of bytes. It stops when there are too many, without writing the last chunk.
    """
    folder = Path(out.name).parent
    meter.show(have, total)
    for chunk in response.chunks():
        have += len(chunk)
        if have > (total or MAX_BYTES):
            break
        if total is None and (free := shutil.disk_usage(folder).free) < MIN_FREE:
            raise UserError(f"{one_line(response.url)} does not say how much it sends, and {folder} has only "
                            f"{decimal(free)} free; free some space and run the same command again")
        out.write(chunk)
        meter.show(have, total)
    out.flush()
    os.fsync(out.fileno())
    return have


def validator_of(response: Response) -> str | None:
    """The strong ETag, else the date; None if there is none that can be used for If-Range."""
    etag = response.headers.get("etag", "")
    return matching(HEADER, etag if etag.startswith('"') else response.headers.get("last-modified"))


def content_range(response: Response) -> tuple[int | None, int | None]:
    """(first byte, total length) of the Content-Range header; None for what it does not state."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", response.headers.get("content-range", ""))
    return (as_count(found[1]), as_count(found[2])) if found else (None, None)


def discard(part: Path, info_path: Path) -> None:
    part.unlink(missing_ok=True)
    info_path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class ProgressMeter:
    """A progress bar in a terminal; elsewhere a line every ten seconds."""

    def __init__(self, name: str):
        columns = ("{task.description}", progress.BarColumn(), progress.DownloadColumn(),
                   progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
        self.bar = progress.Progress(*columns, console=console(), disable=not console().is_terminal)
        self.name, self.last_report = name, time.monotonic()
        self.task: progress.TaskID | None = None

    def __enter__(self) -> ProgressMeter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, have: int, total: int | None) -> None:
        """Show that `have` of `total` bytes (None: unknown) have arrived."""
        if self.task is None:
            self.task = self.bar.add_task(self.name, completed=have, total=total)
        self.bar.update(self.task, completed=have, total=total)
        if self.bar.disable and time.monotonic() - self.last_report > 10:
            self.last_report = time.monotonic()
            share = f" of {decimal(total)}, {have / total:.0%}" if total else ""
            report(f"{self.name}: {decimal(have)}{share}")


# ---- The command line ----


def download(
    name: str, out: Path, mirror: str | None = None, proxy: str | None = None, retries: int = 5
) -> None:
    """Download a data set into the folder `out`, and print what to do next."""
    if name not in SETS:
        near = difflib.get_close_matches(name.lower(), SETS, 1, 0.4)
        raise UserError(f"there is no set {name}; " + (f"did you mean {near[0]}?" if near else "see --list"))
    data, folder, client = SETS[name], folder_url(name, mirror), Client(proxy)
    out.mkdir(parents=True, exist_ok=True)
    files = data.files or listed_files(client, folder)
    for file in files:
        target, url = out / (file.save_as or file.path), folder + quote(file.path)
        if not is_here(file, target):
            report(f"{target.name} from {one_line(url)}")
            fetch(client, url, file, target, retries)
    paths = {"first": out / (files[0].save_as or files[0].path), "dataset": ROOT / "dataset"}
    report("next: " + data.next_step.format(
        **{key: f'"{path}"' if " " in str(path) else path for key, path in paths.items()}))
    if data.next_step.startswith("python data.py"):
        from sources.kinds import detect_kind

        try:
            detect_kind(paths["first"])
        except UserError as error:  # such as the login page of a network
            print(f"but {error}")


def is_here(file: File, target: Path) -> bool:
    """Whether the file exists already. Raises UserError if `target` is something else."""
    if not target.exists():
        return False
    if target.is_dir():
        raise UserError(f"{target} is a folder; move it away, or choose another --out")
    if file.size not in (None, size_of(target)):
        raise UserError(f"{target} exists, but has {size_of(target):,} bytes instead of {file.size:,}; "
                        "move it away, or choose another --out")
    report(f"{target} is already here")
    return True


def show_list() -> None:
    table = Table("name", "description", "language", "size", "licence", box=SIMPLE_HEAD, pad_edge=False)
    for column in (0, 3, 4):
        table.columns[column].no_wrap = True
    for name, data in SETS.items():
        table.add_row(name, data.description, data.language, data.size, data.licence)
    console().print(table)


def non_negative_int(text: str) -> int:
    if (value := as_count(text)) is None:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Download public data sets. An interrupted download continues where it stopped.",
        epilog="examples:\n"
        "  python dataset/download.py --list\n"
        "  python dataset/download.py tinyshakespeare\n"
        "  python dataset/download.py tinystories --mirror hf-mirror\n"
        "  python dataset/download.py minimind-sft-mini --mirror modelscope\n"
        "  python dataset/download.py tinystories-v2 --proxy socks5h://127.0.0.1:1080",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="sets to download, see --list")
    add("--list", action="store_true", help="show the sets")
    add("--mirror", help="hf, hf-mirror, modelscope, or an address that replaces https://HOST,"
        " such as https://my.mirror (default: the original server of the set)")
    add("--proxy", help="socks5h://HOST:PORT (the proxy resolves names), socks5://..., http://..."
        " (default: from ALL_PROXY, HTTPS_PROXY, HTTP_PROXY)")
    add("--out", type=Path, default=ROOT / "dataset" / "downloads", metavar="DIR",
        help="folder to write to (default: dataset/downloads/)")
    add("--retries", type=non_negative_int, default=5, metavar="N",
        help="how often to retry while nothing more arrives (default: 5)")
    arguments = parser.parse_args()
    if arguments.list:
        show_list()
    elif not arguments.names:
        parser.error("name a set, or see --list")
    for name in arguments.names:
        download(name, arguments.out, arguments.mirror, arguments.proxy, arguments.retries)


if __name__ == "__main__":
    run(main)
