"""From gradients to steps: the optimizer and the learning-rate schedule."""

import math

import torch


def make_optimizer(model, config):
    """AdamW (Loshchilov & Hutter 2019), with weight decay on matrices and not on gains and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # One fused pass over all numbers is several times faster than one operation after another.
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def learning_rate_at(step, config):
    """Rate of the step with this number (the first is 0): linear warm-up, then a cosine to min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    end = config.lr_decay_iters or config.max_steps
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    progress = min(1.0, (step - config.warmup_iters) / (end - config.warmup_iters))
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
