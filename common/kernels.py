"""Operations that PyTorch has not, or not as fast: attention, loss, and products of many matrices.

Attention and loss are for training in float32 on a CPU, with backward passes written by hand; both trade
PyTorch's operations for fewer and better shaped ones. `GPT.use_custom_kernels` turns them on, and
doc/speed.md has what each of them gains. tests/common/test_kernels.py holds all to PyTorch's own.
"""

import math

import torch
import torch.nn.functional as F

BLOCKS, SHORTEST = 4, 128  # of queries in `causal_attention`: at most so many, of at least this length
ALIGNMENT = 64  # numbers per row of logits: a multiple of this


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D) + causal mask) v; all [B, H, T, D].

    The queries are taken in blocks, and a block looks only at the keys up to its end, so
    nearly half of the products of a long text are never made; what remains are large plain matrix
    products, which a CPU does best. It keeps the attention weights for the backward pass.
    """
    return _CausalAttention.apply(*(t.flatten(0, 1) for t in (q, k, v))).view(q.shape)


def linear_cross_entropy(x, weight, targets, softcap=None):
    """The output head and its loss in one: x [N, C], weight [V, C], targets [N] -> cross-entropy in nats [N].

    softcap: of the logits, which become softcap * tanh(logits / softcap) (Gemma Team 2024, section 2).

    A vocabulary is rarely a multiple of anything, and a product that writes rows of an odd length is
    a third slower; here rows are as long as the next multiple of 64, and the rest of them is -inf.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, softcap)


def grouped_product(x, weight, sizes):
    """x [N, I] times weight [E, I, O]: the first sizes[0] rows with the first matrix, and so on; -> [N, O]

    For the experts of a mixture, on any device and in any precision: one call of PyTorch's where it has one.
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
    def forward(ctx, q, k, v):
        n, length, dim = q.shape
        size = max(-(-length // BLOCKS), SHORTEST)
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
    def backward(ctx, grad_output):
        q, k, v, *weights = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for p in weights:
            end = p.shape[2]
            grad_block = grad_output[:, start:end]
            grad_v[:, :end].baddbmm_(p.mT, grad_block)
            grad_p = torch.bmm(grad_block, v[:, :end].mT)
            # The softmax's Jacobian: dS = P * (dP - sum(dP * P)).
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:end] = torch.bmm(grad_scores, k[:, :end]).mul_(scale)
            grad_k[:, :end].baddbmm_(grad_scores.mT, q[:, start:end], alpha=scale)
            start = end
        return grad_q, grad_k, grad_v


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap):
        size = weight.shape[0]
        rows = x.new_empty(x.shape[0], -(-size // ALIGNMENT) * ALIGNMENT)
        rows[:, size:] = -math.inf
        logits = rows[:, :size]
        torch.mm(x, weight.mT, out=logits)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        p = rows.softmax(-1)
        # log sum exp(logits), by way of each row's largest, whose p cannot underflow
        log_sums = rows.amax(-1) - p.amax(-1).log()
        ctx.save_for_backward(x, weight, targets, p, rows if softcap else None)
        ctx.softcap = softcap
        return log_sums - logits.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, grad_losses):
        x, weight, targets, p, rows = ctx.saved_tensors
        grad_losses = grad_losses[:, None]
        grad = p.mul_(grad_losses).scatter_add_(1, targets[:, None], -grad_losses)[:, : weight.shape[0]]
        if ctx.softcap:
            # d tanh = 1 - tanh²
            slope = (rows[:, : weight.shape[0]] / ctx.softcap).square_().neg_().add_(1)
            grad.mul_(slope)
        return grad @ weight, grad.mT @ x, None, None
