"""Atomic file writing: a file on disk is complete or absent, whatever fails along the way.

A file is written next to its target as NAME.part, flushed to disk and then renamed. Finally its folder is
flushed, because a power cut could otherwise undo the rename. If anything fails, an OSError says what and
where, the old file is unchanged, and nothing is left of the attempt.

    with atomic_write(path) as file:               one file; file.write takes bytes
    with AtomicFiles() as files:               several files, replaced all together or not at all
    with atomic_folder(path) as folder:      a new folder with everything written into it
    LineFile(path).write(line)                 a file that grows line by line
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

# Error numbers of file systems without hard links, and of systems that cannot fsync a folder (PostgreSQL
# tolerates the same ones).
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NO_FOLDER_SYNC = {errno.EACCES, errno.EISDIR, errno.EBADF, errno.EINVAL}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, without changing line ends."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[PendingFile]:
    """Yield a file to write to. It appears at `path` when the block ends without an exception."""
    with AtomicFiles() as files:
        yield files.open(path)


class AtomicFiles:
    """Several files that appear at their paths when the block ends: all of them or none.

    They are renamed in the order in which they were opened. Before that, the old files are moved away in the
    opposite order. So if the process dies in between, the file that was opened last is missing, and a reader
    can tell from that not to trust the others.
    """

    def __init__(self) -> None:
        self.files: dict[Path, PendingFile] = {}

    def open(self, path: str | os.PathLike[str]) -> PendingFile:
        """A file to write to, which will appear at `path`. Missing parent folders are created."""
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with _errors_name(path):
            os.makedirs(path.parent, exist_ok=True)
            self.files[path] = file = PendingFile(path)
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            hidden = next((file.error for file in self.files.values() if file.error), None)
            if hidden and (kind is None or issubclass(kind, Exception)):
                raise hidden from None
            if kind is None:
                self._publish()
        finally:
            for file in self.files.values():
                file.discard()

    def _publish(self) -> None:
        for file in self.files.values():
            file.finish()
        backups = {path: path.with_name(path.name + ".old") for path in self.files}
        with contextlib.ExitStack() as undo:
            for path, backup in reversed(backups.items()):
                if os.path.lexists(path):
                    with _errors_name(path):
                        _back_up(path, backup, by_link=len(backups) == 1)
                    undo.callback(_restore, backup, path)
                else:
                    undo.callback(_remove, path)
            for path, file in self.files.items():
                with _errors_name(path):
                    os.replace(file.part, path)
                file.is_published = True
            for folder in {path.parent for path in backups}:
                sync_folder(folder)
            undo.pop_all()
        for backup in backups.values():
            with contextlib.suppress(OSError):  # a leftover backup does no harm
                _remove(backup)


def _back_up(path: Path, backup: Path, by_link: bool) -> None:
    """Keep the file at `path` as `backup`, too. by_link: `path` itself must not be missing for a moment."""
    if not by_link:
        os.replace(path, backup)
        return
    try:
        _remove(backup)
        os.link(path, backup)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise


def _restore(backup: Path, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # there are no hard links here, hence no backup
        os.replace(backup, path)
        os.unlink(backup)  # os.replace does nothing if both are links to the same file


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class PendingFile(io.RawIOBase):
    """A file that is being written as NAME.part next to its target.

    error: the first OSError while writing. A library that writes to the file may hide it or turn it into an
    exception of its own; `AtomicFiles` raises it in the end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.is_published = False
        self.error: OSError | None = None
        self.size = 0  # bytes written so far
        _remove(self.part)  # left by a process that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self.descriptor: int | None = os.open(self.part, flags, 0o666)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Buffer) -> int:
        """Write all of `data`. Returns its length in bytes."""
        if self.error:
            raise self.error
        assert self.descriptor is not None
        view = memoryview(data)
        try:
            with _errors_name(self.path):
                _write_all(self.descriptor, view)
        except OSError as error:
            self.error = error
            raise
        self.size += view.nbytes
        return view.nbytes

    def finish(self) -> None:
        """Flush it to disk and close it."""
        assert self.descriptor is not None
        with _errors_name(self.path):
            os.fsync(self.descriptor)
            if not self._still_has_its_name():
                raise UserError(f"another process is writing {self.path}, too; try again")
            descriptor, self.descriptor = self.descriptor, None  # even a close that fails closes it
            os.close(descriptor)

    def discard(self) -> None:
        """Close it, and remove it unless it was published."""
        with contextlib.suppress(OSError):  # the reason for discarding it is already being raised
            if self.descriptor is not None:
                is_own = self._still_has_its_name()
                os.close(self.descriptor)
                if not is_own:
                    return
            if not self.is_published:
                _remove(self.part)

    def _still_has_its_name(self) -> bool:
        """Whether NAME.part is still this file: another process may have started to write the same target."""
        assert self.descriptor is not None
        try:
            return os.path.samestat(os.stat(self.part), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False


class LineFile:
    """A file that grows line by line. A partial last line, left by a killed process, is ended first."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name, flags = str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self.descriptor = os.open(path, flags, 0o666)
        if os.fstat(self.descriptor).st_size:
            os.lseek(self.descriptor, -1, os.SEEK_END)
            if os.read(self.descriptor, 1) != b"\n":
                self.write("\n")

    def write(self, line: str, sync: bool = False) -> None:
        """Append `line`; with `sync`, flush it to disk. If that fails, the file is as it was before.

        A file that would be empty then is removed.
        """
        before = os.fstat(self.descriptor).st_size
        try:
            with _errors_name(self.name):
                _write_all(self.descriptor, memoryview(line.encode("utf-8", "backslashreplace")))
                if sync:
                    os.fsync(self.descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, before)
                if not before:
                    os.unlink(self.name)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line to the file at `path` and flush it to disk."""
    os.makedirs(Path(path).parent, exist_ok=True)
    lines = LineFile(path)
    try:
        lines.write(line, sync=True)
    finally:
        with contextlib.suppress(OSError):  # the line is on disk, or the failure is already being raised
            lines.close()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write files into by any means. It appears at `path`, which must not exist yet."""
    with _errors_name(path):
        os.makedirs(path.parent, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            prefix=f"{path.name}.", suffix=".part", dir=path.parent, ignore_cleanup_errors=True
        )
    with temporary:
        # One level deeper, because the temporary folder itself can be read by its owner only.
        folder = Path(temporary.name) / path.name
        with _errors_name(path):
            os.mkdir(folder)
        try:
            yield folder
        except OSError as error:  # report the final name: the temporary one will be gone
            if error.filename and Path(error.filename).is_relative_to(folder):
                error.filename = str(path / Path(error.filename).relative_to(folder))
            raise
        with _errors_name(path):
            for file in sorted(folder.iterdir()):
                _sync(file, os.O_RDWR)
            sync_folder(folder)
            os.rename(folder, path)
        try:
            sync_folder(path.parent)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk, on systems that can do so."""
    try:
        with _errors_name(path):
            _sync(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, view: memoryview) -> None:
    """Write until everything is written: a disk that is nearly full accepts a part of the data first."""
    view, done = view.cast("B") if view.nbytes else view, 0
    while done < view.nbytes:
        done += os.write(descriptor, view[done:])


@contextlib.contextmanager
def _errors_name(path: str | Path) -> Iterator[None]:
    """Let every OSError in the block name this file, whichever file the system call was about."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
