"""train_deepspeed.py on two processes of this machine: ZeRO draws the curve of train.py, and its files."""

import json

import pytest
import torch
from launching import (
    RUN,
    TORCHRUN,
    deepspeed,
    finish,
    largest_difference,
    launched,
    losses,
    settings_of,
    start,
)

from engine.checkpoint import load

SCRIPT = "train_deepspeed.py"
CPU = {"device": "cpu"}
STAGES = {
    "ZeRO-0": {"stage": 0},
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-3, offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}


def settings_file(project, stage, **others):
    """--deepspeed_config and a file with this stage of ZeRO."""
    path = project.root / "config" / "mine.json"
    path.write_text(json.dumps({"zero_optimization": STAGES[stage], **others}), "utf-8")
    return "--deepspeed_config", path


def alone(project, *args, **settings):
    done = project.run("train.py", *args, *settings_of(settings))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=[pytest.mark.slow] if name != "ZeRO-2" else []) for name in STAGES]
)
def test_the_curve_is_that_of_one_process(tiny_project, other_project, stage):
    for task in ("pretrain", "sft"):
        alone(tiny_project, "-t", task, **RUN)
        args = ("-t", task, *settings_file(other_project, stage))
        output = launched(other_project, deepspeed(), SCRIPT, *args, **RUN)
        assert output.count("Done: step 50") == 1  # one of them talks
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


def test_a_run_moves_between_engines(tiny_project, train):
    """One process, DDP with two, ZeRO-3 with two, one again: as if nothing had happened."""
    assert train("pretrain", **RUN).returncode == 0
    settings = {**RUN, "lr_decay_iters": 50, "save_interval": 1}
    alone(tiny_project, "-t", "pretrain", **{**settings, "max_steps": 10})
    resume = ("-t", "pretrain", "--resume")
    launched(tiny_project, TORCHRUN, "train_ddp.py", *resume, **{**settings, "max_steps": 20})
    zero = settings_file(tiny_project, "ZeRO-3")
    launched(tiny_project, TORCHRUN, SCRIPT, *resume, *zero, **{**settings, "max_steps": 35})
    alone(tiny_project, "-t", "pretrain", "--resume", **settings)
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-4
    columns = [place.logged("Train", "Curriculum") for place in (train, tiny_project)]
    assert columns[0] == columns[1]  # the order of the data


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(tiny_project, other_project, stage):
    """20 steps at once, and 10 and 10 of the same engine: the same checkpoint, bit for bit."""
    for project in (tiny_project, other_project):
        settings = {**RUN, "lr_decay_iters": 50, "save_interval": 10, "eval_interval": 1000}
        args = (project, TORCHRUN, SCRIPT, "-t", "pretrain", *settings_file(project, stage))
        if project is other_project:
            launched(*args, **{**settings, "max_steps": 10})
        launched(*args, "--resume", **{**settings, "max_steps": 20})
    one, two = (load(project.checkpoints()[20]) for project in (tiny_project, other_project))
    for name, value in one.model.items():
        assert torch.equal(value, two.model[name]), name


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"train_batch_size": 7},
            "train_batch_size 7 must be train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 1 x "
            "2 processes = 8, and the global batch of the run, 8",
        ),
        ({"train_micro_batch_size_per_gpu": 3}, "_per_gpu 3 x gradient_accumulation_steps 1 x 2"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization: stage: input should be 0, 1, 2, 3"),
        ({"zero_optimization": {"stge": 3}}, "zero_optimization: stge: extra inputs are not permitted"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but grad_clip of the run is 1.0"),
        ({"optimizer": {"type": "Adam"}}, "only there; remove optimizer"),
        ({"zero_optimisation": {}}, 'unknown key "zero_optimisation"; did you mean "zero_optimization"?'),
    ],
)
def test_a_wrong_deepspeed_file(tiny_project, settings, sentence):
    args = settings_file(tiny_project, "ZeRO-2", **{"zero_optimization": {"stage": 2}, **settings})
    _, errors = finish(process := start(tiny_project, TORCHRUN, SCRIPT, "-t", "pretrain", *args,
                                        gradient_accumulation_steps=2))  # fmt: skip
    assert process.returncode and errors.count("error: ") == 1
    assert sentence in errors and 'train_deepspeed.py", line' not in errors


def test_batch_keys_are_honoured(tiny_project):
    batch = dict(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    args = settings_file(tiny_project, "ZeRO-2", **batch)
    launched(tiny_project, TORCHRUN, SCRIPT, "-t", "pretrain", *args, gradient_accumulation_steps=2)


def test_without_a_launcher_it_says_how(tiny_project):
    done = tiny_project.run(SCRIPT, "-t", "pretrain")
    assert done.returncode == 2 and "deepspeed --num_gpus 2 train_deepspeed.py" in done.stderr
