"""A run's configuration when every "auto" is resolved. A module of its own, as schemas take time to build."""

from config.schema import PeakRate, Rate, Sequences, Steps, TrainConfig


class ResolvedTrainConfig(TrainConfig):
    """A `TrainConfig` in which no number is "auto" any more."""

    batch_size: Sequences
    gradient_accumulation_steps: Sequences = 1
    max_steps: Steps
    learning_rate: PeakRate
    warmup_iters: Steps
    min_lr: Rate
