"""Parameter groups and their rates; Muon compared with PyTorch's; numbers of the schedules."""

import copy
import math

import pytest
import torch
from lm_pass import lm_pass
from torch import nn

from common.errors import UserError
from config.schema import ModelConfig, TrainConfig
from engine.optimizer import Muon, learning_rate_at, make_optimizer, orthogonal, rate_multiplier
from model import GPT

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 20}
needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9")


def model_of(seed=0, **shape):
    torch.manual_seed(seed)
    return GPT(ModelConfig(**{**SHAPE, **shape}))


def config_of(**settings):
    return TrainConfig(dataset_path=[("a", "b")], **{"max_steps": 1000, "warmup_iters": 100, **settings})


def train_a_step(model, optimizer, seed):
    tokens = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(seed))
    lm_pass(model, tokens, tokens.roll(-1, 1))[1].backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rate_and_decay_of_each_parameter(optimizer, tied):
    model = model_of(tie_embeddings=tied, use_rope=False, bias=True)
    rates = {"embedding_lr": 0.3} | ({} if tied else {"unembedding_lr": 0.004})
    rates |= {"matrix_lr": 0.05, "momentum": 0.9} if optimizer == "muon" else {}
    made = make_optimizer(model, config_of(optimizer=optimizer, learning_rate=0.002, **rates))
    found = {p: group for group in made.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in made.param_groups) == len(found)
    assert found.keys() == set(model.parameters())
    for name, parameter in model.named_parameters():
        group, matrix = found[parameter], name.startswith("blocks.") and parameter.dim() == 2
        rate = {"wte.weight": 0.3, "wpe.weight": 0.3, "lm_head.weight": 0.004}.get(name, 0.002)
        muon = matrix and optimizer == "muon"
        assert (group["lr"], group["initial_lr"]) == (0.05, 0.05) if muon else (rate, rate), name
        assert group.get("momentum") == (0.9 if muon else None)
        assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0)


def test_without_rates_of_their_own_there_are_as_few_groups_as_can_be():
    """The order of the parameters never changes, because a checkpoint stores their state by number."""
    orders = []
    for settings, n_groups in [({}, 2), ({"embedding_lr": 1.0, "unembedding_lr": 0.1}, 4)]:
        model = model_of(tie_embeddings=False)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = make_optimizer(model, config_of(**settings)).param_groups
        assert len(groups) == n_groups
        orders.append([names[p] for group in groups for p in group["params"]])
    assert orders[0] == orders[1]


def test_a_tied_head_has_no_rate_of_its_own():
    with pytest.raises(UserError, match="unembedding_lr is for an untied head"):
        make_optimizer(model_of(), config_of(unembedding_lr=0.1))


def test_a_stack_of_experts_is_a_matrix_for_muon():
    model = model_of()
    block = model.blocks[0]
    block.experts = nn.Parameter(torch.randn(4, 32, 48))
    groups = make_optimizer(model, config_of(optimizer="muon")).param_groups
    kinds = {p: "momentum" in group for group in groups for p in group["params"]}
    assert kinds[block.experts] and kinds[block.attn.proj.weight] and not kinds[model.wte.weight]


# ---- Muon --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (64, 16), (16, 64)])
def test_an_update_keeps_its_directions_and_loses_its_lengths(rows, columns):
    u, s, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.05, len(s), dtype=torch.float64)
    scale = math.sqrt(max(1, rows / columns))
    turned = u.T @ (orthogonal((7 * u * s @ v).float()).double() / scale) @ v.T
    assert (turned.diag() > 0.6).all() and (turned.diag() < 1.25).all()
    assert (turned - turned.diag().diag()).abs().max() < 1e-5


def test_a_stack_is_one_matrix_after_another_that_maps_the_other_way():
    stack = torch.randn(3, 16, 40)  # [E, inputs, outputs]
    each = torch.stack([orthogonal(matrix.T.contiguous()).T for matrix in stack])
    torch.testing.assert_close(orthogonal(stack), each)
    assert not orthogonal(torch.zeros(4, 4)).any()


@needs_torch_muon
def test_it_is_pytorchs_muon_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    shapes = [(32, 32), (96, 32), (16, 64)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9}
    optimizers = Muon([{"params": ours, **settings}]), torch.optim.Muon(theirs, **settings)
    for _ in range(10):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = two.grad = torch.randn(one.shape)
        for optimizer in optimizers:
            optimizer.step()
    for one, two in zip(ours, theirs, strict=True):
        assert (one - 1).abs().max() > 0.1
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@needs_torch_muon
def test_pytorchs_own_takes_the_steps_of_a_run_in_bfloat16():
    ours, theirs = model_of(), model_of()
    optimizers = [make_optimizer(model, config_of(optimizer="muon"), dtype)
                  for model, dtype in ((ours, "float32"), (theirs, "bfloat16"))]  # fmt: skip
    assert [type(optimizer.muon) for optimizer in optimizers] == [Muon, torch.optim.Muon]
    before = copy.deepcopy(ours)
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train_a_step(model, optimizer, seed=0)
    for one, two, start in zip(ours.matrices(), theirs.matrices(), before.matrices(), strict=True):
        steps = ((matrix - start).flatten() for matrix in (one, two))
        assert nn.functional.cosine_similarity(*steps, dim=0) > 0.95  # each product is rounded to 8 bits


def test_the_two_in_one_are_muon_and_adamw():
    config = config_of(optimizer="muon", weight_decay=0.3)
    joined, apart = model_of(), model_of()
    one, two = make_optimizer(joined, config), make_optimizer(apart, config)
    for step in range(4):
        if step == 2:  # continue with a new optimizer that loads the state
            state = copy.deepcopy(one.state_dict())
            one = make_optimizer(joined, config)
            one.load_state_dict(state)
        train_a_step(joined, one, seed=step)
        tokens = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(step))
        lm_pass(apart, tokens, tokens.roll(-1, 1))[1].backward()
        two.muon.step(), two.adamw.step(), apart.zero_grad()
    for p, q in zip(joined.parameters(), apart.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, {0: 0.01, 49: 0.5, 99: 1, 100: 1, 325: 0.868198052, 550: 0.55, 1000: 0.1, 2000: 0.1}),
        ({"lr_decay_iters": 500}, {99: 1, 300: 0.55, 500: 0.1, 999: 0.1}),
        ({"warmup_ratio": 0.2}, {0: 0.005, 199: 1, 200: 1, 600: 0.55, 1000: 0.1}),
        ({"warmup_ratio": 0.0}, {0: 1, 500: 0.55}),
        ({"warmdown_ratio": 0.4}, {49: 0.5, 100: 1, 600: 1, 800: 0.55, 900: 0.325, 1000: 0.1, 1100: 0.1}),
        ({"warmup_ratio": 0.01, "warmdown_ratio": 0.99}, {0: 0.1, 9: 1, 10: 1, 505: 0.55}),
        ({"warmdown_ratio": 1.0, "warmup_ratio": 0.0, "min_lr": 0.0}, {0: 1, 250: 0.75, 1000: 0}),
        ({"decay_lr": False}, {0: 1, 5000: 1}),
    ],
)
def test_the_rate_of_a_step(settings, rates):
    config = config_of(**{"learning_rate": 2e-3, "min_lr": 2e-4, **settings})
    for step, multiplier in rates.items():
        assert rate_multiplier(step, config) == pytest.approx(multiplier), step
        assert learning_rate_at(step, config) == pytest.approx(2e-3 * multiplier)


def test_all_rates_follow_the_schedule(train):
    rates = {"learning_rate": 4e-3, "min_lr": 4e-4, "embedding_lr": 0.1, "matrix_lr": 0.05}
    settings = {"warmup_iters": 1, "warmdown_ratio": 0.5, "max_steps": 4, "log_interval": 1}
    assert train("pretrain", optimizer="muon", **rates, **settings).returncode == 0
    assert [float(rate) for _, rate in train.logged("Train", "LR")] == [4e-3, 4e-3, 4e-3, 2.2e-3]
    from engine.checkpoint import load

    groups = load(train.checkpoints()[4]).optimizer["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.055, 0.0275, 0.0022])
