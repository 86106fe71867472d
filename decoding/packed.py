"""Weight matrices packed for decoding/compiled.py, in float32 or in 8 bits.

A matrix [M, N] is cut into blocks of ROWS rows. In a block, the weights are stored column by column: first
the ROWS weights of column 0, then those of column 1, and so on. So a processor can load ROWS weights as one
vector, one from each row, and multiply it by one number of the input. The sum of each row stays in its own
lane of a vector, and memory is read from beginning to end.

With 8 bits, weights need a quarter of the memory, and of the time to read it. Each row is cut into groups of
GROUP weights that share a scale: w = q * scale with q in -127..127, such that the largest weight of the group
becomes 127 or -127 (symmetric quantization; Dettmers et al. 2022, LLM.int8(), section 2.1, with groups in
place of rows). Activations are not quantized ("weight-only"), except that decoding/compiled.py rounds them to
16 bits. Neither is the embedding: only one row of it is read per token.
"""

import platform
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
GROUP, ROWS = 64, 16
# Integer products are computed for two columns at once, and the two products of each row are added. x86 has
# an instruction that adds neighbouring lanes, so the two weights of a row are neighbours there; on Arm, where
# adding the two halves of a vector is cheaper, one half of it holds the first column and the other half the
# second.
PAIRS_ARE_NEIGHBOURS = platform.machine().lower() in ("x86_64", "amd64", "x86", "i386", "i686")


def to_blocks(w: torch.Tensor) -> torch.Tensor:
    """w [M, N] -> [M / ROWS, ROWS, N], M padded with zeros"""
    return F.pad(w, (0, 0, 0, -w.shape[0] % ROWS)).unflatten(0, (-1, ROWS))


class PackedLinear(nn.Module):
    """An nn.Linear with weights `w` [M / ROWS, N, ROWS], M padded with zeros."""

    w: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        self.store(linear.weight.detach())

    def store(self, weight: torch.Tensor) -> None:
        self.register_buffer("w", to_blocks(weight).mT.contiguous())

    @property
    def weight(self) -> torch.Tensor:
        """The unpacked matrix [M, N], computed anew each time"""
        return self.w.mT.flatten(0, 1)[: self.out_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear(PackedLinear):
    """A PackedLinear in 8 bits: weights `w` times `scales`, both padded with zeros.

    w: int8 [M / ROWS, N / 2, ROWS, 2] if PAIRS_ARE_NEIGHBOURS, else [M / ROWS, N / 2, 2, ROWS].
    scales: float32 [M / ROWS, N / GROUP, ROWS].
    """

    scales: torch.Tensor

    def store(self, weight: torch.Tensor) -> None:
        w, scales = quantize_matrix(weight.float())
        self.register_buffer("w", w)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> torch.Tensor:
        """The unpacked matrix [M, N] in the original dtype, up to rounding"""
        pairs = (self.w if PAIRS_ARE_NEIGHBOURS else self.w.mT.contiguous()).view(torch.int16).squeeze(-1)
        q = pairs.mT.contiguous().view(torch.int8).unflatten(2, (-1, GROUP))  # [.., ROWS, N / GROUP, GROUP]
        weight = (q * self.scales.mT.unsqueeze(-1)).flatten(2).flatten(0, 1)
        return weight[: self.out_features, : self.in_features].to(self.dtype)


def quantize_matrix(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, N] float32 -> (w, scales) of an Int8Linear"""
    groups = to_blocks(F.pad(weight, (0, -weight.shape[1] % GROUP))).unflatten(2, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    q = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    pairs = q.flatten(2).unflatten(2, (-1, 2)).transpose(1, 2)  # [M / ROWS, N / 2, ROWS, 2]
    w = (pairs if PAIRS_ARE_NEIGHBOURS else pairs.mT).contiguous()
    return w, scales.squeeze(-1).mT.contiguous()


class TiedEmbedding(nn.Module):
    """An nn.Embedding that reads its rows from the PackedLinear of the output head."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.head = [head]  # in a list, so that it does not become a submodule

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head[0].w[tokens // ROWS, :, tokens % ROWS]


def replace_linears(model: nn.Module, kind: type[PackedLinear]) -> None:
    """Replace every plain nn.Linear of the model, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, kind(child))


def quantize(model: Model) -> Model:
    """Convert the weights to 8 bits, in place; returns the model."""
    replace_linears(model, Int8Linear)
    return model


def pack(model: Any) -> None:
    """Pack the weights of a GPT, in place. It can no longer be trained."""
    is_tied = model.lm_head.weight is model.wte.weight
    replace_linears(model, PackedLinear)
    if is_tied:
        model.wte = TiedEmbedding(model.lm_head)
