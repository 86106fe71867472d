"""Files of other programs: one format, one file.

What --format calls it, and where it is. Each has a function `why_not`: of a configuration of ours it says why
this format cannot hold such a model, or None.
"""

import importlib

from engine.errors import UserError

FORMATS = {"huggingface": "families", "gguf": "gguf_file", "llama2c": "llama2c"}


def why_not(name, config):
    return importlib.import_module(f"formats.{FORMATS[name]}").why_not(config)


def check(name, config):
    """UserError if a format cannot hold a model of this configuration: the reason, and which one can."""
    if reason := why_not(name, config):
        can = (f"; --format {other} writes this model" for other in FORMATS if not why_not(other, config))
        raise UserError(reason + next(can, ""))


def check_free(path):
    """UserError if something is at `path` already."""
    from engine.config import shown

    if path.exists() or path.is_symlink():
        raise UserError(f"{shown(path)} is there already; remove it, or name another with --output")
