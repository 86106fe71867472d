"""Where Numba keeps what it made of decoding/compiled.py, and whether it is there."""

import importlib.metadata
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch

from common.config import ROOT


def cache_folder():
    """Beside the code or, if that is another user's, with the user's caches.

    What is there is of no use to another Python, to much another processor, and where the code is moved to;
    nor when the code or Numba has changed, which Numba tells by the time of one file: so all that goes into
    the name.
    """
    beside = ROOT / "decoding" / "__pycache__"
    is_ours = os.access(beside if beside.exists() else beside.parent, os.W_OK)
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = os.environ.get("NUMBA_CACHE_DIR") or (beside if is_ours else of_user)
    python, processor = sys.implementation.cache_tag, torch.backends.cpu.get_cpu_capability()
    home = f"nano_{python}_{processor.replace(' ', '')}_{zlib.crc32(os.fsencode(ROOT)):08x}"
    parts = [(ROOT / "decoding" / f"{name}.py").read_bytes() for name in ("compiled", "packed")]
    try:
        parts += [importlib.metadata.version(package).encode() for package in ("numba", "llvmlite")]
    except importlib.metadata.PackageNotFoundError:  # nothing will be compiled
        pass
    return Path(place, f"{home}_{zlib.crc32(b''.join(parts)):08x}")


CACHE = cache_folder()


def mark(weights):
    """The file that is there when all of it is, for these weights: "float32" or "int8"."""
    return CACHE / weights


def is_compiled(weights):
    """Whether that was done on this machine before, with the code and Numba as they are now."""
    return mark(weights).exists() and os.access(CACHE, os.W_OK)  # it reads where it may write


def forget_older():
    """Delete what was made of the code as it was before."""
    for folder in CACHE.parent.glob(CACHE.name.rpartition("_")[0] + "_*"):
        if folder != CACHE:
            shutil.rmtree(folder, ignore_errors=True)
