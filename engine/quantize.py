"""Weights in 8 bits: a quarter of the memory, and of the time that reading them takes.

Each row of a matrix is cut into groups of GROUP weights, which share a scale: w = q * scale, q in -127..127,
the largest weight of a group being 127 or -127 (symmetric; Dettmers et al. 2022, LLM.int8(), section 2.1,
in blocks instead of rows). Activations stay as they are ("weight-only"), but engine/compiled.py rounds them
to 16 bits. The embedding stays, too: a token reads one row of it.

The numbers lie in the order in which engine/compiled.py reads them: of ROWS rows the first two weights, then
the next two, and so on.
"""

import platform

import torch
import torch.nn.functional as F
from torch import nn

GROUP, ROWS = 64, 16
# Of the products of two weights of ROWS rows, x86 adds neighbours in one instruction, Arm halves.
NEIGHBOURS = platform.machine().lower() in ("x86_64", "amd64", "x86", "i386", "i686")


class Int8Linear(nn.Module):
    """An nn.Linear whose weights are `q` times `scales`; zeros fill up the rows and their number.

    q: [M / ROWS, N / 2, ROWS, 2] int8, or [M / ROWS, N / 2, 2, ROWS]; scales: [M / ROWS, N / GROUP, ROWS].
    """

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
        pairs = (self.q if NEIGHBOURS else self.q.mT.contiguous()).view(torch.int16).squeeze(-1)
        q = pairs.mT.contiguous().view(torch.int8).unflatten(2, (-1, GROUP))  # [.., ROWS, N / GROUP, GROUP]
        weight = (q * self.scales.mT.unsqueeze(-1)).flatten(2).flatten(0, 1)
        return weight[: self.out_features, : self.in_features].to(self.dtype)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def quantized(w):
    """w [M, N] float32 -> q and scales of an Int8Linear"""
    w = F.pad(w, (0, -w.shape[1] % GROUP, 0, -w.shape[0] % ROWS))
    groups = w.unflatten(1, (-1, GROUP)).unflatten(0, (-1, ROWS))  # [M / ROWS, ROWS, N / GROUP, GROUP]
    scales = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    pairs = q.flatten(2).unflatten(2, (-1, 2)).transpose(1, 2)  # [M / ROWS, N / 2, ROWS, 2]
    return (pairs if NEIGHBOURS else pairs.mT).contiguous(), scales.squeeze(-1).mT.contiguous()


def quantize(model):
    """Replace every nn.Linear of the model in place; returns it. What is no plain nn.Linear stays."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model
