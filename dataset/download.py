"""Bring well-known public text to this machine: TinyStories, tiny Shakespeare, the Nano and MiniMind sets.

    python dataset/download.py --list
    python dataset/download.py tinyshakespeare                          # -> dataset/downloads/
    python dataset/download.py tinystories --mirror hf-mirror
    python dataset/download.py minimind-sft-mini --mirror modelscope --proxy socks5h://127.0.0.1:1080

What has arrived is kept in `NAME.part`, and beside it, in `NAME.part.json`, the ETag of the file it is a
part of. So a download that broke off, even by `kill -9`, goes on where it stopped, and never joins the
halves of two versions. Only a file that is whole, of the announced length and with the right SHA-256
(known here, or stated by Hugging Face) gets its name.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import requests  # noqa: E402
from requests.utils import get_environ_proxies, select_proxy  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.filesize import decimal  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn)
from rich.table import Table  # noqa: E402

from engine.errors import UserError, run  # noqa: E402

TIMEOUT = (15, 60)  # seconds: to connect, between two pieces of the answer
CHUNK = 1 << 20
MIRRORS = ("hf", "hf-mirror", "modelscope", "github")

console = Console(highlight=False, markup=False, soft_wrap=True)


# ---- What there is. A checksum stands here only where the file is known not to change any more. ----

@dataclass(frozen=True)
class File:
    path: str  # at the source
    size: int | None = None  # bytes
    sha256: str | None = None
    save_as: str = ""

    @property
    def name(self):
        return self.save_as or self.path


@dataclass(frozen=True)
class DataSet:
    what: str
    language: str
    size: str
    licence: str
    places: dict  # mirror -> address of the folder the files lie in; the first is the default
    files: tuple  # empty: the Hub is asked what the repository holds
    chat: bool = False  # MiniMind's "conversations", to be rewritten as "messages"
    next: str = "python data.py --pretrain {first}"


def hub(repository, modelscope=None):
    """The addresses of a Hugging Face repository, its public mirror, and its twin on ModelScope."""
    places = {"hf": f"https://huggingface.co/{repository}/resolve/main/",
              "hf-mirror": f"https://hf-mirror.com/{repository}/resolve/main/"}
    if modelscope:
        places["modelscope"] = f"https://www.modelscope.cn/{modelscope}/resolve/master/"
    return places


def minimind(what, size, file, chat=False):
    return DataSet(what, "zh, en", size, "mixed: Apache-2.0, CC-BY-NC-2.0",
                   hub("datasets/jingyaogong/minimind_dataset", "datasets/gongjy/minimind_dataset"),
                   (File(file),), chat, "python data.py --sft {first}" if chat else DataSet.next)


TINYSTORIES = hub("datasets/roneneldan/TinyStories")
SETS = {
    "tinyshakespeare": DataSet(
        "40,000 lines of Shakespeare's plays", "en", "1.1 MB", "public domain",
        {"github": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"},
        (File("input.txt", 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
              "tinyshakespeare.txt"),)),
    "tinystories": DataSet(
        "2.1 million stories in a small child's words, by GPT-3.5 and GPT-4 (arXiv 2305.07759)", "en",
        "1.9 GB", "CDLA-Sharing-1.0", TINYSTORIES, (
            File("TinyStories-train.txt", 1_924_281_556,
                 "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
            File("TinyStories-valid.txt", 19_447_282,
                 "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4"))),
    "tinystories-v2": DataSet(
        "the same kind, all by GPT-4", "en", "2.3 GB", "CDLA-Sharing-1.0", TINYSTORIES, (
            File("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
                 "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
            File("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
                 "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"))),
    "nano": DataSet(
        "the Nano data set: pretrain.txt and sft.jsonl in an archive, password nano", "zh", "", "",
        hub("bd4sur/nano_dataset"), (), next="7z x -pnano -o{dataset} {first}\nthen: python data.py"),
    "nano-pt-10g": DataSet(
        "Nano's later pretraining text: seven volumes of one 7z archive, password nano", "zh", "6.9 GB", "",
        hub("datasets/bd4sur/Nano-PT-10G"),
        tuple(File(f"pretrain_20241018_25G.7z.00{volume}") for volume in range(1, 8)),
        next="7z x -pnano -o{dataset} {first}\nthen: python data.py --pretrain the text file it held"),
    "minimind-pretrain-mini": minimind("MiniMind-3 pretraining, small", "1.2 GB", "pretrain_t2t_mini.jsonl"),
    "minimind-pretrain": minimind("MiniMind-3 pretraining", "10 GB", "pretrain_t2t.jsonl"),
    "minimind-sft-mini": minimind("MiniMind-3 conversations, small", "1.6 GB", "sft_t2t_mini.jsonl", True),
    "minimind-sft": minimind("MiniMind-3 conversations", "14 GB", "sft_t2t.jsonl", True),
    "minimind-pretrain-hq": minimind("MiniMind2 pretraining", "1.6 GB", "pretrain_hq.jsonl"),
    "minimind-sft-512": minimind("MiniMind2 conversations, short", "1.2 GB", "sft_mini_512.jsonl", True),
}


def folder_url(name, mirror):
    """Where the files of a set lie, with a / at the end. An address as mirror stands in for scheme and host."""
    places = SETS[name].places
    if mirror is None:
        return next(iter(places.values()))
    if re.match(r"https?://[^/]", mirror):
        return mirror.rstrip("/") + urlsplit(next(iter(places.values()))).path
    if mirror not in places:
        known = "is not a mirror" if mirror not in MIRRORS else f"does not have {name}"
        raise UserError(f"--mirror {mirror} {known}; {name} is on {', '.join(places)}. "
                        "An address (https://...) in place of theirs would do too")
    return places[mirror]


# ---- Asking ----

class Dropped(Exception):
    """The answer did not come or broke off; asking again may help. `wait`: seconds the server asks for."""

    def __init__(self, sentence, wait=0.0):
        super().__init__(sentence)
        self.wait = wait


class Web:
    """GET with a proxy (else the environment's: ALL_PROXY, HTTPS_PROXY, ...) and failures in plain words."""

    def __init__(self, proxy=None):
        if proxy is not None:
            parts = urlsplit(proxy)
            if not re.fullmatch(r"https?|socks4a?|socks5h?", parts.scheme) or not parts.hostname:
                raise UserError(f"--proxy {proxy} is not a proxy address; write socks5h://127.0.0.1:1080 "
                                "or http://127.0.0.1:8080")
        self.session = requests.Session()
        self.session.headers.update({"User-Agent": "nano-download", "Accept-Encoding": "identity"})
        self.proxies = {"http": proxy, "https": proxy} if proxy else {}

    def get(self, url, headers=None):
        """The reply, its body still unread. Raises Dropped where trying again may help, else UserError."""
        try:
            reply = self.session.get(url, headers=headers, proxies=dict(self.proxies), stream=True, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise self.explain(error, url) from error
        code, reason = reply.status_code, f"{reply.status_code} {reply.reason}"
        if code in (408, 429) or code >= 500:
            wait = reply.headers.get("Retry-After", "")
            raise Dropped(f"{url} answers {reason}", min(float(wait), 60.0) if wait.isdigit() else 0.0)
        if code in (404, 410):
            raise UserError(f"{url} does not exist ({reason}); the set may have moved: try another --mirror")
        if code == 407:
            raise UserError("the proxy wants a name and a password: --proxy http://NAME:PASSWORD@HOST:PORT")
        if code >= 400 and code != 416:
            raise UserError(f"{url} is refused ({reason}); it may be gone, moved or closed: try another --mirror")
        return reply

    def explain(self, error, url):
        """What to raise for an exception of requests."""
        if not isinstance(error, (requests.ConnectionError, requests.Timeout,
                                  requests.exceptions.ChunkedEncodingError)):
            return UserError(f"{url} cannot be asked for: {error}")
        proxy = self.proxies.get("https") or select_proxy(url, get_environ_proxies(url))
        through = f" through the proxy {re.sub('//.*@', '//', proxy)}" if proxy else ""
        cause = error
        for _ in range(10):  # requests wraps urllib3 wraps socket: the innermost says it best
            cause = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__ or cause
            if not isinstance(cause, BaseException):
                break
        cause = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
        return Dropped(f"no connection to {urlsplit(url).hostname}{through}: {cause}")


def listed_files(web, folder):
    """The files of a Hugging Face repository, from the Hub's own list (which holds sizes and SHA-256)."""
    url = re.sub(r"/([^/]+/[^/]+)/resolve/main/$", r"/api/models/\1/tree/main", folder)
    try:
        with web.get(url) as reply:
            entries = [(entry["path"], entry["size"], entry.get("lfs", {}).get("oid")) for entry in reply.json()
                       if entry["type"] == "file"]
    except Dropped as drop:
        raise UserError(str(drop)) from drop
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{url} does not answer with a list of files; try another --mirror") from error
    # A name from the network becomes a name on this disk: plain names only.
    files = tuple(File(*entry) for entry in entries
                  if re.fullmatch(r"\w[\w .()-]*", entry[0]) and not entry[0].endswith(".md"))
    if not files:
        raise UserError(f"{url} lists no files to download")
    return files


# ---- Receiving one file ----

def fetch(web, url, file, target, retries):
    """Bring `url` to `target`, going on with an earlier part; returns the SHA-256. Whole or not at all."""
    part, note = Path(f"{target}.part"), Path(f"{target}.part.json")
    most = size_of(part)
    failures = 0
    with Meter(file.name) as meter:
        while True:
            try:
                stated = receive(web, url, file, part, note, meter)
                break
            except Dropped as drop:
                # Only more bytes than ever before are progress, or a server that always breaks off
                # half-way and cannot resume would keep us for ever.
                failures = 0 if size_of(part) > most else failures + 1
                most = max(most, size_of(part))
                if failures > retries or (meter.total is None and not drop.wait and not most):
                    kept = f"; {decimal(most)} are kept, run the same command again to go on" if most else \
                        "; check the network, or try --proxy or another --mirror"
                    raise UserError(f"{drop}{kept}") from drop
                pause = max(drop.wait, min(0.5 * 2 ** failures, 30.0))
                meter.say(f"{drop}; trying again in {pause:g} s")
                time.sleep(pause)
    found = sha256_of(part)
    wanted = file.sha256 or stated
    if wanted and found != wanted:
        part.unlink()
        note.unlink(missing_ok=True)
        raise UserError(f"{file.name} has SHA-256 {found}, but should have {wanted}; what was downloaded is "
                        "removed: run the same command again, or try another --mirror")
    os.replace(part, target)
    note.unlink(missing_ok=True)
    console.print(f"{target}: {decimal(target.stat().st_size)}, SHA-256 {found} "
                  + ("(as it should be)" if wanted else "(there is none to compare it with)"))


def receive(web, url, file, part, note, meter):
    """One request: append to `part` what it lacks. Returns the SHA-256 that Hugging Face states, or None.

    Range asks for the rest; with If-Range a server sends the whole file (200 instead of 206) when it no
    longer is the one whose ETag or Last-Modified stands in `note` (RFC 9110, sections 13.1.5 and 14).
    """
    try:
        before = json.loads(note.read_text("utf-8"))
        have, validator = size_of(part), before["validator"]
    except (OSError, ValueError, LookupError, TypeError):
        before, have, validator = {}, 0, None  # without a note nobody knows what the part is a part of
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have and validator else {}
    with web.get(url, headers) as reply:
        now = identity(reply)
        range_start, total = content_range(reply)
        if reply.status_code == 416:
            if total == have == before.get("total"):
                return before.get("sha256")  # stopped between the last byte and the rename
            part.unlink(missing_ok=True)
            raise Dropped("what is here does not fit the server's file: starting over")
        resumed = reply.status_code == 206
        if resumed and (range_start != have or now["validator"] != validator or now["sha256"] != before.get("sha256")):
            part.unlink()
            raise Dropped("the server's file has changed: starting over")
        if not resumed:
            encoded = reply.headers.get("Content-Encoding", "identity") != "identity"
            total = None if encoded else int(reply.headers.get("Content-Length", -1))
            total = None if total == -1 else total
            if have:
                meter.say("the server sends the whole file again: it has changed, or cannot resume")
            have = 0
        if file.size and total and total != file.size:
            raise UserError(f"{url} has {total:,} bytes, but {file.name} should have {file.size:,}; "
                            "try another --mirror")
        if reply.headers.get("Content-Type", "").startswith("text/html"):
            raise UserError(f"{url} answers with a web page, not with the file; try another --mirror")
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise UserError(f"{file.name} needs {decimal(total - have)} more, but only {decimal(free)} are free "
                            f"on the disk of {part.parent}")
        with open(part, "ab" if resumed else "wb") as out:
            # After the part was cut and before its first byte: part and note always belong together.
            note.write_text(json.dumps({**now, "total": total}), "utf-8")
            meter.show(have, total)
            try:
                for chunk in reply.iter_content(CHUNK):
                    out.write(chunk)
                    have += len(chunk)
                    meter.show(have, total)
            except requests.RequestException as error:
                raise web.explain(error, url) from error
            out.flush()
            os.fsync(out.fileno())
    if total is not None and have != total:
        raise Dropped(f"{have:,} bytes came instead of {total:,}")
    return now["sha256"]


def identity(reply):
    """Which version of the file this is: {"validator": strong ETag or date, "sha256": of the whole file}."""
    etag = reply.headers.get("ETag", "")
    stated = [hop.headers.get("X-Linked-ETag", "").strip('"') for hop in [*reply.history, reply]]
    return {"validator": etag if etag.startswith('"') else reply.headers.get("Last-Modified"),
            "sha256": next((tag for tag in stated if re.fullmatch("[0-9a-f]{64}", tag)), None)}


def content_range(reply):
    """(first byte, total length) from a Content-Range header; None for what it does not say."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", reply.headers.get("Content-Range", ""))
    return tuple(int(n) if n and n != "*" else None for n in found.groups()) if found else (None, None)


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
        self.name, self.total, self.task = name, None, None
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                            TimeRemainingColumn(), console=console) if console.is_terminal else None
        self.last = time.monotonic()

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def show(self, have, total):
        """`have` bytes of `total` (None: unknown) are here."""
        self.total = total
        if self.bar:
            if self.task is None:
                self.task = self.bar.add_task(self.name, completed=have, total=total)
            self.bar.update(self.task, completed=have, total=total)
        elif time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            self.say(f"{self.name}: {decimal(have)}" + (f" of {decimal(total)}, {have / total:.0%}" if total else ""))

    def say(self, text):
        console.print(text)


# ---- Conversion ----

def to_messages(source, target):
    """MiniMind's {"conversations": [...]} lines -> {"messages": [...]}; returns (kept, left out).

    Left out are conversations that use tools, or do not alternate user, assistant (after at most one
    system turn): our template has no place for them.
    """
    kept = left_out = 0
    beside = Path(f"{target}.tmp")
    with open(source, encoding="utf-8") as lines, open(beside, "w", encoding="utf-8", newline="\n") as out:
        for number, line in enumerate(lines, 1):
            try:
                turns = json.loads(line)["conversations"]
                plain = not any(turn.get("tools") or turn.get("tool_calls") for turn in turns)
                messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
                roles = " ".join(message["role"] for message in messages)
                filled = all(isinstance(m["content"], str) and m["content"].strip() for m in messages)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{source}, line {number}: not a JSON object with a list \"conversations\" of "
                                "role and content") from error
            if plain and filled and re.fullmatch(r"(system )?user assistant( user assistant)*", roles):
                kept += 1
                out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            else:
                left_out += 1
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, target)
    return kept, left_out


# ---- The command ----

def show_list():
    table = Table("name", "what", "language", "size", "licence", "mirrors")
    for name, data in SETS.items():
        table.add_row(name, data.what, data.language, data.size or "?", data.licence or "not stated",
                      ", ".join(data.places))
    console.print(table)


def download(name, out, mirror, proxy, retries):
    """Download one set into the folder `out` and say what to do next."""
    if name not in SETS:
        near = difflib.get_close_matches(name.lower(), SETS, 1, 0.4)
        raise UserError(f"there is no set {name!r}" + (f"; did you mean {near[0]}?" if near else "; see --list"))
    data, folder, web = SETS[name], folder_url(name, mirror), Web(proxy)
    out.mkdir(parents=True, exist_ok=True)
    files = data.files or listed_files(web, folder)
    for file in files:
        target = out / file.name
        if not target.exists():
            url = folder + quote(file.path)
            console.print(f"{file.name} from {url}")
            fetch(web, url, file, target, retries)
        elif file.size in (None, target.stat().st_size):
            console.print(f"{target} is already here")
        else:
            raise UserError(f"{target} has {target.stat().st_size:,} bytes instead of {file.size:,}: it is another "
                            "file or a broken one; move it away, or choose another --out")
    first = out / files[0].name
    if data.chat:
        source, first = first, first.with_suffix(".messages.jsonl")
        if not first.exists():
            kept, left_out = to_messages(source, first)
            console.print(f"{first}: {kept:,} conversations as \"messages\"; {left_out:,} left out (tools, or "
                          "turns that do not alternate)")
    console.print("next: " + data.next.format(first=quoted(first), dataset=quoted(ROOT / "dataset")))


def quoted(path):
    """A path as it can be pasted into a shell."""
    return f'"{path}"' if re.search(r"\s", str(path)) else str(path)


def main():
    parser = argparse.ArgumentParser(
        description="Download well-known public data sets; what broke off goes on where it stopped.",
        epilog="examples:\n  python dataset/download.py --list\n  python dataset/download.py tinyshakespeare\n"
               "  python dataset/download.py tinystories --mirror hf-mirror\n"
               "  python dataset/download.py minimind-sft-mini --mirror modelscope\n"
               "  python dataset/download.py tinystories-v2 --proxy socks5h://127.0.0.1:1080",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the sets to download, see --list")
    parser.add_argument("--list", action="store_true", help="show the sets")
    parser.add_argument("--mirror", help=f"{', '.join(MIRRORS)}, or an address that stands in for scheme and "
                        "host, like https://my.mirror (default: where the set is at home)")
    parser.add_argument("--proxy", help="socks5h://HOST:PORT (names are looked up by the proxy), socks5://, http:// "
                        "(default: from ALL_PROXY, HTTPS_PROXY, HTTP_PROXY)")
    parser.add_argument("--out", type=Path, default=ROOT / "dataset" / "downloads",
                        help="folder to save in (default: dataset/downloads/)")
    parser.add_argument("--retries", type=int, default=5,
                        help="how often in a row to ask again without getting further (default: 5)")
    arguments = parser.parse_args()
    if not arguments.list and not arguments.names:
        parser.error("name a set, or see --list")
    if arguments.list:
        show_list()
    for name in arguments.names:
        download(name, arguments.out, arguments.mirror, arguments.proxy, arguments.retries)


if __name__ == "__main__":
    run(main)
