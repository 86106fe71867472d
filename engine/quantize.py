"""Weights in 8 bits: a quarter of the memory, and of the time that reading them takes.

Each row of a matrix is cut into groups of GROUP weights, which share a scale: w = q * scale, q in -127..127,
the largest weight of a group being 127 or -127 ("weight-only", symmetric; Dettmers et al. 2022, LLM.int8(),
section 2.1, in blocks instead of rows). Activations stay as they are. The embedding does, too: a token reads
one row of it.
"""

import torch
import torch.nn.functional as F
from torch import nn

GROUP = 64


class Int8Linear(nn.Module):
    """An nn.Linear whose weights are `q` [M, N] int8 times `scales` [M, N / GROUP]; zeros fill N up."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.dtype = (
            linear.in_features, linear.out_features, linear.weight.dtype
        )  # fmt: skip
        q, scales = quantized(linear.weight.detach().float())
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    @property
    def weight(self):
        """[M, N], as it was but for rounding."""
        weight = self.q.unflatten(1, (-1, GROUP)) * self.scales.unsqueeze(-1)
        return weight.flatten(1)[:, : self.in_features].to(self.dtype)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def quantized(w):
    """w [M, N] float32 -> int8 [M, N], scales [M, N / GROUP]; N is filled up to whole groups."""
    groups = F.pad(w, (0, -w.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return q.flatten(1), scales.squeeze(-1)


def quantize(model):
    """Replace every nn.Linear of the model in place; returns it. What is no plain nn.Linear stays."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model
