"""What a file is. Its first bytes decide, and its name only in case of doubt.

A kind that is read is a module of this folder (see `Kind`). A file of another kind is refused, with a command
that converts it to text or JSON lines.
"""

from __future__ import annotations

import codecs
import functools
import importlib
import os
import pkgutil
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from common.errors import UserError
from sources.reading import BYTE_ORDER_MARK, Note, Reader, ReadReport, unreadable

HEAD = 1 << 16  # bytes of a file that are examined


class Kind(Protocol):
    """A module of this folder that reads one kind of file.

    NAME         what to call it
    HAS_RECORDS  whether it yields records, which may be conversations
    SIGNATURE    a regular expression for the first bytes; None for a kind of UTF-8 text, which its
                 `recognise` tells from others
    """

    NAME: str
    HAS_RECORDS: bool
    SIGNATURE: bytes | None

    def recognise(self, path: Path, lines: list[str], is_cut: bool) -> bool:
        """Whether a UTF-8 file is of this kind, by its first lines; is_cut: it goes on after them."""
        ...

    def documents(
        self, reader: Reader, of_record: Callable[[Any], tuple[Any, list[Note]]], report: ReadReport
    ) -> Iterator[tuple[list[Any], bool]]:
        """Read the file to its end, `reader.advance` with each block. Yields (documents, is_open), see
        `sources.Source`; a document is what `of_record` makes of a record."""
        ...


# What else a file can be. In the commands, {old} is the file, and {jsonl}, {txt} and so on are the new one.
TABLE = (
    "is a table, which is not read; convert it to JSON lines: "
    'python -c "import csv, json; csv.field_size_limit(10**9); [print(json.dumps(row)) for row in '
    "csv.DictReader(open(0, encoding='utf-8-sig', newline=''), delimiter='{delimiter}')]\" < {old} > {jsonl}"
)
MARKUP = (
    "is HTML or XML, which is not read; remove its tags: "
    "python -c \"import html, re, sys; print(html.unescape(re.sub(r'(?s)<(script|style).*?</\\1>|<[^>]*>', "
    "'', sys.stdin.read())))\" < {old} > {txt}"
)
PARQUET = (
    "is a Parquet file, which is not read; convert it to JSON lines: pip install pandas pyarrow; "
    'python -c "import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], '
    "orient='records', lines=True)\" {old} {jsonl}"
)
PICKLE = (
    "is a Python pickle, which is not read because opening one may run any code; "
    "have the program that wrote it write JSON lines instead"
)
ENCODED = "is not in UTF-8, it looks like {encoding}; convert it: iconv -f {encoding} -t UTF-8 {old} > {utf8}"
BINARY = "holds NUL bytes, which text never does; if it is text, remove them: tr -d '\\000' < {old} > {utf8}"
UNKNOWN = "is not text in UTF-8, nor in any other encoding that can be detected"
# A regular expression for the first bytes -> what such a file is.
BY_CONTENT = {
    rb"\x1f\x8b": "is compressed with gzip; unpack it: gzip -dc < {old} > {unpacked}",
    rb"\x28\xb5\x2f\xfd": "is compressed with Zstandard; unpack it: zstd -dc < {old} > {unpacked}",
    rb"\xfd7zXZ\x00": "is compressed with xz; unpack it: xz -dc < {old} > {unpacked}",
    rb"BZh[1-9]1AY&SY": "is compressed with bzip2; unpack it: bzip2 -dc < {old} > {unpacked}",
    rb"\x04\x22\x4d\x18": "is compressed with LZ4; unpack it: lz4 -dc < {old} > {unpacked}",
    rb"PK[\x03\x05\x07][\x04\x06\x08]": "is a zip archive (as .docx, .xlsx, .epub and checkpoints are); "
    "unpack it and name the text files inside: python -m zipfile -e {old} {unpacked}",
    rb"(?s).{257}ustar": "is a tar archive; unpack it and name the text files inside: tar -xf {old}",
    rb"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it and name the text files inside: 7z x {old}",
    rb"Rar!\x1a\x07": "is a rar archive; unpack it and name the text files inside: unrar x {old}",
    rb"PAR1[^\s -~]": PARQUET,
    rb"%PDF-": "is a PDF; extract its text: pdftotext {old} {txt} (pdftotext is part of Poppler)",
    rb"\{\\rtf": "is an RTF document; extract its text: pandoc -f rtf -t plain {old} -o {txt}",
    rb"\x80[\x02-\x05]": PICKLE,
    rb"(?i)(\xef\xbb\xbf)?\s*(<!doctype html|<html[\s>]|<\?xml\s)": MARKUP,
}
BY_SUFFIX = {
    ".csv": TABLE, ".tsv": TABLE, ".html": MARKUP, ".htm": MARKUP, ".xhtml": MARKUP,
    ".xml": MARKUP, ".pkl": PICKLE, ".pickle": PICKLE,
}  # fmt: skip


@functools.cache
def kinds() -> list[Kind]:
    """The modules of this folder that read a kind of file; plain text, which any UTF-8 can be, is last."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [importlib.import_module(f"sources.{name}") for name in sorted(names)]
    found = [cast(Kind, module) for module in modules if hasattr(module, "documents")]
    return sorted(found, key=lambda kind: kind.NAME == "text")


def detect_kind(path: Path | str) -> Kind:
    """What the file holds. UserError, saying what to do, if it is nothing that is read."""
    path = Path(path)
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder; name the files in it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is a pipe or a device, which cannot be read twice; write its text to a file")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    for kind in kinds():
        if kind.SIGNATURE and re.match(kind.SIGNATURE, head):
            return kind
    for pattern, sentence in BY_CONTENT.items():
        if re.match(pattern, head):
            raise unreadable(path, sentence)
    text, n_used = codecs.utf_8_decode(head, "ignore", False)
    n_ascii = sum(map(len, re.findall(rb"[\x00-\x7f]+", head)))
    n_other = len(text.encode()) - n_ascii  # bytes of other valid characters
    n_bad = n_used - n_ascii - n_other
    surely_other = n_bad * 5 > n_used >= 64 or b"\0" in head
    if surely_other or n_bad > n_other:
        if encoding := detect_encoding(head, surely_other):
            raise unreadable(path, ENCODED, encoding=encoding)
    if surely_other:
        raise unreadable(path, BINARY if b"\0" in head else UNKNOWN)
    lines, is_cut = text.replace(BYTE_ORDER_MARK, "").split("\n"), len(head) == HEAD
    if is_cut and len(lines) > 1:
        del lines[-1]  # it may be incomplete
    lines = [line for line in lines if line.strip()]
    kind = next(k for k in kinds() if not k.SIGNATURE and k.recognise(path, lines, is_cut))
    suffix = path.suffix.lower()
    if kind.NAME == "text" and lines and suffix in BY_SUFFIX:
        raise unreadable(path, BY_SUFFIX[suffix], delimiter="\\t" if suffix == ".tsv" else ",")
    return kind


def detect_encoding(head: bytes, surely_other: bool) -> str | None:
    """The encoding that `head` seems to be in, by its name for iconv; None if it cannot be told.

    surely_other: it is certainly not UTF-8; otherwise it may be UTF-8 with errors in it.
    """
    for mark, name in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
                       (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_BE, "UTF-16")):  # fmt: skip
        if head.startswith(mark):
            return name
    if b"\0" not in head and is_gb18030(head):
        return "GB18030"
    if not surely_other:
        return None
    from charset_normalizer import from_bytes

    n_whole = len(head) // 4 * 4 if b"\0" in head else head.rfind(b"\n") + 1
    best = from_bytes(head[: n_whole or None]).best()
    name = best.encoding if best else ""
    for encoding, pattern in ENCODINGS.items():
        if re.match(pattern, name):
            return encoding
    # Encodings with one byte for each character can hardly be told apart: only the common ones are named.
    return name.upper().replace("_", "-") if re.match("cp125|cp866|iso8859|koi8", name) else None


# The name of an encoding for iconv -> the names of it and its relatives in Python.
ENCODINGS = {"UTF-16LE": "utf_16_le", "UTF-16BE": "utf_16_be", "UTF-32LE": "utf_32_le",
             "UTF-32BE": "utf_32_be", "GB18030": "gb", "BIG5-HKSCS": "big5|cp950",
             "CP932": "shift_jis|cp932", "EUC-JP": "euc_j", "CP949": "euc_kr|cp949"}  # fmt: skip


def is_gb18030(head: bytes) -> bool:
    """Whether 90 % of the characters beyond ASCII are Chinese punctuation or among the 3,755 common ones."""
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(head)
    except UnicodeDecodeError:
        return False
    characters = "".join(character for character in text if not character.isascii())
    firsts = re.findall(rb"([\xa1-\xa3\xb0-\xd7])[\xa1-\xfe]", characters.encode("gb18030"))
    n_late = sum(first > b"\xc8" for first in firsts)  # Korean has no characters there
    return 10 * len(firsts) >= 9 * len(characters) and 10 * n_late >= len(characters) > 0
