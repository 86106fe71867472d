"""How a script ends when something goes wrong: one sentence on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

exit_delay = 0.0  # seconds to wait before an error is printed; `common.log.mute` sets it
OUT_OF_MEMORY = "out of memory; lower batch_size, block_size or the size of the model"


class UserError(Exception):
    """A mistake the user can fix. The message is the one or two sentences they read."""


def run(main: Callable[[], object]) -> None:
    """Call `main()` as a script: exit code 0 when it returns, 2 with a sentence on stderr for a UserError.

    A full disk, a missing permission, too little memory or a package that is not installed is something
    the user can fix, so it is reported the same way. Any other exception is a bug and keeps its traceback.
    """
    _prepare_terminal()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _exit_with_error(str(error))
    except BrokenPipeError:
        # The reader of the output (`| head`) is gone. Send the rest to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _exit_with_error(describe_os_error(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _exit_with_error(OUT_OF_MEMORY)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        from common import packages

        if not packages.is_missing(error):
            raise
        _exit_with_error(str(packages.not_installed(str(error.name))))


def run_launched(main: Callable[[], object]) -> NoReturn:
    """Like `run`, for a script that a launcher starts once per device.

    Skips Python's shutdown, where PyTorch (2.13) can deadlock with one of gloo's threads.
    """
    code: int | str | None = 0
    try:
        run(main)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU or the CPU allocator ran out of memory. Does not import torch."""
    texts = ("out of memory", "alloc_failed", "can't allocate memory")  # CUDA and MPS, cuBLAS, the CPU
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def describe_os_error(error: OSError) -> str:
    """One sentence for an operating-system error: what happened, and to which file."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}; free some space and run the same command again"
    return f"{(error.strerror or str(error)).lower()}{where}"


def printable(sentence: str) -> str:
    """Cut `sentence` to a readable length and escape control characters: it may quote a hostile file."""
    cut = sentence if len(sentence) <= 1000 else sentence[:1000] + " ..."
    return "".join(c if c.isprintable() or c in "\n\xa0\u3000" else ascii(c)[1:-1] for c in cut)


def _prepare_terminal() -> None:
    """Let no script fail because of odd terminal settings, unprintable characters or a closed stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[0-9]{1,4}", os.environ.get(name, "0")):  # rich would accept ² as a digit
            del os.environ[name]
    if getattr(sys.stdout, "errors", None) == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # typed as TextIO


def write_utf8() -> None:
    """Let pipes get UTF-8. A terminal that cannot show a character gets a question mark."""
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def _exit_with_error(sentence: str) -> NoReturn:
    if exit_delay:
        # Print the sentence once, not once per process: the launcher ends the others after the first exit.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(exit_delay)
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"error: {printable(sentence)}", file=sys.stderr)
    sys.exit(2)
