"""From gradients to steps: the optimizers and the learning-rate schedules."""

import itertools
import math

import torch

from common.errors import UserError


def make_optimizer(model, config, dtype="float32", muon=None):
    """One optimizer of all parameters, in groups that have a peak rate, "initial_lr", each.

    AdamW (Loshchilov & Hutter 2019), with weight decay on matrices and not on gains and biases; with
    config.optimizer "muon", Muon for `model.matrices()` and AdamW for the rest. Parameters have the same
    order whatever their rates. dtype: that of the run's products. muon: a class to use instead of Muon.
    UserError for an unembedding_lr where the head is the embedding.
    """
    if model.config.tie_embeddings and config.unembedding_lr is not None:
        raise UserError(
            "unembedding_lr is for an untied head, and tie_embeddings is true: set it to null, and "
            "embedding_lr instead"
        )
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = set(model.matrices())

    def kind(parameter):
        if parameter in embeddings:
            return 0
        if parameter in matrices:
            return 1
        return 2 if parameter is model.lm_head.weight else 3 if parameter.dim() >= 2 else 4

    def settings(parameter):
        at = kind(parameter)
        rate = {0: config.embedding_lr, 2: config.unembedding_lr}.get(at) or config.learning_rate
        how = {"betas": (config.beta1, config.beta2)}
        if at == 1 and config.optimizer == "muon":
            rate, how = config.matrix_lr or 0.02, {"momentum": config.momentum or 0.95}
        return {"weight_decay": config.weight_decay if at < 4 else 0.0, "lr": rate, "initial_lr": rate, **how}

    ordered = sorted((p for p in model.parameters() if p.requires_grad), key=kind)
    groups = [{"params": list(some), **same} for same, some in itertools.groupby(ordered, settings)]
    if config.optimizer == "muon":
        return MuonWithAdamW(groups, muon or _muon_for(dtype, matrices))
    # One fused pass over all numbers is several times faster than one operation after another.
    return torch.optim.AdamW(groups, fused=True)


def _muon_for(dtype, matrices):
    """PyTorch's Muon multiplies in bfloat16, one matrix at a time: for runs in bfloat16, and no stacks."""
    if dtype == "bfloat16" and hasattr(torch.optim, "Muon") and all(p.dim() == 2 for p in matrices):
        return torch.optim.Muon
    return Muon


def state_shapes(group, shape):
    """{name: shape} of what is kept of a parameter of this shape and this group of an optimizer."""
    if "momentum" in group:
        return {"momentum_buffer": shape}
    return {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers in one: Muon takes the groups that have a "momentum", AdamW the others."""

    def __init__(self, groups, muon):
        self.muon = muon([group for group in groups if "momentum" in group])
        self.adamw = torch.optim.AdamW([group for group in groups if "momentum" not in group], fused=True)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for part in (self.muon, self.adamw):
            # Anew each time: what holds groups and state is replaced when a state is loaded.
            part.param_groups = [g for g in self.param_groups if ("momentum" in g) == (part is self.muon)]
            part.state = self.state
            part.step()


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024, "Muon"), as in torch.optim.Muon.

    The same numbers, but in float32, where the products of torch.optim.Muon are in bfloat16: on a CPU without
    instructions for it, that takes 20 times as long. And for PyTorch before 2.9, and for stacks of matrices.
    """

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = self.direction(p, p.grad.lerp(state["momentum_buffer"], momentum))  # Nesterov's
                p.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)

    def direction(self, parameter, update):
        return orthogonal(update)


def orthogonal(update):
    """U V^T of the update U S V^T, roughly, times sqrt(max(1, outputs / inputs)).

    update: a matrix [outputs, inputs], or a stack of them, [E, inputs, outputs]. Singular values end
    between about 0.7 and 1.2: the coefficients of the iteration are Jordan's, chosen for few steps.
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


def rate_multiplier(step, config):
    """What the peak rates are multiplied with in the step with this number; the first is 0.

    Linear warm-up; then a cosine (Loshchilov & Hutter 2017), or, with warmdown_ratio, a constant that falls
    in a line at the end (Hu et al. 2024, "MiniCPM", section 4). Both end at min_lr / learning_rate.
    """
    if not config.decay_lr:
        return 1.0
    end = config.lr_decay_iters or config.max_steps
    warmup = config.warmup_iters if config.warmup_ratio is None else round(config.warmup_ratio * end)
    if step < warmup:
        return (step + 1) / warmup
    last = config.min_lr / config.learning_rate
    if config.warmdown_ratio is not None:
        left = (end - step) / max(1, round(config.warmdown_ratio * end))
        return last + (1 - last) * min(1.0, max(0.0, left))
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate_at(step, config):
    """learning_rate in the step with this number."""
    return config.learning_rate * rate_multiplier(step, config)
