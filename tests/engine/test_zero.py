"""What DeepSpeed's file may contain. Real runs are in tests/test_train_deepspeed.py."""

import os
from types import SimpleNamespace

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from common.errors import UserError
from config.schema import DeepSpeedConfig, TrainConfig
from engine.zero import Zero


def zero_of(**settings):
    """The strategy of rank 0 of two processes, without a connection."""
    zero = object.__new__(Zero)
    zero.rank, zero.world_size, zero.stage, zero.name = 0, 2, 2, "config/mine.json"
    zero.settings = DeepSpeedConfig(**{"zero_optimization": {"stage": 2}, **settings}).model_dump()
    return zero


def run_of(batch_size=4, gradient_accumulation_steps=2, **settings):
    return TrainConfig(dataset_path=[("a", "b")], decay_lr=False, batch_size=batch_size,
                       gradient_accumulation_steps=gradient_accumulation_steps, **settings)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "micro_batch", "accumulation"),
    [
        ({}, 4, 1),
        ({"train_batch_size": 8}, 4, 1),
        ({"train_micro_batch_size_per_gpu": 2}, 2, 2),
        ({"gradient_accumulation_steps": 4}, 1, 4),
        ({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}, 1, 4),
    ],
)
def test_batch_keys(settings, micro_batch, accumulation):
    zero = zero_of(**settings)
    assert zero.rows(run_of()) == range(0, 4, micro_batch)
    found = zero.settings
    assert found["train_batch_size"] == 8 and found["train_micro_batch_size_per_gpu"] == micro_batch
    assert found["gradient_accumulation_steps"] == accumulation


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"train_batch_size": 7},
            "train_batch_size 7 must be train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 1 x "
            "2 processes = 8, and the global batch of the run, 8",
        ),
        ({"train_micro_batch_size_per_gpu": 3}, "_per_gpu 3 x gradient_accumulation_steps 1 x 2"),
        ({"train_micro_batch_size_per_gpu": 8}, "_per_gpu 8 x gradient_accumulation_steps 0 x 2"),
        ({"gradient_accumulation_steps": 3}, "_per_gpu 1 x gradient_accumulation_steps 3 x 2"),
        ({"gradient_accumulation_steps": 9}, "_per_gpu 0 x gradient_accumulation_steps 9 x 2"),
    ],
)
def test_batch_keys_that_cannot_be(settings, sentence):
    with pytest.raises(UserError) as refused:
        zero_of(**settings).rows(run_of())
    told = str(refused.value)
    assert told.startswith("config/mine.json: train_batch_size") and sentence in told


@pytest.mark.parametrize(
    ("settings", "run", "compute", "sentence"),
    [
        ({"gradient_clipping": 0.5}, {}, {}, "gradient_clipping is 0.5, but grad_clip of the run is 1.0"),
        ({}, {"compile": True}, {}, "compile is for train.py and train_ddp.py"),
        ({}, {}, {"dtype": "bfloat16"}, "set use_amp to true"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {"optimizer": "muon"},
            {},
            'remove offload_optimizer, or set optimizer to "adamw"',
        ),
    ],
)
def test_what_is_refused(settings, run, compute, sentence):
    compute = SimpleNamespace(**{"dtype": "float32", "autocast": False, **compute})
    with pytest.raises(UserError, match=sentence):
        zero_of(**settings).wrap(None, None, run_of(**run), compute)


@pytest.mark.parametrize(
    ("zero", "sentence"),
    [
        ({"stage": 4}, "stage: input should be 0, 1, 2, 3"),
        ({"stge": 3}, "stge: extra inputs are not permitted"),
    ],
)
def test_a_wrong_section(zero, sentence):
    with pytest.raises(UserError, match=f"config/mine.json: zero_optimization: {sentence}"):
        Zero(DeepSpeedConfig(zero_optimization=zero), "config/mine.json", "gloo", None)
