"""Where Numba keeps what it made of engine/compiled.py, and whether it is there."""

import importlib.util
import os
import sys
import zlib
from pathlib import Path

import torch

from engine.config import ROOT


def cache_folder():
    """Beside the code or, if that is another user's, with the user's caches.

    What is there is of no use to another Python, to much another processor, and where the code is moved to.
    """
    beside = ROOT / "engine" / "__pycache__"
    is_ours = os.access(beside if beside.exists() else beside.parent, os.W_OK)
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = os.environ.get("NUMBA_CACHE_DIR") or (beside if is_ours else of_user)
    python, processor = sys.implementation.cache_tag, torch.backends.cpu.get_cpu_capability()
    return Path(place, f"nano_{python}_{processor.replace(' ', '')}_{zlib.crc32(os.fsencode(ROOT)):08x}")


CACHE = cache_folder()


def mark(weights):
    """The file that is there when all of it is, for these weights: "float32" or "int8"."""
    return CACHE / weights


def is_compiled(weights):
    """Whether that was done on this machine before, with engine/compiled.py and Numba as they are now."""
    numba, done = importlib.util.find_spec("numba"), mark(weights)
    if not numba or not done.exists() or not os.access(CACHE, os.W_OK):  # it reads where it may write
        return False
    sources = (ROOT / "engine" / "compiled.py", numba.origin)
    return done.stat().st_mtime >= max(os.stat(source).st_mtime for source in sources)
