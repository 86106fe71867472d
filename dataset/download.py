"""Bring well-known public text to this machine: TinyStories, tiny Shakespeare, the Nano and MiniMind sets.

    python dataset/download.py --list
    python dataset/download.py tinyshakespeare                          # -> dataset/downloads/
    python dataset/download.py tinystories --mirror hf-mirror
    python dataset/download.py minimind-sft-mini --mirror modelscope --proxy socks5h://127.0.0.1:1080

What has arrived is kept in `NAME.part`, and beside it, in `NAME.part.json`, the ETag of the file it is a
part of. So a download that broke off, even by `kill -9`, goes on where it stopped, and never joins the
halves of two versions. Only a file that is whole, of the announced length and with the right SHA-256
(known here, or stated by Hugging Face) gets its name.

libcurl does the asking: it never blocks and bounds what it reads, where requests, httpx, pooch and
huggingface_hub wait for ever for a server that sends a byte now and then. Going on with If-Range, bounds on
size and speed, and mirrors: none of them has all of these, so they are ours.
"""

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
from pathlib import Path
from typing import NamedTuple
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

CONNECT = 30  # seconds to connect: names, proxy and TLS included
LEAST, PATIENCE = 1000, 60  # bytes a second on average over so many seconds; what is slower has stopped
MOST = 50 * 10**9  # bytes of a file, whatever a server announces
MOST_LISTED = 10**6  # bytes of a listing
# A name from the network becomes a name on this disk: plain names only, and none of a part.
FILE_NAME = r"(?!.*\.part)\w[\w .()-]{,150}(?<!\.md)"
SPARE = 10**9  # bytes that stay free on the disk where a server does not say how much is to come
HOPS = 10  # redirects, one after the other
CHUNK = 1 << 16  # bytes at a time


@functools.cache
def console():
    """Made when it is needed: by then, `run` has seen to what rich makes of the environment."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def say(text):
    console().print(text)


# ---- What there is. A checksum stands here only where the file is known not to change any more. ----


class File(NamedTuple):
    path: str  # at the source
    size: int | None = None  # bytes
    sha256: str | None = None
    save_as: str = ""


class DataSet(NamedTuple):
    what: str
    language: str
    size: str
    licence: str
    places: dict  # mirror -> address of the folder the files lie in; the first is the default
    files: tuple  # empty: the Hub is asked what the repository holds
    next: str = "python data.py --pretrain {first}"


def hub(repository, modelscope=None):
    """The addresses of a Hugging Face repository, its public mirror, and its twin on ModelScope."""
    places = {"hf": f"https://huggingface.co/{repository}/resolve/main/",
              "hf-mirror": f"https://hf-mirror.com/{repository}/resolve/main/"}
    if modelscope:
        places["modelscope"] = f"https://www.modelscope.cn/{modelscope}/resolve/master/"
    return places


def minimind(what, size, file, *next):
    places = hub("datasets/jingyaogong/minimind_dataset", "datasets/gongjy/minimind_dataset")
    return DataSet(what, "zh, en", size, "several", places, (File(file),), *next)


STORIES = hub("datasets/roneneldan/TinyStories")
# Both texts together, so that they share one tokenizer; lines that call tools are bad lines to data.py.
CHAT = "python data.py --pretrain PRETRAINING_TEXT --sft {first} --skip-bad-lines"
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
        hub("bd4sur/nano_dataset"), (), "7z x -pnano -o{dataset} {first} && python data.py"),
    "nano-pt-10g": DataSet(
        "Nano's later pretraining text (7z, password: nano)", "zh", "6.9 GB", "not stated",
        hub("datasets/bd4sur/Nano-PT-10G"),
        tuple(File(f"pretrain_20241018_25G.7z.00{volume}") for volume in range(1, 8)),
        "7z x -pnano -o{dataset} {first}, then python data.py --pretrain with the text file it holds"),
    "minimind-pretrain": minimind("MiniMind-3 pretraining", "10 GB", "pretrain_t2t.jsonl"),
    "minimind-pretrain-mini": minimind("MiniMind-3 pretraining, small", "1.2 GB", "pretrain_t2t_mini.jsonl"),
    "minimind-sft": minimind("MiniMind-3 conversations", "14 GB", "sft_t2t.jsonl", CHAT),
    "minimind-sft-mini": minimind("MiniMind-3 conversations, small", "1.6 GB", "sft_t2t_mini.jsonl", CHAT),
    "minimind2-pretrain": minimind("MiniMind2 pretraining", "1.6 GB", "pretrain_hq.jsonl"),
    "minimind2-sft-mini": minimind("MiniMind2 conversations, short", "1.2 GB", "sft_mini_512.jsonl", CHAT),
}


def folder_url(name, mirror):
    """Where the files of a set lie. A mirror given as an address stands in for scheme and host."""
    places = SETS[name].places
    home = next(iter(places.values()))
    if mirror is None or mirror in places:
        return places.get(mirror, home)
    if re.match(r"https?://[\w.-]+(:\d+)?(/|$)", mirror):
        return mirror.rstrip("/") + urlsplit(home).path
    raise UserError(f"--mirror {mirror}: {name} is on {', '.join(places)}, or give an address (https://...)")


# ---- Asking ----


class Dropped(Exception):
    """No answer, or one that broke off: asking again may help. `wait`: seconds the server asks for."""

    wait = 0


class BadAnswer(UserError):
    """The server's mistake: asking it again does not help."""

    def __init__(self, sentence):
        super().__init__(f"{sentence}; try another --mirror")


# What comes from a server, or lies in a note on the disk, passes through one of these four.
SHA256, HEADER = "[0-9a-f]{64}", "[ -~]{1,200}"


def whole(value):
    """A count of bytes or seconds, given as text or number; None if it is none."""
    return int(value) if re.fullmatch("[0-9]{1,19}", str(value)) else None


def matching(pattern, value):
    """Text of this kind; None if it is none."""
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def parsed(text):
    """JSON, in which None stands for every number that is no count; None if it is none."""
    try:
        return json.loads(text, parse_int=whole, parse_float=whole, parse_constant=whole)
    except (ValueError, RecursionError):
        return None


def plain(text):
    """Text fit for a line on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


# Not ip.is_private: programs that tunnel all traffic give every name an address of 198.18.0.0/15 or fc00::/7.
PRIVATE = [*map(ipaddress.ip_network, ("0.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))]


def is_inside(address):
    """Whether an IP address is of this machine or of the private network around it."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_loopback or ip.is_link_local or any(ip in network for network in PRIVATE)


PASSWORD = "the proxy wants NAME:PASSWORD@HOST:PORT"
CERTIFICATE = ("try another --mirror; or, if your own network looks into all that passes, let SSL_CERT_FILE "
               "name a file that holds its certificate")


class Web:
    """GET with a proxy (else the environment's: ALL_PROXY, HTTPS_PROXY, ...) and failures in plain words."""

    def __init__(self, proxy=None):
        self.proxy, self.answered = proxy, False

    @contextlib.contextmanager
    def get(self, url, *headers):
        """The Reply at the end of all redirects, its body still unread; `linked`: the SHA-256 they state.

        Raises Dropped where trying again may help, else UserError.
        """
        linked, inside = None, True
        for _ in range(HOPS + 1):
            with contextlib.closing(Reply(url, headers, self.proxy_for(url), inside)) as reply:
                reply.ask()
                self.answered = True
                linked = linked or matching(SHA256, reply.headers.get("x-linked-etag", "").strip('"'))
                if not reply.redirect:
                    self.check(reply)
                    reply.linked = linked
                    yield reply
                    return
                url, inside = self.followed(url, reply.redirect), reply.inside
        raise BadAnswer(f"{plain(url)} is yet another redirect after {HOPS}")

    def followed(self, url, target):
        """Where a redirect leads: to any host, for no secrets are sent; but never from https to http."""
        with contextlib.suppress(ValueError):
            target = urljoin(url, target)
        safe = "https://" if url.lower().startswith("https:") else "https?://"
        if not re.match(safe, target, re.IGNORECASE):
            raise BadAnswer(f"{plain(url)} leads to {plain(target)}, which is not as safe and not followed")
        return target

    def check(self, reply):
        """Raise where the reply is not what was asked for."""
        code, answer = reply.status, f"{plain(reply.url)} answers {reply.answer}"
        if code in (408, 429) or code >= 500:
            drop = Dropped(answer)
            drop.wait = min(whole(reply.headers.get("retry-after")) or 0, 60)
            raise drop
        if code == 407:
            raise UserError(f"{answer}: {PASSWORD}")
        if code not in (200, 206, 416):
            raise BadAnswer(f"{answer}: the file may have moved or be closed")
        packed = reply.headers.get("content-encoding", "identity")
        if packed.lower() != "identity":
            raise BadAnswer(f"{plain(reply.url)} sends a packed file ({plain(packed)}), though asked not to")

    def proxy_for(self, url):
        """The address of the proxy for it, "" for none."""
        try:
            there = urlsplit(url)
            known = {} if self.proxy or proxy_bypass(there.hostname or "") else getproxies()
        except ValueError as error:
            raise BadAnswer(f"{plain(url)} is no address: {error}") from None
        proxy = self.proxy or known.get(there.scheme) or known.get("all") or ""
        if proxy and not re.match(r"(https?|socks4a?|socks5h?)://[^/:]", proxy):
            raise UserError(f"{without_password(proxy)} is not the address of a proxy; "
                            "write socks5h://127.0.0.1:1080 or http://127.0.0.1:8080")
        return proxy


def without_password(proxy):
    return plain(re.sub(r"^(\w+://)?.*@", r"\1", proxy))


class Reply:
    """The answer to one GET. `ask` waits for its head: `status`, `answer` ("404 Not Found"), `headers` (names
    in lower case), `length` of the body (None: not stated), `redirect` (None: it is the last).

    Raises Dropped or UserError. libcurl calls methods of lists: Ctrl-C would be lost in a line of Python.
    """

    def __init__(self, url, headers, proxy, inside):
        """inside: it may be in the private network, as what the user has named or what one there leads to."""
        self.url, self.proxy, self.linked = url, proxy, None
        self.lines, self.body, self.failure, self.ended = [], [], None, False
        self.since, self.count = time.monotonic(), 0
        self.curl, self.multi = pycurl.Curl(), pycurl.CurlMulti()
        options = {
            pycurl.URL: quote(url, string.punctuation, errors="surrogateescape"),
            pycurl.HTTPHEADER: ["Accept-Encoding: identity", *headers], pycurl.USERAGENT: "nano-download",
            pycurl.PROXY: os.fsencode(proxy), pycurl.NOPROXY: "", pycurl.CONNECTTIMEOUT: CONNECT,
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
            pycurl.MAXFILESIZE_LARGE: 2**63 - 1,  # otherwise a larger length is taken for none
            pycurl.HEADERFUNCTION: self.lines.append, pycurl.WRITEFUNCTION: self.body.append,
        }  # fmt: skip
        if proxy.startswith("socks5:"):  # we look the name up: its first address is taken, so be it of IPv4
            options[pycurl.IPRESOLVE] = pycurl.IPRESOLVE_V4
        if not inside and not proxy:
            options[pycurl.PREREQFUNCTION] = lambda address, *_: is_inside(address)  # true: send no request
        if file := os.environ.get("SSL_CERT_FILE"):
            options |= {pycurl.CAINFO: os.fsencode(file), pycurl.PROXY_CAINFO: os.fsencode(file)}
        for option, value in options.items():
            self.curl.setopt(option, value)
        self.multi.add_handle(self.curl)

    def ask(self):
        # Heads of a proxy (status 0) and of 100 Continue may come before; what trails the body comes later.
        while self.curl.getinfo(pycurl.RESPONSE_CODE) < 200 or self.lines[-1].strip():
            if self.ended:
                raise self.failure or Dropped(f"{self.where()} does not answer well: half a head")
            self.step()
        first = max(i for i, line in enumerate(self.lines) if line.startswith(b"HTTP/"))
        head = itertools.takewhile(bytes.strip, self.lines[first:])
        status, *lines = (line.decode(errors="surrogateescape").strip() for line in head)
        self.status, self.answer = self.curl.getinfo(pycurl.RESPONSE_CODE), plain(status[9:])
        self.headers = {}
        for name, _, value in (line.partition(":") for line in lines):
            earlier = self.headers.get(name.lower())
            self.headers[name.lower()] = f"{earlier}, {value.strip()}" if earlier else value.strip()
        self.length = whole(self.curl.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T))
        self.redirect = self.headers.get("location") if self.status in (301, 302, 303, 307, 308) else None
        self.inside = not self.proxy and is_inside(self.curl.getinfo(pycurl.PRIMARY_IP))

    def pieces(self):
        """The body, piece by piece, as bytes."""
        while self.body or not self.ended:
            while self.body:
                piece = self.body.pop(0)
                self.count += len(piece)
                yield piece
            if not self.ended:
                self.step()
        if self.failure:
            raise self.failure

    def step(self):
        """Let libcurl work, for a moment; see whether all goes well."""
        self.ended = not self.multi.perform()[1]
        for _, code, message in self.multi.info_read()[2]:
            self.failure = self.explain(code, message)
        if not self.ended and not self.body and self.multi.select(0.2) < 0:
            time.sleep(0.02)  # no socket yet: a name is being looked up
        seconds = time.monotonic() - self.since
        if seconds > PATIENCE:
            if self.count < LEAST * seconds and not self.ended:
                text = f"{self.where()} gave less than {LEAST:,} bytes a second for {seconds:.0f} seconds"
                self.failure, self.ended = Dropped(text), True
            self.since, self.count = time.monotonic(), 0

    def explain(self, code, message):
        """What to raise for an error of libcurl's: Dropped or UserError."""
        if code == pycurl.E_ABORTED_BY_CALLBACK:
            return UserError(f"a redirect leads into the private network, to {self.where()}, and is not "
                             "followed; if that is the right place, give it as --mirror")
        if self.curl.getinfo(pycurl.HTTP_CONNECTCODE) == 407:
            return UserError(f"{without_password(self.proxy)} answers 407: {PASSWORD}")
        number = self.curl.getinfo(pycurl.OS_ERRNO)
        if code == pycurl.E_COULDNT_CONNECT and number:
            message = os.strerror(number)  # libcurl only says that it could not
        what = f"{self.where()} does not answer well" if self.lines else f"no connection to {self.where()}"
        sentence = f"{what}: {plain(message)}"
        if code in (pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT_BADFILE):
            return UserError(f"{sentence}; {CERTIFICATE}")
        lasts = code in (pycurl.E_URL_MALFORMAT, pycurl.E_UNSUPPORTED_PROTOCOL, pycurl.E_FILESIZE_EXCEEDED)
        return (BadAnswer if lasts else Dropped)(sentence)

    def where(self):
        through = f" through the proxy {without_password(self.proxy)}" if self.proxy else ""
        return plain(urlsplit(self.url).hostname or "") + through

    def close(self):
        self.multi.remove_handle(self.curl)
        self.multi.close()
        self.curl.close()


def listed_files(web, folder):
    """The files of a Hugging Face repository, from the Hub's own list (which holds sizes and SHA-256)."""
    url = re.sub(r"/([^/]+/[^/]+)/resolve/main/$", r"/api/models/\1/tree/main", folder)
    text, files = bytearray(), []
    try:
        with web.get(url) as reply:
            for piece in reply.pieces():
                text += piece
                if len(text) > MOST_LISTED:
                    raise BadAnswer(f"{url} lists more than {decimal(MOST_LISTED)}")
    except Dropped as drop:
        raise BadAnswer(f"{url} does not answer: {drop}") from drop
    entries = parsed(text)
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"type": "file", "path": str(path), "size": int(size)} if re.fullmatch(FILE_NAME, path):
                stated = entry.get("lfs")
                stated = stated.get("oid") if isinstance(stated, dict) else None
                files.append(File(path, size, matching(SHA256, stated)))
    if not files:
        raise BadAnswer(f"{url} does not list the files to download")
    size = sum(file.size for file in files)
    if len(files) > 1000 or size > MOST:
        raise BadAnswer(f"{url} lists {len(files):,} files of {decimal(size)}, more than any set has")
    return files


# ---- Receiving ----


class Note(NamedTuple):
    """What a part is a part of; None for what is not known."""

    validator: str | None  # strong ETag, or date: what If-Range wants
    sha256: str | None  # of the whole file, as stated by Hugging Face
    total: int | None  # bytes of the whole file


def read_note(path):
    """The Note in a file; nothing is known where it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            found = parsed(file.read(10_000))
    except FileNotFoundError:
        found = None
    found = found if isinstance(found, dict) else {}
    validator, sha256, total = map(found.get, Note._fields)
    return Note(matching(HEADER, validator), matching(SHA256, sha256), whole(total))


def fetch(web, url, file, target, retries):
    """Bring `url` to `target`, going on with an earlier part; whole and checked, or not at all."""
    part, note = Path(f"{target}.part"), Path(f"{target}.part.json")
    try:
        with locked(target):
            if is_here(file, target):  # another download has ended while this one began
                return
            stated = receive_all(web, url, file, part, note, retries)
            found, wanted = sha256_of(part), file.sha256 or stated
            if wanted and found != wanted:
                throw_away(part, note)
                raise UserError(f"{target.name} came with SHA-256 {found} instead of {wanted} and was thrown "
                                "away; run the same command again, or try another --mirror")
            os.replace(part, target)
            note.unlink(missing_ok=True)
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on")
        raise
    say(f"{target}: {decimal(size_of(target))}, SHA-256 {found}"
        f" ({'as it should be' if wanted else 'with none known to compare'})")


@contextlib.contextmanager
def locked(target):
    """Nobody else downloads this file meanwhile. UserError if somebody does."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.part.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{target} is being downloaded already; wait for that to end, or choose another --out"
                        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # on Windows, release() removes it
            os.unlink(lock.lock_file)
        lock.release()


def receive_all(web, url, file, part, note, retries):
    """Ask until all of the file lies in `part`. Returns its SHA-256 as Hugging Face states it, or None."""
    most, failures = size_of(part), 0
    with Meter(part.stem) as meter:
        while True:
            try:
                return receive(web, url, file, part, note, meter)
            except Dropped as drop:
                # Only a good piece more than ever before is progress: a server that gives a byte at a time,
                # or always breaks off half-way and cannot resume, would keep us for ever.
                have = size_of(part)
                failures = 0 if have - most >= LEAST * PATIENCE else failures + 1
                most = max(most, have)
                if failures > retries or not web.answered:
                    hint = "check the network, or try --proxy or another --mirror"
                    if have and read_note(note).validator:
                        hint = f"{decimal(have)} are kept: run the same command again to go on"
                    elif note.exists():
                        throw_away(part, note)  # nobody can go on with it
                    raise UserError(f"{drop}; {hint}") from drop
                pause = max(drop.wait, min(0.25 * 2 ** min(failures, 10), 30.0))
                say(f"{drop}; trying again in {pause:g} s")
            time.sleep(pause)


def receive(web, url, file, part, note, meter):
    """One request: append to `part` what it lacks. Returns the SHA-256 that Hugging Face states, or None.

    Range asks for the rest; with If-Range a server sends the whole file (200 instead of 206) when it no
    longer is the one whose ETag or Last-Modified stands in `note` (RFC 9110, sections 13.1.5 and 14).
    """
    before, have = read_note(note), size_of(part)
    resume = have > 0 and before.validator is not None
    asked = [f"Range: bytes={have}-", f"If-Range: {before.validator}"] if resume else []
    with web.get(url, *asked) as reply:
        start, total = (None, reply.length) if reply.status == 200 else content_range(reply)
        now = Note(validator_of(reply), reply.linked, total)
        if reply.status == 416 and resume and have == before.total == total:
            return before.sha256  # stopped between the last byte and the new name
        same = now[:2] == before[:2] and before.total in (None, total)
        if reply.status == 416 or (reply.status == 206 and not (resume and same and start == have and total)):
            throw_away(part, note)
            raise Dropped("the file at the server is not the one a part is here of; starting over")
        if reply.status == 200 and have:
            say("the server sends the whole file: it has changed there, or cannot be resumed"
                if resume else f"of what {part.name} is a part is not known: starting over")
            have = 0
        if reply.headers.get("content-type", "").startswith("text/html"):
            raise BadAnswer(f"{url} answers with a web page, not with the file")
        if file.size and total is not None and total != file.size:
            raise BadAnswer(f"{url} has {total:,} bytes instead of {file.size:,}")
        total = file.size if total is None else total
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise UserError(f"{decimal(total - have)} are to come, but {part.parent} has only {decimal(free)}"
                            " free; free some space, or choose another --out")
        if total and total > MOST:
            raise BadAnswer(f"{url} announces {decimal(total)}, more than any file here has")
        with open(part, "ab" if have else "wb") as out:
            if not have:  # the part is cut and has no byte yet: so it and its note always belong together
                note.write_text(json.dumps(now._asdict()), "utf-8")
            have = save(reply, out, have, total, meter)
    limit = total or MOST
    if have > limit or not have:
        throw_away(part, note)
        what = f"sends more than the {limit:,} bytes there may be" if have else "answers with an empty file"
        raise BadAnswer(f"{url} {what}")
    if total is not None and have != total:
        raise Dropped(f"{have:,} bytes came instead of {total:,}")
    return now.sha256


def save(reply, out, have, total, meter):
    """Write the body to the file `out`, which has `have` bytes of `total` (None: not known) by now.

    Returns how many came, at most a piece more than there may be; that piece is not written.
    """
    folder = Path(out.name).parent
    meter.show(have, total)
    for piece in reply.pieces():
        have += len(piece)
        if have > (total or MOST):
            break
        if total is None and (free := shutil.disk_usage(folder).free) < SPARE:
            raise UserError(f"{plain(reply.url)} does not say how much is to come, and {folder} has only "
                            f"{decimal(free)} free; free some space and run the same command again")
        out.write(piece)
        meter.show(have, total)
    out.flush()
    os.fsync(out.fileno())
    return have


def validator_of(reply):
    """Its strong ETag, else its date; None if it has none, or none fit for If-Range."""
    etag = reply.headers.get("etag", "")
    return matching(HEADER, etag if etag.startswith('"') else reply.headers.get("last-modified"))


def content_range(reply):
    """(first byte, total length) of a Content-Range header; None for what it does not say."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", reply.headers.get("content-range", ""))
    return tuple(map(whole, found.groups())) if found else (None, None)


def throw_away(part, note):
    part.unlink(missing_ok=True)
    note.unlink(missing_ok=True)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Meter:
    """A progress bar in a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, name):
        columns = ("{task.description}", progress.BarColumn(), progress.DownloadColumn(),
                   progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
        self.bar = progress.Progress(*columns, console=console(), disable=not console().is_terminal)
        self.name, self.task, self.said = name, None, time.monotonic()

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def show(self, have, total):
        """`have` bytes of `total` (None: unknown) are here."""
        if self.task is None:
            self.task = self.bar.add_task(self.name, completed=have, total=total)
        self.bar.update(self.task, completed=have, total=total)
        if self.bar.disable and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            share = f" of {decimal(total)}, {have / total:.0%}" if total else ""
            say(f"{self.name}: {decimal(have)}{share}")


# ---- The command ----


def download(name, out, mirror=None, proxy=None, retries=5):
    """Download the set `name` into the folder `out` and say what to do next."""
    if name not in SETS:
        near = difflib.get_close_matches(name.lower(), SETS, 1, 0.4)
        raise UserError(f"there is no set {name}; " + (f"did you mean {near[0]}?" if near else "see --list"))
    data, folder, web = SETS[name], folder_url(name, mirror), Web(proxy)
    out.mkdir(parents=True, exist_ok=True)
    files = data.files or listed_files(web, folder)
    for file in files:
        target, url = out / (file.save_as or file.path), folder + quote(file.path)
        if not is_here(file, target):
            say(f"{target.name} from {plain(url)}")
            fetch(web, url, file, target, retries)
    paths = {"first": out / (files[0].save_as or files[0].path), "dataset": ROOT / "dataset"}
    say("next: " + data.next.format(
        **{key: f'"{path}"' if " " in str(path) else path for key, path in paths.items()}))
    if data.next.startswith("python data.py"):
        from sources.kinds import detect_kind

        try:
            detect_kind(paths["first"])
        except UserError as error:  # such as a page that a network shows instead of what was asked for
            print(f"but {error}")


def is_here(file, target):
    """Whether it need not be downloaded. UserError if something else lies in its place."""
    if not target.exists():
        return False
    if target.is_dir():
        raise UserError(f"{target} is a folder; move it away, or choose another --out")
    if file.size not in (None, size_of(target)):
        raise UserError(f"{target} is here, but has {size_of(target):,} bytes instead of {file.size:,}; "
                        "move it away, or choose another --out")
    say(f"{target} is already here")
    return True


def show_list():
    table = Table("name", "what", "language", "size", "licence", box=SIMPLE_HEAD, pad_edge=False)
    for column in (0, 3, 4):
        table.columns[column].no_wrap = True
    for name, data in SETS.items():
        table.add_row(name, data.what, data.language, data.size, data.licence)
    console().print(table)


def count(text):
    if whole(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return whole(text)


def main():
    parser = argparse.ArgumentParser(
        description="Download public data sets. A download that broke off goes on where it stopped.",
        epilog="examples:\n"
        "  python dataset/download.py --list\n"
        "  python dataset/download.py tinyshakespeare\n"
        "  python dataset/download.py tinystories --mirror hf-mirror\n"
        "  python dataset/download.py minimind-sft-mini --mirror modelscope\n"
        "  python dataset/download.py tinystories-v2 --proxy socks5h://127.0.0.1:1080",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="the sets to download, see --list")
    add("--list", action="store_true", help="show the sets")
    add("--mirror", help="hf, hf-mirror, modelscope, or an address to put in place of https://HOST,"
        " like https://my.mirror (default: the set's own home)")
    add("--proxy", help="socks5h://HOST:PORT (the proxy looks names up), socks5://..., http://..."
        " (default: from ALL_PROXY, HTTPS_PROXY, HTTP_PROXY)")
    add("--out", type=Path, default=ROOT / "dataset" / "downloads", metavar="DIR",
        help="folder to save in (default: dataset/downloads/)")
    add("--retries", type=count, default=5, metavar="N",
        help="how often to try again while nothing more arrives (default: 5)")
    arguments = parser.parse_args()
    if arguments.list:
        show_list()
    elif not arguments.names:
        parser.error("name a set, or see --list")
    for name in arguments.names:
        download(name, arguments.out, arguments.mirror, arguments.proxy, arguments.retries)


if __name__ == "__main__":
    run(main)
