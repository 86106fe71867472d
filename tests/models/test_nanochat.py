"""models/nanochat.py compared with Transformers' NanoChatForCausalLM and with float64."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from lm_pass import lm_loss, lm_pass
from test_model import differ, graph_of, random_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import inference
import models
from common.config import ROOT, read_json
from common.errors import UserError
from decoding.sampling import generate
from engine.checkpoint import build as open_checkpoint
from engine.checkpoint import load
from models.nanochat import Config, Model

transformers = pytest.importorskip("transformers")

SMALL = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, n_hidden=40)


def build(seed=0, **fields):
    """A small model in eval(), with weights large enough for soft-cap and norms to matter."""
    torch.manual_seed(seed)
    model = Model(Config(**{**SMALL, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 2.5 / math.sqrt(parameter.shape[1]))
        model.lm_head.weight.normal_(0, 10 / math.sqrt(model.config.n_embd))
    return model.eval()


def in_transformers(model):
    """A NanoChatForCausalLM with the same weights."""
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
    "YaRN": dict(block_size=128, rope_scaling={**LONGER, "rope_type": "yarn"}),
    "by the dial": dict(n_layer=3, n_embd=None, n_head=None, n_kv_head=None, n_hidden=None),
}
EVERY_SHAPE = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)


@torch.no_grad()
@EVERY_SHAPE
def test_logits_are_equal(fields):
    model = build(**fields)
    other = in_transformers(model)
    tokens = random_tokens(3, model.config.block_size)
    ours, theirs = model(tokens), other(tokens).logits
    assert theirs.std() > 2 and theirs.abs().max() > 10  # the soft-cap has an effect
    assert differ(ours, theirs) < 1e-4


@pytest.mark.filterwarnings(
    "ignore:`past_key_values`:FutureWarning"
)  # Transformers 5.0 does not know the new name
@torch.no_grad()
@EVERY_SHAPE
def test_cached_logits_are_equal(fields):
    """Right-padded prefill and ragged steps here, one row at a time in Transformers, with its cache."""
    model = build(**fields)
    other = in_transformers(model)
    tokens, lengths = random_tokens(2, 16), torch.tensor([5, 9])
    cache = model.new_cache(2)
    model(tokens[:, :9], cache=cache, lengths=lengths)
    following = torch.stack([tokens[0, 5:9], tokens[1, 9:13]])
    ours = [model(following[:, :1], cache=cache), model(following[:, 1:], cache=cache)]
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
    assert list(generate(model, prompt, 30, temperature=0)) == theirs[0, 6:].tolist()


@pytest.mark.parametrize("fields", [{}, dict(block_size=257, n_layer=1, head_dim=10)])
def test_gradients_equal_those_in_float64(fields):
    """float64 with PyTorch's attention and loss, and float32 as in training on a CPU."""
    length = min(fields.get("block_size", 13), 257)
    tokens, targets = random_tokens(2, length), random_tokens(2, length, seed=2)
    mask = (random_tokens(2, length, seed=3) % 2).float()
    model, exact = build(**fields).train(), build(**fields).train().double()
    model.use_custom_kernels(True)
    loss = lm_pass(model, tokens, targets, mask)[1]
    names = graph_of(loss)
    assert "_LinearCrossEntropy" in names and ("_CausalAttention" in names) == (length > 256)
    loss.backward()
    losses = F.cross_entropy(exact(tokens).transpose(1, 2), targets, reduction="none")
    reference = (losses * mask).sum() / mask.sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert differ(p.grad, q.grad) < 5e-5 * q.grad.abs().max(), name
        assert q.grad.any(), name
    for p in model.parameters():  # and with PyTorch's operations in float32
        p.by_hand = p.grad.clone()
    model.use_custom_kernels(False)
    model.zero_grad()
    lm_pass(model, tokens, targets, mask)[1].backward()
    for name, p in model.named_parameters():
        assert differ(p.grad, p.by_hand) < 1e-4 * p.by_hand.abs().max(), name


@pytest.mark.parametrize("fields", [{}, dict(n_embd=64, n_head=8, n_kv_head=1, block_size=96, n_hidden=None)])
def test_operations_agree_with_a_counted_trace(fields):
    model = build(**fields).train()
    tokens = random_tokens(3, model.config.block_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        lm_loss(model, tokens, tokens)[0].backward()
    assert model.flops_per_token() == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.02)


def test_a_fresh_model_knows_nothing_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    model = Model(Config(vocab_size=500, n_layer=3))
    tokens = random_tokens(4, 50, vocab_size=500)
    _, loss, _ = lm_pass(model, tokens, random_tokens(4, 50, seed=2, vocab_size=500))
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
        loss = lm_loss(model, tokens, tokens)[0]
    measured = sum(size for pointer, size in kept.items() if pointer not in own) / (4 * tokens.numel())
    assert model.costs(64, training=True).activations == pytest.approx(measured, rel=0.2)
    assert math.isfinite(loss.item())


CHANGES = {
    "block_size": 15,
    "vocab_size": 24,
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 32,
    "dropout": 0.5,
    "rope_theta": 100.0,
    "rope_scaling": {**LONGER, "original_max_position_embeddings": 8},
    "norm_eps": 0.1,
    "n_kv_head": 4,
    "head_dim": 8,
    "n_hidden": 41,
}


@pytest.mark.parametrize("field", sorted(Config.model_fields.keys() - {"architecture"}))
def test_every_key_changes_something(field):
    before, after = build(), build(**{field: CHANGES[field]})
    tokens = random_tokens(1, 16)
    if field == "block_size":
        with pytest.raises(ValueError, match="do not fit in a context of 15"):
            after(tokens)
    elif field in ("dropout", "rope_theta", "rope_scaling", "norm_eps"):
        after.load_state_dict(before.state_dict())
        assert torch.equal(before(tokens)[0], after(tokens)[0]) == (field == "dropout")
        assert not torch.equal(before.train()(tokens), after.train()(tokens))
    else:
        shapes = [[p.shape for p in model.parameters()] for model in (before, after)]
        assert shapes[0] != shapes[1]


@pytest.mark.filterwarnings("error")
def test_bfloat16_autocast_is_close():
    model = build().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    tokens, gradients = random_tokens(2, 16), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, loss, _ = lm_pass(model, tokens, random_tokens(2, 16, seed=2))
        loss.backward()
        assert logits.dtype == loss.dtype == torch.float32  # the soft-cap, too
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


# ---- the dial and the presets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layer", "shape"),
    [
        (1, (64, 1, 64)),
        (2, (128, 1, 128)),
        (3, (192, 2, 96)),
        (4, (256, 2, 128)),
        (5, (320, 4, 80)),  # 3 heads do not divide 320
        (6, (384, 3, 128)),
        (12, (768, 6, 128)),
        (20, (1280, 10, 128)),
    ],
)
def test_all_follows_from_the_depth(n_layer, shape):
    config = Config(n_layer=n_layer).resolved(100)
    assert (config.n_embd, config.n_head, config.head_dim) == shape
    assert (config.n_kv_head, config.n_hidden) == (config.n_head, 4 * config.n_embd)


@pytest.mark.parametrize("n_layer", range(1, 101))
def test_any_depth_has_a_sound_shape(n_layer):
    config = Config(n_layer=n_layer).resolved(100)
    assert config.n_head * config.head_dim == config.n_embd == 64 * n_layer
    assert config.head_dim % 2 == 0 and 40 <= config.head_dim <= 128
    assert Config(**config.model_dump()) == config  # as a checkpoint has it


def test_what_is_set_by_hand_is_obeyed():
    config = Config(n_layer=4, n_head=8, n_kv_head=2, n_hidden=100).resolved(9)
    assert (config.n_embd, config.head_dim, config.n_kv_head, config.n_hidden) == (256, 32, 2, 100)
    config = Config(n_layer=4, n_embd=100, head_dim=30).resolved(9)
    assert (config.n_head, config.head_dim) == (4, 30)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n_embd": 100, "n_head": 8}, "n_embd=100 does not divide into 8 heads of an even size; change"),
        ({"n_embd": 33}, "n_embd=33 does not divide into 1 heads of an even size"),
        ({"head_dim": 7}, "rotary positions need an even head_dim, found 7"),
        ({"n_head": 4, "n_kv_head": 3}, "n_kv_head=3 does not divide n_head=4"),
        ({"tie_embeddings": True}, 'unknown key "tie_embeddings"'),
        ({"n_layers": 3}, 'unknown key "n_layers"; did you mean "n_layer"?'),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, sentence):
    with pytest.raises(UserError) as refusal:
        models.check_config({"architecture": "nanochat", **fields}, "a file")
    assert str(refusal.value).startswith(f"a file: {sentence}")


@pytest.mark.parametrize(
    ("preset", "n_params"),
    [("_small", 49_016_832), ("_base", 161_734_656), ("_large", 776_454_144), ("", 28_745_728)],
)
def test_the_presets_have_these_parameters_with_a_vocabulary_of_50000(preset, n_params):
    config = models.check_config(read_json(ROOT / f"config/nanochat/model_config{preset}.json"), "a preset")
    with torch.device("meta"):
        assert models.build(config.resolved(50_000)).n_params == n_params


# ---- through the command lines -----------------------------------------------------------------------------


def test_from_pretraining_to_answers(train, capsys, monkeypatch):
    shape = dict(architecture="nanochat", n_head=2, n_kv_head=1)
    settings = dict(lr_decay_iters=6, gradient_accumulation_steps=2, **shape)
    plan = train("pretrain", "--plan", **shape)
    assert plan.returncode == 0 and "nanochat: 1 layers, width 32, 2 heads (1 key/value)" in plan.stdout
    for steps in (3, 6):
        assert train("pretrain", "--resume", max_steps=steps, **settings).returncode == 0
    resumed = load(train.checkpoints()[6])
    losses = [float(loss) for _, loss in train.logged("Train", "Loss")]
    assert len(losses) == 6 and losses[5] < losses[0] - 0.2
    for path in train.checkpoints().values():
        path.unlink()
    assert train("pretrain", max_steps=6, **settings).returncode == 0
    assert train.same(load(train.checkpoints()[6]), resumed)
    assert train("sft", max_steps=2, decay_lr=False, **shape).returncode == 0

    [path] = train.checkpoints("sft").values()
    monkeypatch.setattr(sys, "argv", ["inference.py", "-m", str(path), "-t", "0", "--prompt", "3 + 4"])
    inference.main()
    said = capsys.readouterr().out
    model, tokenizer = open_checkpoint(load(path), "a test's")
    tokens = [tokenizer.bos_id, *tokenizer.encode("3 + 4")]
    stop = (tokenizer.eos_id, tokenizer.padding_id)
    answer = generate(model, tokens, 32, temperature=0, repetition_penalty=1.2, stop_tokens=stop)
    assert tokenizer.decode(list(answer)).strip() in said
