"""Packages that are not installed: which one a command needs, and what to type.

What there is to install is read from the requirements files, so it is written down once.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from common.errors import UserError, run

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "requirements.txt", ROOT / "requirements-dev.txt")
NEEDED_BY_ALL = {"torch", "numpy", "pydantic", "rich", "filelock"}
SET_UP = 'python -m pip install -r requirements.txt (for a Jetson or a Raspberry Pi: README.md, "Hardware")'


def requirements() -> dict[str, str]:
    """Every package that Nano may import, by module: {"pycurl": "pycurl>=7.46", ...}."""
    lines = [line for path in FILES if path.exists() for line in path.read_text("utf-8").splitlines()]
    found = [match for line in lines if (match := re.match(r"([\w.-]+)[^;#\n]*", line))]
    named = {match[1]: re.search(r"# import (\w+)", match.string) for match in found}  # where names differ
    modules = {name: known[1] if known else name.replace("-", "_") for name, known in named.items()}
    return {modules[match[1]]: match[0].strip() for match in found}


def not_installed(*modules: str, otherwise: str = "") -> UserError:
    """The error that names these modules of requirements() and says what to type; `otherwise` ends it."""
    sentence = f"{', '.join(modules)} {'is' if len(modules) == 1 else 'are'} not installed"
    if NEEDED_BY_ALL.isdisjoint(modules):
        packages = " ".join(f'"{requirements()[module]}"' for module in modules)
        return UserError(f"{sentence}: python -m pip install {packages}{otherwise}")
    if (ROOT / ".venv").exists() and not (ROOT / ".venv").samefile(sys.prefix):
        return UserError(
            f"{sentence} for {sys.executable}; Nano's packages are in .venv: use .venv/bin/python"
        )
    return UserError(f"{sentence}: {SET_UP}{otherwise}")


def require(*modules: str, otherwise: str = "") -> None:
    """Raise that error unless all these modules are installed.

    Most code just imports what it needs, and `errors.run` says the same when the import fails. This is for
    what should be known before slow work starts, and for naming an alternative.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise not_installed(*missing, otherwise=otherwise)


def is_missing(error: BaseException) -> bool:
    """Whether an import failed because a package of requirements() is not installed: no bug."""
    return isinstance(error, ModuleNotFoundError) and error.name in requirements()


def explain_imports() -> None:
    """Let Nano's scripts name a missing package even if an import fails before `errors.run` is called."""

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not is_missing(error):
            return sys.__excepthook__(kind, error, trace)

        def main() -> None:
            raise error

        run(main)

    script = getattr(sys.modules["__main__"], "__file__", None)  # of a program that uses Nano: left alone
    if script and Path(script).resolve().parent in (ROOT, ROOT / "dataset"):
        sys.excepthook = explain
