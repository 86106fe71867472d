"""Bytes of files in blocks of whole lines, and notes of what was found in them and what was left out."""

import codecs
import collections
import itertools

import numpy as np

from common.errors import UserError

CHUNK = 1 << 20  # bytes read at once: little enough for a processor's cache
BYTE_ORDER_MARK = "\ufeff"


class BadLine(UserError):
    """A line of which no text can be made."""


class Found:
    """What was read in some files, and what was not.

    skip_bad_lines: bad lines are counted and left out; otherwise the first one raises BadLine
    counts          {(what, of which kind): how many}, where what is "read" (documents), "not read" (fields of
                    records), "joined" (messages with the one before) or "marks" (byte-order marks)
    """

    def __init__(self, skip_bad_lines=False):
        self.skip_bad_lines = skip_bad_lines
        self.counts = collections.Counter()
        self.n_bad_lines = self.n_bad_bytes = 0
        self.left_out = []  # sentences: the first ten

    def add(self, notes):
        """Count notes, (what, of which kind) each; of a great many kinds only the frequent ones."""
        self.counts.update(notes)
        if len(self.counts) > 1000:
            frequent = collections.Counter(dict(self.counts.most_common(100)))
            frequent["not read", "other fields"] += self.counts.total() - frequent.total()
            self.counts = frequent

    def leave_out(self, path, number, what, n_bytes):
        """Line `number` of a file is of no use."""
        sentence = f"{path}, line {number}: {what}"
        if not self.skip_bad_lines:
            raise BadLine(sentence)
        self.n_bad_lines += 1
        self.n_bad_bytes += n_bytes
        self._note(sentence)

    def no_text(self, path):
        """Nothing in a file is of use."""
        sentence = f"{path}: there is no {'usable ' if self.n_bad_lines else ''}text in it"
        if not self.skip_bad_lines:
            raise UserError(sentence)
        self._note(sentence)

    def _note(self, sentence):
        if len(self.left_out) < 10:
            self.left_out.append(sentence)

    def told(self, name):
        """What was read, in sentences; `name`: of the file or the files."""

        def kinds_of(what):
            return [(kind, n) for (label, kind), n in self.counts.most_common() if label == what]

        parts = [", ".join(f"{n:,} {kind}" for kind, n in kinds_of("read"))]
        if fields := kinds_of("not read"):
            more = f" and {len(fields) - 10} more" if len(fields) > 10 else ""
            parts.append("not read: " + ", ".join(f"{field} ({n:,})" for field, n in fields[:10]) + more)
        if n := self.counts["joined", ""]:
            parts.append(f"messages joined with the one before, of the same role: {n:,}")
        if n := self.counts["marks", ""]:
            parts.append(f"byte-order marks left out: {n:,}")
        parts = [part for part in parts if part]
        return [f"{name}: {'; '.join(parts)}"] if parts else []

    def told_left_out(self, name, n_bytes):
        """What was left out, in sentences; `n_bytes`: of all that was read."""
        sentences = [f"left out: {sentence}" for sentence in self.left_out]
        if n := self.n_bad_lines:
            share = f"{self.n_bad_bytes:,} of {n_bytes:,} bytes"
            sentences.append(f"{n:,} bad line{'s' * (n > 1)} of {name} left out: {share}")
        return sentences


class Reader:
    """An open file (binary, buffered), and what has passed of it: `n_lines` and a `checksum`.

    The checksum costs next to nothing. It tells a file that was changed, not one that was forged.
    """

    def __init__(self, file, path, on_read):
        self.file, self.path, self._on_read = file, path, on_read
        self.n_lines = self.checksum = 0

    def parts_of_line(self):
        """The next line, in parts that have passed already."""
        while part := self.file.readline(CHUNK):
            self.passed(part)
            yield part
            if part.endswith(b"\n"):
                break

    def passed(self, data):
        """`data`, the next bytes of the file, are done with."""
        words = np.frombuffer(data, np.uint64, len(data) // 8)
        self.checksum = hash((self.checksum, int(words.sum()), data[8 * len(words) :]))
        self.n_lines += np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        self._on_read(len(data))


def fault_of(parts):
    """Where a line, given as bytes in parts, holds a NUL or is not UTF-8: a sentence, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_before = 0
    for part in itertools.chain(parts, [b""]):
        faults = []
        n_waiting = len(decoder.getstate()[0])  # bytes of a character that the end of a part has cut
        if b"\0" in part:
            faults.append((n_before + part.index(b"\0"), "holds a NUL byte", ""))
        try:
            decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            faults.append((n_before - n_waiting + error.start, "not UTF-8", f" ({error.reason})"))
        if faults:
            place, what, why = min(faults)
            return f"{what} at its byte {place + 1:,}{why}"
        n_before += len(part)
    return None


def changed(path):
    return UserError(f"{path} has changed while it was read; wait until it is complete, and start again")
