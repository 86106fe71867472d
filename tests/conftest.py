"""A copy of the project in which a test may do what it likes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("*.py", "engine/**/*.py", "config/*.*", "dataset/*.py", "models/*.py", "tasks/*.py")


class Project:
    """The source at `root`, whose name holds a space and Chinese; its scripts are run from elsewhere."""

    def __init__(self, folder):
        self.root, self.elsewhere = folder / "项目 copy", folder / "elsewhere"
        self.elsewhere.mkdir()
        for pattern in SOURCE:
            for path in ROOT.glob(pattern):
                target = self.root / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)

    def command(self, script, *args):
        return [sys.executable, str(self.root / script), *map(str, args)]

    @property
    def environment(self):
        """No terminal's width or colours, and one thread: the tests run beside others."""
        kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
        return kept | {"OMP_NUM_THREADS": "1"}

    def run(self, script, *args, input=None, timeout=120, **environment):
        """A CompletedProcess with stdout and stderr as text; `input` is what is piped in (str or bytes)."""
        if not isinstance(input, bytes):
            input = (input or "").encode()
        process = subprocess.run(
            self.command(script, *args),
            cwd=self.elsewhere,
            env=self.environment | environment,
            input=input,
            capture_output=True,
            timeout=timeout,
        )
        process.stdout, process.stderr = process.stdout.decode(), process.stderr.decode()
        return process


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="session")
def shared_project(tmp_path_factory):
    """For tests that only read, or write where no other test looks."""
    return Project(tmp_path_factory.mktemp("shared"))
