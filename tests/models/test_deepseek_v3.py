"""models/deepseek_v3.py compared with Transformers, with float64 and with the paper's formulas."""

import copy
import functools
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from launching import RUN, TORCHRUN, largest_difference, launched, losses, settings_of
from lm_pass import lm_loss, lm_pass
from test_model import differ, greedy_without_cache, random_tokens
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from decoding.sampling import generate
from engine.checkpoint import load
from models.deepseek_v3 import Config, Model

SMALL = dict(
    architecture="deepseek_v3", block_size=16, vocab_size=23, n_layer=3, n_head=4, n_embd=24, n_hidden=40,
    kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=10, n_routed_experts=8,
    num_experts_per_tok=3, n_group=4, topk_group=2, moe_intermediate_size=16,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def build(seed=0, std=0.2, **fields):
    """A small model in eval(), with much larger weights than initial ones, so that errors show."""
    torch.manual_seed(seed)
    model = Model(Config(**{**SMALL, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), std)
        for _, moe in model.moe_layers():
            moe.gate.e_score_correction_bias.normal_(0, 0.1)
    return model.eval()


def alone(tensor):
    """all_reduce of a single process."""
    return tensor


def routing(moe):
    """A list to which each pass appends (scores [B, T, E], chosen experts [B, T, K])."""
    seen = []
    moe.gate.register_forward_hook(lambda _, __, output: seen.append(output))
    return seen


# ---- Transformers ----------------------------------------------------------------------------------------


def rotary_rows(weight, heads, size, interleave):
    """Reorder the last `size` rows of each head as in the released weights: interleaved instead of halves."""
    if not interleave:
        return weight
    weight = weight.clone().unflatten(0, (heads, -1))
    halves = weight[:, -size:].unflatten(1, (2, -1))
    weight[:, -size:] = halves.transpose(1, 2).flatten(1, 2)
    return weight.flatten(0, 1)


def in_transformers(model, interleave=True):
    """A DeepseekV3ForCausalLM with the weights of the network, without its MTP module."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    shared = [key for key in Config.model_fields if hasattr(transformers.DeepseekV3Config, key)]
    own = {key: getattr(c, key) for key in shared if key != "rope_scaling"}
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling:
        rope |= c.rope_scaling.model_dump() | {"mscale": 1.0, "mscale_all_dim": 1.0}
    config = transformers.DeepseekV3Config(**own | dict(
        hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, rope_parameters=rope, tie_word_embeddings=c.tie_embeddings,
        rope_interleave=interleave, attn_implementation="eager", experts_implementation="eager",
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    assert {key: getattr(config, key) for key in own} == own and len(own) > 10
    other = transformers.DeepseekV3ForCausalLM(config)
    names = (
        ("wte", "model.embed_tokens"), ("blocks.", "model.layers."), ("mlp_norm", "post_attention_layernorm"),
        ("attn_norm", "input_layernorm"), ("attn.q_norm", "attn.q_a_layernorm"),
        ("attn.kv_norm", "attn.kv_a_layernorm"), ("attn.q_a.", "attn.q_a_proj."),
        ("attn.q_b.", "attn.q_b_proj."), ("attn.q.", "attn.q_proj."), ("kv_a.", "kv_a_proj_with_mqa."),
        ("kv_b.", "kv_b_proj."), ("attn.proj", "attn.o_proj"), ("attn.", "self_attn."),
        ("shared.", "shared_experts."), ("down", "down_proj"), (".experts.gate_up", ".experts.gate_up_proj"),
    )  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("mtp."):
            continue
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        name = "model." + name if name.startswith("norm") else name
        if "q_b_proj" in name or "q_proj" in name:
            tensor = rotary_rows(tensor, c.n_head, c.qk_rope_head_dim, interleave)
        elif "kv_a_proj" in name:
            tensor = rotary_rows(tensor, 1, c.qk_rope_head_dim, interleave)
        if ".experts." in name:
            tensor = tensor.mT
        if "gate_up.weight" in name:
            for which, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                state[name.replace("gate_up", f"{which}_proj")] = part
        else:
            state[name] = tensor
    other.load_state_dict(state)
    return other.eval()


SHAPES = {
    "plain": {},
    "compressed queries": dict(q_lora_rank=20),
    "one group": dict(n_group=1, topk_group=1),
    "all groups": dict(n_group=2, topk_group=2),
    "all experts": dict(num_experts_per_tok=4),
    "weights not normalized": dict(norm_topk_prob=False, routed_scaling_factor=1.3),
    "all dense": dict(first_k_dense_replace=3),
    "no dense": dict(first_k_dense_replace=0),
    "three shared experts": dict(n_shared_experts=3),
    "tied": dict(tie_embeddings=True),
    "large eps": dict(norm_eps=0.3),
    "wavelengths": dict(rope_theta=30.0),
    "equal heads": dict(v_head_dim=14),
    "odd sizes": dict(n_embd=22, moe_intermediate_size=15, n_hidden=17),
    "yarn": dict(rope_scaling=YARN, block_size=64),
}  # fmt: skip
EVERY_SHAPE = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
INTERLEAVE = pytest.mark.parametrize("interleave", [True, False], ids=["pairs", "halves"])


@torch.no_grad()
@EVERY_SHAPE
@INTERLEAVE
def test_logits_are_those_of_transformers(fields, interleave):
    model = build(**fields)
    other = in_transformers(model, interleave)
    tokens = random_tokens(3, model.config.block_size)
    ours, theirs = model(tokens), other(tokens).logits
    assert theirs.std() > 0.5  # they are not equal just because they are small
    assert differ(ours, theirs) < 1e-4


@torch.no_grad()
@EVERY_SHAPE
def test_cached_logits_are_those_of_transformers(fields):
    """Right-padded prefill, then several tokens, then one; Transformers runs without a cache."""
    model = build(**fields)
    other = in_transformers(model)
    tokens, lengths = random_tokens(2, 16), torch.tensor([5, 9])
    expected = other(tokens).logits
    cache = model.new_cache(2)
    first = model(tokens[:, :9], cache=cache, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        assert differ(first[row, :n], expected[row, :n]) < 1e-4
    for done, count in ((0, 3), (3, 1), (4, 3)):
        following = torch.stack([tokens[row, n + done :][:count] for row, n in enumerate(lengths.tolist())])
        logits = model(following, cache=cache)
        for row, n in enumerate(lengths.tolist()):
            assert differ(logits[row], expected[row, n + done :][:count]) < 1e-4
    cache = model.new_cache(2)  # now with rows of equal length
    steps = [model(part, cache=cache) for part in tokens.split((6, 3, 1, 1, 5), dim=1)]
    assert differ(torch.cat(steps, 1), expected) < 1e-4
    cache.advance(-4)
    assert differ(model(tokens[:, 12:], cache=cache), expected[:, 12:]) < 1e-4


@pytest.mark.parametrize("fields", [{}, dict(q_lora_rank=20, rope_scaling=YARN)], ids=["plain", "yarn"])
def test_greedy_text_is_that_of_transformers(fields):
    model = build(**{**fields, "block_size": 40, "vocab_size": 97})
    prompt = random_tokens(6, vocab_size=97)
    theirs = in_transformers(model).generate(
        prompt[None], attention_mask=torch.ones(1, 6), do_sample=False, max_new_tokens=30, pad_token_id=0
    )
    assert list(generate(model, prompt, 30, temperature=0)) == theirs[0, 6:].tolist()


def test_gradients_are_those_of_transformers():
    model = build(first_k_dense_replace=1, num_nextn_predict_layers=0, q_lora_rank=20)
    other = in_transformers(model, interleave=False)
    tokens = random_tokens(3, 16)
    targets = tokens.roll(-1, 1)
    mask = torch.ones(3, 16)
    mask[:, -1] = 0
    loss, reference = lm_pass(model, tokens, targets, mask)[1], other(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(reference.item(), abs=1e-5)
    loss.backward()
    reference.backward()
    for ours, theirs in zip(model.blocks[1:], other.model.layers[1:], strict=True):
        for one, two in (
            (ours.mlp.experts.gate_up, theirs.mlp.experts.gate_up_proj),
            (ours.mlp.experts.down, theirs.mlp.experts.down_proj),
        ):
            assert differ(one.grad.mT, two.grad) < 1e-4 * two.grad.abs().max()
        for one, two in (
            (ours.mlp.gate.weight, theirs.mlp.gate.weight),
            (ours.attn.q_b.weight, theirs.self_attn.q_b_proj.weight),
            (ours.attn.kv_a.weight, theirs.self_attn.kv_a_proj_with_mqa.weight),
            (ours.attn.kv_b.weight, theirs.self_attn.kv_b_proj.weight),
        ):
            assert differ(one.grad, two.grad) < 1e-4 * two.grad.abs().max()


# ---- the cache -------------------------------------------------------------------------------------------


def test_the_cache_holds_a_latent_and_a_rotary_key_only():
    model = build()
    layers, c = model.new_cache(3, 11).layers, model.config
    tensors = [t for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    n_bytes = sum(t.element_size() * t.numel() for t in tensors)
    assert n_bytes == 3 * 11 * c.n_layer * (c.kv_lora_rank + c.qk_rope_head_dim) * 4
    # DeepSeek-V2's table 1: with its sizes, as much as grouped-query attention with 2.25 groups.
    big = Config(**{**SMALL, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                    "v_head_dim": 128, "n_head": 128})  # fmt: skip
    with torch.device("meta"):
        layers = Model(big).new_cache(1, 1).layers
    n_numbers = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert n_numbers == 2.25 * 2 * 128 * big.n_layer


def test_decoding_does_not_expand_what_is_past(monkeypatch):
    model = build()
    read, forward = [], nn.Linear.forward

    def spy(module, x):
        read.append((module, x.shape[1]))
        return forward(module, x)

    cache = model.new_cache()
    model(random_tokens(1, 9), cache=cache)
    monkeypatch.setattr(nn.Linear, "forward", spy)
    model(random_tokens(1, 1), cache=cache)
    assert not [module for module, _ in read if any(module is block.attn.kv_b for block in model.blocks)]
    assert {length for _, length in read} == {1}


# ---- experts ---------------------------------------------------------------------------------------------


def one_by_one(moe, x):
    """The mixture of experts in float64, one token and one expert at a time (equations 12 to 16)."""
    moe, c, rows = copy.deepcopy(moe).double(), moe.config, x.double().flatten(0, 1)
    y = torch.zeros_like(rows)
    for n, row in enumerate(rows):
        scores = [1 / (1 + math.exp(-float(row @ weight))) for weight in moe.gate.weight]
        ranked = [s + float(b) for s, b in zip(scores, moe.gate.e_score_correction_bias, strict=True)]
        size = c.n_routed_experts // c.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
        groups.sort(key=lambda group: -sum(sorted((ranked[e] for e in group), reverse=True)[:2]))
        allowed = [e for group in groups[: c.topk_group] for e in group]
        chosen = sorted(allowed, key=lambda e: -ranked[e])[: c.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if c.norm_topk_prob else 1
        for e in chosen:
            gate, up = (row @ moe.experts.gate_up[e]).chunk(2)
            weight = c.routed_scaling_factor * scores[e] / total
            y[n] += weight * (F.silu(gate) * up) @ moe.experts.down[e]
        y[n] += moe.shared(row)
    return y.view(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (3, 16)])
@pytest.mark.parametrize("fields", [{}, dict(n_group=8, topk_group=5), dict(norm_topk_prob=False)], ids=str)
def test_experts_are_those_of_a_loop_over_tokens(fields, shape):
    moe = build(**fields).blocks[1].mlp
    x = torch.randn(*shape, 24)
    assert differ(moe(x).double(), one_by_one(moe, x)) < 1e-4


@torch.no_grad()
def test_no_token_is_dropped_when_all_choose_alike():
    moe = build().blocks[1].mlp
    moe.gate.e_score_correction_bias[:] = torch.arange(8) * 10.0  # the last three, whatever the scores say
    x = torch.randn(4, 16, 24)
    assert moe.gate(x)[1].sort().values.eq(torch.tensor([5, 6, 7])).all()
    assert differ(moe(x).double(), one_by_one(moe, x)) < 1e-4


@torch.no_grad()
def test_a_token_chooses_within_its_groups():
    c = build().config
    for fields, most in (({}, 2), (dict(topk_group=3), 3), (dict(n_group=2, topk_group=1), 1)):
        gate = build(**fields).blocks[1].mlp.gate
        _, chosen = gate(3 * torch.randn(50, 20, 24))
        size = c.n_routed_experts // gate.config.n_group
        in_groups = F.one_hot(chosen // size, gate.config.n_group).amax(-2).sum(-1)
        assert in_groups.max() == most
        assert chosen.sort().values.diff().min() > 0  # no expert twice


def test_scores_are_in_float32_whatever_the_rest_is_in():
    gate, x = build().blocks[1].mlp.gate, torch.randn(2, 9, 24)
    exact = gate(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x)[0], exact)
    low = copy.deepcopy(gate).bfloat16()
    assert low.weight.dtype == torch.bfloat16 and low(x)[0].dtype == torch.float32
    assert torch.equal(low.e_score_correction_bias, gate.e_score_correction_bias)


def test_the_bias_moves_loads_together():
    """With only the bias trained, the loads of experts with random scores become equal."""
    tokens, loads = random_tokens(16, 16), {}
    for speed in (0.0, 0.01):
        model = build(bias_update_speed=speed).train()
        with torch.no_grad():
            for _ in range(80):
                _, _, watched = lm_pass(model, tokens, tokens)
                model.after_step(alone)
        loads[speed] = [float(watched[f"expert_load/{layer}"]) for layer in (1, 2, 3)]
    assert min(loads[0.0]) > 1.4 and max(loads[0.01]) < 1.2


def test_the_bias_moves_by_the_counts_of_all_passes_and_processes():
    model = build(num_nextn_predict_layers=0, n_layer=2).train()
    gate, before = model.blocks[1].mlp.gate, model.blocks[1].mlp.gate.e_score_correction_bias.clone()
    seen = routing(model.blocks[1].mlp)
    for seed in range(3):
        tokens = random_tokens(2, 16, seed=seed)
        lm_loss(model, tokens, tokens)
    counts = sum(chosen.flatten().bincount(minlength=8) for _, chosen in seen)
    assert counts.sum() == 3 * 2 * 16 * 3
    elsewhere, asked = torch.tensor([500.0, 0, 0, 0, 0, 0, 0, 0]), []

    def with_another(tensor):
        asked.append(tensor)
        return tensor + elsewhere

    model.after_step(with_another)
    assert len(asked) == 1 and asked[0].tolist() == [counts.tolist()]
    total = counts + elsewhere
    moved = gate.e_score_correction_bias - before
    assert torch.allclose(moved, 0.01 * (total.mean() - total).sign(), atol=1e-7) and moved[0] < 0 < moved[1]
    model.after_step(with_another)  # no passes since the last step
    assert len(asked) == 1
    lm_pass(model.eval(), tokens, tokens)
    model.after_step(with_another)  # a validation does not count
    assert len(asked) == 1


# ---- losses ----------------------------------------------------------------------------------------------


class Reference:
    """Multi-token prediction by the paper's equations 21 to 24, in float64, one row at a time."""

    def __init__(self, model):
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.c, self.moe = model.config, model.mtp.block.mlp

    def norm(self, x, name, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]

    def turn(self, x):
        """Rotate the pairs (i, i + D / 2) of x [T, D] by position times frequency."""
        half = x.shape[-1] // 2
        frequency = self.c.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(len(x), dtype=torch.float64), frequency)
        z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), dim=-1)

    def attention(self, x, name):
        """DeepSeek-V2's equations 9 to 19, head by head."""
        c, w, T = self.c, self.weights, len(x)
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        latent, k_rope = (x @ w[f"{name}.kv_a.weight"].mT).split((c.kv_lora_rank, rope), dim=-1)
        latent, k_rope = self.norm(latent, f"{name}.kv_norm", 1e-6), self.turn(k_rope)
        heads = []
        for q, kv in zip(
            (x @ w[f"{name}.q.weight"].mT).chunk(c.n_head, -1),
            (latent @ w[f"{name}.kv_b.weight"].mT).chunk(c.n_head, -1),
            strict=True,
        ):
            q = torch.cat((q[:, :nope], self.turn(q[:, nope:])), -1)
            k, v = torch.cat((kv[:, :nope], k_rope), -1), kv[:, nope:]
            scores = q @ k.mT / math.sqrt(nope + rope)
            scores += torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
            heads.append(scores.softmax(-1) @ v)
        return torch.cat(heads, -1) @ w[f"{name}.proj.weight"].mT

    def __call__(self, h, following):
        """h [T, C] and the following tokens [T] -> log-probabilities of the tokens after those [T, V]"""
        w, eps = self.weights, self.c.norm_eps
        embedded = self.norm(w["wte.weight"][following], "mtp.enorm", eps)
        x = torch.cat((embedded, self.norm(h, "mtp.hnorm", eps)), -1) @ w["mtp.eh_proj.weight"].mT
        x = x + self.attention(self.norm(x, "mtp.block.attn_norm", eps), "mtp.block.attn")
        x = x + one_by_one(self.moe, self.norm(x, "mtp.block.mlp_norm", eps)[None])[0]
        return (self.norm(x, "mtp.norm", eps) @ w["lm_head.weight"].mT).log_softmax(-1)


@torch.no_grad()
def test_multi_token_prediction_against_float64():
    model = build(seed=2).train()
    tokens, mask = random_tokens(2, 16), (random_tokens(2, 16, seed=5) % 3 > 0).float()
    targets = random_tokens(2, 16, seed=6)
    _, loss, watched = lm_pass(model, tokens, targets, mask)
    h = model.hidden(tokens)
    ours = model.logits(model.predict(h, targets)).log_softmax(-1)
    total = 0.0
    for row in range(2):
        theirs = Reference(model)(h[row].double(), targets[row])
        assert theirs.exp().std() > 0.01 and differ(ours[row].double(), theirs) < 1e-4
        total -= sum(mask[row, t + 1] * theirs[t, targets[row, t + 1]] for t in range(15))
    assert float(watched["mtp_loss"]) == pytest.approx(float(total / mask[:, 1:].sum()), abs=1e-4)
    assert loss.item() == pytest.approx(lm_pass(model.eval(), tokens, targets, mask)[1].item(), abs=1e-5)


def test_the_balance_loss_is_its_formula():
    model = build(n_layer=2, num_nextn_predict_layers=0).train()
    tokens, mask = random_tokens(3, 16), torch.ones(3, 16)
    mask[1, 10:] = 0  # padding
    seen = routing(model.blocks[1].mlp)
    _, watched = lm_loss(model, tokens, tokens, mask)
    [(scores, chosen)] = seen
    values, counts = [], torch.zeros(8)
    for row, T in enumerate((16, 10, 16)):
        count = chosen[row, :T].flatten().bincount(minlength=8)
        s = scores[row, :T].detach()
        values.append((8 / (3 * T) * count * (s / s.sum(-1, keepdim=True)).mean(0)).sum())
        counts += count
    assert float(watched["balance_loss"]) == pytest.approx(float(sum(values)) / 3, abs=1e-5)
    assert float(watched["expert_load/1"]) == pytest.approx(float(counts.max() / counts.mean()))


def gradients(model, *passes):
    """All gradients, by name, of the sum of some losses."""
    model.zero_grad()
    sum(lm_pass(model, *each)[1] for each in passes).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


EXTRA = dict(mtp_loss_weight=0.7, aux_loss_alpha=0.5)


def test_each_extra_loss_is_in_the_gradient_with_its_weight():
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    without, mtp, balance, both = (
        gradients(build(**{"mtp_loss_weight": 0, "aux_loss_alpha": 0, **fields}).train(), (tokens, targets))
        for fields in ({}, dict(mtp_loss_weight=0.7), dict(aux_loss_alpha=0.5), EXTRA)
    )
    for name, plain in without.items():
        added = mtp[name] - plain + balance[name] - plain
        assert differ(both[name] - plain, added) < 1e-5
    assert not any(plain.any() for name, plain in without.items() if name.startswith("mtp."))
    model = build(**EXTRA).train()
    h = model.hidden(tokens)
    logits = model.logits(model.predict(h, targets))[:, :-1]
    loss = 0.7 * F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum") / 32
    loss.backward()
    for name in ("mtp.eh_proj.weight", "blocks.0.attn.kv_a.weight", "blocks.2.mlp.experts.down"):
        assert differ(mtp[name] - without[name], model.get_parameter(name).grad) < 1e-5
    gate = "blocks.1.mlp.gate.weight"
    assert (balance[gate] - without[gate]).abs().max() > 1e-4


def test_passes_add_up_to_the_whole_batch():
    """Losses, gradients and counts, when rows have different numbers of tokens that count."""
    model = build(**EXTRA).train()
    tokens, targets = random_tokens(6, 16), random_tokens(6, 16, seed=2)
    mask = (random_tokens(6, 16, seed=3) % 4 > 0).float()
    divisor = mask.sum()
    whole = gradients(model, (tokens, targets, mask))
    counts, model.expert_counts = model.expert_counts, None
    parts = [(tokens[n], targets[n], mask[n], divisor) for n in (slice(0, 1), slice(1, 4), slice(4, 6))]
    for name, gradient in gradients(model, *parts).items():
        assert differ(gradient, whole[name]) < 1e-5
    assert torch.equal(model.expert_counts, counts)


def test_gradients_against_float64():
    low, exact = build(**EXTRA).train(), build(**EXTRA).train().double()
    batch = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    exact = gradients(exact, batch)
    for name, gradient in gradients(low, batch).items():
        assert exact[name].any()
        assert differ(gradient.double(), exact[name]) < 1e-4 * (1 + exact[name].abs().max())


def test_a_batch_without_a_word_that_counts():
    model = build().train()
    tokens = random_tokens(2, 16)
    _, loss, watched = lm_pass(model, tokens, tokens, torch.zeros(2, 16), 1)
    loss.backward()
    assert loss == 0 and all(value.isfinite() for value in watched.values())
    model.after_step(alone)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_what_is_watched_has_a_curve_a_layer_and_only_in_training():
    model, tokens = build(), random_tokens(2, 16)
    assert lm_pass(model, tokens, tokens)[2] == {}
    _, _, watched = lm_pass(model.train(), tokens, tokens)
    assert set(watched) == {"mtp_loss", "balance_loss", "expert_load/1", "expert_load/2", "expert_load/3"}
    plain = build(first_k_dense_replace=3, num_nextn_predict_layers=0).train()
    assert lm_pass(plain, tokens, tokens)[2] == {}


@pytest.mark.filterwarnings("error")
def test_bfloat16_autocast_is_close():
    model = build(block_size=300, std=0.05).train()
    tokens, targets = random_tokens(2, 300), random_tokens(2, 300, seed=2)
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
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logits.float(), torch.cat(steps, 1).float(), gradient, loss.item()))
    for plain, low in zip(*(r[:3] for r in results), strict=True):
        assert (plain - low).norm() < 0.05 * plain.norm()
    assert results[0][3] == pytest.approx(results[1][3], rel=0.01)


def test_weights_in_bfloat16():
    model, exact = build(std=0.05).bfloat16(), build(std=0.05)
    tokens = random_tokens(2, 16)
    assert (model(tokens).float() - exact(tokens)).norm() < 0.05 * exact(tokens).norm()
    assert model.moe_layers()[0][1].gate.e_score_correction_bias.dtype == torch.float32
    assert len(list(generate(model, [1, 2], 30, temperature=0))) == 30


# ---- drafting --------------------------------------------------------------------------------------------


@functools.cache
def trained():
    """A model whose network and MTP module have learned to count in steps of 1 to 4, and its losses."""
    torch.manual_seed(0)
    model = Model(Config(**{**SMALL, "block_size": 24})).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(80):
        starts, strides = random_tokens(8, 1, seed=step), 1 + random_tokens(8, 1, seed=step + 1000) % 4
        tokens = (starts + strides * torch.arange(25)) % 23
        _, loss, watched = lm_pass(model, tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(alone)
        losses.append((loss.item(), float(watched["mtp_loss"])))
    return model.eval(), losses


def test_training_learns_both_predictions():
    _, losses = trained()
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert first == pytest.approx(math.log(23), abs=0.3) and last < 0.5 * first


@pytest.mark.parametrize("make", [build, lambda: trained()[0]], ids=["drafts that fail", "drafts that hold"])
def test_drafted_text_is_the_greedy_text(make):
    """Also beyond the context, where the older half is dropped, and for any number of tokens."""
    model = make()
    for prompt in ([1, 2, 3], [5], [(3 * n) % 23 for n in range(40)]):
        plain = list(generate(model, prompt, 60, temperature=0, draft=False))
        assert plain == greedy_without_cache(model, prompt, 60)
        assert list(generate(model, prompt, 60, temperature=0)) == plain
        for stop in plain[11], plain[20]:
            expected = plain[: plain.index(stop)]
            assert list(generate(model, prompt, 60, temperature=0, stop_tokens=[stop])) == expected
        for count in range(5):
            assert list(generate(model, prompt, count, temperature=0)) == plain[:count]


def test_a_good_drafter_saves_passes():
    (model, _), passes = trained(), []
    hook = model.blocks[0].register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].shape[1]))
    assert len(list(generate(model, [1, 3, 5, 7], 20, temperature=0))) == 20
    hook.remove()
    assert passes[0] == 4 and set(passes[1:]) <= {1, 2}
    assert len(passes) <= 14  # one token at a time takes 20


def test_drafting_is_for_greedy_text_alone(monkeypatch):
    model, prompt = build(), [1, 2]
    monkeypatch.setattr(model, "drafter", None)
    for options in (dict(temperature=0.5, seed=1), dict(temperature=0, repetition_penalty=1.2)):
        assert list(generate(model, prompt, 9, **options)) == list(
            generate(model, prompt, 9, **options, draft=False)
        )
    plain = build(num_nextn_predict_layers=0)
    assert len(list(generate(plain, prompt, 9, temperature=0))) == 9
    with pytest.raises(ValueError, match="no token"):
        next(generate(model, [], 5))


def test_a_prompt_is_checked_before_it_is_drafted_from():
    for tokens, words in (([], "no token"), ([23], "outside 0 .. 22")):
        with pytest.raises(ValueError, match=words):
            next(generate(build(), tokens, 5, temperature=0))


# ---- size and operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, dict(q_lora_rank=20, num_nextn_predict_layers=0)], ids=str)
def test_n_params_by_hand(fields):
    model = build(**fields)
    c = model.config
    C, H, R, D = c.n_embd, c.n_head, c.kv_lora_rank, c.qk_nope_head_dim + c.qk_rope_head_dim
    attention = C * (R + c.qk_rope_head_dim) + R + R * H * (c.qk_nope_head_dim + c.v_head_dim)
    attention += H * c.v_head_dim * C
    attention += C * H * D if not c.q_lora_rank else C * c.q_lora_rank + c.q_lora_rank * (1 + H * D)
    experts = C * 8 + (8 + 1) * 3 * C * c.moe_intermediate_size
    layers = 3 * (attention + 2 * C) + 3 * C * c.n_hidden + 2 * experts
    mtp = c.num_nextn_predict_layers * (attention + 2 * C + experts + 2 * C * C + 3 * C)
    assert model.n_params == 2 * 23 * C + layers + C + mtp == sum(p.numel() for p in model.parameters())
    state = model.state_dict()
    biases = {name for name in state if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2 + c.num_nextn_predict_layers
    assert set(state) - biases == {name for name, _ in model.named_parameters()}


def test_a_fresh_model_knows_nothing():
    torch.manual_seed(0)
    model = Model(Config(architecture="deepseek_v3", vocab_size=500, n_embd=64, n_layer=8))
    tokens, targets = (random_tokens(4, 50, seed=seed, vocab_size=500) for seed in (1, 2))
    _, loss, watched = lm_pass(model, tokens, targets)
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)
    assert float(watched["mtp_loss"]) == pytest.approx(math.log(500), abs=0.1)
    for block in (model.blocks[1], model.mtp.block):
        assert block.mlp.experts.gate_up.std().item() == pytest.approx(0.02, rel=0.03)
        for weight in (block.attn.proj.weight, block.mlp.shared.down.weight, block.mlp.experts.down):
            assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize(
    "fields", [{}, dict(q_lora_rank=20, n_group=1, topk_group=1), dict(num_nextn_predict_layers=0)], ids=str
)
@pytest.mark.parametrize("share", [1, 0.5])
def test_operations_agree_with_a_counted_trace(fields, share, monkeypatch):
    """Only the FLOPs of the experts that a token uses count."""
    monkeypatch.delattr(F, "grouped_mm", raising=False)  # PyTorch's counter only knows plain products
    model = build(**{"block_size": 64, "v_head_dim": 14, **fields}).train()
    length = int(model.config.block_size * share)
    tokens = random_tokens(3, length)
    for training in (False, True):
        model.train(training)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = lm_loss(model, tokens, tokens)[0]
            if training:
                loss.backward()
        counted = counter.get_total_flops() / (3 * length)
        given = None if share == 1 else length
        assert model.flops_per_token(given, training) == pytest.approx(counted, rel=0.02)


def test_more_experts_cost_memory_but_no_operations():
    few, many = build(), build(n_routed_experts=64)
    assert many.n_params > 3 * few.n_params
    routing = 2 * 24 * (64 - 8) * 3  # of three layers
    assert many.flops_per_token() - few.flops_per_token() == 3 * routing


def test_activations_are_near_what_autograd_keeps():
    for fields in ({}, dict(q_lora_rank=20, v_head_dim=14), dict(num_nextn_predict_layers=0)):
        model = build(**{"block_size": 64, "n_embd": 64, "n_hidden": 160, "vocab_size": 50, **fields}).train()
        tokens, kept = random_tokens(4, 64), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(tensor, kept=kept, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes() / 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), sdpa_kernel(SDPBackend.MATH):
            loss = lm_loss(model, tokens, tokens)[0]
        counted = sum(kept.values()) / (4 * 64) - 2 * 50
        costs = model.costs(64, training=True)
        assert loss and costs.activations + costs.attention_scores == pytest.approx(counted, rel=0.25)


# ---- configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(n_group=3), "n_routed_experts=8 does not divide into n_group=3 groups"),
        (dict(topk_group=5), "topk_group=5 is more than there are groups, n_group=4"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok=5 is more than topk_group=2 groups of 2 experts"),
        (dict(first_k_dense_replace=4), "first_k_dense_replace=4 is more than n_layer=3"),
        (dict(qk_rope_head_dim=7), "even qk_rope_head_dim, found 7"),
        (dict(v_head_dim=15), "v_head_dim=15 is more than .* = 14"),
        (dict(num_nextn_predict_layers=2), "num_nextn_predict_layers"),
        (dict(n_kv_head=2), "n_kv_head"),
    ],
    ids=str,
)
def test_impossible_shapes_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        Config(**{**SMALL, **fields})


CHANGES = {
    "q_lora_rank": 20, "kv_lora_rank": 13, "qk_nope_head_dim": 9, "qk_rope_head_dim": 4, "v_head_dim": 9,
    "n_routed_experts": 12, "n_shared_experts": 0, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 3,
    "moe_intermediate_size": 15, "first_k_dense_replace": 2, "routed_scaling_factor": 1.0,
    "norm_topk_prob": False, "num_nextn_predict_layers": 0, "bias_update_speed": 0.1, "aux_loss_alpha": 0.3,
    "mtp_loss_weight": 0.9, "n_hidden": 41, "norm_eps": 0.1, "tie_embeddings": True,
}  # fmt: skip


def after_a_step(model):
    """All gradients of a training pass on fixed tokens, and the state dictionary after the step."""
    lm_pass(model.train(), random_tokens(4, 16), random_tokens(4, 16, seed=2))[1].backward()
    model.after_step(alone)
    return [p.grad for p in model.parameters()] + list(model.state_dict().values())


@pytest.mark.parametrize("key", sorted(CHANGES))
def test_every_key_changes_something(key):
    one, other = after_a_step(build()), after_a_step(build(**{key: CHANGES[key]}))
    if [value.shape for value in one] == [value.shape for value in other]:
        assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- the command line ------------------------------------------------------------------------------------

TINY = {
    **{key: value for key, value in SMALL.items() if key != "vocab_size"},
    "block_size": 32, "n_layer": 2, "kv_lora_rank": 8,
}  # fmt: skip


def give_model(place):
    path = place.root / "config" / "model_config.json"
    path.write_text(json.dumps(TINY), "utf-8")
    return place


def test_train_resume_fine_tune_and_talk(train, project, monkeypatch, capsys):
    give_model(train)
    assert train("pretrain", max_steps=6, save_interval=3, keep_checkpoints=0).returncode == 0
    checkpoints = train.checkpoints()
    whole = load(checkpoints[6])
    assert whole.model["blocks.1.mlp.gate.e_score_correction_bias"].abs().max() > 0.005
    checkpoints[6].unlink()
    done = train("pretrain", "--resume", max_steps=6, save_interval=3, keep_checkpoints=0)
    assert done.returncode == 0 and "at step 3" in done.stderr
    assert train.same(whole, load(train.checkpoints()[6]))
    assert len(train.logged("Train", "mtp_loss", "balance_loss", "expert_load/1", "expert_load/2")) == 9
    assert train("sft").returncode == 0
    done = train("pretrain", "--plan")
    assert done.returncode == 0 and "deepseek_v3: 2 layers" in done.stdout

    import inference

    for extra in (["-t", "0", "-r", "1"], []):
        arguments = ["-i", "--prompt", "1 + 1?", "-m", str(train.checkpoints("sft")[6]), *extra]
        monkeypatch.setattr("sys.argv", ["inference.py", *arguments])
        inference.main()
        assert capsys.readouterr().out


def test_a_wrong_key_is_named(train):
    give_model(train)
    done = train("pretrain", n_group=3)
    assert done.returncode == 2 and "does not divide into n_group=3 groups" in done.stderr
    done = train("pretrain", topk_grup=3)
    assert done.returncode == 2 and 'did you mean "topk_group"?' in done.stderr


LONGER = {**RUN, "learning_rate": 1e-2, "min_lr": 1e-3}


def run_alone(project, *args, **settings):
    done = give_model(project).run("train.py", *args, *settings_of(settings))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_draw_the_curve_of_one(tiny_project, other_project):
    for task in ("pretrain", "sft"):
        run_alone(tiny_project, "-t", task, **LONGER)
        launched(give_model(other_project), TORCHRUN, "train_ddp.py", "-t", task, **LONGER)
    for kind in ("Train", "Val"):
        assert largest_difference(losses(tiny_project, kind), losses(other_project, kind)) <= 1e-5
    one, two = (load(project.checkpoints("sft")[50]) for project in (tiny_project, other_project))
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_draws_the_curve_of_one_and_resumes(tiny_project, other_project, stage):
    run_alone(tiny_project, "-t", "pretrain", **RUN)
    give_model(other_project)
    path = other_project.root / "config" / "mine.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero}), "utf-8")
    args = (TORCHRUN, "train_deepspeed.py", "-t", "pretrain", "--deepspeed_config", path)
    settings = {**RUN, "lr_decay_iters": 50}
    launched(other_project, *args, **{**settings, "max_steps": 20})
    launched(other_project, *args, "--resume", **settings)
    for kind in ("Train", "Val"):
        both = losses(tiny_project, kind), losses(other_project, kind)[-50 if kind == "Train" else -2 :]
        assert largest_difference(*both) <= 1e-4
    one, two = (load(project.checkpoints()[50]) for project in (tiny_project, other_project))
    assert one.model.keys() == two.model.keys()
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_step_computes_the_same(tiny_project, other_project):
    """The compiling pass before the first step must not count for the load, either."""
    settings = dict(max_steps=4, gradient_accumulation_steps=2)
    run_alone(other_project, "-t", "pretrain", **settings)
    arguments = ["-t", "pretrain", *settings_of({**settings, "compile": "true"})]
    done = give_model(tiny_project).run("train.py", *arguments, timeout=400)
    assert done.returncode == 0, done.stderr
    assert largest_difference(losses(tiny_project), losses(other_project)) <= 1e-5
    one, two = (load(project.checkpoints()[4]).model for project in (tiny_project, other_project))
    biases = [name for name in one if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(torch.equal(one[name], two[name]) for name in biases)


@pytest.mark.slow
def test_expert_load_stays_even_with_balancing_and_drifts_without(train):
    """The mean of the logged values of the last 50 of 300 steps, in each layer."""
    give_model(train)
    settings = dict(batch_size=16, max_steps=300, learning_rate=4e-3, min_lr=4e-4, warmup_iters=20, n_layer=3)
    last = []
    for balancing in ({}, dict(bias_update_speed=0.0, aux_loss_alpha=0.0)):
        before = len(train.logged("Train", "Loss"))
        assert train("pretrain", **settings, **balancing).returncode == 0
        runs = [train.logged("Train", f"expert_load/{layer}")[before:] for layer in (1, 2, 3)]
        last.append([sum(float(load) for _, load in run[-50:]) / 50 for run in runs])
    assert max(last[0]) < 1.25 and min(last[1]) > 1.3


def test_muon_takes_the_matrices_and_leaves_the_routers():
    model = build()
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p] for p in model.matrices()}
    assert {"blocks.1.mlp.experts.gate_up", "blocks.1.attn.kv_b.weight", "mtp.eh_proj.weight"} <= taken
    assert not any("norm" in name or name.endswith("gate.weight") for name in taken)
    assert not taken & {"wte.weight", "lm_head.weight"}
    assert model.n_matrix_params == sum(p.numel() for p in model.matrices())
