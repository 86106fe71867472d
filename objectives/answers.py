"""Language modelling on questions and answers of which only the answer counts: the objective of toy
problems."""

from typing import Any

from torch import Tensor

from objectives import lm


class Objective(lm.Objective):
    """Also measures, in validation, the share of rows whose likeliest tokens are right wherever the mask is
    1."""

    def validation_metrics(self, model: Any, x: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        right = (model.logits(x).argmax(-1) == batch["y"]) | (batch["mask"] == 0)
        return {"accuracy": right.all(-1).float().mean()}
