"""train_ddp.py on two processes of this machine: the run of train.py, its faults, and its way back."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import Project

from engine.checkpoint import load

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
RUN = dict(max_steps=50, gradient_accumulation_steps=2, eval_interval=25, eval_iters=3, n_layer=2)
ENDLESS = dict(max_steps=0, decay_lr="false", log_interval=5)


def settings_of(settings):
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def start(project, *args, **settings):
    command = [*LAUNCHER, str(project.root / "train_ddp.py"), *args, *settings_of(settings)]
    return subprocess.Popen(
        command, cwd=project.elsewhere, env=project.environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process, seconds=30):
    """(stdout, stderr) of a launched run, which ends by itself, all of it, within so many seconds."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def launched(project, *args, **settings):
    output, errors = finish(process := start(project, *args, **settings), 120)
    assert process.returncode == 0, errors
    return output


def in_training(project, **settings):
    """A launched run that has trained for some steps."""
    process = start(project, "-t", "pretrain", **ENDLESS, **settings)
    next(line for line in process.stdout if " | Train | " in line)
    return process


def processes_of(project):
    """{rank: pid} of the processes that train."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{name}/cmdline", "rb").read().decode().split("\0")
            values = open(f"/proc/{name}/environ", "rb").read().decode().split("\0")
        except OSError:
            continue
        if any(word == str(project.root / "train_ddp.py") for word in words[:3]):
            found |= {int(value[5:]): int(name) for value in values if value.startswith("RANK=")}
    return found


def losses(project, kind="Train"):
    return [float(loss) for _, loss in project.logged(kind, "Loss")]


def largest_difference(one, two):
    assert len(one) == len(two) > 0
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def other_project(tmp_path_factory, tiny_data):
    other = Project(tmp_path_factory.mktemp("other"))
    other.furnish(tiny_data)
    return other


def test_two_processes_draw_the_curve_of_one(tiny_project, other_project):
    for task in ("pretrain", "sft"):
        done = tiny_project.run("train.py", "-t", task, *settings_of(RUN))
        assert done.returncode == 0, done.stderr
        output = launched(other_project, "-t", task, **RUN)
        assert output.count("Done: step 50") == 1  # one of them talks
    for kind in ("Train", "Val"):
        assert largest_difference(losses(tiny_project, kind), losses(other_project, kind)) <= 1e-5
    assert len(list(other_project.root.glob("train_*.log"))) == 2
    assert [*other_project.checkpoints("sft")] == [*tiny_project.checkpoints("sft")]
    done = other_project.run("inference.py", "--prompt", "1 + 1?", "-i", "-l", 8)
    assert done.returncode == 0, done.stderr


def test_a_run_moves_from_one_process_to_two_and_back(tiny_project, train):
    assert train("pretrain", **RUN).returncode == 0
    settings = {**RUN, "save_interval": 1}
    stop_at = {"max_steps": 15, "lr_decay_iters": 50}
    first = tiny_project.run("train.py", "-t", "pretrain", *settings_of({**settings, **stop_at}))
    assert first.returncode == 0, first.stderr
    launched(tiny_project, "-t", "pretrain", "--resume", **{**settings, **stop_at, "max_steps": 35})
    last = tiny_project.run("train.py", "-t", "pretrain", "--resume", *settings_of(settings))
    assert last.returncode == 0, last.stderr
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-5
    columns = [place.logged("Train", "Curriculum") for place in (train, tiny_project)]
    assert columns[0] == columns[1]  # the order of the data
    assert load(tiny_project.checkpoints()[50]).step == 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_ends(tiny_project, number):
    process = in_training(tiny_project)
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
    process = in_training(tiny_project, save_interval=5)
    began = time.monotonic()
    os.kill(processes_of(tiny_project)[1], signal.SIGKILL)
    _, errors = finish(process)
    assert process.returncode and time.monotonic() - began < 30
    assert "SIGKILL" in errors and "train_ddp.py\", line" not in errors
    assert not processes_of(tiny_project)
    newest = list(tiny_project.checkpoints().values())[-1]
    assert load(newest).step >= 5


def test_an_error_that_all_processes_meet_is_told_once(tiny_project):
    process = start(tiny_project, "-t", "pretrain", batch_size=3,
                    gradient_accumulation_steps=1)  # fmt: skip
    _, errors = finish(process)
    assert process.returncode and errors.count("error: ") == 1
    assert "= 3, does not divide by 2 processes" in errors


def test_without_a_launcher_it_says_how(tiny_project):
    done = tiny_project.run("train_ddp.py", "-t", "pretrain")
    assert done.returncode == 2 and "python -m torch.distributed.run --nproc_per_node 2" in done.stderr
