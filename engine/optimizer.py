"""The optimizers and the learning-rate schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from common.errors import UserError
from config.schema import TrainConfig, number

if TYPE_CHECKING:
    from model import GPT

Group = dict[str, Any]  # a parameter group of an optimizer: {"params": ..., "lr": ..., ...}


def make_optimizer(
    model: GPT,
    config: TrainConfig,
    dtype: str = "float32",
    muon: Callable[[list[Group]], torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """Make one optimizer for all parameters, in groups with their own peak learning rate, "initial_lr".

    AdamW (Loshchilov & Hutter 2019), with weight decay on matrices but not on gains and biases. If
    config.optimizer is "muon", Muon for `model.matrices()` and AdamW for the rest. The order of the
    parameters does not depend on their rates.

    dtype: of the run's matrix products. muon: a class to use instead of Muon.
    Raises UserError if unembedding_lr is set, but the head shares the embedding's weights.
    """
    if model.config.tie_embeddings and config.unembedding_lr is not None:
        raise UserError(
            "unembedding_lr is for an untied head, but tie_embeddings is true: set unembedding_lr to null "
            "and use embedding_lr instead"
        )
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = set(model.matrices())

    def kind(parameter: torch.Tensor) -> int:
        """0: embeddings, 1: matrices of the blocks, 2: the head, 3: other matrices, 4: gains and biases."""
        if parameter in embeddings:
            return 0
        if parameter in matrices:
            return 1
        return 2 if parameter is model.lm_head.weight else 3 if parameter.dim() >= 2 else 4

    def settings(parameter: torch.Tensor) -> Group:
        k = kind(parameter)
        rate = {0: config.embedding_lr, 2: config.unembedding_lr}.get(k) or number(config.learning_rate)
        decays: Group = {"betas": (config.beta1, config.beta2)}
        if k == 1 and config.optimizer == "muon":
            rate, decays = config.matrix_lr or 0.02, {"momentum": config.momentum or 0.95}
        weight_decay = config.weight_decay if k < 4 else 0.0
        return {"weight_decay": weight_decay, "lr": rate, "initial_lr": rate, **decays}

    ordered = sorted((p for p in model.parameters() if p.requires_grad), key=kind)
    groups = [{"params": list(params), **same} for same, params in itertools.groupby(ordered, settings)]
    if config.optimizer == "muon":
        return MuonWithAdamW(groups, muon or _muon_for(dtype, matrices))
    # One fused pass over all parameters is several times faster than one operation after another.
    return torch.optim.AdamW(groups, fused=True)


def _muon_for(dtype: str, matrices: Iterable[torch.Tensor]) -> Callable[[list[Group]], torch.optim.Optimizer]:
    """Use PyTorch's Muon where it fits: it multiplies in bfloat16 and does not support stacks of matrices."""
    if dtype == "bfloat16" and hasattr(torch.optim, "Muon") and all(p.dim() == 2 for p in matrices):
        return torch.optim.Muon
    return Muon


def state_shapes(group: Group, shape: torch.Size) -> dict[str, torch.Size]:
    """{name: shape} of the optimizer state of a parameter of this shape in this group."""
    if "momentum" in group:
        return {"momentum_buffer": shape}
    return {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers in one: Muon for the groups that have a "momentum", AdamW for the others."""

    def __init__(self, groups: list[Group], muon: Callable[[list[Group]], torch.optim.Optimizer]) -> None:
        self.muon = muon([group for group in groups if "momentum" in group])
        self.adamw = torch.optim.AdamW([group for group in groups if "momentum" not in group], fused=True)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Update all parameters."""
        for part in (self.muon, self.adamw):
            # Every time, because load_state_dict replaces the objects that hold groups and state.
            part.param_groups = [g for g in self.param_groups if ("momentum" in g) == (part is self.muon)]
            part.state = self.state
            part.step()


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (Jordan et al. 2024, "Muon").

    Computes the same as torch.optim.Muon, but in float32, because bfloat16 products take 20 times as long on
    a CPU without instructions for them. Also handles stacks of matrices, and works with PyTorch before 2.9.
    """

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Update all parameters."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = self.direction(p, p.grad.lerp(state["momentum_buffer"], momentum))  # Nesterov
                p.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)

    def direction(self, parameter: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """The direction of the step; engine/zero.py computes it from a part of the parameter."""
        return orthogonal(update)


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Approximate U V^T of the update U S V^T, times sqrt(max(1, outputs / inputs)).

    update: a matrix [outputs, inputs], or a stack of them, [E, inputs, outputs].
    Newton-Schulz iteration with Jordan's coefficients, which trade accuracy for few iterations: the singular
    values end up between about 0.7 and 1.2.
    """
    rows, columns = update.shape[-2:]
    ratio = rows / columns if update.dim() == 2 else columns / rows
    x = update.float()
    x = x.mT if rows > columns else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    x = x.mT if rows > columns else x
    return x.to(update.dtype) * math.sqrt(max(1, ratio))


def rate_multiplier(step: int, config: TrainConfig) -> float:
    """The factor of all peak learning rates in this step (the first one is 0).

    Linear warm-up, then cosine decay (Loshchilov & Hutter 2017) or, with warmdown_ratio, a constant rate with
    a linear decay at the end (Hu et al. 2024, "MiniCPM", section 4). Both end at min_lr / learning_rate.
    """
    if not config.decay_lr:
        return 1.0
    end = config.lr_decay_iters or number(config.max_steps)
    ratio = config.warmup_ratio
    warmup = number(config.warmup_iters) if ratio is None else round(ratio * end)
    if step < warmup:
        return (step + 1) / warmup
    last = number(config.min_lr) / number(config.learning_rate)
    if config.warmdown_ratio is not None:
        left = (end - step) / max(1, round(config.warmdown_ratio * end))
        return last + (1 - last) * min(1.0, max(0.0, left))
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate in this step."""
    return number(config.learning_rate) * rate_multiplier(step, config)
