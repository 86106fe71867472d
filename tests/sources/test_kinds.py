"""sources/kinds.py: the content decides what a file is, others are refused, and the advised commands work."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from sources import ReadReport, Source
from sources.kinds import detect_kind
from sources.records import texts_in

ROOT = Path(__file__).resolve().parents[2]
TEXT = '天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。\nPlain text, as "it" is.\n' * 4
RECORDS = [{"text": "Anna lives in Rome.\n罗马"}, {"text": 'Bob, "in Oslo"'}]


def zipped():
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("inside.txt", TEXT)
    return file.getvalue()


def tarred():
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        entry = tarfile.TarInfo("inside.txt")
        entry.size = len(TEXT.encode())
        archive.addfile(entry, io.BytesIO(TEXT.encode()))
    return file.getvalue()


TEXTS = [record["text"] for record in RECORDS]
CSV = "\ufeffid,text\r\n" + "".join('1,"{}"\r\n'.format(text.replace('"', '""')) for text in TEXTS)
HTML = f"\n<!DOCTYPE html><html><style>p {{}}</style><p>{TEXT}</p>&lt;</html>"
# {name: (content, what it is said to be, the file that the advice makes, its texts)}
OTHERS = {
    "a b.txt.gz": (gzip.compress(TEXT.encode()), "gzip", "a b.txt", [TEXT]),
    "misnamed.txt": (gzip.compress(TEXT.encode()), "gzip", "misnamed", [TEXT]),
    "a.txt.bz2": (bz2.compress(TEXT.encode()), "bzip2", "a.txt", [TEXT]),
    "a.txt.xz": (lzma.compress(TEXT.encode()), "xz", "a.txt", [TEXT]),
    "a.zip": (zipped(), "a zip archive", "a/inside.txt", [TEXT]),
    "a.tar": (tarred(), "a tar archive", "inside.txt", [TEXT]),
    "utf16": (TEXT.encode("utf-16"), "UTF-16;", "utf16.utf8", [TEXT]),
    "be.txt": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16;", "be.utf8.txt", [TEXT]),
    "no mark.txt": (TEXT.encode("utf-16-le"), "UTF-16LE", "no mark.utf8.txt", [TEXT]),
    "nomark_be.txt": (TEXT.encode("utf-16-be"), "UTF-16BE", "nomark_be.utf8.txt", [TEXT]),
    "utf32.txt": (TEXT.encode("utf-32"), "UTF-32", "utf32.utf8.txt", [TEXT]),
    "gbk.txt": (TEXT.encode("gbk"), "GB18030", "gbk.utf8.txt", [TEXT]),
    "gb.jsonl": (
        json.dumps({"text": TEXT}, ensure_ascii=False).encode("gb18030"), "GB18030", "gb.utf8.jsonl", [TEXT]
    ),
    "big5.txt": (("今天天氣很好，我們去公園散步。\n" * 9).encode("big5"), "BIG5", "big5.utf8.txt", None),
    "nul.txt": (b"a\0b\n" + TEXT.encode(), "NUL bytes", "nul.utf8.txt", ["ab\n" + TEXT]),
    "a.json": (json.dumps(RECORDS, indent=1).encode(), "a JSON array", "a.jsonl", TEXTS),
    "b.JSON": (json.dumps(RECORDS).encode(), "a JSON array", "b.jsonl", TEXTS),
    "c.jsonl": (json.dumps(RECORDS).encode(), "a JSON array", "c.new.jsonl", TEXTS),
    "d.txt": (json.dumps(RECORDS[0], indent=1).encode(), "a single JSON value", "d.jsonl", TEXTS[:1]),
    "a.csv": (CSV.encode(), "a table", "a.jsonl", TEXTS),
    "a.TSV": (CSV.replace(",", "\t").replace("Bob\t", "Bob,").encode(), "a table", "a.jsonl", TEXTS),
    "a.html": (b"<p>" + TEXT.encode(), "HTML or XML", "a.txt", [TEXT + "\n"]),
    "page.txt": (HTML.encode(), "HTML or XML", "page.new.txt", [f"\n{TEXT}<\n"]),
    "a.pdf": (b"%PDF-1.7\n" + TEXT.encode(), "a PDF", None, None),
    "a.parquet": (b"PAR1\x15\x04\x15" + TEXT.encode(), "a Parquet file", None, None),
    "a.zst": (b"\x28\xb5\x2f\xfd" + TEXT.encode(), "Zstandard", None, None),
    "a.lz4": (b"\x04\x22\x4d\x18" + TEXT.encode(), "LZ4", None, None),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + TEXT.encode(), "a 7z archive", None, None),
    "a.rar": (b"Rar!\x1a\x07" + TEXT.encode(), "a rar archive", None, None),
    "a.rtf": (rb"{\rtf1 text}", "an RTF document", None, None),
    "a.pkl": (pickle.dumps([TEXT]), "a Python pickle", None, None),
    "b.pkl": (pickle.dumps([TEXT], protocol=0), "a Python pickle", None, None),
    "bytes": (bytes(range(128, 256)) * 9, "not text in UTF-8", None, None),
    "ints.bin": (b"\7\0\x50\1\x33\2" * 99, "NUL bytes", None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_refused_and_the_advised_command_works(name, tmp_path, monkeypatch):
    content, what, new, texts = OTHERS[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as error:
        detect_kind(name)
    sentence = str(error.value)
    assert sentence.startswith(f"{name} ") and what in sentence and "\n" not in sentence
    if new is None:
        return
    command = sentence.partition(": ")[2]
    if shutil.which(command.split()[0]) is None and not command.startswith("python"):
        pytest.skip(f"there is no {command.split()[0]} here")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` is this one
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})
    found = [text for batch, _ in Source(new, texts_in).documents(ReadReport()) for text in batch]
    if texts is not None:
        assert [text for part in found for text in ([part] if isinstance(part, str) else part)] == texts


@pytest.mark.parametrize("name", OTHERS)
def test_a_truncated_file_of_another_kind_is_refused_or_text(name, tmp_path):
    """At every length (each of the first ones, then some) it is refused, or it holds nothing but text."""
    content, path = OTHERS[name][0], tmp_path / name
    for length in {*range(40), *range(40, len(content), 1 + len(content) // 40)}:
        path.write_bytes(content[:length])
        try:
            kind = detect_kind(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert kind.NAME in ("text", "JSON lines") and b"\0" not in content[:length]


@given(content=st.binary(max_size=300), name=st.sampled_from(["x", "x.txt", "x.jsonl", "x.csv"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_refused(content, name, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    found, read = ReadReport(skip_bad_lines=True), []
    try:
        for documents, _ in Source(path, texts_in).documents(found):
            read += documents
    except UserError as error:
        assert str(path) in str(error)
    plain = content.replace(b"\xef\xbb\xbf", b"")
    for text in read:
        assert "\0" not in text and (isinstance(text, list) or set(text.encode()) <= set(plain))


PROSE = {
    "a.txt": "id,text\n1,one\n2,two\n",
    "b.txt": "[1] A note, and { braces }.\n",
    "c.txt": "[[File:x.png]] of a wiki\n",
    "d.txt": '["Hello," she said.]\n',
    "e.md": "# A page\n<div>with some HTML</div>\n",
    "f.log": "2026-01-02 | Train | Loss: 3.2\n",
    "README": "no suffix\n",
    "g.py": '{"not": json}.get("not")\n[x for x in y]\n',
    "h.UNKNOWN": "<p>one tag</p>\n",
    "i.txt": '{"a": 1} is an object in JSON.\nAnd this is none.\nNor this.\n',
    "j.txt": "\ufeffmarked\n",
    "k.txt": "PAR1 of an address\n",
    "l.txt": "BZh, PK, GIF8, Rar! and MZ are no signatures\n",
}


@pytest.mark.parametrize("name", PROSE)
def test_text_stays_text(name, tmp_path):
    (tmp_path / name).write_text(PROSE[name], "utf-8")
    assert detect_kind(tmp_path / name).NAME == "text"


LINE = '{"text": "one"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINE * 2),
        ("A.JSONL", LINE * 2),
        ("a.ndjson", "broken\n"),
        ("a.jsonl", "broken\n" + LINE),
        ("a.jsonl", '["question", "answer"]\n'),
        ("a.jsonl", '{"text": "half of\n' + LINE),
        ("a.json", LINE * 2),
        ("a.txt", LINE * 2),
        ("a.csv", LINE),
        ("a", "\n\ufeff".join(["", LINE, LINE])),
        ("a.txt", LINE + "a bad one\n" + LINE),
        ("a.txt", '{"text": "' + "long" * 20_000 + '"}\n' + LINE),
        ("a.txt", '[{"role": "user", "content": "Hi"}]\n' * 2),
        ("a.jsonl", ""),
    ],
)
def test_json_lines_are_recognised_by_their_lines(name, content, tmp_path):
    (tmp_path / name).write_text(content, "utf-8")
    assert detect_kind(tmp_path / name).NAME == "JSON lines"


def test_some_bad_lines_do_not_make_it_another_kind(tmp_path):
    path = tmp_path / "x.txt"
    for content in (b"one\n\xff\ntwo\n" * 30, ("好\n" * 20).encode() + b"caf\xe9 au lait\n", b"sch\xf6n\n"):
        path.write_bytes(content)
        assert detect_kind(path).NAME == "text"


def test_what_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, sentence in (
            ("pipe", "is a pipe or a device"),
            ("socket", "is a pipe or a device"),
            ("/dev/null", "is a pipe or a device"),
            (".", "is a folder"),
        ):
            with pytest.raises(UserError, match=sentence):
                detect_kind(tmp_path / name)
    for name in ("loop", "nowhere"):
        with pytest.raises(OSError):  # which a script tells in a sentence
            detect_kind(tmp_path / name)


SUBTITLES = (
    "1\r\n00:00:01,600 --> 00:00:04,200\r\nWhere does Anna live?\r\n\r\n"
    "2\r\n00:00:05,900 --> 00:00:07,999\r\n42\r\nIn Rome.\r\n\r\n"
)


def test_the_guides_kind_of_file_is_one_module(project):
    guide = (ROOT / "doc" / "extending.md").read_text("utf-8")
    [code] = re.findall(r"`sources/subtitles.py`:\n\n```python\n(.*?)```", guide, re.DOTALL)
    (project.root / "film.srt").write_bytes(("\ufeff" + SUBTITLES * 40).encode())
    (project.root / "film.txt").write_text("Where does Anna live?\n\n42\nIn Rome.\n\n" * 40, "utf-8")
    (project.root / "sources" / "subtitles.py").write_text(code, "utf-8")
    for name in ("srt", "txt"):
        output = project.root / name
        done = project.run("data.py", "--pretrain", project.root / f"film.{name}", "--out", output)
        assert done.returncode == 0, done.stderr
    one, two = ((project.root / name / "pretrain_train.bin").read_bytes() for name in ("srt", "txt"))
    assert one == two
