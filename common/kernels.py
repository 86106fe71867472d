"""Operations that PyTorch lacks or runs more slowly: attention, loss and grouped matrix products.

Attention and loss are for training in float32 on a CPU. Their backward passes are written by hand, and both
replace PyTorch's operations by fewer, larger ones. `GPT.use_custom_kernels` turns them on; doc/speed.md says
what each of them gains. tests/common/test_kernels.py compares everything with PyTorch's own operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

MAX_BLOCKS, MIN_BLOCK = 4, 128  # `causal_attention`: at most 4 blocks of queries, each 128 or longer
ALIGNMENT = 64  # `linear_cross_entropy`: the rows of logits are padded to a multiple of this


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + causal mask) v; all of shape [B, H, T, D].

    Queries are processed in blocks, and each block only uses the keys up to its end. So nearly half of the
    work on a long sequence is skipped, and the rest consists of large matrix products, which suit a CPU best.
    The attention weights are kept for the backward pass.
    """
    return _CausalAttention.apply(*(t.flatten(0, 1) for t in (q, k, v))).view(q.shape)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """The output head and its loss in one step. x [N, C], weight [V, C], targets [N].

    softcap: replaces the logits by softcap * tanh(logits / softcap) (Gemma Team 2024, section 2).
    Returns the cross-entropies in nats [N].

    Matrix products whose rows have an odd length are a third slower, and a vocabulary can have any size. So
    the rows are padded with -inf to the next multiple of 64.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, softcap)


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Multiply the first sizes[0] rows of x with weight[0], the next sizes[1] rows with weight[1], and so on.

    x: [N, I]. weight: [E, I, O], one matrix per expert. sizes: [E], integers that sum to N. Returns [N, O].
    Works on any device and in any precision, with torch.nn.functional.grouped_mm where that is possible.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if hasattr(F, "grouped_mm") and aligned and x.dtype != torch.float64 and x.device.type in ("cpu", "cuda"):
        return F.grouped_mm(x, weight, offs=sizes.cumsum(0, dtype=torch.int32))
    parts = zip(x.split(sizes.tolist()), weight.unbind(), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        _, length, dim = q.shape
        size = max(-(-length // MAX_BLOCKS), MIN_BLOCK)
        future = torch.full((size, size), -math.inf, dtype=q.dtype).triu_(1)
        output, weights = torch.empty_like(q), []
        for start in range(0, length, size):
            end = min(start + size, length)
            scores = torch.baddbmm(
                q.new_zeros(()), q[:, start:end], k[:, :end].mT, beta=0, alpha=1 / math.sqrt(dim)
            )
            scores[:, :, start:] += future[: end - start, : end - start]
            weights.append(scores.softmax(-1))
            torch.bmm(weights[-1], v[:, :end], out=output[:, start:end])
        ctx.save_for_backward(q, k, v, *weights)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        q, k, v, *weights = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for p in weights:
            end = p.shape[2]
            grad_block = grad_output[:, start:end]
            grad_v[:, :end].baddbmm_(p.mT, grad_block)
            grad_p = torch.bmm(grad_block, v[:, :end].mT)
            # Backward of softmax: dS = P * (dP - sum(dP * P)).
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:end] = torch.bmm(grad_scores, k[:, :end]).mul_(scale)
            grad_k[:, :end].baddbmm_(grad_scores.mT, q[:, start:end], alpha=scale)
            start = end
        return grad_q, grad_k, grad_v


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        size = weight.shape[0]
        rows = x.new_empty(x.shape[0], -(-size // ALIGNMENT) * ALIGNMENT)
        rows[:, size:] = -math.inf
        logits = rows[:, :size]
        torch.mm(x, weight.mT, out=logits)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        p = rows.softmax(-1)
        # log sum exp(logits) = max logit - log(its p), which cannot underflow
        log_sums = rows.amax(-1) - p.amax(-1).log()
        ctx.save_for_backward(x, weight, targets, p, rows if softcap else None)
        ctx.softcap = softcap
        return log_sums - logits.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> Any:
        x, weight, targets, p, rows = ctx.saved_tensors
        grad_losses = grad_losses[:, None]
        grad = p.mul_(grad_losses).scatter_add_(1, targets[:, None], -grad_losses)[:, : weight.shape[0]]
        if ctx.softcap:
            # derivative of tanh: 1 - tanh²
            slope = (rows[:, : weight.shape[0]] / ctx.softcap).square_().neg_().add_(1)
            grad.mul_(slope)
        return grad @ weight, grad.mT @ x, None, None
