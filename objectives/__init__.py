"""What a model is trained for: one file per objective, found by its name.

An objective defines what a batch is, what the loss is, and which metrics are logged. A stage
(config/stages.py) names its objective. doc/extending.md shows how to write one.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from data import BatchSource, Part, TokenBatches, TokenFile


class Objective:
    """The base class of the `Objective` in each file.

    A batch is a dictionary of tensors whose first dimension is the rows. A step follows the gradient of one
    number: the sum of `loss` over all micro-batches and processes, divided by the sum of `weight`.
    """

    def source(
        self, files: Sequence[TokenFile | Part], block_size: int, batch_size: int, seed: int,
        weights: Sequence[float] = (),
    ) -> BatchSource:  # fmt: skip
        """Where batches come from in a stage that trains on files and tasks; see `TokenBatches`."""
        return TokenBatches(files, block_size, batch_size, seed, weights)

    def weight(self, batch: dict[str, Any]) -> float:
        """How much a batch counts: usually the number of tokens that the loss is summed over."""
        return float(batch["mask"].sum())

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, summed over the batch, and metrics: {name: scalar tensor, a mean over the rows}.

        In training, the gradient may include further losses. In eval mode, the metrics are those of a
        validation.
        """
        raise NotImplementedError


class LossModule(nn.Module):
    """A model and its objective as one module, which DDP, DeepSpeed and torch.compile can wrap."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(self.model, batch)


def find(name: str) -> Objective:
    """The objective in objectives/<name>.py."""
    return importlib.import_module(f"objectives.{name}").Objective()
