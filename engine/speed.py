"""How fast training is: tokens and FLOPs per second between two log lines."""

import time
from typing import Any


class Speedometer:
    """Counts tokens and FLOPs between two readings. Call `restart` after time that was not training."""

    def __init__(self, model: Any):
        self.model, self.seconds_per_step = model, 0.0
        self.restart()

    def restart(self) -> None:
        self.since, self.steps, self.tokens, self.flops = time.perf_counter(), 0, 0, 0.0

    def add(self, shape: tuple[int, ...]) -> None:
        """Count a batch of this shape [B, T]."""
        rows, length = shape
        self.steps, self.tokens = self.steps + 1, self.tokens + rows * length
        self.flops += rows * length * self.model.flops_per_token(length)

    def read(self) -> dict[str, float]:
        """Since the last reading: seconds per step, FLOPs and tokens per second."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        now = seconds / max(self.steps, 1)
        # Smoothed, so that the estimate of the remaining time does not jump with every step.
        self.seconds_per_step = 0.9 * self.seconds_per_step + 0.1 * now if self.seconds_per_step else now
        rates = {
            "step_seconds": now,
            "flops_per_second": self.flops / seconds,
            "tokens_per_second": self.tokens / seconds,
        }
        self.restart()
        return rates
