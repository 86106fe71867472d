"""Running text in UTF-8, as it is in a .txt: documents, and delimiters between them."""

import codecs
import io
import os
import re

from sources import reading
from sources.reading import BYTE_ORDER_MARK, changed, fault_of

# What stands between documents: one or more of these, and white space between them.
_MARK = r"<\|(?:bos|eos|endoftext)\|>"
DELIMITER = re.compile(rf"{_MARK}(?:\s*{_MARK})*")
LONGEST = len("<|endoftext|>")
LONG = 1 << 18  # characters; a document of more than twice as many is passed on in parts


def documents(reader, of_record, found):
    """What stands between delimiters, exactly as it is, unless it is blank.

    Yields (texts, is_open). With `is_open`, the last text goes on in the first of the next list: so a book of
    any length passes through in little memory.
    """
    held = edge = ""  # what is behind the last delimiter, and its end if that may be half a delimiter
    is_open = False  # whether a part of that has been passed on
    for text in texts(reader, found):
        *ended, tail = DELIMITER.split(edge + text)
        if ended:
            ended[0], held = held + ended[0], ""
            if not is_open and (not ended[0] or ended[0].isspace()):
                del ended[0]  # no other can be blank: a delimiter takes in the white space up to the next
            is_open = False
            if max(map(len, ended), default=0) > 2 * LONG:
                *batches, ended = in_parts(ended)
                yield from ((batch, True) for batch in batches)
        held += tail
        if len(held) > 2 * LONG + LONGEST and (is_open or not held.isspace()):
            *batches, [held] = in_parts([*ended, held], LONGEST)
            yield from ((batch, True) for batch in batches)
            ended, is_open = [], True
        if ended:
            yield ended, False
        begins = held.rfind("<", -LONGEST)
        held, edge = (held, "") if begins < 0 else (held[:begins], held[begins:])
    held += edge
    if is_open or (held and not held.isspace()):
        *batches, last = in_parts([held])
        yield from ((batch, True) for batch in batches)
        yield last, False


def in_parts(documents, unsure=0):
    """Lists of texts, of which the last goes on in the first of the next list.

    A document of more than 2 LONG characters is cut, at places that depend on nothing but itself: after line
    ends, across which BPE never merges, if it has some. `unsure`: how many at the end may not belong to it.
    """
    lists = [[]]
    for document in documents:
        start = 0
        while len(document) - start > 2 * LONG + unsure:
            end = line_end(document, start + LONG, start + 2 * LONG)
            lists[-1].append(document[start:end])
            lists.append([])
            start = end
        lists[-1].append(document[start:])
    return lists


def line_end(text, first, last):
    """The first place from `first` on at which a line begins, with no white space around; else `last`."""
    place = first
    while place := text.find("\n", place - 1, last - 1) + 1:
        if not text[place - 2].isspace() and not text[place].isspace():
            return place
        place += 1
    return last


def texts(reader, found):
    """The text of a file in pieces, without its bad lines and byte-order marks."""
    is_first = True
    for piece in pieces(reader, found):
        if BYTE_ORDER_MARK in piece:
            piece = piece.removeprefix(BYTE_ORDER_MARK) if is_first else piece
            n_characters = len(piece)
            piece = piece.replace(BYTE_ORDER_MARK, "")
            found.counts["marks", ""] += n_characters - len(piece)
        is_first = is_first and not piece
        yield piece


def pieces(reader, found):
    """The sound lines of a file; of one that is longer than a block, parts."""
    file = reader.file
    while block := file.read(reading.CHUNK) + file.readline(reading.CHUNK):
        is_cut = not block.endswith(b"\n") and file.peek(1)
        if is_cut:
            n_whole = block.rfind(b"\n") + 1
            file.seek(n_whole - len(block), os.SEEK_CUR)
            block = block[:n_whole]
        if block:
            first = reader.n_lines + 1
            reader.passed(block)
            yield sound_lines(block, reader.path, first, found)
        if is_cut:
            yield from long_line(reader, found)


def sound_lines(block, path, first, found):
    """The text of a block of whole lines, of which the first has the number `first`, without the bad ones."""
    if b"\0" not in block:
        try:
            return block.decode()
        except UnicodeDecodeError:
            pass
    sound = []
    for number, line in enumerate(io.BytesIO(block), first):
        if fault := fault_of([line]):
            found.leave_out(path, number, fault, len(line))
        else:
            sound.append(line)
    return b"".join(sound).decode()


def long_line(reader, found):
    """The next line, in parts. It is looked through first: if it is not sound, it is left out whole."""
    file, number = reader.file, reader.n_lines + 1
    start = file.tell()
    parts = reader.parts_of_line()
    fault = fault_of(parts)
    for _ in parts:  # the rest of it
        pass
    end = file.tell()
    if fault:
        found.leave_out(reader.path, number, fault, end - start)
        return
    file.seek(start)
    decoder = codecs.getincrementaldecoder("utf-8")()
    while n_left := end - file.tell():
        part = file.read(min(n_left, reading.CHUNK))
        try:
            text = decoder.decode(part, final=len(part) == n_left)
        except UnicodeDecodeError:
            raise changed(reader.path) from None
        if not part:
            raise changed(reader.path)
        yield text
