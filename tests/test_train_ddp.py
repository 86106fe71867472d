"""train_ddp.py on two processes of this machine: the run of train.py, its faults, and its way back."""

import os
import re
import signal
import time

import pytest
from launching import (
    ENDLESS,
    RUN,
    TORCHRUN,
    finish,
    in_training,
    largest_difference,
    launched,
    losses,
    processes_of,
    settings_of,
    start,
    with_prelude,
)

from engine.checkpoint import load

DDP = (TORCHRUN, "train_ddp.py")


def test_two_processes_draw_the_curve_of_one(tiny_project, other_project):
    settings = {**RUN, "learning_rate": 1e-2, "min_lr": 1e-3}  # DDP adds up in the same order: rounding stays
    for task in ("pretrain", "sft"):
        done = tiny_project.run("train.py", "-t", task, *settings_of(settings))
        assert done.returncode == 0, done.stderr
        output = launched(other_project, *DDP, "-t", task, **settings)
        assert output.count("Done: step 50") == 1  # one of them talks
    for kind in ("Train", "Val"):
        assert largest_difference(losses(tiny_project, kind), losses(other_project, kind)) <= 1e-5
    assert len(list(other_project.root.glob("train_*.log"))) == 2
    assert [*other_project.checkpoints("sft")] == [*tiny_project.checkpoints("sft")]
    done = other_project.run("inference.py", "--prompt", "1 + 1?", "-i", "-l", 8)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_ends(tiny_project, number):
    process = in_training(tiny_project, *DDP)
    if number == signal.SIGINT:  # Ctrl-C reaches every process of the terminal
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, errors = finish(process)
    assert "the same command and --resume" in output, errors
    [step] = tiny_project.checkpoints()
    assert f"Stopped after step {step}" in output
    assert load(tiny_project.checkpoints()[step]).step == step


def test_a_killed_process_ends_the_run(tiny_project):
    process = in_training(tiny_project, *DDP, until=" | Save | ", save_interval=5)
    began = time.monotonic()
    os.kill(processes_of(tiny_project)[1], signal.SIGKILL)
    _, errors = finish(process)
    assert process.returncode and time.monotonic() - began < 30
    assert "SIGKILL" in errors and "train_ddp.py\", line" not in errors
    assert not processes_of(tiny_project)
    newest = list(tiny_project.checkpoints().values())[-1]
    assert load(newest).step >= 5


def test_an_error_that_all_processes_meet_is_told_once(tiny_project):
    process = start(tiny_project, *DDP, "-t", "pretrain", batch_size=3, gradient_accumulation_steps=1)
    _, errors = finish(process)
    assert process.returncode and errors.count("error: ") == 1
    assert "= 3, does not divide by 2 processes" in errors


def test_without_a_launcher_it_says_how(tiny_project):
    done = tiny_project.run("train_ddp.py", "-t", "pretrain")
    assert done.returncode == 2 and "python -m torch.distributed.run --nproc_per_node 2" in done.stderr


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


def test_nan_in_one_process_ends_all(tiny_project):
    process = start(tiny_project, TORCHRUN, with_prelude(tiny_project, NAN), "-t", "pretrain",
                    **ENDLESS, save_interval=10, sdp_kernel="math")  # fmt: skip
    _, errors = finish(process, 60)
    assert process.returncode and errors.count("error: ") == 1, errors
    good = tiny_project.checkpoints()[20]  # the one of step 30 may be why the loss of step 31 is NaN
    assert "step 31: loss nan, gradient norm nan; training stopped" in errors
    assert f"The last good checkpoint is checkpoint/{good.name}" in errors
    assert all(value.isfinite().all() for value in load(good).model.values())
    assert not processes_of(tiny_project)


def test_a_full_disk_under_the_first_process_ends_all(tiny_project):
    launched(tiny_project, *DDP, "-t", "pretrain", max_steps=5, decay_lr="false")
    script = with_prelude(tiny_project, FULL_DISK)
    process = start(tiny_project, TORCHRUN, script, "-t", "pretrain", "--resume", **ENDLESS, save_interval=20)
    _, errors = finish(process)
    assert errors.count("error: ") == 1 and "earlier checkpoints are untouched" in errors, errors
    assert list(tiny_project.checkpoints()) == [5] and load(tiny_project.checkpoints()[5]).step == 5
    assert not processes_of(tiny_project)


def test_the_launcher_brings_a_killed_run_back(tiny_project, train):
    settings = dict(max_steps=200, save_interval=20, learning_rate=2e-3, min_lr=2e-4, eval_interval=1000)
    assert train("pretrain", **settings).returncode == 0
    # An older run must not be taken for this one.
    launched(tiny_project, *DDP, "-t", "pretrain", **{**settings, "max_steps": 40, "random_seed": 1})
    for path in tiny_project.checkpoints().values():
        os.utime(path, (1, 1))
    for path in tiny_project.root.glob("train_*.log"):
        path.unlink()
    launcher = (*TORCHRUN, "--max-restarts", "1")
    process = start(tiny_project, launcher, "train_ddp.py", "-t", "pretrain", **settings)
    next(line for line in process.stdout if "step_60.pt" in line)
    os.kill(processes_of(tiny_project)[1], signal.SIGKILL)
    output, errors = finish(process, 120)
    assert process.returncode == 0 and "Done: step 200" in output, errors
    assert re.search(r"going on with checkpoint/pretrain_\w+_step_\d+.pt at step \d+", errors)
    curve = {step: float(loss) for step, loss in train.logged("Train", "Loss")}
    again = {step: float(loss) for step, loss in tiny_project.logged("Train", "Loss")}
    assert curve.keys() == again.keys()
    assert max(abs(curve[step] - again[step]) for step in curve) <= 1e-5
