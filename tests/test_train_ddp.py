"""train_ddp.py with two processes on this machine gives the run of train.py. Faults are in test_faults.py."""

import importlib
import os
import signal

import pytest
from launching import (
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
    together,
    with_prelude,
)

from common.errors import UserError, run
from engine import parallel
from engine.checkpoint import load

DDP = (TORCHRUN, "train_ddp.py")


def test_two_processes_draw_the_curve_of_one(tiny_project, other_project):
    settings = {
        **RUN,
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
    }  # DDP sums in the same order, so rounding is equal
    for task in ("pretrain", "sft"):
        done = tiny_project.run("train.py", "-t", task, *settings_of(settings))
        assert done.returncode == 0, done.stderr
        if task == "pretrain":
            output = launched(other_project, *DDP, "-t", task, **settings)
        else:
            output = together(other_project, "train_ddp.py", "-t", task, **settings)
        assert output.count("Done: step 50") == 1  # only one of them prints
    for kind in ("Train", "Val"):
        assert largest_difference(losses(tiny_project, kind), losses(other_project, kind)) <= 1e-5
    assert len(list(other_project.root.glob("train_*.log"))) == 2
    assert [*other_project.checkpoints("sft")] == [*tiny_project.checkpoints("sft")]
    done = other_project.run("inference.py", "--prompt", "1 + 1?", "-i", "-l", 8)
    assert done.returncode == 0, done.stderr


def test_two_processes_with_muon_draw_the_curve_of_one(tiny_project, train):
    settings = {**RUN, "optimizer": "muon"}
    assert train("pretrain", **settings).returncode == 0
    together(tiny_project, "train_ddp.py", "-t", "pretrain", **settings)
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-5


@pytest.mark.parametrize(
    ("number", "sent_to"),
    [
        (signal.SIGINT, "all"),  # Ctrl-C reaches every process of the terminal
        pytest.param(signal.SIGTERM, "launcher", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "launcher", marks=pytest.mark.slow),  # its terminal is closed
        pytest.param(signal.SIGTERM, "one of them", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends(tiny_project, number, sent_to):
    process = in_training(tiny_project, *DDP)
    if sent_to == "all":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if sent_to == "launcher" else processes_of(tiny_project)[1], number)
    output, errors = finish(process)
    assert "the same command and --resume" in output, errors
    assert (process.returncode == 0) == (sent_to == "one of them")
    [step] = tiny_project.checkpoints()
    assert f"Stopped after step {step}" in output
    assert load(tiny_project.checkpoints()[step]).step == step


def test_an_error_that_all_processes_meet_is_told_once(tiny_project):
    process = start(tiny_project, *DDP, "-t", "pretrain", batch_size=3, gradient_accumulation_steps=1)
    _, errors = finish(process)
    assert process.returncode and errors.count("error: ") == 1
    assert "= 3, does not divide by 2 processes" in errors


def test_without_a_launcher_it_says_how(tiny_project):
    done = tiny_project.run("train_ddp.py", "-t", "pretrain")
    assert done.returncode == 2 and "python -m torch.distributed.run --nproc_per_node 2" in done.stderr


TOLD = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_PORT": "1"}
ODD = [{name: value} for name in TOLD for value in ("abc", "²", "３", "-1", "", "1e3", "9" * 5000)]
ODD += [{name: None} for name in TOLD if name != "RANK"]
ODD += [{"RANK": "1"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "1"}, {"LOCAL_SIZE": "2"}, {"LOCAL_SIZE": "0"},
        {"LOCAL_WORLD_SIZE": "2"}, {"MASTER_PORT": "65536"}, {"MASTER_ADDR": ""}]  # fmt: skip


def test_a_first_machine_that_cannot_be_found_is_named():
    """PyTorch would retry for minutes without a message."""
    for host in ("no-such-machine.invalid", "a" * 300):
        with pytest.raises(UserError, match=f"MASTER_ADDR is '{host[:100]}'.*use its IP address"):
            parallel.wait_for_name(host, seconds=0)
    assert parallel.wait_for_name("localhost", seconds=0)


@pytest.mark.parametrize("script", ["train_ddp", "train_deepspeed"])
@pytest.mark.parametrize("odd", ODD)
def test_what_no_launcher_tells_is_refused(script, odd, monkeypatch, capsys):
    """Environment variables that are missing, out of range or not numbers. Every rank prints the error."""
    for name in (*TOLD, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**TOLD, "MASTER_ADDR": "127.0.0.1", **odd}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", [f"{script}.py", "-t", "pretrain"])
    with pytest.raises(SystemExit) as end:
        run(importlib.import_module(script).main)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert next(iter(odd)) in errors and "launcher" in errors and len(errors) < 300


def test_processes_that_are_configured_differently_are_refused(tiny_project):
    other = 'import os, sys\nif os.environ["RANK"] == "1":\n    sys.argv += ["--set", "learning_rate=0.02"]\n'
    process = start(tiny_project, TORCHRUN, with_prelude(tiny_project, other), "-t", "pretrain")
    _, errors = finish(process)
    assert process.returncode and "learning_rate is 0.02 there and 0.01 here" in errors
    assert "Warning" not in errors.partition("error: ")[0] and not tiny_project.checkpoints()


@pytest.mark.slow
def test_launches_beside_each_other_are_runs_of_their_own(tiny_project):
    settings = dict(save_interval=5, keep_checkpoints=1)
    lasting = in_training(tiny_project, *DDP, until=" | Save | ", **settings)
    output = launched(tiny_project, *DDP, "-t", "pretrain", **settings, max_steps=6, random_seed=7)
    assert "Done: step 6, 6 steps in this session." in output
    lasting.send_signal(signal.SIGTERM)
    finish(lasting)
    checkpoints = [load(path) for path in (tiny_project.root / "checkpoint").glob("*.pt")]
    runs = {(checkpoint.run, checkpoint.train_config["random_seed"]) for checkpoint in checkpoints}
    assert sorted(seed for _, seed in runs) == [7, 1337] and len({name for name, _ in runs}) == 2
    assert len(list(tiny_project.root.glob("train_*.log"))) == 2


def test_two_processes_share_the_examples_of_eval_tasks(tiny_project, train):
    """With the scores and texts of one process. There are fewer examples than fit evenly."""
    tests = {"eval_tasks": '["arithmetic:digits=1"]', "eval_tasks_examples": 5, "eval_tasks_interval": 3}
    tests |= {"sample_prompts": '["1 + 1"]'}
    output = together(tiny_project, "train_ddp.py", "-t", "pretrain", **tests)
    done = tiny_project.run("train.py", "-t", "pretrain", *settings_of(tests))
    assert done.returncode == 0, done.stderr
    for kind, names in (("Task", ("Score", "Base", "Examples")), ("Sample", ("Text",))):
        logged = tiny_project.logged(kind, *names)
        assert len(logged) == 4 and logged[:2] == logged[2:], kind
    assert output.count("| Task |") == 2  # only one of them prints
