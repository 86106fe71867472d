"""evaluation/sandbox.py: what a program may do, and how the rest ends."""

import os
import re
import socket
import sys

import pytest

from common.errors import UserError
from evaluation import sandbox
from evaluation.sandbox import CodeEval, run_code

pytestmark = pytest.mark.skipif(sandbox.why_not() is not None, reason=str(sandbox.why_not()))

FINE = [
    "import math, re, heapq, itertools, os, sys, threading",
    "assert math.comb(5, 2) == 10",
    "print('x' * 10**7)",
    "open('a', 'w').write('b')",  # in its own folder
    "assert open('a').read() == 'b'",
    "open(os.devnull, 'w').write('b')",
    "thread = threading.Thread(target=print)",
    "thread.start()",
    "thread.join()",
    "assert sys.stdin.read() == ''",
]
ENDS = {
    "a wrong answer": ("assert 1 == 2", "AssertionError"),
    "no program": ("def f(:", "SyntaxError"),
    "leaving": ("raise SystemExit(0)", "SystemExit"),
    "leaving at once": ("import os\nos._exit(0)", "ended early"),
    "an endless loop": ("while True: pass", "timed out"),
    "waiting": ("import time\ntime.sleep(99)", "timed out"),
    "10 GB of memory": ("bytearray(10**10)", "MemoryError"),
    "memory, little by little": ("x = []\nwhile True: x.append(bytearray(10**8))", "MemoryError"),
    "a large file": ("open('a', 'w').write('b' * 10**7)", "OSError"),
    "many open files": ("x = [open('/dev/null') for _ in range(999)]", "OSError"),
    "a fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "a command": ("import subprocess\nsubprocess.run(['ls'])", "PermissionError"),
    "a socket": ("import socket\nsocket.socket()", "PermissionError"),
    "a signal": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "a script": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "ended early"),
    "its own report": ("import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed')\n"
                       "    except OSError: pass\nos._exit(0)", "ended early"),
}  # fmt: skip


def test_programs_that_pass():
    assert run_code("\n".join(FINE), seconds=5) == "passed"


@pytest.mark.parametrize("name", ENDS)
def test_programs_that_fail(name):
    program, outcome = ENDS[name]
    assert run_code(program, seconds=1, memory=1 << 28) == outcome


ATTACKS = """
open(FILE, 'w')
open(FILE, 'a').write('b')
os.remove(FILE)
os.truncate(FILE, 0)
os.rename(FILE, 'a')
os.chmod(FILE, 0)
os.utime(FILE, (0, 0))
os.link(FILE, 'a')
os.setxattr(FILE, 'user.a', b'b')
os.mkdir(FILE + '.d')
os.symlink('a', FILE + '.l')
"""


def test_nothing_outside_is_changed(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept", "utf-8")
    before = os.stat(file)
    program = f"import os\nFILE = {str(file)!r}\n"
    for attack in ATTACKS.strip().splitlines():
        program += f"try:\n    {attack}\nexcept OSError: pass\nelse: raise AssertionError\n"
    assert run_code(program) == "passed"
    after = os.stat(file)
    assert [*tmp_path.iterdir()] == [file] and file.read_text("utf-8") == "kept"
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_no_one_hears_of_it(monkeypatch):
    """No connection to this machine, and nothing of the environment."""
    monkeypatch.setenv("SECRET", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))"
        assert run_code(connect) == "PermissionError"
    assert run_code("import os\nassert 'SECRET' not in os.environ") == "passed"


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_no_rights_are_left():
    status = "text = open('/proc/self/status').read()\n"
    assert (
        run_code(status + "import re\nassert not int(re.search('CapEff:\\t(.*)', text)[1], 16)") == "passed"
    )
    assert run_code(status + "assert 'NoNewPrivs:\\t1' in text and 'Seccomp:\\t2' in text") == "passed"


def test_where_it_cannot_be_confined_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "landlock_version", lambda: -1)
    with pytest.raises(UserError, match="Landlock"):
        run_code("pass")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="Linux"):
        run_code("pass")


def test_pass_at_k():
    """1 - C(n - c, k) / C(n, k), averaged over the problems; and the interface of code_eval."""
    good, bad = "def f(): return 1", "def f(): return 2"
    rates, details = CodeEval().compute(["assert f() == 1"] * 2, [[good, bad, bad], [bad] * 3], k=[1, 2, 5])
    assert rates == {"pass@1": pytest.approx(1 / 6), "pass@2": pytest.approx((1 - 1 / 3) / 2)}
    assert [one["passed"] for _, one in details[0]] == [True, False, False]
    assert details[1][2] == (2, {"task_id": 1, "passed": False, "result": "AssertionError"})


def test_system_calls_have_the_numbers_of_the_kernel():
    """Where the kernel's headers are installed."""
    from pathlib import Path

    for machine, headers in (("x86_64", "asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")):
        roots = [Path("/usr/include"), Path("/usr/include/x86_64-linux-gnu")]
        found = [root / headers for root in roots if (root / headers).exists()]
        if not found:
            continue
        text = found[0].read_text("utf-8")
        column = [*sandbox.AUDIT_ARCH].index(machine)
        for name, numbers in {**sandbox.REFUSED, "clone": sandbox.CLONE, "clone3": sandbox.CLONE3}.items():
            match = re.search(rf"#define __NR_{name} (\d+)", text)
            if match:  # headers may be older than the call
                assert int(match[1]) == numbers[column], name
