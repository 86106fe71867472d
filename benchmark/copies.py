"""A copy of the project for a benchmark, so that logs and checkpoints do not mix with the user's."""

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def copy_of_project(folder):
    """Copy everything that train.py needs to a new folder inside `folder`. Returns its path."""
    copy = Path(tempfile.mkdtemp(dir=folder))
    rooms = "", "common/", "config/", "decoding/", "engine/", "formats/", "models/", "objectives/"
    rooms += "preparation/", "sources/", "tasks/"
    rooms = (ROOT.glob(f"{room}*.py") for room in rooms)
    for source in itertools.chain(ROOT.glob("config/*.json"), *rooms):
        target = copy / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return copy


def timed(name, script, *arguments):
    """Run a script in its own folder. Returns the seconds. Raises UserError if it fails."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, script.name, *map(str, arguments)],
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    seconds = time.perf_counter() - start
    if process.returncode:
        last = (process.stdout.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{name}'s {script.name} failed; its last line is: {last}")
    return seconds
