"""How scripts end: exit codes, and the sentence that a user reads."""

import errno
import subprocess
import sys

import pytest

from common.config import ROOT
from common.errors import OUT_OF_MEMORY, UserError, describe_os_error, is_out_of_memory, run


def ended(error, capsys):
    """(exit code, stderr) of a script that raises this."""

    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run(main)
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("no such model"), "no such model"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
            "no such file or directory (a.txt)",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.pt"),
            "the disk is full (x.pt); free some space",
        ),
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), OUT_OF_MEMORY),
    ],
)
def test_what_a_user_can_fix_is_one_sentence(error, sentence, capsys):
    code, told = ended(error, capsys)
    assert code == 2 and told.startswith(f"error: {sentence}") and told.count("\n") == 1


def test_a_bug_keeps_its_traceback_and_ctrl_c_its_exit_code(capsys):
    for bug in (RuntimeError("shape mismatch"), ValueError("x")):
        with pytest.raises(type(bug)):
            run(lambda bug=bug: (_ for _ in ()).throw(bug))
    assert ended(KeyboardInterrupt(), capsys) == (130, "")
    assert run(lambda: 7) is None


def test_out_of_memory_of_a_gpu_and_of_the_cpu_is_recognised():
    for text in (
        "CUDA out of memory",
        "MPS backend out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("size mismatch"))


def test_an_os_error_without_a_file_or_a_text():
    assert describe_os_error(OSError(errno.EPERM, "Operation not permitted")) == "operation not permitted"
    assert describe_os_error(OSError("broken")) == "broken"


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("pass", 0, ""),
        ("raise UserError('no')", 2, "error: no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("raise SystemExit(3)", 3, ""),
    ],
)
def test_a_launched_script_ends_with_the_same_codes(body, code, stderr):
    script = f"from common.errors import UserError, run_launched\ndef main():\n    {body}\nrun_launched(main)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.endswith(stderr) and bool(done.stderr) == bool(stderr)
