"""Reading files in blocks of whole lines, and keeping count of what was read and what was left out."""

import codecs
import collections
import io
import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError

CHUNK = 1 << 20  # bytes read at once: few enough for the CPU's cache
BYTE_ORDER_MARK = "\ufeff"

Note = tuple[str, str]  # (what, which kind of it): see ReadReport.counts


class BadLine(UserError):
    """A line that cannot be used."""


class ReadReport:
    """What was read from some files, and what was left out.

    skip_bad_lines   leave bad lines out and count them; otherwise the first one raises BadLine
    counts           {(what, which kind): how many}, where what is "read" (documents), "not read" (fields of
                     records), "joined" (messages with the one before) or "marks" (byte-order marks)
    n_bad_lines, n_bad_bytes   how much was left out
    left_out         the first ten sentences about that
    """

    def __init__(self, skip_bad_lines: bool = False) -> None:
        self.skip_bad_lines = skip_bad_lines
        self.counts: collections.Counter[Note] = collections.Counter()
        self.n_bad_lines = self.n_bad_bytes = 0
        self.left_out: list[str] = []

    def add(self, notes: Iterable[Note]) -> None:
        """Count notes. If there are very many kinds, only the frequent ones are kept apart."""
        self.counts.update(notes)
        if len(self.counts) > 1000:
            frequent = collections.Counter(dict(self.counts.most_common(100)))
            frequent["not read", "other fields"] += self.counts.total() - frequent.total()
            self.counts = frequent

    def leave_out(self, path: Path | str, number: int, fault: str, n_bytes: int) -> None:
        """Count line `number` of a file as bad. BadLine unless bad lines are to be skipped."""
        sentence = f"{path}, line {number}: {fault}"
        if not self.skip_bad_lines:
            raise BadLine(sentence)
        self.n_bad_lines += 1
        self.n_bad_bytes += n_bytes
        self._note(sentence)

    def no_text(self, path: Path | str) -> None:
        """Note that a file holds no usable text. UserError unless bad lines are to be skipped."""
        sentence = f"{path}: there is no {'usable ' if self.n_bad_lines else ''}text in it"
        if not self.skip_bad_lines:
            raise UserError(sentence)
        self._note(sentence)

    def _note(self, sentence: str) -> None:
        if len(self.left_out) < 10:
            self.left_out.append(sentence)

    def summary(self, name: Path | str) -> list[str]:
        """What was read, as at most one sentence; `name` is that of the file or files."""

        def kinds_of(what: str) -> list[tuple[str, int]]:
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

    def left_out_summary(self, name: str, n_bytes: int) -> list[str]:
        """What was left out, in sentences; `n_bytes` is how many bytes were read in all."""
        sentences = [f"left out: {sentence}" for sentence in self.left_out]
        if n := self.n_bad_lines:
            share = f"{self.n_bad_bytes:,} of {n_bytes:,} bytes"
            sentences.append(f"{n:,} bad line{'s' * (n > 1)} of {name} left out: {share}")
        return sentences


class Reader:
    """An open file (binary, buffered), and how far it has been processed: `n_lines` and a `checksum`.

    The checksum costs next to nothing. It detects that a file has changed, not that somebody has forged one.
    """

    def __init__(self, file: io.BufferedReader, path: Path | str, on_read: Callable[[int], object]) -> None:
        self.file, self.path, self._on_read = file, path, on_read
        self.n_lines = self.checksum = 0

    def line_parts(self) -> Iterator[bytes]:
        """The next line, in parts of at most CHUNK bytes; each counts as processed."""
        while part := self.file.readline(CHUNK):
            self.advance(part)
            yield part
            if part.endswith(b"\n"):
                break

    def advance(self, data: bytes) -> None:
        """Count `data`, the next bytes of the file, as processed."""
        words = np.frombuffer(data, np.uint64, len(data) // 8)
        self.checksum = hash((self.checksum, int(words.sum()), data[8 * len(words) :]))
        self.n_lines += int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))
        self._on_read(len(data))


def line_fault(parts: Iterable[bytes]) -> str | None:
    """Where a line (bytes, in parts) holds a NUL byte or is not UTF-8, in words; None if it is fine."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_before = 0
    for part in itertools.chain(parts, [b""]):
        faults = []
        n_pending = len(decoder.getstate()[0])  # bytes of a character that the end of the last part has cut
        if b"\0" in part:
            faults.append((n_before + part.index(b"\0"), "holds a NUL byte", ""))
        try:
            decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            faults.append((n_before - n_pending + error.start, "not UTF-8", f" ({error.reason})"))
        if faults:
            position, what, why = min(faults)
            return f"{what} at its byte {position + 1:,}{why}"
        n_before += len(part)
    return None


def changed_error(path: Path | str) -> UserError:
    """The error for a file that is not what it was when it was read first."""
    return UserError(f"{path} has changed while it was read; wait until it is complete, and start again")


def unreadable(path: Path, sentence: str, **names: str) -> UserError:
    """The error for a file of another kind; fills in the names of files in the command of `sentence`."""

    def new(suffix: str) -> str:
        made = path.with_suffix(suffix)
        return shlex.quote(str(made if made != path else path.with_suffix(".new" + suffix)))

    names.update(txt=new(".txt"), jsonl=new(".jsonl"), unpacked=new(""), utf8=new(".utf8" + path.suffix))
    return UserError(f"{path} {sentence.format(old=shlex.quote(str(path)), **names)}")
