"""Weights as decoding/compiled.py reads them, in float32 and in 8 bits.

ROWS rows of a matrix lie side by side, a block: of all of them the first weight, then the second, and so on.
So a processor multiplies ROWS weights, one of each row, by one number of a token at a time, needs no sums
across a vector, and reads memory from one end to the other.

With 8 bits, a quarter of the memory is needed, and of the time that reading takes. Each row is cut into
groups of GROUP weights, which share a scale: w = q * scale, q in -127..127, the largest weight of a group
being 127 or -127 (symmetric; Dettmers et al. 2022, LLM.int8(), section 2.1, in groups instead of rows).
Activations stay as they are ("weight-only"), but decoding/compiled.py rounds them to 16 bits. The embedding
stays, too: a token reads one row of it.
"""

import platform

import torch
import torch.nn.functional as F
from torch import nn

GROUP, ROWS = 64, 16
# Of the products of two weights of ROWS rows, x86 adds neighbours in one instruction, Arm halves.
NEIGHBOURS = platform.machine().lower() in ("x86_64", "amd64", "x86", "i386", "i686")


def blocks_of(w):
    """w [M, N] -> [M / ROWS, ROWS, N], filled up with zeros"""
    return F.pad(w, (0, 0, 0, -w.shape[0] % ROWS)).unflatten(0, (-1, ROWS))


class PackedLinear(nn.Module):
    """An nn.Linear whose weights are `w` [M / ROWS, N, ROWS]; zeros fill up the number of rows."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.dtype = (
            linear.in_features, linear.out_features, linear.weight.dtype
        )  # fmt: skip
        self.bias = linear.bias
        self.keep(linear.weight.detach())

    def keep(self, weight):
        self.register_buffer("w", blocks_of(weight).mT.contiguous())

    @property
    def weight(self):
        """[M, N], made anew each time"""
        return self.w.mT.flatten(0, 1)[: self.out_features]

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Int8Linear(PackedLinear):
    """The same in 8 bits: `w` times `scales`, both filled up with zeros.

    w: [M / ROWS, N / 2, ROWS, 2] int8, or [M / ROWS, N / 2, 2, ROWS]; scales: [M / ROWS, N / GROUP, ROWS].
    """

    def keep(self, weight):
        w, scales = quantized(weight.float())
        self.register_buffer("w", w)
        self.register_buffer("scales", scales)

    @property
    def weight(self):
        """[M, N], as it was but for rounding"""
        pairs = (self.w if NEIGHBOURS else self.w.mT.contiguous()).view(torch.int16).squeeze(-1)
        q = pairs.mT.contiguous().view(torch.int8).unflatten(2, (-1, GROUP))  # [.., ROWS, N / GROUP, GROUP]
        weight = (q * self.scales.mT.unsqueeze(-1)).flatten(2).flatten(0, 1)
        return weight[: self.out_features, : self.in_features].to(self.dtype)


def quantized(weight):
    """[M, N] float32 -> w and scales of an Int8Linear"""
    groups = blocks_of(F.pad(weight, (0, -weight.shape[1] % GROUP))).unflatten(2, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    pairs = q.flatten(2).unflatten(2, (-1, 2)).transpose(1, 2)  # [M / ROWS, N / 2, ROWS, 2]
    return (pairs if NEIGHBOURS else pairs.mT).contiguous(), scales.squeeze(-1).mT.contiguous()


class TiedEmbedding(nn.Module):
    """An nn.Embedding that reads the rows of a PackedLinear, the output head."""

    def __init__(self, head):
        super().__init__()
        self.head = [head]  # in a list: it is no part of this one

    def forward(self, tokens):
        return self.head[0].w[tokens // ROWS, :, tokens % ROWS]


def replace(model, kind):
    """Make every nn.Linear of the model a `kind`, in place. What is no plain nn.Linear stays."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, kind(child))
    return model


def quantize(model):
    """Weights in 8 bits, in place; returns the model."""
    return replace(model, Int8Linear)


def block(model):
    """Weights in blocks, in place; returns the model, which cannot be trained any more."""
    is_tied = model.lm_head.weight is model.wte.weight
    replace(model, PackedLinear)
    if is_tied:
        model.wte = TiedEmbedding(model.lm_head)
    return model
