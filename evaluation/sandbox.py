"""Run Python code that a model has written, such that it can do no harm: `run_code`.

The code runs in a Python process of its own, which first gives up its rights. The Linux kernel enforces that:

- Resource limits: time, memory, the size of files, open files.
- Landlock: nothing can be written, made or removed outside of a temporary folder, which is deleted
  afterwards. (Reading is allowed: there is no way in which something could be passed on.)
- seccomp: no sockets, no further processes (threads are fine), no signals to others, and no change of the
  owner, mode or time of files, which Landlock leaves open.
- No environment variables and no capabilities, even for root.

Where the kernel has no Landlock (it came with Linux 5.13), or on another system, nothing is run.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

SECONDS, MEMORY, FILE_SIZE, OPEN_FILES = 10, 1 << 30, 1 << 20, 64

# System calls that are refused, by their numbers on x86-64 and Arm (None: it has no such call).
REFUSED = {
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "fork": (57, None), "vfork": (58, None), "unshare": (272, 97), "setns": (308, 268),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_writev": (311, 271), "prlimit64": (302, 261), "setpriority": (141, 140),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same everywhere


# ---- in this process -------------------------------------------------------------------------------


def run_code(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> str:
    """Run a program. Returns "passed" if it came to its end; else "timed out", "ended early", or the name of
    the exception that it raised.

    seconds: of computing, and for everything. memory: bytes, with Python's own 20 MB.
    Raises UserError if this system cannot confine it; see the top of this file.
    """
    from common.errors import UserError

    if why := why_not():
        raise UserError(f"code that a model has written is not run here: {why}")
    secret = secrets.token_hex(16)  # so that a program that just exits has not passed
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        command = [sys.executable, "-I", "-S", "-B", __file__, secret, str(int(seconds) or 1), str(memory)]
        try:
            done = subprocess.run(
                command, input=program.encode("utf-8", "replace"), stdout=output, stderr=subprocess.DEVNULL,
                cwd=folder, env={}, timeout=seconds + 1,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "timed out"
        output.seek(0)
        said = output.read(FILE_SIZE).decode("utf-8", "replace").partition(" ")
    if done.returncode == -signal.SIGXCPU:
        return "timed out"
    return said[2] if said[0] == secret else "ended early"


def why_not() -> str | None:
    """Why this system cannot confine a program; None if it can."""
    if sys.platform != "linux" or platform.machine() not in AUDIT_ARCH:
        return "that needs Linux on x86-64 or 64-bit Arm"
    if landlock_version() < 1:
        return "the kernel has no Landlock, which came with Linux 5.13, or does not let programs use it"
    return None


def landlock_version() -> int:
    """-1 if there is none."""
    return ctypes.CDLL(None).syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)


# ---- as a metric -----------------------------------------------------------------------------------


class CodeEval:
    """The metric code_eval of Hugging Face's `evaluate`, run here; it needs no download."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """references: the tests of each problem; predictions: programs for each. Returns (pass@k for each k,
        {problem: [(number, outcome)]})."""
        details: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, (test, programs) in enumerate(zip(references, predictions, strict=True)):
            results = [run_code(f"{program}\n{test}") for program in programs]
            details[problem] = [
                (number, {"task_id": problem, "passed": result == "passed", "result": result})
                for number, result in enumerate(results)
            ]
        rates: dict[str, float] = {}
        for size in [k] if isinstance(k, int) else k:
            if all(len(results) >= size for results in details.values()):
                # The chance that one of k programs passes, estimated from n programs (Chen et al. 2021,
                # "Evaluating Large Language Models Trained on Code", equation 1).
                chances = [
                    1
                    - math.comb(len(own) - sum(one["passed"] for _, one in own), size)
                    / math.comb(len(own), size)
                    for own in details.values()
                ]
                rates[f"pass@{size}"] = math.fsum(chances) / len(chances)
        return rates, details


# ---- in the process of the program -----------------------------------------------------------------


def confine(folder: str, seconds: int, memory: int) -> None:
    """Give up the rights of this process, for good. Raises OSError if that fails."""
    import resource

    limits = (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_CORE, 0),
    )  # fmt: skip
    for limit, amount in limits:
        resource.setrlimit(limit, (amount, amount))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # the first is announced by a signal
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: object) -> int:
        if (result := getattr(libc, function)(*arguments)) < 0:
            raise OSError(ctypes.get_errno(), function)
        return result

    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities (version 3 of the call)
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    write_file, is_new = 1 << 1, landlock_version() >= 3
    rights = write_file | sum(1 << bit for bit in range(4, 13)) | is_new << 14  # make, remove; truncate
    ruleset = call("syscall", LANDLOCK_CREATE, struct.pack("Q", rights), ctypes.c_size_t(8), 0)
    for path, allowed in ((folder, rights), (os.devnull, write_file)):
        beneath = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        call("syscall", LANDLOCK_ADD, ruleset, 1, beneath, 0)  # 1: LANDLOCK_RULE_PATH_BENEATH
    call("syscall", LANDLOCK_RESTRICT, ruleset, 0)
    instructions = b"".join(struct.pack("HBBI", *instruction) for instruction in system_call_filter())
    buffer = ctypes.create_string_buffer(instructions)
    program = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(buffer))
    call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def system_call_filter() -> list[tuple[int, int, int, int]]:
    """The seccomp filter: instructions (code, jump if true, jump if false, value) of classic BPF."""
    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, no_such_call, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    column = [*AUDIT_ARCH].index(platform.machine())
    program = [
        (load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[platform.machine()]), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 1 << 30), (give, 0, 0, kill),  # calls of another kind on x86-64
        (equal, 0, 1, CLONE3[column]), (give, 0, 0, no_such_call),  # then clone is called
    ]  # fmt: skip
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            program += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    thread = 0x10000  # CLONE_THREAD in the first argument
    program += [
        (equal, 0, 3, CLONE[column]),
        (load, 0, 0, 16),
        (has_bits, 1, 0, thread),
        (give, 0, 0, refuse),
    ]
    return [*program, (give, 0, 0, allow)]


def main() -> None:
    """Run the program from stdin, and report how it ended."""
    secret, seconds, memory = sys.argv[1], *map(int, sys.argv[2:])
    code = sys.stdin.buffer.read().decode()
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    sys.argv[1:] = []
    confine(os.getcwd(), seconds, memory)
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
        outcome = "passed"
    except BaseException as error:
        outcome = type(error).__name__
    os.write(report, f"{secret} {outcome}".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
