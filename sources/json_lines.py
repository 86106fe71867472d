"""JSON lines: one record on each line."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from sources import reading
from sources.reading import Note, Reader, ReadReport, line_fault, unreadable

NAME, HAS_RECORDS, SIGNATURE = "JSON lines", True, None
SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
ARRAY = (
    "is a JSON array, which is not read; convert it to JSON lines: "
    'python -c "import json, sys; [print(json.dumps(x)) for x in json.load(sys.stdin.buffer)]"'
    " < {old} > {jsonl}"
)
OBJECT = (
    "is a single JSON value, not one on each line; if it is one record, write it on one line: "
    'python -c "import json, sys; print(json.dumps(json.load(sys.stdin.buffer)))" < {old} > {jsonl}'
)

parse = json.JSONDecoder().decode


def recognise(path: Path, lines: list[str], is_cut: bool) -> bool:
    """Whether half of the first 20 lines are records, or the file's name says that they should be.

    is_cut: the file goes on after these lines. UserError for JSON that is not one value on each line.
    """
    text, suffix = "\n".join(lines).lstrip(), path.suffix.lower()
    n_records = sum(map(is_record, lines[:20]))
    if n_records and 2 * n_records >= len(lines[:20]):
        return True
    if starts_like_json(text, is_cut):
        if suffix not in SUFFIXES and len(lines) == 1 and text[0] == "{":
            return True  # a record that is longer than HEAD
        if suffix not in SUFFIXES or re.match(r'\[\s*\{\s*"', text):
            raise unreadable(path, ARRAY if text[0] == "[" else OBJECT)
    if lines and suffix == ".json":
        raise unreadable(path, OBJECT)
    return suffix in SUFFIXES


def starts_like_json(text: str, is_cut: bool) -> bool:
    """Whether the text is a JSON object or array, or the start of one if the text is cut."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if not is_cut or error.pos < len(text) - len("false") and "Unterminated string" not in error.msg:
            return False
    except RecursionError:
        pass
    return text[:1] in ("{", "[")


def is_record(line: str) -> bool:
    """Whether a line is a JSON object or a list of messages."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "role" in value[0]
    return isinstance(value, dict)


def documents(
    reader: Reader, of_record: Callable[[Any], tuple[Any, list[Note]]], report: ReadReport
) -> Iterator[tuple[list[Any], bool]]:
    """What `of_record` makes of each line. Yields (documents, False), about a block of bytes at a time."""
    while block := reader.file.read(reading.CHUNK) + reader.file.readline():
        documents, notes = [], []
        for number, line in enumerate(io.BytesIO(block), reader.n_lines + 1):
            line = line.removeprefix(codecs.BOM_UTF8)  # of this file, or of one that was appended to it
            if not line or line.isspace():
                continue
            try:
                document, new_notes = of_record(parse(line.decode()))
                documents.append(document)
                notes += new_notes
                continue
            except UnicodeDecodeError:
                fault = str(line_fault([line]))
            except RecursionError:
                fault = "not usable JSON (nested too deeply)"
            except ValueError as error:
                fault = f"not JSON ({error})"
            except UserError as error:
                fault = str(error)
            report.leave_out(reader.path, number, fault, len(line))
        report.add(notes)
        reader.advance(block)
        yield documents, False
