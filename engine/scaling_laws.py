"""Choose the numbers of a pretraining run from the size of its model, where the configuration says "auto".

Hoffmann et al. 2022 ("Chinchilla", table 3): a model of N parameters is best trained on D = 20 N tokens.
Li et al. 2025 ("Predictable Scale, Part I", equation 1): with AdamW, batches of 0.58 D^0.571 tokens and a
learning rate of 1.79 N^-0.713 D^0.307 are best then. They studied models of 60 million parameters and more,
and do not count embeddings in N. Models here may be a thousand times smaller, and mostly embeddings, so all
parameters count, and the learning rate is capped at 0.01: models of 0.3 and 0.9 million parameters did best
between 0.006 and 0.012.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.errors import UserError
from config.resolved import ResolvedTrainConfig
from config.schema import Number, TrainConfig
from config.validation import check
from engine.plan import RunEstimate

if TYPE_CHECKING:
    from common.hardware import ComputeConfig
    from config.stages import Stage
    from engine.runs import StartPoint
    from model import GPT

TOKENS_PER_PARAMETER = 20
MAX_LEARNING_RATE = 0.01
# These keys follow from the model; the other automatic ones follow from these.
FROM_MODEL = ("batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate")


def resolved(
    config: TrainConfig, model: GPT, compute: ComputeConfig, stage: Stage, start: StartPoint
) -> ResolvedTrainConfig:
    """Replace every "auto" of `config.automatic` by a number. Prints the numbers and their reasons.

    start: where the run begins; a run that is resumed keeps its numbers.
    Raises UserError if the numbers do not fit what was set by hand, and for fine-tuning, for which these laws
    do not hold.
    """
    if not config.automatic:
        return check(ResolvedTrainConfig, config.model_dump(mode="json"), start.name)
    if stage.follows:
        raise UserError(f'{config.automatic[0]} is "auto", which is for pretraining; give it a number')
    values = config.model_dump(mode="json")
    before = start.checkpoint.train_config if start.resumes and start.checkpoint else {}
    for key in config.automatic:
        if key in FROM_MODEL and before.get(key, "auto") != "auto":
            values[key] = before[key]
            print(f"{key} {before[key]}: as at the start of the run")
    config = check(TrainConfig, values, start.name)
    numbers = chosen(config, model, RunEstimate(stage, config, compute, model).largest_batch())
    for key in config.automatic:
        values[key], reason = numbers[key]
        print(f"{key} {values[key]}: {reason}")
    return check(ResolvedTrainConfig, values, 'with numbers for "auto"')


def chosen(config: TrainConfig, model: GPT, largest_batch: int | None) -> dict[str, tuple[int | float, str]]:
    """{key: (number, reason)} for all keys that may be "auto"; what was set by hand stays as it is.

    largest_batch: how many sequences fit in memory at once; None: unknown.
    """

    def by_hand_or(key: str, number: Number) -> Number:
        return number if getattr(config, key) == "auto" else getattr(config, key)

    n, block_size = model.n_params, model.config.block_size
    horizon = TOKENS_PER_PARAMETER * n
    tokens = 0.58 * horizon**0.571
    # A power of two can be divided among most numbers of devices.
    sequences = 2 ** min(max(0, round(math.log2(tokens / block_size))), 20)
    passes = 1
    while sequences // passes > max(1, sequences if largest_batch is None else largest_batch):
        passes *= 2
    if not isinstance(config.batch_size, str):
        passes = max(1, round(sequences / config.batch_size))
    passes = by_hand_or("gradient_accumulation_steps", passes)
    batch_size = by_hand_or("batch_size", max(1, sequences // passes))
    max_steps = by_hand_or("max_steps", -(-horizon // (batch_size * passes * block_size)))
    warmup = (config.lr_decay_iters or max_steps) // 20
    rate = min(MAX_LEARNING_RATE, float(f"{1.79 * n**-0.713 * horizon**0.307:.2g}"))
    rate = by_hand_or("learning_rate", rate)
    law = f"for {n:,} parameters and {horizon:,} tokens"
    return {
        "batch_size": (batch_size, f"about {tokens:,.0f} tokens per step, {law}"),
        "gradient_accumulation_steps": (passes, "for that batch, in parts that fit in memory"),
        "max_steps": (max_steps, f"{TOKENS_PER_PARAMETER} tokens per parameter, of which there are {n:,}"),
        "warmup_iters": (warmup, "5 % of the steps"),
        "learning_rate": (rate, law),
        "min_lr": (float(f"{rate / 10:.2g}"), "a tenth of the learning rate"),
    }
