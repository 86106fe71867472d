"""What a user is told when something is wrong: a sentence on stderr and exit code 2."""

import contextlib
import errno
import os
import re
import signal
import sys
import time
import traceback

patience = 0.0  # seconds before an error is told
OUT_OF_MEMORY = "memory does not suffice; lower batch_size, block_size or the model's size"


class UserError(Exception):
    """A mistake the user can mend. Its message is the one or two sentences they read."""


def run(main):
    """Call `main()` as a script: exit 0 when it returns, 2 with a sentence on a user's mistake.

    Disk full, missing permission and exhausted memory are things a user can mend, so they
    are told in the same way. Any other exception is a bug of ours and keeps its traceback.
    """
    _accept_terminal()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _leave(str(error))
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; the rest of the output has no taker.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _leave(describe_os_error(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _leave(OUT_OF_MEMORY)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        from common import packages

        if not packages.is_missing(error):
            raise
        _leave(str(packages.not_installed(error.name)))


def run_launched(main):
    """The same in one of several processes that a launcher has started.

    It ends without Python's tidying up: there, PyTorch (2.13) may wait for a thread of gloo's, with the
    lock that this thread waits for.
    """
    code = 0
    try:
        run(main)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader has left
            stream.flush()
    os._exit(code or 0)


def is_out_of_memory(error):
    """Whether it is Python's, a GPU's or a CPU's way of saying so, without importing torch."""
    words = ("out of memory", "alloc_failed", "can't allocate memory")  # of CUDA and MPS, cuBLAS, the CPU
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def describe_os_error(error):
    """One sentence for an operating-system error: what happened, to which file."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}; free some space and run the same command again"
    return f"{(error.strerror or str(error)).lower()}{where}"


def _accept_terminal():
    """No script fails for what the environment says of the terminal, nor for a character it cannot show,
    nor because nobody reads it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[0-9]{1,4}", os.environ.get(name, "0")):  # rich would take ² for a number
            del os.environ[name]
    if getattr(sys.stdout, "errors", None) == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave(sentence):
    if patience:
        # Nobody should read the same sentence from each process: the launcher ends them all with the first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(patience)
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"error: {printable(sentence)}", file=sys.stderr)
    sys.exit(2)


def printable(sentence):
    """Short enough to read, and without what would move the cursor: it may quote a hostile file."""
    cut = sentence if len(sentence) <= 1000 else sentence[:1000] + " ..."
    return "".join(c if c.isprintable() or c in "\n\xa0\u3000" else ascii(c)[1:-1] for c in cut)
