"""One pass of a model with the objective of language modelling."""

import torch

import objectives


def lm_loss(model, tokens, targets, mask=None, divisor=None):
    """(loss, metrics); the loss is divided by `divisor`, or else by the sum of the mask."""
    mask = torch.ones_like(targets, dtype=torch.float32) if mask is None else mask
    batch = {"x": tokens, "y": targets, "mask": mask}
    loss, metrics = objectives.find("lm").loss(model, batch)
    return loss / (mask.sum() if divisor is None else divisor), metrics


def lm_pass(model, tokens, targets, mask=None, divisor=None):
    """(logits, loss, metrics)"""
    loss, metrics = lm_loss(model, tokens, targets, mask, divisor)
    with torch.no_grad():
        return model(tokens), loss, metrics
