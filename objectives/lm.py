"""Language modelling, the objective of pretraining and supervised fine-tuning (SFT): predict the next token.

The two stages differ only in their data: in SFT, the mask is 1 on the answers and 0 elsewhere.
"""

from typing import Any

from torch import Tensor

import objectives


class Objective(objectives.Objective):
    """A batch: tokens "x" [B, T], the tokens that follow them "y" [B, T], and a "mask" [B, T].

    The loss is the cross-entropy in nats, summed over the positions where the mask is 1.
    """

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        targets, mask = batch["y"], batch["mask"]
        x = model.hidden(batch["x"])
        losses = model.token_losses(x.flatten(0, 1), targets.flatten())
        loss = (losses * mask.flatten()).sum()
        if not model.training:
            return loss, self.validation_metrics(model, x, batch)
        auxiliary, metrics = model.auxiliary_loss(x, targets, mask)
        if auxiliary is not None:
            # The value stays the language-modelling loss, but the gradient includes the auxiliary losses.
            loss = loss + (auxiliary - auxiliary.detach())
        return loss, metrics

    def validation_metrics(self, model: Any, x: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Further metrics of a validation. x [B, T, C] are the model's final vectors."""
        return {}
