"""The numbers that "auto" stands for in a run, and that a resumed run keeps them."""

import json
from types import SimpleNamespace

import pytest

from config.schema import TrainConfig
from engine.checkpoint import load
from engine.scaling_laws import chosen

KEYS = ("batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate", "min_lr", "warmup_iters")
AUTO = dict.fromkeys(KEYS, "auto")


def numbers(n_params, block_size=256, largest_batch=None, **settings):
    config = TrainConfig(dataset_path=[("a", "b")], **{**AUTO, **settings})
    model = SimpleNamespace(n_params=n_params, config=SimpleNamespace(block_size=block_size))
    found = {key: number for key, (number, _) in chosen(config, model, largest_batch).items()}
    assert set(found) == set(KEYS)
    assert TrainConfig(dataset_path=[("a", "b")], **found)  # a valid configuration
    return found


def test_the_laws():
    """Computed by hand: 20 million parameters, 400 million tokens, batches of 0.58 * 4e8^0.571 = 47,377."""
    assert numbers(20_000_000) == {
        "batch_size": 256,  # 185 sequences of 256, to the nearest power of two
        "gradient_accumulation_steps": 1,
        "max_steps": 6104,  # 4e8 / (256 * 256) = 6103.5
        "learning_rate": 0.0049,
        "min_lr": 0.00049,
        "warmup_iters": 305,
    }


@pytest.mark.parametrize("n_params", [1, 1000, 10**6, 10**9, 10**12])
@pytest.mark.parametrize("block_size", [1, 100, 4096, 1 << 20])
def test_any_size_has_a_sound_run(n_params, block_size):
    found = numbers(n_params, block_size)
    step = found["batch_size"] * block_size
    assert step * (found["max_steps"] - 1) < 20 * n_params <= step * found["max_steps"]


def test_the_horizon_and_the_batch_grow_and_the_rate_falls():
    small, large = numbers(10**6), numbers(10**8)
    assert small["batch_size"] < large["batch_size"] and small["max_steps"] < large["max_steps"]
    assert small["learning_rate"] == 0.01 > large["learning_rate"]  # 0.016 by the law


def test_what_does_not_fit_in_memory_is_cut_into_passes_of_the_same_batch():
    whole, cut, least = (numbers(20_000_000, largest_batch=n) for n in (None, 20, 0))
    assert (cut["batch_size"], cut["gradient_accumulation_steps"]) == (16, 16)
    assert (least["batch_size"], least["gradient_accumulation_steps"]) == (1, 256)
    assert whole["max_steps"] == cut["max_steps"] == least["max_steps"]


def test_what_is_set_by_hand_is_obeyed_and_the_rest_follows_it():
    assert numbers(20_000_000, batch_size=10)["gradient_accumulation_steps"] == 26
    assert numbers(20_000_000, gradient_accumulation_steps=4)["batch_size"] == 64
    assert numbers(20_000_000, batch_size=2, gradient_accumulation_steps=1)["max_steps"] == 781250
    assert numbers(20_000_000, max_steps=200)["warmup_iters"] == 10
    assert numbers(20_000_000, max_steps=200, lr_decay_iters=100)["warmup_iters"] == 5
    assert numbers(20_000_000, learning_rate=0.5)["min_lr"] == 0.05


# ---- through train.py --------------------------------------------------------------------------------------


def test_a_run_has_numbers_and_keeps_them(train):
    settings = {**AUTO, "max_steps": 4, "save_interval": 2, "warmup_iters": 0}
    done = train("pretrain", **settings)
    assert done.returncode == 0
    told = [line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith((*KEYS,))]
    whole = load(train.checkpoints()[4])
    written = {key: whole.train_config[key] for key in KEYS}
    assert told == [f"{key} {written[key]}" for key in KEYS if settings[key] == "auto"]
    assert all(type(number) in (int, float) for number in written.values())
    [log] = train.root.glob("train_*.log")
    header = json.loads(log.read_text("utf-8").partition("\n")[0].removeprefix("# "))
    assert {key: header["train_config"][key] for key in KEYS} == written

    # A resumed run keeps its numbers, except those that are set by hand now.
    train.checkpoints()[4].unlink()
    done = train("pretrain", "--resume", **settings)
    assert done.returncode == 0 and "changed since then" not in done.stderr
    assert done.stdout.count("as at the start of the run") == 3
    assert train.same(load(train.checkpoints()[4]), whole)
    done = train("pretrain", "--resume", **{**settings, "max_steps": 5, "learning_rate": 0.004})
    changed = f"changed since then: max_steps: 4 -> 5, learning_rate: {written['learning_rate']} -> 0.004\n"
    assert done.returncode == 0 and changed in done.stderr
    after = load(train.checkpoints()[5]).train_config
    by_hand = {"max_steps": 5, "learning_rate": 0.004, "min_lr": 0.0004}
    assert {**written, **by_hand} == {key: after[key] for key in KEYS}


def test_the_plan_of_a_model(train):
    done = train("pretrain", "--plan", **AUTO)
    assert done.returncode == 0 and "max_steps " in done.stdout and "plan: pretrain" in done.stdout
    steps = next(line.split()[1].rstrip(":") for line in done.stdout.splitlines() if "max_steps" in line)
    assert f"time for {steps} steps" in done.stdout


def test_what_cannot_be_is_refused_in_a_sentence(train):
    done = train("sft", from_checkpoint="", learning_rate="auto")
    assert done.returncode == 2 and done.stderr == (
        'error: learning_rate is "auto", which is for pretraining; give it a number\n'
    )
    done = train("pretrain", **{**AUTO, "warmup_iters": 10**6})
    assert done.returncode == 2
    assert 'error: with numbers for "auto": warmup_iters=1000000 must be below the end' in done.stderr
    done = train("pretrain", learning_rate="auto", min_lr=1.0)
    assert done.returncode == 2 and 'error: with numbers for "auto": min_lr=1.0 is above' in done.stderr
    assert not list(train.root.glob("train_*.log"))
