"""model.py against Transformers: the same random weights give the same logits and the same text.

With qk_norm off the network is Llama, with it on Qwen3; only names and packing differ.
"""

import pytest
import torch
from lm_pass import lm_pass
from test_model import build, differ, random_tokens

from decoding.sampling import generate
from formats import families

transformers = pytest.importorskip("transformers")


def in_transformers(model):
    """The same network as a LlamaForCausalLM or a Qwen3ForCausalLM, and with the same weights."""
    c = model.config
    # Qwen3 has biases in attention only, so export.py refuses them; `both` has made the MLP's zero.
    family = families.find_family(c.model_copy(update={"bias": c.bias and not c.qk_norm}))
    fields = families.to_hf_config(family, c) | {"attention_bias": c.bias}
    fields |= {"bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(**fields)
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert type(other).__name__ == ("Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM")
    state = families.to_hf_weights(family, c, model.state_dict())
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if c.tie_embeddings else set())
    assert not any(state[name].any() for name in unexpected)
    return other.eval()


LONG = dict(block_size=200, head_dim=20)  # so that pairs turn much, little and not once
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}
SHAPES = {
    "plain": {},
    "one kv head": dict(n_kv_head=1),
    "all kv heads": dict(n_kv_head=4),
    "wide heads": dict(head_dim=14, n_layer=3),
    "narrow heads": dict(n_embd=28, head_dim=4, n_kv_head=1),
    "short wavelengths": dict(rope_theta=30.0),
    "long wavelengths": dict(rope_theta=1e6, block_size=200),
    "large eps": dict(norm_eps=0.3),
    "untied": dict(tie_embeddings=False),
    "biases": dict(bias=True),
    "all of it": dict(
        n_head=6, n_kv_head=2, head_dim=10, rope_theta=500.0, norm_eps=1e-3, tie_embeddings=False, bias=True,
        n_layer=4, n_hidden=37, block_size=64,
    ),
    "llama3": dict(LONG, rope_theta=5e5, rope_scaling=LLAMA3),
    "llama3, other turns": dict(
        LONG, rope_scaling={**LLAMA3, "factor": 2.5, "low_freq_factor": 0.4, "high_freq_factor": 1.5}
    ),
    "yarn": dict(LONG, rope_scaling=YARN),
    "yarn, other turns": dict(
        LONG, rope_scaling={**YARN, "factor": 16.0, "beta_fast": 5.0, "beta_slow": 0.5}
    ),
    "yarn without a ramp": dict(LONG, rope_scaling={**YARN, "beta_fast": 2.0, "beta_slow": 2.0}),
}  # fmt: skip
EVERY_SHAPE = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
BOTH = pytest.mark.parametrize("qk_norm", [False, True], ids=["Llama", "Qwen3"])


def both(qk_norm, seed=0, **fields):
    model = build(seed, qk_norm=qk_norm, **fields)
    if qk_norm and model.config.bias:  # Qwen3's MLP has none
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.gate_up.bias.zero_()
                block.mlp.down.bias.zero_()
    return model, in_transformers(model)


@torch.no_grad()
@EVERY_SHAPE
@BOTH
def test_logits_are_equal(qk_norm, fields):
    model, other = both(qk_norm, **fields)
    tokens = random_tokens(3, model.config.block_size)
    ours, theirs = model(tokens), other(tokens).logits
    assert theirs.std() > 0.5  # not equal for being small
    assert differ(ours, theirs) < 1e-4


@torch.no_grad()
@BOTH
def test_cached_logits_are_equal(qk_norm):
    """Right-padded prefill and ragged steps here, one row at a time there."""
    model, other = both(qk_norm, head_dim=10)
    tokens, lengths = random_tokens(2, 16), torch.tensor([5, 9])
    cache = model.new_cache(2)
    model(tokens[:, :9], cache=cache, lengths=lengths)
    following = torch.stack([tokens[0, 5:9], tokens[1, 9:13]])
    logits = model(following, cache=cache)
    for row, n in enumerate(lengths.tolist()):
        assert differ(logits[row], other(tokens[row : row + 1, : n + 4]).logits[0, n:]) < 1e-4


@BOTH
def test_loss_and_gradients_are_equal(qk_norm):
    """Llama's own masking (label -100) is the mask here."""
    model, other = both(qk_norm)
    tokens, mask = random_tokens(3, 14), random_tokens(3, 14, seed=3) % 2
    targets = tokens.roll(-1, dims=1)
    mask[:, -1] = 0  # Transformers shifts the labels by itself
    labels = torch.where(mask.roll(1, dims=1) == 1, tokens, -100)
    loss, reference = lm_pass(model, tokens, targets, mask.float())[1], other(tokens, labels=labels).loss
    assert loss.item() == pytest.approx(reference.item(), abs=1e-5)
    loss.backward()
    reference.backward()
    for layer, block in zip(other.model.layers, model.blocks, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [p.weight.grad for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        gate_up = [p.weight.grad for p in (mlp.gate_proj, mlp.up_proj)]
        for ours, theirs in (
            (block.attn.qkv.weight.grad, torch.cat(qkv)),
            (block.mlp.gate_up.weight.grad, torch.cat(gate_up)),
            (block.attn_norm.weight.grad, layer.input_layernorm.weight.grad),
        ):
            assert differ(ours, theirs) < 1e-4 * theirs.abs().max()
    assert differ(model.wte.weight.grad, other.model.embed_tokens.weight.grad) < 1e-4


@BOTH
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_is_equal(qk_norm, penalty):
    for seed in range(3):
        model, other = both(qk_norm, seed, block_size=40, vocab_size=97)
        prompt = random_tokens(6, seed=seed, vocab_size=97)
        theirs = other.generate(
            prompt[None], attention_mask=torch.ones(1, 6), do_sample=False, max_new_tokens=30,
            repetition_penalty=penalty, pad_token_id=0,
        )  # fmt: skip
        ours = list(generate(model, prompt, 30, temperature=0, repetition_penalty=penalty))
        assert ours == theirs[0, 6:].tolist()
