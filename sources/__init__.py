"""Where text comes from: every script detects what a file is, and finds the documents in it, in the same way.
A new kind of file is a new module here; `kinds.Kind` says what it needs.

    text.py         plain text: documents between delimiters
    json_lines.py   one JSON record on each line
    kinds.py        which of these a file is: its content decides, and its name in case of doubt
    records.py      the text or the conversation in a record, in any of the shapes in common use
    reading.py      reading in blocks of lines; what was read and what was left out

A file is read in blocks, so memory does not depend on its length; where a block ends makes no difference to
what comes out. A file can be read a second time: it yields exactly the same, or an error says that it has
changed.

    source, report = Source("pretrain.jsonl"), ReadReport()
    for documents, is_open in source.documents(report):
        ...  # if is_open, the last document continues as the first of the next list
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from sources.kinds import detect_kind
from sources.reading import BadLine, Note, Reader, changed_error
from sources.reading import ReadReport as ReadReport
from sources.records import text_of, texts_in


class Source:
    """A file of documents: plain text, or records from which `of_record` makes them.

    Args:
        of_record: takes the JSON value of a line; returns (document, notes for the ReadReport), or raises
            UserError if it cannot be used.
        needs_records: refuse plain text.

    Raises UserError if the file is of a kind that is not read.
    """

    def __init__(
        self,
        path: Path | str,
        of_record: Callable[[Any], tuple[Any, list[Note]]] = text_of,
        needs_records: bool = False,
    ) -> None:
        self.path, self.of_record, self.kind = path, of_record, detect_kind(path)
        self.n_bytes = os.path.getsize(path)
        self._checksum: int | None = None
        if needs_records and not self.kind.HAS_RECORDS:
            raise UserError(
                f"{path} is plain {self.kind.NAME}; conversations are JSON lines, like "
                '{"question": "...", "answer": "..."}'
            )

    def documents(
        self, report: ReadReport, on_read: Callable[[int], object] = lambda n_bytes: None
    ) -> Iterator[tuple[list[Any], bool]]:
        """Yield (documents, is_open). `report` collects what was read and left out; `on_read` is called with
        the number of bytes just read. UserError if there is no text in the file, or if it has changed."""
        is_empty = True
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self.n_bytes:
                raise changed_error(self.path)
            reader = Reader(file, self.path, on_read)
            try:
                for documents, is_open in self.kind.documents(reader, self.of_record, report):
                    if documents:
                        is_empty = False
                        yield documents, is_open
            except BadLine:
                if self._checksum is None:
                    raise
                raise changed_error(self.path) from None  # the line was fine the first time
        if self._checksum not in (None, reader.checksum):
            raise changed_error(self.path)
        self._checksum = reader.checksum
        if is_empty:
            report.no_text(self.path)


def texts_of(
    paths: Iterable[Path | str], report: ReadReport | None = None, limit: int | None = None
) -> Iterator[str]:
    """All texts in some files, those of conversations included; about `limit` bytes at most."""
    report = report or ReadReport()
    for source in [Source(path, texts_in) for path in paths]:
        for documents, _ in source.documents(report):
            for document in documents:
                for part in document if isinstance(document, list) else [document]:
                    yield part
                    if limit is not None and (limit := limit - len(part.encode("utf-8", "replace"))) <= 0:
                        return
