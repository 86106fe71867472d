"""decoding/likelihood.py against one plain pass over each whole text."""

import random

import pytest
import torch
from test_model import build

import models
from decoding import likelihood, packed
from decoding.likelihood import Likelihood, log_likelihoods

V = 23
ARCHITECTURES = {
    "nano": dict(),
    "learned positions": dict(use_rope=False),
    "llama3": dict(qk_norm=False, tie_embeddings=False, rope_scaling=dict(
        rope_type="llama3", factor=4.0, original_max_position_embeddings=8)),
    "nanochat": dict(architecture="nanochat"),
    "deepseek_v3": dict(architecture="deepseek_v3"),
}  # fmt: skip


def make(name, **changes):
    """A model in float64, with a context of 32 tokens."""
    torch.manual_seed(0)
    shape = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, vocab_size=V) | ARCHITECTURES[name] | changes
    model = models.build(models.check_config(shape, "the test")).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def questions(n=12, seed=0):
    """Requests that begin alike in every way: the same examples first, the same question, the same text."""
    draw = random.Random(seed)

    def text(shortest, longest):
        return [draw.randrange(V) for _ in range(draw.randint(shortest, longest))]

    examples, requests = text(9, 9), []
    for number in range(n):
        context = [*examples[: draw.choice((0, 9, 9))], *text(1, 12)]
        choices = [text(1, 1) if number % 3 == 0 else text(1, 9) for _ in range(4)]
        choices[1] = [*choices[0], *choices[1]][:10]  # one may begin as another, or be the same
        requests += [(context, choice) for choice in choices]
    requests += [(requests[0][0][:3], [*requests[0][0][3:], 1]), requests[5], ([1], [2])]
    draw.shuffle(requests)
    return requests


@torch.no_grad()
def alone(model, context, continuation):
    """A plain pass over one text."""
    text = [*context, *continuation]
    n_dropped = max(0, len(text) - model.config.block_size - 1)
    text = text[n_dropped:]
    logits = model(torch.tensor([text[:-1]]))[0, -len(continuation) :]
    logprobs = logits.log_softmax(-1)[range(len(continuation)), continuation]
    is_greedy = logits.argmax(-1).tolist() == continuation
    return Likelihood(float(logprobs.sum()), is_greedy, len(continuation), n_dropped)


def check(model, requests, tolerance=1e-6):  # deepseek_v3 computes its routers in float32
    found = log_likelihoods(model, requests)
    for one, request in zip(found, requests, strict=True):
        expected = alone(model, *request)
        assert one[1:] == expected[1:]
        assert one.logprob == pytest.approx(expected.logprob, abs=tolerance)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_in_a_plain_pass(name):
    model, requests = make(name), questions()
    greedy = list(range(V))
    greedy = [int(model(torch.tensor([[token]]))[0, -1].argmax()) for token in greedy]
    requests += [([token], [following]) for token, following in enumerate(greedy)]
    found = check(model, requests)
    assert all(one.is_greedy for one in found[-V:]) and not all(one.is_greedy for one in found)


@pytest.mark.parametrize("name", ["nano", "learned positions", "deepseek_v3"])
def test_small_batches_and_few_logits_change_nothing(name, monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 3 * V)
    monkeypatch.setattr(likelihood, "MIN_SHARED", 1)
    monkeypatch.setattr(likelihood, "CPU_BATCH", 40)
    check(make(name), questions(seed=1))


def test_a_shared_beginning_is_read_once(monkeypatch):
    model, n_read = make("nano"), []
    hidden = model.hidden

    def counting(tokens, cache=None, lengths=None):
        n_read.append(int(lengths.sum()))
        return hidden(tokens, cache, lengths)

    monkeypatch.setattr(model, "hidden", counting)
    context = [token % V for token in range(20)]
    log_likelihoods(model, [(context, [i, i + 1, 7]) for i in range(4)])
    assert n_read == [20, 8]  # the last token of a text is not read
    n_read.clear()
    log_likelihoods(model, [(context, [i]) for i in range(4)])
    assert n_read == [20]
    n_read.clear()
    few_shot = [([*context[:12], i, i + 1, i + 2, *context[12:]], [j, 1]) for i in range(3) for j in (4, 5)]
    log_likelihoods(model, few_shot)
    assert n_read == [12, 3 * 11, 6]


def test_only_continuations_get_logits(monkeypatch):
    model, n_logits = make("nano"), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: n_logits.append(len(x)) or logits(x))
    log_likelihoods(model, [([1] * 20, [i, 2, 3]) for i in range(4)])
    assert sum(n_logits) == 1 + 4 * 2  # the first token of all four follows the same context


def test_texts_longer_than_the_context_lose_their_beginning():
    model = make("nano")
    draw = random.Random(2)
    ids = [draw.randrange(V) for _ in range(90)]
    requests = [(ids[:n], ids[n : n + m]) for n, m in [(31, 2), (32, 1), (33, 1), (60, 5), (1, 32), (50, 32)]]
    found = check(model, requests)
    assert [one.n_dropped for one in found] == [0, 0, 1, 32, 0, 49]


def test_a_model_is_left_as_it_was():
    model = build(block_size=32).set_dropout(0.5)
    model.train()
    state = torch.get_rng_state()
    first = log_likelihoods(model, questions())
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert first == log_likelihoods(model, questions())  # without dropout
    assert all(weight.requires_grad and not weight.is_inference() for weight in model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    model.eval()
    log_likelihoods(model, questions())
    assert not model.training


def test_int8_and_float32():
    model = make("nano", n_embd=64).float()
    check(model, questions(), tolerance=1e-4)
    check(packed.quantize(model), questions(), tolerance=1e-4)


def test_each_result_is_reported_once():
    reported = {}
    requests = questions()
    found = log_likelihoods(make("nano"), requests, lambda number, one: reported.setdefault(number, one))
    assert [reported[number] for number in range(len(requests))] == found
    assert log_likelihoods(make("nano"), []) == []


def test_what_has_no_likelihood_is_refused():
    model = make("nano")
    for request, why in [
        (([], [1]), "no token"), (([1], []), "no token"), (([V], [1]), "outside"), (([1], [-1]), "outside"),
        (([1], [1] * 33), "33 tokens do not fit in a context of 32"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=why):
            log_likelihoods(model, [([1], [2]), request])
    with pytest.raises(ValueError, match="is_causal"):
        log_likelihoods(build(is_causal=False), [([1] * 9, [2, 3]), ([1] * 9, [3, 3])])
