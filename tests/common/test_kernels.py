"""common/kernels.py compared with PyTorch's own operations and autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F

from common import kernels


def draw(*shape, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def assert_same(ours, theirs, inputs):
    """Equal outputs, and equal gradients for a random gradient of the outputs."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5, 64, 127, 128, 129, 130, 255, 256, 300, 515])
def test_causal_attention(length):
    torch.manual_seed(length)
    q, k, v = (draw(2, 3, length, 10) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_same(kernels.causal_attention(q, k, v), expected, (q, k, v))


def test_causal_attention_of_heads_that_lie_apart():
    """As in the model: queries, keys and values are views of one tensor [B, T, heads, D]."""
    torch.manual_seed(0)
    qkv = draw(2, 9, 6, 4)
    q, k, v = qkv.transpose(1, 2).split(2, dim=1)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_same(kernels.causal_attention(q, k, v), expected, (qkv,))


def head(x, weight, softcap):
    logits = x @ weight.T
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@pytest.mark.parametrize("vocab_size", [2, 63, 64, 65, 200])
@pytest.mark.parametrize("scale", [1, 100], ids=["mild", "huge logits"])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_linear_cross_entropy(vocab_size, scale, softcap):
    torch.manual_seed(0)
    x, weight = draw(31, 6, scale=scale), draw(vocab_size, 6)
    targets, weights = torch.randint(vocab_size, (31,)), torch.rand(31, dtype=torch.float64)
    weights[3:9] = 0
    found = kernels.linear_cross_entropy(x, weight, targets, softcap)
    expected = F.cross_entropy(head(x, weight, softcap), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    assert_same((found * weights).sum(), (expected * weights).sum(), (x, weight))


@pytest.mark.parametrize("sizes", [(3, 0, 5, 2), (0, 0, 0, 1), (10, 0, 0, 0)])
@pytest.mark.parametrize("shape", [(16, 12), (15, 11)], ids=["aligned", "odd"])
def test_grouped_products(monkeypatch, sizes, shape):
    """In float32, because PyTorch's grouped_mm does not support float64."""
    sizes = torch.tensor(sizes)
    x = torch.randn(int(sizes.sum()), shape[0], requires_grad=True)
    weight = torch.randn(4, *shape, requires_grad=True)
    group = torch.arange(4).repeat_interleave(sizes)
    exact = torch.einsum("ni,nio->no", x, weight[group])
    g = torch.randn_like(exact)
    expected = exact.detach(), *torch.autograd.grad((exact * g).sum(), (x, weight))
    for way in ("as it is", "without PyTorch's"):
        if way != "as it is":
            monkeypatch.delattr(F, "grouped_mm", raising=False)
        y = kernels.grouped_matmul(x, weight, sizes)
        found = y.detach(), *torch.autograd.grad((y * g).sum(), (x, weight))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
