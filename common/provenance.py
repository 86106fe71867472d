"""With which command and which version of Nano something was made."""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys

from common.config import ROOT, display_path, resolve_path


def command() -> str:
    """The command, for a shell, that started this process, without what launched it, such as torchrun."""
    script, *arguments = sys.argv
    return shlex.join(["python", display_path(resolve_path(script).absolute()), *arguments])


@functools.cache
def commit() -> str | None:
    """The commit of Nano, with "-dirty" if files were changed since; None outside a clone."""

    def git(*arguments: str) -> str:
        # Without locks: a process that is killed meanwhile must not leave one in the user's repository.
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
