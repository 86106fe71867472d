"""JSON lines: one record on each line."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from common.errors import UserError
from sources import reading
from sources.reading import Note, Reader, ReadReport, line_fault

parse = json.JSONDecoder().decode


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
