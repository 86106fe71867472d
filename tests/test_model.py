"""model.py compared with itself, with float64 and with formulas. tests/test_model_oracle.py compares it with
other implementations."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from lm_pass import lm_loss, lm_pass
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config.schema import ModelConfig
from decoding.sampling import generate
from model import (
    GPT,
    KVCache,
    RMSNorm,
    apply_rotary_emb,
    rotary_table,
)
from models import nanochat

SMALL = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, n_hidden=40)


def build(seed=0, std=0.2, **fields):
    """A small model in eval(), with much larger weights than initial ones, so that errors show."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), std)
    return model.eval()


def random_tokens(*shape, seed=1, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def differ(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def greedy_without_cache(model, tokens, max_tokens):
    """Greedy decoding by definition. At the end of the context, the newer half of it is kept."""
    window, answer = list(tokens)[-model.config.block_size :], []
    while len(answer) < max_tokens:
        if len(window) > model.config.block_size:
            window = window[-max(1, model.config.block_size // 2) :]
        with torch.no_grad():
            answer.append(model(torch.tensor([window]))[0, -1].argmax().item())
        window.append(answer[-1])
    return answer


POSITIONS = pytest.mark.parametrize("use_rope", [True, False], ids=["rope", "learned"])
GROUPS = pytest.mark.parametrize("n_kv_head", [4, 2, 1])


# ---- shape and size ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(n_kv_head=1, head_dim=10, bias=True),
        dict(tie_embeddings=False, qk_norm=False, n_layer=3),
        dict(use_rope=False, head_dim=5, n_kv_head=4, n_hidden=17, bias=True, tie_embeddings=False),
    ],
)
def test_n_params_by_hand(fields):
    model = build(**fields)
    c = model.config
    V, C, D, H, G, M = c.vocab_size, c.n_embd, c.head_dim, c.n_head, c.n_kv_head, c.n_hidden
    layer = C * (H + 2 * G) * D + H * D * C + 3 * C * M + 2 * C
    layer += 2 * D * c.qk_norm
    layer += c.bias * ((H + 2 * G) * D + C + 2 * M + C)
    whole = V * C * (1 if c.tie_embeddings else 2) + c.n_layer * layer + C
    whole += 0 if c.use_rope else c.block_size * C
    assert model.n_params == whole


def test_defaults_follow_from_the_width():
    config = ModelConfig(n_embd=96, n_head=6).resolved(100)
    assert (config.vocab_size, config.n_kv_head, config.head_dim, config.n_hidden) == (100, 6, 16, 256)
    assert ModelConfig(vocab_size=7).resolved(100).vocab_size == 7


def test_state_dict_is_the_parameters_and_nothing_else():
    for fields in ({}, dict(tie_embeddings=False), dict(use_rope=False)):
        model = build(**fields)
        state = model.state_dict()
        assert set(state) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
        again = build(seed=5, **fields)
        again.load_state_dict(state)
        tokens = random_tokens(2, 9)
        assert torch.equal(model(tokens), again(tokens))


def test_a_fresh_model_knows_nothing():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=500, n_embd=64, n_layer=8, bias=True))
    _, loss, _ = lm_pass(
        model, random_tokens(4, 50, vocab_size=500), random_tokens(4, 50, seed=2, vocab_size=500)
    )
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for block in model.blocks:
        for linear in (block.attn.proj, block.mlp.down):
            assert linear.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
            assert not linear.bias.any()


LONGER = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
# The changed key, further settings, and where the change must have an effect.
CHANGES = {
    "architecture": ("llama", {}, "refused"),
    "block_size": (15, {}, "context"),
    "vocab_size": (24, {}, "weights"),
    "n_layer": (3, {}, "weights"),
    "n_head": (8, dict(head_dim=6), "weights"),
    "n_kv_head": (4, {}, "weights"),
    "n_embd": (32, {}, "weights"),
    "head_dim": (8, {}, "weights"),
    "n_hidden": (41, {}, "weights"),
    "dropout": (0.5, {}, "training"),
    "bias": (True, {}, "weights"),
    "use_rope": (False, {}, "weights"),
    "rope_scaling": (LONGER, {}, "output"),
    "rope_theta": (100.0, {}, "output"),
    "norm_eps": (0.1, {}, "output"),
    "is_causal": (False, {}, "output"),
    "qk_norm": (False, {}, "weights"),
    "tie_embeddings": (False, {}, "weights"),
}


@pytest.mark.parametrize("field", ModelConfig.model_fields)
def test_every_key_changes_something(field):
    value, beside, where = CHANGES[field]
    if where == "refused":
        with pytest.raises(ValidationError):
            ModelConfig(**{field: value})
        return
    before, after = build(**beside), build(**beside, **{field: value})
    shapes = [[(name, p.shape) for name, p in model.named_parameters()] for model in (before, after)]
    tokens = random_tokens(1, 16)
    if where == "weights":
        assert shapes[0] != shapes[1]
    elif where == "context":
        before(tokens)
        with pytest.raises(ValueError):
            after(tokens)
    else:
        assert shapes[0] == shapes[1]
        after.load_state_dict(before.state_dict())
        same = torch.equal(before(tokens)[0], after(tokens)[0])
        assert same == (where == "training")
        assert not torch.equal(before.train()(tokens), after.train()(tokens))


# ---- building blocks -----------------------------------------------------------------------------


def test_rms_norm_is_its_formula():
    norm = RMSNorm(12, 0.01)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 12)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight
    assert differ(norm(x), exact) < 1e-6


def test_rotation_is_multiplication_by_complex_numbers():
    cos, sin = rotary_table(8, 50, 500.0)
    x = torch.randn(2, 50, 3, 8, dtype=torch.float64)
    turned = apply_rotary_emb(x, cos[:, None], sin[:, None])
    for position, pair in itertools.product((0, 1, 49), range(4)):
        angle = position * 500.0 ** (-2 * pair / 8)
        z = torch.complex(x[:, position, :, pair], x[:, position, :, pair + 4])
        z = z * complex(math.cos(angle), math.sin(angle))
        assert differ(turned[:, position, :, pair], z.real) < 1e-5
        assert differ(turned[:, position, :, pair + 4], z.imag) < 1e-5


def test_rotary_attention_sees_only_distances():
    cos, sin = rotary_table(8, 64, 10000.0)
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (apply_rotary_emb(q, cos[i], sin[i]) * apply_rotary_emb(k, cos[j], sin[j])).sum().item()

    assert score(12, 5) == pytest.approx(score(57, 50), abs=1e-5)
    assert score(12, 5) != pytest.approx(score(12, 6), abs=1e-3)


def test_grouped_heads_share_keys_and_values():
    grouped = build(n_kv_head=2)
    full = build(n_kv_head=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith("qkv.weight"):
            q, k, v = weight.view(8, 6, 24).split((4, 2, 2))
            copied = (q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))
            state[name] = torch.cat(copied).reshape(12 * 6, 24)
    full.load_state_dict(state)
    tokens = random_tokens(2, 11)
    assert differ(grouped(tokens), full(tokens)) < 1e-5


@POSITIONS
def test_a_causal_model_does_not_see_ahead_and_the_other_does(use_rope):
    tokens = random_tokens(1, 10)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 23
    causal = build(use_rope=use_rope)
    difference = (causal(tokens) - causal(changed)).abs().amax(-1)[0]
    assert difference[:7].max() == 0 and difference[7:].min() > 1e-3
    full = build(use_rope=use_rope, is_causal=False)
    assert (full(tokens) - full(changed)).abs().amax(-1).min() > 1e-3


# ---- kernels for a CPU ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(use_rope=False, n_kv_head=4),
        dict(qk_norm=False, tie_embeddings=False, bias=True),
        dict(block_size=259, n_layer=1),  # long enough for attention in blocks
        dict(is_causal=False),
    ],
)
def test_a_model_trains_alike_with_the_kernels_for_a_cpu(fields):
    model = build(**fields).train()
    length = model.config.block_size
    tokens, targets = random_tokens(2, length), random_tokens(2, length, seed=2)
    mask = (random_tokens(2, length, seed=3) % 3).float()
    logits, losses, gradients = [], [], []
    for on in (False, True):
        model.use_custom_kernels(on)
        model.zero_grad()
        y, loss, _ = lm_pass(model, tokens, targets, mask)
        names = graph_of(loss)
        assert ("_LinearCrossEntropy" in names) == on
        assert ("_CausalAttention" in names) == (on and length >= 256)
        (loss + 0.1 * y.square().mean()).backward()
        logits.append(y), losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert differ(*logits) < 1e-4 * logits[0].abs().max()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for plain, custom_kernels in zip(*gradients, strict=True):
        assert differ(plain, custom_kernels) < 1e-4 * plain.abs().max()


def graph_of(tensor):
    """The names of all autograd nodes of a tensor."""
    names, stack, seen = "", [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names += node.name() + " "
            stack += [following for following, _ in node.next_functions]
    return names


# ---- the KV cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head, head_dim", [(4, None), (2, 10), (1, 8)])
def test_cache_memory(n_kv_head, head_dim):
    model = build(n_kv_head=n_kv_head, head_dim=head_dim, n_layer=3)
    for capacity in (None, 7):
        cache = model.new_cache(5, capacity)
        expected = 2 * 3 * 5 * n_kv_head * (capacity or 16) * (head_dim or 6)
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert sum(t.untyped_storage().nbytes() for t in held) == 4 * expected
        assert cache.capacity == (capacity or 16)


@torch.no_grad()
@POSITIONS
@GROUPS
def test_token_by_token_equals_all_at_once(use_rope, n_kv_head):
    model = build(use_rope=use_rope, n_kv_head=n_kv_head)
    tokens = random_tokens(3, 16)
    cache = model.new_cache(3)
    steps = [model(tokens[:, t : t + 1], cache=cache) for t in range(16)]
    assert differ(torch.cat(steps, 1), model(tokens)) < 1e-5
    assert cache.lengths.tolist() == [16] * 3


@torch.no_grad()
@POSITIONS
@GROUPS
@pytest.mark.parametrize("chunks", [(16,), (15, 1), (1, 15), (5, 5, 6), (8, 1, 1, 6), (2, 3, 4, 7)])
def test_any_chunking_equals_all_at_once(use_rope, n_kv_head, chunks):
    model = build(use_rope=use_rope, n_kv_head=n_kv_head)
    tokens = random_tokens(2, 16)
    cache = model.new_cache(2)
    parts = [model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)]
    assert differ(torch.cat(parts, 1), model(tokens)) < 1e-5


SCHEDULES = {  # for each pass, how many real tokens each of the three rows gets
    "prefill, then one by one": [(5, 2, 7), *[(1, 1, 1)] * 8],
    "prefill, then chunks": [(1, 4, 6), (3, 3, 3), (2, 2, 2), (4, 4, 4)],
    "everything ragged": [(3, 5, 1), (1, 1, 1), (4, 2, 3), (1, 1, 1), (2, 1, 4), (1, 1, 1)],
    "rows that wait": [(0, 4, 2), (3, 0, 1), (1, 1, 0), (0, 0, 5), (2, 1, 1)],
    "alike first, ragged later": [(4, 4, 4), (1, 1, 1), (1, 3, 2), (1, 1, 1), (2, 2, 2)],
}


@torch.no_grad()
@POSITIONS
@GROUPS
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_rows_of_different_lengths(use_rope, n_kv_head, schedule):
    """Each row of a right-padded, ragged batch gets the result that it gets alone, without a cache."""
    model = build(use_rope=use_rope, n_kv_head=n_kv_head, block_size=24)
    cache = model.new_cache(3)
    totals = [sum(counts) for counts in zip(*schedule, strict=True)]
    rows = [random_tokens(total, seed=10 + i) for i, total in enumerate(totals)]
    alone = [model(row[None])[0] for row in rows]
    done = [0, 0, 0]
    for step, counts in enumerate(schedule):
        tokens = random_tokens(3, max(counts), seed=100 + step)  # the padding may be anything
        for i, n in enumerate(counts):
            tokens[i, :n] = rows[i][done[i] : done[i] + n]
        lengths = torch.tensor(counts) if len(set(counts)) > 1 else None
        logits = model(tokens, cache=cache, lengths=lengths)
        for i, n in enumerate(counts):
            if n:
                assert differ(logits[i, :n], alone[i][done[i] : done[i] + n]) < 1e-5
            done[i] += n
    assert cache.lengths.tolist() == totals


@torch.no_grad()
def test_what_lies_behind_a_rows_end_is_never_looked_at():
    model = build()
    for poison in (0.0, 1e6):
        cache = model.new_cache(2)
        for layer in cache.layers:
            layer.keys.fill_(poison)
            layer.values.fill_(poison)
        model(random_tokens(2, 6), cache=cache, lengths=torch.tensor([2, 6]))
        logits = model(random_tokens(2, 3, seed=4), cache=cache)
        if poison == 0:
            clean = logits
    assert torch.equal(clean, logits)


@torch.no_grad()
@POSITIONS
def test_too_many_tokens_are_refused(use_rope):
    model = build(use_rope=use_rope)
    with pytest.raises(ValueError, match=r"0 \+ 17 tokens do not fit in a context of 16"):
        model(random_tokens(1, 17))
    model(random_tokens(1, 16))
    for capacity, room in ((None, 16), (9, 9), (40, 16)):
        cache = model.new_cache(2, capacity)
        model(random_tokens(2, room - 2), cache=cache)
        before = cache.lengths.copy()
        with pytest.raises(ValueError, match=rf"{room - 2} \+ 3 tokens do not fit in a context of {room}"):
            model(random_tokens(2, 3), cache=cache)
        assert cache.lengths.tolist() == before.tolist()
        model(random_tokens(2, 2), cache=cache)
        ragged = model.new_cache(2, capacity)
        model(random_tokens(2, room - 2), cache=ragged, lengths=torch.tensor([1, room - 2]))
        with pytest.raises(ValueError, match="do not fit"):
            model(random_tokens(2, 3), cache=ragged)
        model(random_tokens(2, 2), cache=ragged)


def test_only_a_causal_model_has_a_cache():
    model = build(is_causal=False)
    with pytest.raises(ValueError, match="causal"):
        model.hidden(random_tokens(1, 3), model.new_cache())
    with pytest.raises(ValueError, match="causal"):
        list(generate(model, [1, 2], 3))


# ---- loss and gradients --------------------------------------------------------------------------


def loss_by_hand(logits, targets, mask, divisor=None):
    """The loss by definition, one number at a time, in double precision."""
    total = weight = 0.0
    for row, wanted, weights in zip(logits.tolist(), targets.tolist(), mask.tolist(), strict=True):
        for values, target, w in zip(row, wanted, weights, strict=True):
            total += w * (math.log(math.fsum(math.exp(v) for v in values)) - values[target])
            weight += w
    return total / (weight if divisor is None else divisor)


def masked_batch():
    tokens, targets = random_tokens(6, 9), random_tokens(6, 9, seed=2)
    mask = (random_tokens(6, 9, seed=3) % 3 == 0).float()
    mask[1] = 0  # a row without tokens that count
    mask[4] = 0.25  # and one with a smaller weight
    return tokens, targets, mask


def test_masked_loss_by_hand():
    model = build()
    tokens, targets, mask = masked_batch()
    logits, loss, _ = lm_pass(model, tokens, targets)
    ones = torch.ones_like(mask)
    assert loss.item() == pytest.approx(loss_by_hand(logits, targets, ones), abs=1e-5)
    assert loss.item() == pytest.approx(lm_pass(model, tokens, targets, ones)[1].item(), abs=1e-7)
    custom_kernels = loss_by_hand(logits, targets, mask)
    assert abs(custom_kernels - loss.item()) > 0.01  # otherwise this test would not depend on the mask
    assert lm_pass(model, tokens, targets, mask)[1].item() == pytest.approx(custom_kernels, abs=1e-5)
    assert lm_pass(model, tokens, targets, mask, 7.5)[1].item() == pytest.approx(
        loss_by_hand(logits, targets, mask, 7.5), abs=1e-5
    )
    assert torch.equal(model(tokens), logits)


def test_masked_positions_have_no_part_in_the_loss():
    model = build()
    tokens, targets, mask = masked_batch()
    others = torch.where(mask == 0, (targets + 1) % 23, targets)
    gradients = []
    for t in (targets, others):
        model.zero_grad()
        loss = lm_pass(model, tokens, t, mask)[1]
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole(rows):
    model = build()
    tokens, targets, mask = masked_batch()

    def pass_over(size):
        model.zero_grad()
        total = 0.0
        for x, y, m in zip(*(t.split(size) for t in (tokens, targets, mask)), strict=True):
            loss = lm_pass(model, x, y, m, divisor=mask.sum())[1]
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in model.parameters()]

    (whole, gradient), (pieces, sum_of_gradients) = pass_over(6), pass_over(rows)
    assert pieces == pytest.approx(whole, abs=1e-6)
    for a, b in zip(gradient, sum_of_gradients, strict=True):
        assert differ(a, b) < 1e-5 * a.abs().max()


class Capped(GPT):
    def logits(self, x):
        return 2 * torch.tanh(GPT.logits(self, x) / 2)


class CappedLoss(Capped):
    def total_loss(self, x, targets, weights):
        return super().total_loss(x, targets, weights * 3)


class WithBias(GPT):
    def make_modules(self):
        super().make_modules()
        self.lm_head = torch.nn.Linear(self.config.n_embd, self.config.vocab_size)


@pytest.mark.parametrize("kind", [Capped, CappedLoss, WithBias, "nanochat"])
def test_kernels_leave_alone_what_they_do_not_compute(kind):
    """If an architecture changes the head, as the guide allows, training uses the changed head."""
    torch.manual_seed(0)
    config = build(tie_embeddings=False).config
    if kind == "nanochat":
        config = nanochat.Config(n_layer=1).resolved(config.vocab_size)
        kind = type("Capped", (nanochat.Model,), {"logits": Capped.logits})
    model = kind(config).train()
    for parameter in model.lm_head.parameters():
        torch.nn.init.normal_(parameter)
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=2)
    losses = []
    for on in (False, True):
        model.use_custom_kernels(on)
        losses.append(lm_pass(model, tokens, targets)[1].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(n_kv_head=1, qk_norm=False, tie_embeddings=False, bias=True),
        dict(use_rope=False, head_dim=5),
        dict(is_causal=False, n_kv_head=4),
        dict(block_size=257, n_layer=1),  # long enough for attention in blocks
    ],
)
def test_gradients_equal_those_in_float64(fields):
    """float64 with PyTorch's attention and loss, and float32 as in training."""
    length = min(fields.get("block_size", 13), 257)
    tokens, targets = random_tokens(2, length), random_tokens(2, length, seed=2)
    mask = (random_tokens(2, length, seed=3) % 2).float()
    model, exact = build(**fields).train(), build(**fields).train().double()
    model.use_custom_kernels(True)
    loss = lm_pass(model, tokens, targets, mask)[1]
    loss.backward()
    losses = F.cross_entropy(exact(tokens).transpose(1, 2), targets, reduction="none")
    reference = (losses * mask).sum() / mask.sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert differ(p.grad, q.grad) < 2e-5 * q.grad.abs().max(), name
        assert q.grad.any(), name


def test_float64_gradients_equal_finite_differences():
    """So the reference above is the derivative of the loss."""
    model = build(vocab_size=4, n_embd=4, n_layer=1, n_head=2, n_kv_head=1, n_hidden=4).double()
    tokens, targets = random_tokens(1, 5, vocab_size=4), random_tokens(1, 5, vocab_size=4, seed=2)
    names = [name for name, _ in model.named_parameters()]

    def loss(*parameters):
        logits = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), tokens)
        return F.cross_entropy(logits[0], targets[0])

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()))


def test_dropout_is_for_training_only():
    model, without = build().set_dropout(0.4), build()
    without.load_state_dict(model.state_dict())
    tokens = random_tokens(2, 12)
    assert torch.equal(model(tokens), without(tokens))
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(tokens))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(model.eval()(tokens), without(tokens))
    assert list(generate(model, [3], 8, temperature=0)) == list(generate(without, [3], 8, temperature=0))


def test_dropout_reaches_every_place(monkeypatch):
    """Embedding, attention weights and both sublayers of a block, each switched off in turn."""
    places = Counter()
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention",
        lambda *a, dropout_p=0.0, **k: (places.update([("attention", dropout_p)]), attention(*a, **k))[1],
    )  # fmt: skip
    monkeypatch.setattr(F, "dropout", lambda x, p, training, *_: (places.update([("x", p * training)]), x)[1])
    model = build().set_dropout(0.25)
    model(random_tokens(1, 8))
    assert all(p == 0 for _, p in places)
    places.clear()
    model.train()(random_tokens(1, 8))
    assert places == {("attention", 0.25): 2, ("x", 0.25): 1 + 2 * 2}


# ---- sequence to sequence ------------------------------------------------------------------------


def test_transduce_is_the_best_output_at_each_place():
    model = build(is_causal=False)
    tokens = random_tokens(3, 11)
    output = model.transduce(tokens)
    assert output.shape == (3, 11) and output.dtype == torch.long
    assert torch.equal(output, model(tokens).argmax(-1))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 23
    assert not torch.equal(model.transduce(changed)[:, :-1], output[:, :-1])


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_padding_is_ignored_without_causality_too(n_kv_head):
    model = build(is_causal=False, n_kv_head=n_kv_head)
    tokens, lengths = random_tokens(3, 9), torch.tensor([4, 9, 1])
    logits = model(tokens, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        assert differ(logits[row, :n], model(tokens[row : row + 1, :n])[0]) < 1e-5


# ---- configuration -------------------------------------------------------------------------------


def test_bad_shapes_are_refused_in_words():
    with pytest.raises(ValueError, match="vocab_size"):
        GPT(ModelConfig())
    for fields, name in (
        (dict(n_embd=30, n_head=4), "n_embd=30"),
        (dict(n_head=4, n_kv_head=3), "n_kv_head=3"),
        (dict(head_dim=5), "head_dim"),
        (dict(dropout=1.0), "dropout"),
        (dict(n_layers=2), "n_layers"),
        (dict(n_layer=2.0), "n_layer"),
    ):
        with pytest.raises(ValueError, match=name):
            ModelConfig(**fields)


# ---- operations per token ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(n_embd=64, n_head=8, n_kv_head=1, block_size=96, n_layer=3, n_hidden=160),
        dict(head_dim=20, n_kv_head=4, tie_embeddings=False, qk_norm=False, bias=True, vocab_size=301),
        dict(use_rope=False, head_dim=3, block_size=128, is_causal=False),
    ],
)
@pytest.mark.parametrize("share", [1, 0.5])
def test_operations_agree_with_a_counted_trace(fields, share):
    model = build(**fields).train()
    length = int(model.config.block_size * share)
    tokens = random_tokens(3, length)
    counts = []
    for training in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss, _ = lm_loss(model, tokens, tokens)
            if training:
                loss.backward()
        counts.append(counter.get_total_flops() / (3 * length))
    given = None if share == 1 else length
    assert model.flops_per_token(given, training=False) == pytest.approx(counts[0], rel=0.02)
    assert model.flops_per_token(given) == pytest.approx(counts[1], rel=0.02)


# ---- lower precision -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@POSITIONS
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("length", [16, 261])
def test_bfloat16_autocast_is_close(use_rope, qk_norm, length):
    """Training, and decoding with rows of different lengths."""
    model = build(use_rope=use_rope, qk_norm=qk_norm, block_size=length, std=0.1).train()
    tokens, targets = random_tokens(2, length), random_tokens(2, length, seed=2)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, loss, _ = lm_pass(model, tokens, targets)
            with torch.no_grad():
                cache = model.new_cache(2)
                model(tokens[:, :6], cache=cache, lengths=torch.tensor([3, 6]))
                steps = [model(tokens[:, n : n + t], cache=cache) for n, t in ((6, 1), (7, 3), (10, 1))]
        loss.backward()
        assert loss.dtype == torch.float32 and model.wte.weight.grad.dtype == torch.float32
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logits.float(), torch.cat(steps, 1).float(), gradient, loss.item()))
    for plain, low in zip(*(r[:3] for r in results), strict=True):
        assert (plain - low).norm() < 0.03 * plain.norm()
    assert results[0][3] == pytest.approx(results[1][3], rel=0.01)


def test_weights_in_bfloat16():
    model, exact = build(std=0.1).bfloat16(), build(std=0.1)
    tokens = random_tokens(2, 16)
    assert (model(tokens).float() - exact(tokens)).norm() < 0.05 * exact(tokens).norm()
    assert lm_pass(model, tokens, tokens)[1].dtype == torch.float32
    assert {layer.keys.dtype for layer in model.new_cache().layers} == {torch.bfloat16}
    assert len(list(generate(model, [1, 2], 20, seed=1))) == 20


def test_a_cache_can_be_made_by_itself():
    cache = KVCache(2, 4, 5, 6, 7, dtype=torch.float64)
    assert cache.keys.shape == (2, 4, 5, 6) and cache.keys.dtype == torch.float64
    assert cache.values.shape == (2, 4, 5, 7)
