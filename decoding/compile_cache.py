"""Where Numba stores the compiled code of decoding/compiled.py, and whether it is there."""

import importlib.metadata
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch

from common.config import ROOT


def cache_folder() -> Path:
    """A folder beside the code or, if that is not writable, in the user's cache directory.

    Compiled code fits one version of Python, one type of processor, one location of the source, and one
    version of source and Numba. All of them are part of the folder's name. (Numba itself only compares the
    time of one source file.)
    """
    beside = ROOT / "decoding" / "__pycache__"
    is_writable = os.access(beside if beside.exists() else beside.parent, os.W_OK)
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    parent = os.environ.get("NUMBA_CACHE_DIR") or (beside if is_writable else of_user)
    python, processor = sys.implementation.cache_tag, torch.backends.cpu.get_cpu_capability()
    home = f"nano_{python}_{processor.replace(' ', '')}_{zlib.crc32(os.fsencode(ROOT)):08x}"
    parts = [(ROOT / "decoding" / f"{name}.py").read_bytes() for name in ("compiled", "packed")]
    try:
        parts += [importlib.metadata.version(package).encode() for package in ("numba", "llvmlite")]
    except importlib.metadata.PackageNotFoundError:  # then nothing will be compiled
        pass
    return Path(parent, f"{home}_{zlib.crc32(b''.join(parts)):08x}")


CACHE = cache_folder()


def compiled_mark(weights: str) -> Path:
    """The file that exists once everything is compiled for a weight format, "float32" or "int8"."""
    return CACHE / weights


def is_compiled(weights: str) -> bool:
    """Whether everything is compiled for a weight format, on this machine and from the present source."""
    # Numba does not read from a folder that it may not write to.
    return compiled_mark(weights).exists() and os.access(CACHE, os.W_OK)


def delete_outdated() -> None:
    """Delete what was compiled from earlier source."""
    for folder in CACHE.parent.glob(CACHE.name.rpartition("_")[0] + "_*"):
        if folder != CACHE:
            shutil.rmtree(folder, ignore_errors=True)
