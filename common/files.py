"""Writing files: each is there whole or not at all, whatever fails on the way.

A file is written beside its place, as NAME.part, flushed to disk, and then renamed. At last its folder is
flushed, or a power cut could take the new name back. If anything fails, an OSError says what and where,
what was there before stays as it was, and nothing is left of the attempt.

    with whole(path) as file:               one file; file.write takes bytes
    with Together() as files:               several that are replaced together, all or none
    with whole_folder(path) as folder:      a new folder, and all that is written into it
    Lines(path).write(line)                 a file that grows, by lines
"""

import contextlib
import errno
import io
import os
import shutil
import tempfile
from pathlib import Path

from common.errors import UserError

# What a file system says that cannot link, and a system that cannot flush folders (as PostgreSQL has it).
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NO_FOLDERS = {errno.EACCES, errno.EISDIR, errno.EBADF, errno.EINVAL}


def write_text(path, text):
    """Write `text` to `path` in UTF-8, lines as they are."""
    with whole(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole(path):
    """Yields a `File`, which is at `path` when the block has ended without an exception."""
    with Together() as files:
        yield files.open(path)


class Together:
    """Files that are written now and put into their places when the block ends: all of them, or none.

    They are renamed in the order in which they were opened. Of several, the old ones are taken away before
    that, in the opposite order: where the last one is missing, after a crash, the others do not count.
    """

    def __init__(self):
        self.files = {}

    def open(self, path):
        """A `File` that will be at `path`; folders on the way to it are made."""
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with _naming(path):
            os.makedirs(path.parent, exist_ok=True)
            self.files[path] = file = File(path)
        return file

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            hidden = next((file.error for file in self.files.values() if file.error), None)
            if hidden and (kind is None or issubclass(kind, Exception)):
                raise hidden from None
            if kind is None:
                self._publish()
        finally:
            for file in self.files.values():
                file.discard()

    def _publish(self):
        for file in self.files.values():
            file.finish()
        olds = {path: path.with_name(path.name + ".old") for path in self.files}
        with contextlib.ExitStack() as undo:
            for path, old in reversed(olds.items()):
                if os.path.lexists(path):
                    with _naming(path):
                        _keep(path, old, is_alone=len(olds) == 1)
                    undo.callback(_put_back, old, path)
                else:
                    undo.callback(_remove, path)
            for path, file in self.files.items():
                with _naming(path):
                    os.replace(file.place, path)
                file.place = None
            for folder in {path.parent for path in olds}:
                sync_folder(folder)
            undo.pop_all()
        for old in olds.values():
            with contextlib.suppress(OSError):  # it is in nobody's way
                _remove(old)


def _keep(path, old, is_alone):
    """Keep what is at `path` as `old`, too; a file that is not alone leaves its place."""
    if not is_alone:
        return os.replace(path, old)
    try:
        _remove(old)
        os.link(path, old)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise


def _put_back(old, path):
    with contextlib.suppress(FileNotFoundError):  # it could not be kept
        os.replace(old, path)
        os.unlink(old)  # to rename one of two links to a file does nothing


def _remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class File(io.RawIOBase):
    """A file that is being written, beside its place.

    error: the first OSError of its writing. A library that writes to it may hide the error, or make another
    one of it; `Together` raises it in the end.
    """

    def __init__(self, path):
        self.path, self.place = path, path.with_name(path.name + ".part")
        self.error, self.size = None, 0
        _remove(self.place)  # of a process that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self.descriptor = os.open(self.place, flags, 0o666)

    def writable(self):
        return True

    def tell(self):
        return self.size

    def write(self, data):
        """All of it; returns how many bytes that were."""
        if self.error:
            raise self.error
        view = memoryview(data)
        try:
            with _naming(self.path):
                _write_all(self.descriptor, view)
        except OSError as error:
            self.error = error
            raise
        self.size += view.nbytes
        return view.nbytes

    def finish(self):
        """Flush and close it."""
        with _naming(self.path):
            os.fsync(self.descriptor)
            if not self._is_ours():
                raise UserError(f"{self.path} is being written by another process, too; try again")
            descriptor, self.descriptor = self.descriptor, None  # closed even if that fails
            os.close(descriptor)

    def discard(self):
        """Close it, and remove it if it still is beside its place."""
        with contextlib.suppress(OSError):  # what made us leave is told already
            if self.descriptor is not None:
                is_ours = self._is_ours()
                os.close(self.descriptor)
                if not is_ours:
                    return
            if self.place:
                _remove(self.place)

    def _is_ours(self):
        """Whether it still has its name: another process may have begun the same file anew."""
        try:
            return os.path.samestat(os.stat(self.place), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False


class Lines:
    """A file that grows by lines. What a killed process has left of one is ended where it stops."""

    def __init__(self, path):
        self.name, flags = str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self.descriptor = os.open(path, flags, 0o666)
        if os.fstat(self.descriptor).st_size:
            os.lseek(self.descriptor, -1, os.SEEK_END)
            if os.read(self.descriptor, 1) != b"\n":
                self.write("\n")

    def write(self, line, sync=False):
        """Append it; sync: down to the disk. A file without any line is removed if that fails."""
        before = os.fstat(self.descriptor).st_size
        try:
            with _naming(self.name):
                _write_all(self.descriptor, memoryview(line.encode("utf-8", "backslashreplace")))
                if sync:
                    os.fsync(self.descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, before)
                if not before:
                    os.unlink(self.name)
            raise

    def close(self):
        os.close(self.descriptor)


def append(path, line):
    """Append a line to the file at `path`, and flush it to disk."""
    os.makedirs(Path(path).parent, exist_ok=True)
    lines = Lines(path)
    try:
        lines.write(line, sync=True)
    finally:
        with contextlib.suppress(OSError):  # it is on the disk, or that it is not is told already
            lines.close()


@contextlib.contextmanager
def whole_folder(path):
    """Yields a folder to write files into, in whatever way; in the end it is at `path`, where nothing is."""
    with _naming(path):
        os.makedirs(path.parent, exist_ok=True)
        place = tempfile.TemporaryDirectory(
            prefix=f"{path.name}.", suffix=".part", dir=path.parent, ignore_cleanup_errors=True
        )
    with place:
        folder = Path(place.name) / path.name  # in it, as it is for its owner alone
        with _naming(path):
            os.mkdir(folder)
        try:
            yield folder
        except OSError as error:  # its name for now is gone when somebody reads of it
            if error.filename and Path(error.filename).is_relative_to(folder):
                error.filename = str(path / Path(error.filename).relative_to(folder))
            raise
        with _naming(path):
            for file in sorted(folder.iterdir()):
                _sync(file, os.O_RDWR)
            sync_folder(folder)
            os.rename(folder, path)
        try:
            sync_folder(path.parent)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise


def sync_folder(path):
    """Flush the names in a folder to disk, where the system can do that."""
    try:
        with _naming(path):
            _sync(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_FOLDERS:
            raise


def _sync(path, flags):
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor, view):
    """A disk that is nearly full takes a part of it first, and then nothing."""
    view, done = view.cast("B") if view.nbytes else view, 0
    while done < view.nbytes:
        done += os.write(descriptor, view[done:])


@contextlib.contextmanager
def _naming(path):
    """An OSError within tells the name of this file, whatever the system was asked to do."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
