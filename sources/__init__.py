"""Where text comes from: what a file is, and the documents in it, for every script in the same way.

    kinds.py        what a file is: by its content first, by its name second
    text.py         running text: documents between delimiters
    json_lines.py   a record a line
    records.py      the text, or the conversation, that a record holds in one of the shapes people use
    reading.py      bytes in blocks of lines; what was found, and what was left out

A file is read in blocks, so memory does not depend on its length; where a block ends has no effect on what
comes out. It can be read again: it yields the same again, or says that it has changed.

    source, found = Source("pretrain.jsonl"), Found()
    for documents, is_open in source.documents(found):
        ...  # with is_open, the last document goes on as the first of the next list
"""

import os

from common.errors import UserError
from sources import json_lines, text
from sources.kinds import kind_of
from sources.reading import BadLine, Reader, changed
from sources.reading import Found as Found
from sources.records import text_of

FORMATS = {"text": text, "JSON lines": json_lines}


class Source:
    """A file of running text, whose documents are texts, or one of records, of which `of_record` makes them.

    of_record(record): (document, notes for Found.counts). It raises UserError if the record is unusable.
    UserError if the file is of another kind, or if it needs to be one of records and is not.
    """

    def __init__(self, path, of_record=text_of, needs_records=False):
        self.path, self.of_record, self.kind = path, of_record, kind_of(path)
        self.n_bytes = os.path.getsize(path)
        self._checksum = None
        if needs_records and self.kind == "text":
            raise UserError(
                f"{path} is plain text; conversations are JSON lines, like "
                '{"question": "...", "answer": "..."}'
            )

    def documents(self, found, on_read=lambda n_bytes: None):
        """Yields (documents, is_open). `found` notes what they are and what is left out; `on_read` is told of
        bytes that were read. UserError if there is no text in the file, or if it has changed meanwhile."""
        is_empty = True
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self.n_bytes:
                raise changed(self.path)
            reader = Reader(file, self.path, on_read)
            try:
                for documents, is_open in FORMATS[self.kind].documents(reader, self.of_record, found):
                    if documents:
                        is_empty = False
                        yield documents, is_open
            except BadLine:
                if self._checksum is None:
                    raise
                raise changed(self.path) from None  # when it was read before, the line was sound
        if self._checksum not in (None, reader.checksum):
            raise changed(self.path)
        self._checksum = reader.checksum
        if is_empty:
            found.no_text(self.path)
