"""Files of other programs: one format, one file."""

import contextlib
import os
import tempfile
from pathlib import Path

from engine.errors import UserError


def check_free(path):
    """UserError if something is at `path` already."""
    from engine.config import shown

    if path.exists() or path.is_symlink():
        raise UserError(f"{shown(path)} is there already; remove it, or name another with --output")


@contextlib.contextmanager
def whole(path):
    """Yields where to write a file or a folder that is to be at `path`: it is there whole or not at all.

    UserError if something is there already. Nothing is left of what an exception has interrupted.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=path.name, dir=path.parent) as beside:
        beside = Path(beside) / path.name
        yield beside
        for file in [beside] if beside.is_file() else beside.iterdir():
            with open(file, "rb+") as file:
                os.fsync(file.fileno())
        os.rename(beside, path)
