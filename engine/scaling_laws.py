"""One dial: the run that fits a model, where config/config_pretrain.json says "auto".

Hoffmann et al. 2022 ("Chinchilla", table 3): a model of N parameters is best trained on D = 20 N tokens.
Li et al. 2025 ("Predictable Scale, Part I", equation 1): AdamW is then best with batches of 0.58 D^0.571
tokens and a learning rate of 1.79 N^-0.713 D^0.307. They leave the embeddings out of N, in models of 60
million parameters and more. In ours, which may be a thousand times smaller, all parameters count, most of
which are embeddings then, and the rate ends at 0.01: models of 0.3 and 0.9 million did best between 0.006
and 0.012.
"""

import math

from common.config import check
from common.errors import UserError
from config.schema import TrainConfig
from engine.plan import RunEstimate

TOKENS_PER_PARAMETER = 20
LARGEST_RATE = 0.01
# These follow from the model, and the other keys from these.
OF_THE_MODEL = ("batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate")


def resolved(config, model, compute, stage, start):
    """The configuration with numbers for all its `automatic` keys; says which, and why.

    compute: the machine. start: where the run begins; one that is resumed keeps its numbers.
    UserError if the numbers do not fit what was set by hand, and for fine-tuning, of which these laws know
    nothing.
    """
    if not config.automatic:
        return config
    if stage.follows:
        raise UserError(f'{config.automatic[0]} is "auto", which is for pretraining; give it a number')
    values = config.model_dump(mode="json")
    before = start.checkpoint.train_config if start.resumes else {}
    for key in config.automatic:
        if key in OF_THE_MODEL and before.get(key, "auto") != "auto":
            values[key] = before[key]
            print(f"{key} {before[key]}: as the run began")
    config = check(TrainConfig, values, start.name)
    numbers = chosen(config, model, RunEstimate(stage, config, compute, model).largest_batch())
    for key in config.automatic:
        values[key], why = numbers[key]
        print(f"{key} {values[key]}: {why}")
    return check(TrainConfig, values, 'with numbers for "auto"')


def chosen(config, model, largest_batch):
    """{key: (number, why)} of all keys that may be "auto"; what was set by hand stays as it is.

    largest_batch: how many sequences fit in memory; None: unknown.
    """

    def given(key, number):
        return number if getattr(config, key) == "auto" else getattr(config, key)

    n, block_size = model.n_params, model.config.block_size
    horizon = TOKENS_PER_PARAMETER * n
    tokens = 0.58 * horizon**0.571
    # A power of two divides by most numbers of devices.
    sequences = 2 ** min(max(0, round(math.log2(tokens / block_size))), 20)
    passes = 1
    while sequences // passes > max(1, sequences if largest_batch is None else largest_batch):
        passes *= 2
    if config.batch_size != "auto":
        passes = max(1, round(sequences / config.batch_size))
    passes = given("gradient_accumulation_steps", passes)
    batch_size = given("batch_size", max(1, sequences // passes))
    max_steps = given("max_steps", -(-horizon // (batch_size * passes * block_size)))
    warmup = (config.lr_decay_iters or max_steps) // 20
    rate = min(LARGEST_RATE, float(f"{1.79 * n**-0.713 * horizon**0.307:.2g}"))
    rate = given("learning_rate", rate)
    law = f"for {n:,} parameters and {horizon:,} tokens"
    return {
        "batch_size": (batch_size, f"about {tokens:,.0f} tokens a step, {law}"),
        "gradient_accumulation_steps": (passes, "so that it fits in memory, and makes that batch"),
        "max_steps": (max_steps, f"{TOKENS_PER_PARAMETER} tokens for each of {n:,} parameters"),
        "warmup_iters": (warmup, "a twentieth of the steps"),
        "learning_rate": (rate, law),
        "min_lr": (float(f"{rate / 10:.2g}"), "a tenth of the learning rate"),
    }
