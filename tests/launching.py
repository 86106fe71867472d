"""Runs of several processes on this machine: started by a launcher, waited for, looked at."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import warm

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENDLESS = dict(max_steps=0, decay_lr="false", log_interval=5)
RUN = dict(max_steps=50, gradient_accumulation_steps=2, eval_interval=25, eval_iters=3, n_layer=2,
           learning_rate=2e-3, min_lr=2e-4)  # fmt: skip


def deepspeed():
    """DeepSpeed's launcher, at a port of its own: other tests may run at the same time."""
    return ("deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port())


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def settings_of(settings):
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def start(project, launcher, script, *args, **settings):
    """launcher: a module and its arguments. Returns the Popen of a session of its own."""
    command = [sys.executable, "-m", *launcher, str(project.root / script), *args, *settings_of(settings)]
    return subprocess.Popen(
        list(map(str, command)), cwd=project.elsewhere, env={"DS_ACCELERATOR": "cpu"} | project.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process, seconds=30):
    """(stdout, stderr) of a launched run, which ends by itself, all of it, within so many seconds."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it did not end: {process.communicate()}")


def launched(*args, **settings):
    """stdout of a run that succeeds; for the arguments see `start`."""
    output, errors = finish(process := start(*args, **settings), 240)
    assert process.returncode == 0, output + errors
    return output


def together(project, script, *args, **settings):
    """What `launched` returns, without a launcher: two processes, told by hand what torchrun tells them.

    They have loaded torch and DeepSpeed beforehand, which three processes would be doing for seconds.
    """
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    envs = [project.environment | told | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    command = [str(project.root / script), *map(str, args), *settings_of(settings)]
    library = "deepspeed" if "deepspeed" in script else None
    done = warm.run_together(command, envs, cwd=project.elsewhere, timeout=240, library=library)
    assert [one.returncode for one in done] == [0, 0], b"".join(one.stderr for one in done).decode()
    return b"".join(one.stdout for one in done).decode()


def in_training(project, launcher, script, *args, until=" | Train | ", **settings):
    """The same, running, when it has trained for some steps: when it has printed a line with `until`."""
    process = start(project, launcher, script, "-t", "pretrain", *args, **{**ENDLESS, **settings})
    for line in process.stdout:
        if until in line:
            return process
    pytest.fail(finish(process)[1])


def told(process, text, seconds=30):
    """The next line with this text that a launched run writes to its standard errors."""
    too_late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    too_late.start()
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            too_late.cancel()
            return line
    pytest.fail(f"it did not say {text!r}: {lines}")


def with_prelude(project, prelude, script="train_ddp.py"):
    """A script that does this first, and then what the other one does."""
    name = f"prelude_{script}"
    then = "\nimport runpy\nrunpy.run_path(__file__.replace('prelude_', ''), run_name='__main__')\n"
    (project.root / name).write_text(prelude + then, "utf-8")
    return name


def processes_of(project):
    """{rank: pid} of the processes that train."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{name}/cmdline", "rb").read().decode().split("\0")
            values = open(f"/proc/{name}/environ", "rb").read().decode().split("\0")
        except OSError:
            continue
        if any(word.startswith(str(project.root)) and word.endswith(".py") for word in words[:3]):
            found |= {int(value[5:]): int(name) for value in values if value.startswith("RANK=")}
    return found


def losses(project, kind="Train"):
    return [float(loss) for _, loss in project.logged(kind, "Loss")]


def largest_difference(one, two):
    assert len(one) == len(two) > 0
    return max(abs(a - b) for a, b in zip(one, two, strict=True))
