"""Files of other programs: one format, one file."""

from engine.errors import UserError


def check_free(path):
    """UserError if something is at `path` already."""
    from engine.config import shown

    if path.exists() or path.is_symlink():
        raise UserError(f"{shown(path)} is there already; remove it, or name another with --output")
