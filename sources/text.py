"""Plain text in UTF-8, as in a .txt: documents, with delimiters between them."""

import codecs
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sources import reading
from sources.reading import BYTE_ORDER_MARK, Reader, ReadReport, changed_error, line_fault

NAME, HAS_RECORDS, SIGNATURE = "text", False, None
# What separates documents: one or more of these marks, with any white space between them.
_MARK = r"<\|(?:bos|eos|endoftext)\|>"
DELIMITER = re.compile(rf"{_MARK}(?:\s*{_MARK})*")
MAX_MARK = len("<|endoftext|>")
LONG = 1 << 18  # characters; a document of more than twice as many is passed on in parts


def recognise(path: Path, lines: list[str], is_cut: bool) -> bool:
    """True: it is asked last, and any UTF-8 can be read as plain text."""
    return True


def documents(reader: Reader, of_record: object, report: ReadReport) -> Iterator[tuple[list[str], bool]]:
    """The text between delimiters, exactly as it is; blank documents are dropped.

    Yields (texts, is_open). If is_open, the last text continues as the first of the next list, so a book of
    any length passes through in little memory. (`of_record` is for files of records; it has no use here.)
    """
    held = edge = ""  # the text behind the last delimiter, and its end where that may be half a delimiter
    is_open = False  # whether a part of that document has been passed on already
    for text in texts(reader, report):
        *ended, tail = DELIMITER.split(edge + text)
        if ended:
            ended[0], held = held + ended[0], ""
            if not is_open and (not ended[0] or ended[0].isspace()):
                del ended[0]  # no other can be blank: a delimiter includes the white space up to the next one
            is_open = False
            if max(map(len, ended), default=0) > 2 * LONG:
                *batches, ended = in_parts(ended)
                yield from ((batch, True) for batch in batches)
        held += tail
        if len(held) > 2 * LONG + MAX_MARK and (is_open or not held.isspace()):
            *batches, [held] = in_parts([*ended, held], MAX_MARK)
            yield from ((batch, True) for batch in batches)
            ended, is_open = [], True
        if ended:
            yield ended, False
        begin = held.rfind("<", -MAX_MARK)
        held, edge = (held, "") if begin < 0 else (held[:begin], held[begin:])
    held += edge
    if is_open or (held and not held.isspace()):
        *batches, last = in_parts([held])
        yield from ((batch, True) for batch in batches)
        yield last, False


def in_parts(documents: list[str], n_uncertain: int = 0) -> list[list[str]]:
    """Split documents into lists of texts; the last text of a list continues as the first of the next.

    A document of more than 2 LONG characters is cut, at positions that depend on its own text alone: after a
    line end, across which BPE never merges, if there is one. `n_uncertain`: this many characters at the end
    may not belong to the document.
    """
    lists: list[list[str]] = [[]]
    for document in documents:
        start = 0
        while len(document) - start > 2 * LONG + n_uncertain:
            end = line_start(document, start + LONG, start + 2 * LONG)
            lists[-1].append(document[start:end])
            lists.append([])
            start = end
        lists[-1].append(document[start:])
    return lists


def line_start(text: str, first: int, last: int) -> int:
    """The first position from `first` on where a line starts with no white space around; otherwise `last`."""
    position = first
    while position := text.find("\n", position - 1, last - 1) + 1:
        if not text[position - 2].isspace() and not text[position].isspace():
            return position
        position += 1
    return last


def texts(reader: Reader, report: ReadReport) -> Iterator[str]:
    """The text of a file in pieces, without its bad lines and byte-order marks."""
    is_first = True
    for piece in pieces(reader, report):
        if BYTE_ORDER_MARK in piece:
            piece = piece.removeprefix(BYTE_ORDER_MARK) if is_first else piece
            n_characters = len(piece)
            piece = piece.replace(BYTE_ORDER_MARK, "")
            report.counts["marks", ""] += n_characters - len(piece)
        is_first = is_first and not piece
        yield piece


def pieces(reader: Reader, report: ReadReport) -> Iterator[str]:
    """The sound lines of a file; a line that is longer than a block comes in parts."""
    file = reader.file
    while block := file.read(reading.CHUNK) + file.readline(reading.CHUNK):
        is_cut = not block.endswith(b"\n") and file.peek(1)
        if is_cut:
            n_whole = block.rfind(b"\n") + 1
            file.seek(n_whole - len(block), os.SEEK_CUR)
            block = block[:n_whole]
        if block:
            first = reader.n_lines + 1
            reader.advance(block)
            yield sound_lines(block, reader.path, first, report)
        if is_cut:
            yield from long_line(reader, report)


def sound_lines(block: bytes, path: Path | str, first: int, report: ReadReport) -> str:
    """The text of a block of whole lines without the bad ones; `first` is the number of its first line."""
    if b"\0" not in block:
        try:
            return block.decode()
        except UnicodeDecodeError:
            pass
    sound = []
    for number, line in enumerate(io.BytesIO(block), first):
        if fault := line_fault([line]):
            report.leave_out(path, number, fault, len(line))
        else:
            sound.append(line)
    return b"".join(sound).decode()


def long_line(reader: Reader, report: ReadReport) -> Iterator[str]:
    """The next line, in parts. It is checked to its end first: if it is bad, all of it is left out."""
    file, number = reader.file, reader.n_lines + 1
    start = file.tell()
    parts = reader.line_parts()
    fault = line_fault(parts)
    for _ in parts:  # what is left of the line
        pass
    end = file.tell()
    if fault:
        report.leave_out(reader.path, number, fault, end - start)
        return
    file.seek(start)
    decoder = codecs.getincrementaldecoder("utf-8")()
    while n_left := end - file.tell():
        part = file.read(min(n_left, reading.CHUNK))
        try:
            text = decoder.decode(part, final=len(part) == n_left)
        except UnicodeDecodeError:
            raise changed_error(reader.path) from None
        if not part:
            raise changed_error(reader.path)
        yield text
