"""train_deepspeed.py with two processes on this machine gives the losses and the files of train.py."""

import json
import os
import shutil
import signal

import pytest
import torch
from launching import (
    RUN,
    TORCHRUN,
    deepspeed,
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

from common.errors import UserError
from engine.checkpoint import load
from train_deepspeed import check_hosts

SCRIPT = "train_deepspeed.py"
CPU = {"device": "cpu"}
THREE = {"stage": 3, "stage3_param_persistence_threshold": 0}  # small weights are sharded, too
STAGES = {
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": THREE,
    "ZeRO-3, offload": {**THREE, "offload_optimizer": CPU, "offload_param": CPU},
}


def settings_file(project, stage, **others):
    """Arguments --deepspeed_config and a file that sets this stage of ZeRO."""
    path = project.root / "config" / "mine.json"
    path.write_text(json.dumps({"zero_optimization": STAGES[stage], **others}), "utf-8")
    return "--deepspeed_config", path


def alone(project, *args, **settings):
    done = project.run("train.py", *args, *settings_of(settings))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_curve_is_that_of_one_process(tiny_project, other_project, stage):
    for task in ("pretrain", "sft"):
        alone(tiny_project, "-t", task, **RUN)
        output = together(other_project, SCRIPT, "-t", task, *settings_file(other_project, stage), **RUN)
        assert output.count("Done: step 50") == 1  # only one of them prints
    for kind in ("Train", "Val"):
        assert largest_difference(losses(tiny_project, kind), losses(other_project, kind)) <= 1e-4
    one, two = (load(project.checkpoints("sft")[50]) for project in (tiny_project, other_project))
    assert one.model.keys() == two.model.keys()
    assert one.optimizer["state"].keys() == two.optimizer["state"].keys()
    for number, state in one.optimizer["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(two.optimizer["state"][number][key], value, rtol=0.01, atol=1e-5)
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=0, atol=1e-4)


MUON = {**RUN, "optimizer": "muon", "lr_decay_iters": 50}


def assert_same_state(one, two):
    """Weights and optimizer state of two checkpoints are equal up to rounding."""
    assert one.optimizer["state"].keys() == two.optimizer["state"].keys()
    for number, state in one.optimizer["state"].items():
        assert state.keys() == two.optimizer["state"][number].keys()
        for key, value in state.items():
            torch.testing.assert_close(two.optimizer["state"][number][key], value, rtol=0.01, atol=1e-5)
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_muon_goes_on_with_two_processes(tiny_project, train):
    assert train("pretrain", **MUON, save_interval=5, keep_checkpoints=0).returncode == 0
    (tiny_project.root / "checkpoint").mkdir()
    shutil.copy(train.checkpoints()[5], tiny_project.root / "checkpoint")
    zero = settings_file(tiny_project, "ZeRO-1")
    together(tiny_project, SCRIPT, "-t", "pretrain", "--resume", *zero, **MUON)
    assert largest_difference(losses(train)[5:], losses(tiny_project)) <= 1e-4
    assert_same_state(*(load(project.checkpoints()[50]) for project in (train, tiny_project)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_muon_moves_between_engines(tiny_project, train, stage):
    """Started with two processes, resumed with two and then with one: as with a single process."""
    assert train("pretrain", **MUON, save_interval=30).returncode == 0
    args = (tiny_project, TORCHRUN, SCRIPT, "-t", "pretrain", *settings_file(tiny_project, stage))
    launched(*args, **{**MUON, "max_steps": 30})
    assert_same_state(*(load(project.checkpoints()[30]) for project in (train, tiny_project)))
    launched(*args, "--resume", **{**MUON, "max_steps": 40})
    alone(tiny_project, "-t", "pretrain", "--resume", **MUON)
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_mixed_precision_is_that_of_one_process(tiny_project, other_project, stage):
    settings = {**RUN, "dtype": "bfloat16", "max_steps": 20}
    alone(tiny_project, "-t", "pretrain", **settings)
    args = ("-t", "pretrain", *settings_file(other_project, stage))
    launched(other_project, TORCHRUN, SCRIPT, *args, **settings)
    assert largest_difference(losses(tiny_project), losses(other_project)) <= 2e-3
    one, two = (load(project.checkpoints()[20]) for project in (tiny_project, other_project))
    assert {str(value.dtype) for value in two.model.values()} == {"torch.float32"}
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=0, atol=5e-3)


@pytest.mark.slow  # tests/engine/test_zero.py has the message; this is about one printed once
def test_what_deepspeed_is_not_used_with(tiny_project):
    args = ("-t", "pretrain", *settings_file(tiny_project, "ZeRO-2"))
    _, errors = finish(process := start(tiny_project, TORCHRUN, SCRIPT, *args, compile="true"))
    assert process.returncode and errors.count("error: ") == 1
    assert "compile is for train.py and train_ddp.py" in errors


def test_a_run_moves_between_engines(tiny_project, train):
    """One process, DDP with two, ZeRO-3 with two, one again: as in a single run."""
    assert train("pretrain", **RUN).returncode == 0
    settings = {**RUN, "lr_decay_iters": 50, "save_interval": 1}
    alone(tiny_project, "-t", "pretrain", **{**settings, "max_steps": 10})
    resume = ("-t", "pretrain", "--resume")
    together(tiny_project, "train_ddp.py", *resume, **{**settings, "max_steps": 20})
    zero = settings_file(tiny_project, "ZeRO-3")
    together(tiny_project, SCRIPT, *resume, *zero, **{**settings, "max_steps": 35})
    alone(tiny_project, "-t", "pretrain", "--resume", **settings)
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-5
    assert load(tiny_project.checkpoints()[50]).step == 50
    columns = [place.logged("Train", "Curriculum") for place in (train, tiny_project)]
    assert columns[0] == columns[1]  # the order of the data


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(tiny_project, other_project, stage):
    """20 steps at once, or 10 and 10 with the same engine: the same checkpoint, bit for bit."""
    for project in (tiny_project, other_project):
        settings = {**RUN, "lr_decay_iters": 50, "save_interval": 10, "eval_interval": 1000}
        args = (project, TORCHRUN, SCRIPT, "-t", "pretrain", *settings_file(project, stage))
        if project is other_project:
            launched(*args, **{**settings, "max_steps": 10})
        launched(*args, "--resume", **{**settings, "max_steps": 20})
    one, two = (load(project.checkpoints()[20]) for project in (tiny_project, other_project))
    for name, value in one.model.items():
        assert torch.equal(value, two.model[name]), name


@pytest.mark.slow
def test_ctrl_c_saves_and_ends(tiny_project):
    process = in_training(tiny_project, deepspeed(), SCRIPT, *settings_file(tiny_project, "ZeRO-3"))
    os.killpg(process.pid, signal.SIGINT)
    output, errors = finish(process)
    [step] = tiny_project.checkpoints()
    assert f"Stopped after step {step}" in output, errors
    assert load(tiny_project.checkpoints()[step]).step == step
    assert not processes_of(tiny_project)


@pytest.mark.slow
def test_a_killed_process_ends_the_run(tiny_project):
    args = settings_file(tiny_project, "ZeRO-2")
    process = in_training(tiny_project, deepspeed(), SCRIPT, *args, until=" | Save | ", save_interval=5)
    os.kill(processes_of(tiny_project)[0], signal.SIGKILL)
    output, errors = finish(process)
    assert process.returncode and "return code = -9" in output
    assert not processes_of(tiny_project) and 'train_deepspeed.py", line' not in errors
    assert load(list(tiny_project.checkpoints().values())[-1]).step >= 5


def test_a_wrong_deepspeed_file(tiny_project):
    args = settings_file(tiny_project, "ZeRO-2", zero_optimization={"stge": 3})
    _, errors = finish(process := start(tiny_project, TORCHRUN, SCRIPT, "-t", "pretrain", *args))
    assert process.returncode and errors.count("error: ") == 1
    assert "config/mine.json: zero_optimization: stge: extra inputs are not permitted" in errors
    assert 'train_deepspeed.py", line' not in errors


def test_batch_keys_are_honoured(tiny_project):
    batch = dict(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    args = settings_file(tiny_project, "ZeRO-2", **batch)
    together(tiny_project, SCRIPT, "-t", "pretrain", *args, gradient_accumulation_steps=2)


def test_without_a_launcher_it_says_how(tiny_project):
    done = tiny_project.run(SCRIPT, "-t", "pretrain")
    assert done.returncode == 2 and "deepspeed --num_gpus 2 train_deepspeed.py" in done.stderr


@pytest.mark.slow
def test_a_hostfile_that_the_launcher_has_not_seen(tiny_project):
    hosts = tiny_project.root / "config" / "hostfile.txt"
    hosts.write_text("# two machines\n10.0.0.1 slots=2\n10.0.0.2 slots=2\n")
    arguments = ("-t", "pretrain", "--deepspeed", f"--hostfile={hosts}")
    _, errors = finish(process := start(tiny_project, TORCHRUN, SCRIPT, *arguments))
    assert process.returncode and "4 slots, but 2 processes were started" in errors
    hosts.write_text("localhost slots=2\n")
    together(tiny_project, SCRIPT, *arguments, *settings_file(tiny_project, "ZeRO-1"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.0.0.1 slots=2\n10.0.0.2 slots=²\n", "line 2: write it as HOST slots=N"),
        (f"10.0.0.1 slots={'9' * 5000}", "line 1: write it as HOST slots=N"),
        ("\n# two\n10.0.0.1\n", "line 3: write it as HOST slots=N"),
        ("10.0.0.1 slots=-1", "line 1: write it as HOST slots=N"),
        ("  # none\n\n", "0 slots, but 2 processes were started"),
        ("a slots=1\n\tb  slots=2 # comment", "3 slots, but 2 processes were started"),
        (b"\xff\xfe", "is not text"),
    ],
)
def test_odd_hostfiles(text, says, tmp_path, monkeypatch):
    hosts = tmp_path / "hosts"
    hosts.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as error:
        check_hosts(hosts)
    assert says in str(error.value) and len(str(error.value)) < 500


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ZeRO-2", "ZeRO-3", "ZeRO-3, offload"])
def test_scores_of_eval_tasks_are_those_of_one_process(tiny_project, train, stage):
    tests = {"eval_tasks": ["arithmetic:digits=1"], "eval_tasks_examples": 5, "eval_tasks_interval": 5}
    settings = {"max_steps": 8, "sample_prompts": ["1 + 1"], **tests}
    assert train("pretrain", **settings).returncode == 0
    as_text = {key: json.dumps(value) for key, value in settings.items()}
    together(tiny_project, SCRIPT, "-t", "pretrain", *settings_file(tiny_project, stage), **as_text)
    for kind, names in (("Task", ("Score", "Base", "Examples")), ("Sample", ("Text",))):
        assert len(train.logged(kind, *names)) == 2
        assert train.logged(kind, *names) == tiny_project.logged(kind, *names), kind
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-4


# ---- folders that DeepSpeed writes -----------------------------------------------------------------------

SAVING = """
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
os.environ["DS_ACCELERATOR"] = "cpu"
from engine.zero import Zero

def state_dicts(self, *args, original=Zero.state_dicts):
    self.engine.save_checkpoint(os.path.join(os.path.dirname(__file__), "checkpoint", "ds"))
    return original(self, *args)

Zero.state_dicts = state_dicts
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ZeRO-2", "ZeRO-3"])
def test_a_folder_of_deepspeed_is_converted(tiny_project, stage):
    script = with_prelude(tiny_project, SAVING, SCRIPT)
    together(tiny_project, script, "-t", "pretrain", *settings_file(tiny_project, stage))
    [(step, path)] = tiny_project.checkpoints().items()
    ours = load(path)
    path.unlink()
    convert = (SCRIPT, "-t", "pretrain", "--convert", tiny_project.root / "checkpoint" / "ds")
    done = tiny_project.run(*convert)
    assert done.returncode == 0, done.stderr
    [(converted_step, converted_path)] = tiny_project.checkpoints().items()
    theirs = load(converted_path)
    assert converted_step == step and ours.model.keys() == theirs.model.keys()
    assert all(torch.equal(weight, theirs.model[name]) for name, weight in ours.model.items())
    assert tiny_project.run("inference.py", "--prompt", "1 + 1", "-l", 8).returncode == 0

    done = tiny_project.run(*convert, "--set", "n_embd=64")
    assert done.returncode == 2 and "holds another model than the configuration" in done.stderr
    damaged = next((tiny_project.root / "checkpoint" / "ds").rglob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    done = tiny_project.run(*convert)
    assert done.returncode == 2 and "is not a valid checkpoint folder of DeepSpeed" in done.stderr


def test_a_hostile_folder_of_deepspeed_is_not_run(tiny_project):
    folder, proof = tiny_project.root / "checkpoint" / "ds", tiny_project.root / "proof"
    (folder / "step1").mkdir(parents=True)
    (folder / "latest").write_text("step1")
    torch.save({"module": Payload(proof), "global_steps": 1}, folder / "step1" / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": Payload(proof)}, folder / "step1" / "x_optim_states.pt")
    done = tiny_project.run(SCRIPT, "-t", "pretrain", "--convert", folder)
    assert done.returncode == 2 and not proof.exists(), done.stderr
    torch.save({"module": {}, "global_steps": 1}, folder / "step1" / "mp_rank_00_model_states.pt")
    done = tiny_project.run(SCRIPT, "-t", "pretrain", "--convert", folder)
    assert done.returncode == 2 and not proof.exists(), done.stderr


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return open, (self.proof, "w")
