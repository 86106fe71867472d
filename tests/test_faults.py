"""Something goes wrong in one of two processes: all end soon, with one message, and nothing is lost."""

import os
import re
import signal
import time

import pytest
from launching import (
    ENDLESS,
    TORCHRUN,
    deepspeed,
    finish,
    in_training,
    processes_of,
    settings_of,
    start,
    told,
    with_prelude,
)

from engine.checkpoint import load

# DeepSpeed's own launcher, killed and interrupted: tests/test_train_deepspeed.py.
SCRIPTS = ["train_ddp.py", pytest.param("train_deepspeed.py", marks=pytest.mark.slow)]

NAN = """
import os
import torch.nn.functional as F

original, calls = F.cross_entropy, 0

def cross_entropy(*args, **options):
    global calls
    calls += 1
    return original(*args, **options) * (float("nan") if calls > 30 and os.environ["RANK"] == "1" else 1)

F.cross_entropy = cross_entropy
"""
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_process_ends_the_run(tiny_project, script):
    process = in_training(tiny_project, TORCHRUN, script, until=" | Save | ", save_interval=5)
    os.kill(processes_of(tiny_project)[1], signal.SIGKILL)
    _, errors = finish(process)
    assert process.returncode and "SIGKILL" in errors and f'{script}", line' not in errors
    assert not processes_of(tiny_project)
    newest = list(tiny_project.checkpoints().values())[-1]
    assert load(newest).step >= 5


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_in_one_process_ends_all(tiny_project, script):
    process = start(tiny_project, TORCHRUN, with_prelude(tiny_project, NAN, script), "-t", "pretrain",
                    **ENDLESS, save_interval=10, sdp_kernel="math")  # fmt: skip
    _, errors = finish(process, 60)
    assert process.returncode and errors.count("error: ") == 1, errors
    good = tiny_project.checkpoints()[20]  # the one of step 30 may be why the loss of step 31 is NaN
    assert re.search("step 31: loss nan, gradient norm (nan|inf); training stopped", errors)
    assert f"The last good checkpoint is checkpoint/{good.name}" in errors
    assert all(value.isfinite().all() for value in load(good).model.values())
    assert not processes_of(tiny_project)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_under_the_first_process_ends_all(tiny_project, script):
    done = tiny_project.run("train.py", "-t", "pretrain", *settings_of({"max_steps": 5, "decay_lr": "false"}))
    assert done.returncode == 0, done.stderr
    full = with_prelude(tiny_project, FULL_DISK, script)
    process = start(tiny_project, TORCHRUN, full, "-t", "pretrain", "--resume", **ENDLESS, save_interval=20)
    _, errors = finish(process, 60)  # starting included
    assert errors.count("error: ") == 1 and "earlier checkpoints are untouched" in errors, errors
    assert list(tiny_project.checkpoints()) == [5] and load(tiny_project.checkpoints()[5]).step == 5
    assert not processes_of(tiny_project)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launcher_brings_a_killed_run_back(tiny_project, train, script):
    settings = dict(max_steps=200, save_interval=20, learning_rate=2e-3, min_lr=2e-4, eval_interval=1000)
    assert train("pretrain", **settings).returncode == 0
    # Another run, which begins before this one and ends while it trains, must not be taken for it.
    other = settings_of({**settings, "max_steps": 40, "random_seed": 1})
    assert tiny_project.run("train.py", "-t", "pretrain", *other).returncode == 0
    for path in tiny_project.root.glob("train_*.log"):
        path.unlink()
    before = list(tiny_project.checkpoints().values())
    launcher = (*TORCHRUN, "--max-restarts", "1")
    process = start(tiny_project, launcher, script, "-t", "pretrain", **settings)
    next(line for line in process.stdout if "step_60.pt" in line)
    for path in before:
        path.rename(path.with_name(re.sub(r"\d{8}_\d{6}", "20410101_000000", path.name)))
    os.kill(processes_of(tiny_project)[1], signal.SIGKILL)
    output, errors = finish(process, 120)
    assert process.returncode == 0 and "Done: step 200" in output, errors
    assert re.search(r"resuming from checkpoint/pretrain_\w+_step_\d+.pt at step \d+", errors)
    curve = dict(train.logged("Train", "Loss"))
    again = dict(tiny_project.logged("Train", "Loss"))  # the later of what was computed twice
    assert curve.keys() == again.keys()
    limit = 1e-5 if script == "train_ddp.py" else 1e-4
    assert max(abs(float(curve[step]) - float(again[step])) for step in curve) <= limit


# tests/engine/test_heartbeat.py and test_stop.py have the single parts.
SHORT_MINUTE = "import engine.heartbeat\nengine.heartbeat.ANSWER_TIMEOUT = 3.0\n"
STOPPED = {
    "the second, torchrun": ("train_ddp.py", 1),
    "the first, torchrun": ("train_ddp.py", 0),
    "the second, deepspeed": ("train_deepspeed.py", 1),
    "the first, deepspeed": ("train_deepspeed.py", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "rank"), STOPPED.values(), ids=STOPPED)
def test_a_stopped_process_is_named_and_the_run_ends_with_its_launcher(tiny_project, script, rank):
    launcher = TORCHRUN if script == "train_ddp.py" else deepspeed()
    script = with_prelude(tiny_project, SHORT_MINUTE, script)
    process = in_training(tiny_project, launcher, script, log_interval=50)
    processes = processes_of(tiny_project)
    os.kill(processes[rank], signal.SIGSTOP)
    who = rf"process {rank} on \S+ \(pid {processes[rank]}\)"
    waits = told(process, "Waiting for ")
    assert re.fullmatch(rf"Waiting for {who}: no answer for [345] s, last seen in step \d+\.\n", waits)
    os.kill(processes[rank], signal.SIGCONT)
    assert re.fullmatch(rf"No longer waiting for {who}, after \d+ s\.\n", told(process, "No longer"))

    for number in signal.SIGSTOP, signal.SIGCONT:  # all of them: a laptop sleeps, and wakes
        for pid in processes.values():
            os.kill(pid, number)
        time.sleep(4 if number == signal.SIGSTOP else 1)
    process.kill()
    output, errors = finish(process)  # it ends with the last of its processes
    assert "Waiting" not in errors and errors.count("The launcher has ended") == 1, errors
    [(step, path)] = tiny_project.checkpoints().items()
    assert f"Stopped after step {step}. Resume with: the same command and --resume" in output
    assert load(path).step == step and not processes_of(tiny_project)
