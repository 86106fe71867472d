"""models/nanochat.py against Transformers' NanoChatForCausalLM, against float64, and its dial."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_model import differ, graph_of, random_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.nanochat import Config, Model

transformers = pytest.importorskip("transformers")

SMALL = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, n_hidden=40)


def build(seed=0, **fields):
    """A small model in eval(), whose weights are so large that the soft-cap and the norms matter."""
    torch.manual_seed(seed)
    model = Model(Config(**{**SMALL, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        model.lm_head.weight.normal_(0, 2)
    return model.eval()


def in_transformers(model):
    """The same network as a NanoChatForCausalLM, and with the same weights."""
    c = model.config
    scaling = c.rope_scaling.model_dump() if c.rope_scaling else {"rope_type": "default"}
    config = transformers.NanoChatConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, head_dim=c.head_dim,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_theta": c.rope_theta, **scaling},
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    other = transformers.NanoChatForCausalLM(config)
    sizes = [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
    state = {"lm_head.weight": model.lm_head.weight, "model.embed_tokens.weight": model.wte.weight}
    for layer, block in enumerate(model.blocks):
        parts = dict(zip("qkv", block.attn.qkv.weight.split(sizes), strict=True), o=block.attn.proj.weight)
        parts = {f"self_attn.{letter}_proj": part for letter, part in parts.items()}
        parts |= {"mlp.fc1": block.mlp.up.weight, "mlp.fc2": block.mlp.down.weight}
        state |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    other.load_state_dict(state)
    return other.eval()


LONGER = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
SHAPES = {
    "plain": {},
    "one kv head": dict(n_kv_head=1, n_layer=3),
    "wide heads": dict(head_dim=14, n_kv_head=4),
    "large eps": dict(norm_eps=0.3),
    "wavelengths": dict(rope_theta=500.0, block_size=128, rope_scaling=LONGER),
    "by the dial": dict(n_layer=3, n_embd=None, n_head=None, n_kv_head=None, n_hidden=None),
}
EVERY_SHAPE = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)


@torch.no_grad()
@EVERY_SHAPE
def test_logits_are_equal(fields):
    model = build(**fields)
    other = in_transformers(model)
    tokens = random_tokens(3, model.config.block_size)
    ours, theirs = model(tokens)[0], other(tokens).logits
    assert theirs.std() > 2 and theirs.abs().max() > 10  # the soft-cap is at work
    assert differ(ours, theirs) < 1e-4


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")  # its new name is not known to 5.0
@torch.no_grad()
@EVERY_SHAPE
def test_cached_logits_are_equal(fields):
    """Right-padded prefill and ragged steps here, one row at a time there, with its cache."""
    model = build(**fields)
    other = in_transformers(model)
    tokens, lengths = random_tokens(2, 16), torch.tensor([5, 9])
    cache = model.new_cache(2)
    model(tokens[:, :9], cache=cache, lengths=lengths)
    following = torch.stack([tokens[0, 5:9], tokens[1, 9:13]])
    ours = [model(following[:, :1], cache=cache)[0], model(following[:, 1:], cache=cache)[0]]
    for row, n in enumerate(lengths.tolist()):
        before = other(tokens[row : row + 1, :n], use_cache=True).past_key_values
        theirs = other(tokens[row : row + 1, n : n + 4], past_key_values=before).logits
        assert differ(torch.cat(ours, 1)[row], theirs[0]) < 1e-4


def test_greedy_generation_is_equal():
    model = build(block_size=40, vocab_size=97)
    prompt = random_tokens(6, vocab_size=97)
    theirs = in_transformers(model).generate(
        prompt[None], attention_mask=torch.ones(1, 6), do_sample=False, max_new_tokens=30, pad_token_id=0
    )
    assert list(model.generate(prompt, 30, temperature=0)) == theirs[0, 6:].tolist()


@pytest.mark.parametrize("fields", [{}, dict(block_size=257, n_layer=1, head_dim=10)])
def test_gradients_equal_those_in_float64(fields):
    """float64 with PyTorch's own attention and loss; float32 as it is trained on a CPU."""
    length = min(fields.get("block_size", 13), 257)
    tokens, targets = random_tokens(2, length), random_tokens(2, length, seed=2)
    mask = (random_tokens(2, length, seed=3) % 2).float()
    model, exact = build(**fields).train(), build(**fields).train().double()
    model.use_cpu_kernels(True)
    loss = model(tokens, targets, mask)[1]
    names = graph_of(loss)
    assert "_LinearCrossEntropy" in names and ("_CausalAttention" in names) == (length > 256)
    loss.backward()
    losses = F.cross_entropy(exact(tokens)[0].transpose(1, 2), targets, reduction="none")
    reference = (losses * mask).sum() / mask.sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert differ(p.grad, q.grad) < 5e-5 * q.grad.abs().max(), name
        assert q.grad.any(), name
    for p in model.parameters():  # and with PyTorch's operations in float32
        p.by_hand = p.grad.clone()
    model.use_cpu_kernels(False)
    model.zero_grad()
    model(tokens, targets, mask)[1].backward()
    for name, p in model.named_parameters():
        assert differ(p.grad, p.by_hand) < 1e-4 * p.by_hand.abs().max(), name


@pytest.mark.parametrize("fields", [{}, dict(n_embd=64, n_head=8, n_kv_head=1, block_size=96, n_hidden=None)])
def test_operations_agree_with_a_counted_trace(fields):
    model = build(**fields).train()
    tokens = random_tokens(3, model.config.block_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens)[1].backward()
    assert model.flops_per_token() == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.02)


def test_a_fresh_model_knows_nothing_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    model = Model(Config(vocab_size=500, n_layer=3))
    tokens = random_tokens(4, 50, vocab_size=500)
    _, loss, _ = model(tokens, random_tokens(4, 50, seed=2, vocab_size=500))
    assert loss.item() == pytest.approx(math.log(500), abs=0.01)
    expected = F.rms_norm(model.wte(tokens), (192,), eps=1e-6)
    assert differ(model.hidden(tokens), F.rms_norm(expected, (192,), eps=1e-6)) < 1e-6


def test_activations_are_near_what_autograd_keeps():
    model = build(vocab_size=2, n_layer=4, n_embd=64, n_head=2, n_hidden=None, block_size=64).train()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = random_tokens(8, 64, vocab_size=2)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)[1]
    measured = sum(size for pointer, size in kept.items() if pointer not in own) / (4 * tokens.numel())
    assert model.activations_per_token(keeps_attention=False) == pytest.approx(measured, rel=0.2)
    assert math.isfinite(loss.item())
