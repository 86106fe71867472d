"""Scripts that start in a tenth of a second: a process that has loaded torch copies itself into each of them.

`run` is like subprocess.run, for a script, and keeps such a process for all tests of a worker. A copy
(os.fork) is a process of its own, with its own folder, environment and files, and reads all code of the
project anew; only the seconds in which torch is loaded are saved, in tests nearly all of a script's time.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

# What training and drawing have loaded in the end; torch loads torch._dynamo when it needs it.
LIBRARIES = ("torch", "torch._dynamo", "numpy", "pydantic", "psutil", "rich.live", "rich.table",
             "matplotlib.figure", "matplotlib.backends.backend_agg")  # fmt: skip


# ---- in the tests ------------------------------------------------------------------------------------------


def run(command, env, **options):
    """`python *command` -> CompletedProcess with bytes; for the options see `run_together`."""
    [done] = run_together(command, [env], **options)
    return done


def run_together(command, envs, *, cwd, timeout, input=b"", limits=(), library=None):
    """The same in several processes at once, one for each environment -> [CompletedProcess].

    limits: [(one of resource.RLIMIT_*, amount)]; output goes to files, so a limit on their size is one on
    what is printed, too. library: one more to be loaded beforehand.
    """
    first = first_process(library)
    with tempfile.TemporaryDirectory() as place:
        orders, outputs = [], []
        for number, env in enumerate(envs):
            streams = [Path(place) / f"{name} {number}" for name in ("input", "output", "errors")]
            for path, content in zip(streams, (input, b"", b""), strict=True):
                path.write_bytes(content)
            outputs.append(streams[1:])
            orders.append(dict(command=command, folder=cwd, environment=env, streams=streams, limits=limits))
        first.stdin.write(json.dumps(orders, default=str).encode() + b"\n")
        copies = json.loads(first.stdout.readline())
        has_ended, *_ = select.select([first.stdout], [], [], timeout)
        if not has_ended:
            for copy in copies:
                os.kill(copy, signal.SIGKILL)
        codes = json.loads(first.stdout.readline())
        outputs = [[path.read_bytes() for path in paths] for paths in outputs]
    if not has_ended:
        raise subprocess.TimeoutExpired(command, timeout, *map(b"".join, zip(*outputs, strict=True)))
    done = zip(codes, outputs, strict=True)
    return [subprocess.CompletedProcess(command, code, *texts) for code, texts in done]


@functools.cache
def first_process(library):
    """It ends with this one, by the end of its input."""
    command = [sys.executable, __file__, *LIBRARIES, *[library] * bool(library)]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)


# ---- in the first process and its copies -------------------------------------------------------------------


def next_command():
    """Returns in every copy; in the first process when no more is to come."""
    while line := sys.stdin.readline():
        copies = []
        for order in json.loads(line):
            if not (copy := os.fork()):
                become(**order)
                return order["command"]
            copies.append(copy)
        print(copies, flush=True)
        print([os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) for copy in copies], flush=True)


def become(command, folder, environment, streams, limits):
    """streams: the files that are its standard input, output and errors."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        file = os.open(path, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    limit(limits)
    sys.argv = command
    sys.path[0] = os.path.dirname(command[0])


def limit(limits):
    for which, amount in limits:
        resource.setrlimit(which, (amount, amount))


def live_as(command):
    """Do what `python *command` does, and leave: to tidy up all that is loaded would take a second."""
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    for library in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    gc.freeze()  # what the collector of a copy never touches is never copied
    if command := next_command():
        live_as(command)
