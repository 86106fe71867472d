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
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import requests
from requests.utils import get_environ_proxies, select_proxy
from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.errors import UserError, run  # noqa: E402

TIMEOUT = (15, 60)  # seconds: to connect, between two pieces of the answer
CHUNK = 1 << 16  # bytes; at most this much is lost when a connection drops
console = Console(highlight=False, markup=False, soft_wrap=True)

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

    wait = 0.0


class Web:
    """GET with a proxy (else the environment's: ALL_PROXY, HTTPS_PROXY, ...) and failures in plain words."""

    def __init__(self, proxy=None):
        self.session, self.answered = requests.Session(), False
        self.session.headers.update({"User-Agent": "nano-download", "Accept-Encoding": "identity"})
        self.proxies = {"http": proxy, "https": proxy} if proxy else {}

    def get(self, url, headers=None):
        """The reply, its body still unread. Raises Dropped where trying again may help, else UserError."""
        proxy = self.proxy_for(url)
        if proxy and not re.match(r"(https?|socks4a?|socks5h?)://[^/:]", proxy):
            raise UserError(f"{without_password(proxy)} is not the address of a proxy; "
                            "write socks5h://127.0.0.1:1080 or http://127.0.0.1:8080")
        try:
            reply = self.session.get(
                url, headers=headers, proxies={**self.proxies}, stream=True, timeout=TIMEOUT)
        except (requests.RequestException, ValueError) as error:
            raise self.explain(error, url) from error
        self.answered = True
        answer, code = f"{url} answers {reply.status_code} {reply.reason}", reply.status_code
        if code in (408, 429) or code >= 500:
            drop, wait = Dropped(answer), reply.headers.get("Retry-After", "")
            drop.wait = min(float(wait), 60.0) if wait.isdigit() else 0.0
            raise drop
        if code >= 400 and code != 416:
            hint = "the file may have moved or be closed; try another --mirror"
            raise UserError(f"{answer}: {'the proxy wants NAME:PASSWORD@HOST:PORT' if code == 407 else hint}")
        return reply

    def proxy_for(self, url):
        return self.proxies.get("https") or select_proxy(url, get_environ_proxies(url))

    def explain(self, error, url):
        """What to raise instead of an exception of requests: Dropped or UserError."""
        kinds = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
        proxy, cause = self.proxy_for(url), error
        for _ in range(10):  # requests wraps urllib3 wraps socket: the innermost says it best
            inner = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__
            cause = inner if isinstance(inner, BaseException) else cause
        through = f" through the proxy {without_password(proxy)}" if proxy else ""
        cause = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        return (Dropped if isinstance(error, kinds) else UserError)(
            f"no connection to {urlsplit(url).hostname}{through}: {cause}")


def without_password(proxy):
    return re.sub(r"^(\w+://)?.*@", r"\1", proxy)


def listed_files(web, folder):
    """The files of a Hugging Face repository, from the Hub's own list (which holds sizes and SHA-256)."""
    url = re.sub(r"/([^/]+/[^/]+)/resolve/main/$", r"/api/models/\1/tree/main", folder)
    try:
        with web.get(url) as reply:
            # A name from the network becomes a name on this disk: plain names only.
            files = [File(entry["path"], int(entry["size"]), entry.get("lfs", {}).get("oid"))
                     for entry in reply.json() if entry["type"] == "file"
                     and re.fullmatch(r"\w[\w .()-]*(?<!\.md)", entry["path"])]
    except (ValueError, LookupError, TypeError, AttributeError):
        files = []
    except (Dropped, requests.RequestException) as error:
        raise UserError(f"{url} does not answer: {error}") from error
    if not files:
        raise UserError(f"{url} does not list the files to download; try another --mirror")
    return files


# ---- Receiving ----


def fetch(web, url, file, target, retries):
    """Bring `url` to `target`, going on with an earlier part; whole and checked, or not at all."""
    part, note = Path(f"{target}.part"), Path(f"{target}.part.json")
    most, failures, stated = size_of(part), 0, None
    with Meter(target.name) as meter:
        while True:
            try:
                stated = receive(web, url, file, part, note, meter)
                break
            except Dropped as drop:
                # Only more bytes than ever before are progress: a server that always breaks off
                # half-way and cannot resume would keep us for ever.
                failures = 0 if size_of(part) > most else failures + 1
                most = max(most, size_of(part))
                if failures > retries or not web.answered:
                    kept = f"{decimal(size_of(part))} are kept: run the same command again to go on"
                    hint = kept if size_of(part) else "check the network, or try --proxy or another --mirror"
                    raise UserError(f"{drop}; {hint}") from drop
                pause = max(drop.wait, min(0.25 * 2**failures, 30.0))
                console.print(f"{drop}; trying again in {pause:g} s")
                time.sleep(pause)
            except KeyboardInterrupt:
                console.print("stopped; run the same command again to go on")
                raise
    found, wanted = sha256_of(part), file.sha256 or stated
    if wanted and found != wanted:
        part.unlink()
        note.unlink(missing_ok=True)
        raise UserError(f"{target.name} came with SHA-256 {found} instead of {wanted} and was thrown away; "
                        "run the same command again, or try another --mirror")
    os.replace(part, target)
    note.unlink(missing_ok=True)
    console.print(f"{target}: {decimal(size_of(target))}, SHA-256 {found}"
                  f" ({'as it should be' if wanted else 'with none known to compare'})")


def receive(web, url, file, part, note, meter):
    """One request: append to `part` what it lacks. Returns the SHA-256 that Hugging Face states, or None.

    Range asks for the rest; with If-Range a server sends the whole file (200 instead of 206) when it no
    longer is the one whose ETag or Last-Modified stands in `note` (RFC 9110, sections 13.1.5 and 14).
    """
    try:
        before, have = json.loads(note.read_text("utf-8")), size_of(part)
        version = before["validator"], before["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        before, have, version = {}, 0, (None, None)  # nobody knows what the part is a part of
    resume = have and version[0]
    with web.get(url, {"Range": f"bytes={have}-", "If-Range": version[0]} if resume else {}) as reply:
        now = version_of(reply)
        start, total = content_range(reply)
        if reply.status_code == 416 and total == have == before.get("total"):
            return version[1]  # stopped between the last byte and the new name
        if reply.status_code == 416 or (reply.status_code == 206 and (start != have or now != version)):
            part.unlink(missing_ok=True)
            raise Dropped("the file at the server is not the one a part is here of; starting over")
        if reply.status_code == 200:
            if have:
                console.print("the server sends the whole file: it has changed there, or cannot be resumed")
            length = reply.headers.get("Content-Length")
            have, total = 0, int(length) if length and "Content-Encoding" not in reply.headers else None
        if reply.headers.get("Content-Type", "").startswith("text/html"):
            raise UserError(f"{url} answers with a web page, not with the file; try another --mirror")
        if file.size and total and total != file.size:
            raise UserError(f"{url} has {total:,} bytes instead of {file.size:,}; try another --mirror")
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise UserError(
                f"{decimal(total - have)} are to come, but {part.parent} has only {decimal(free)} free")
        with open(part, "ab" if have else "wb") as out:
            if not have:  # the part is cut and has no byte yet: so it and its note always belong together
                note.write_text(json.dumps({"validator": now[0], "sha256": now[1], "total": total}), "utf-8")
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
    return now[1]


def version_of(reply):
    """(strong ETag or date, SHA-256 of the whole file as stated by Hugging Face); None where absent."""
    etag = reply.headers.get("ETag", "")
    linked = [hop.headers.get("X-Linked-ETag", "").strip('"') for hop in (*reply.history, reply)]
    return (etag if etag.startswith('"') else reply.headers.get("Last-Modified"),
            next((tag for tag in linked if re.fullmatch("[0-9a-f]{64}", tag)), None))


def content_range(reply):
    """(first byte, total length) of a Content-Range header; None for what it does not say."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", reply.headers.get("Content-Range", ""))
    return tuple(number and int(number) for number in found.groups()) if found else (None, None)


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
        self.bar = progress.Progress(*columns, console=console, disable=not console.is_terminal)
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
            console.print(f"{self.name}: {decimal(have)}{share}")


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
        if not target.exists():
            console.print(f"{target.name} from {url}")
            fetch(web, url, file, target, retries)
        elif file.size in (None, size_of(target)):
            console.print(f"{target} is already here")
        else:
            raise UserError(f"{target} is here, but has {size_of(target):,} bytes instead of {file.size:,}; "
                            "move it away, or choose another --out")
    paths = {"first": out / (files[0].save_as or files[0].path), "dataset": ROOT / "dataset"}
    console.print("next: " + data.next.format(
        **{key: f'"{path}"' if " " in str(path) else path for key, path in paths.items()}))
    if data.next.startswith("python data.py"):
        from sources.kinds import kind_of

        try:
            kind_of(paths["first"])
        except UserError as error:  # such as a page that a network shows instead of what was asked for
            print(f"but {error}")


def show_list():
    table = Table("name", "what", "language", "size", "licence", box=SIMPLE_HEAD, pad_edge=False)
    for column in (0, 3, 4):
        table.columns[column].no_wrap = True
    for name, data in SETS.items():
        table.add_row(name, data.what, data.language, data.size, data.licence)
    console.print(table)


def main():
    parser = argparse.ArgumentParser(
        description="Download public data sets. What broke off goes on where it stopped.",
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
    add("--mirror", help="hf, hf-mirror, modelscope, or an address that stands in for scheme and host,"
        " like https://my.mirror (default: where the set is at home)")
    add("--proxy", help="socks5h://HOST:PORT (the proxy looks names up), socks5://..., http://..."
        " (default: from ALL_PROXY, HTTPS_PROXY, HTTP_PROXY)")
    add("--out", type=Path, default=ROOT / "dataset" / "downloads", metavar="DIR",
        help="folder to save in (default: dataset/downloads/)")
    add("--retries", type=int, default=5, metavar="N",
        help="how often to ask again without getting further (default: 5)")
    arguments = parser.parse_args()
    if arguments.list:
        show_list()
    elif not arguments.names:
        parser.error("name a set, or see --list")
    for name in arguments.names:
        download(name, arguments.out, arguments.mirror, arguments.proxy, arguments.retries)


if __name__ == "__main__":
    run(main)
