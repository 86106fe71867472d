"""decoding/engine.py: the result of a request does not depend on who shares the batch."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import random_tokens
from test_tokenizer import BPE, CHAR, any_text, awkward

import decoding.engine
import models
from decoding.backend import TorchBackend
from decoding.engine import BatchedDecoder, Request
from decoding.sampling import generate
from decoding.text import StopStrings, TextStream
from model import GPT
from tokenizer import CharTokenizer

# Also with the compiled backend, for the networks that it supports.
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
ARCHITECTURES = {
    "nano": {},
    "learned positions, biases": dict(use_rope=False, bias=True),
    "nanochat": dict(architecture="nanochat"),
    "deepseek_v3": dict(architecture="deepseek_v3", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
                        v_head_dim=8, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1,
                        moe_intermediate_size=8),
}  # fmt: skip


def network(name="nano", block_size=24, vocab_size=29):
    torch.manual_seed(0)
    fields = dict(architecture="nano", block_size=block_size, n_layer=3, n_head=4, n_embd=32, n_hidden=40)
    config = models.check_config(fields | ARCHITECTURES[name], "the test")
    model = models.build(config.resolved(vocab_size)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # large enough that no two tokens are close
    return model


def prompts(count, seed=0):
    lengths = random.Random(seed).choices(range(1, 25), k=count)
    return [random_tokens(n, seed=i, vocab_size=29).tolist() for i, n in enumerate(lengths)]


def decoder_of(model, n_slots, compiled=False):
    decoder = BatchedDecoder(model, n_slots)
    if compiled:
        pytest.importorskip("numba")
        decoder.compile(wait=True)
    return decoder


@COMPILED
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("n_slots", [1, pytest.param(3, marks=pytest.mark.slow), 16])
def test_alone_or_together_greedy_text_is_the_same(name, n_slots, compiled):
    """For prompts of all lengths, which come and go and outgrow the context; `generate` is the reference.

    Reporting logprobs makes no difference.
    """
    model, requests = network(name), []
    decoder, texts = decoder_of(model, n_slots, compiled), prompts(20)
    stop = [3]
    late = random.Random(1)
    while len(requests) < len(texts) or decoder.is_busy:
        while len(requests) < len(texts) and (late.random() < 0.4 or not decoder.is_busy):
            n = len(requests)
            options = dict(max_tokens=5 + 3 * n, temperature=0, stop_tokens=stop, n_logprobs=[None, 2][n % 2])
            requests.append(decoder.add(Request(texts[n], **options)))
        advanced = decoder.step()
        assert len(advanced) <= n_slots and len(decoder.running) <= n_slots
    for prompt, request in zip(texts, requests, strict=True):
        expected = list(generate(model, prompt, request.max_tokens, temperature=0, stop_tokens=stop))
        assert request.tokens == expected
        assert request.finish_reason == ("length" if len(expected) == request.max_tokens else "stop")
    assert isinstance(decoder.backend, TorchBackend) != (compiled and type(model) is GPT)


@pytest.mark.parametrize("n_before", [0, 3, 30, 60])
def test_the_backend_may_be_switched_at_any_time(n_before):
    """Also while running texts have outgrown the context."""
    pytest.importorskip("numba")
    model, texts = network(), prompts(5)
    decoder = BatchedDecoder(model, 3)
    requests = [decoder.add(Request(prompt, 70, temperature=0)) for prompt in texts]
    for _ in range(n_before):
        decoder.step()
    decoder.compile(wait=True)
    decoder.run([])
    assert not isinstance(decoder.backend, TorchBackend)
    for prompt, request in zip(texts, requests, strict=True):
        assert request.tokens == list(generate(model, prompt, 70, temperature=0))


SETTINGS = [
    dict(), dict(temperature=0.5, top_k=4), dict(top_p=0.8), dict(min_p=0.1),
    dict(temperature=0, repetition_penalty=1.5), dict(repetition_penalty=0.7, top_k=9, top_p=0.9),
    dict(temperature=0, frequency_penalty=0.5), dict(temperature=0, logit_bias={4: 3.0, 5: -100.0}),
    dict(frequency_penalty=-0.1, presence_penalty=0.7, logit_bias={28: 1.5}, temperature=0.8),
]  # fmt: skip


@COMPILED
def test_each_draws_with_its_own_seed_and_settings(compiled):
    model, texts = network(), prompts(18)
    requests = [Request(prompt, 30, seed=i, **SETTINGS[i % len(SETTINGS)]) for i, prompt in enumerate(texts)]
    decoder_of(model, 5, compiled).run(requests)
    for i, (prompt, request) in enumerate(zip(texts, requests, strict=True)):
        assert request.tokens == list(generate(model, prompt, 30, seed=i, **SETTINGS[i % len(SETTINGS)]))
    BatchedDecoder(model, 2).run(again := [Request([5], 20) for _ in range(3)])
    assert len({tuple(request.tokens) for request in again}) == 3  # without a seed


def test_penalties_do_not_search_the_text_for_every_token():
    looks = []

    class Watched(list):
        def __iter__(self):
            looks.append(len(self))
            return super().__iter__()

    decoder = BatchedDecoder(network(block_size=200))
    request = Request([1, 2, 3], 150, repetition_penalty=1.3, frequency_penalty=0.1, presence_penalty=0.1)
    request.context = Watched(request.context)
    decoder.run([request])
    assert len(request.tokens) == 150 and sum(looks) < 20
    plain = Request([1], 3, temperature=0.8, top_k=3)
    decoder.run([plain])
    assert plain.counts is None  # nothing is counted unless a penalty needs it


def test_removing_a_request_does_not_affect_others():
    model, texts = network(), prompts(8)
    decoder, ended = BatchedDecoder(model, 3), []
    requests = [decoder.add(Request(prompt, 20, temperature=0)) for prompt in texts]
    for n_steps, victim in ((4, requests[1]), (1, requests[0]), (2, requests[7])):
        for _ in range(n_steps):
            decoder.step()
        decoder.remove(victim)
        decoder.remove(victim)  # twice is once
        assert victim.finish_reason == "cancelled"
    n_tokens = len(requests[1].tokens)
    while decoder.is_busy:
        ended += [request for request in decoder.step() if request.finish_reason]
    assert len(requests[1].tokens) == n_tokens and requests[7].tokens == []
    assert {id(r) for r in ended} == {id(r) for r in requests} - {id(requests[i]) for i in (0, 1, 7)}
    for i in (2, 3, 4, 5, 6):
        assert requests[i].tokens == list(generate(model, texts[i], 20, temperature=0))


@torch.no_grad()
def test_logprobs_are_the_models_own():
    model = network()
    requests = [
        Request(prompt, 4, seed=1, n_logprobs=n, temperature=0.7, top_k=3)
        for prompt in prompts(3)
        for n in (0, 5, 99)
    ]
    BatchedDecoder(model, 4).run(requests)
    for request in requests:
        for i, (logprob, likeliest) in enumerate(request.logprobs):
            before = request.context[: request.n_prompt + i][-24:]
            expected = model(torch.tensor([before]))[0, -1].log_softmax(-1)
            assert logprob == pytest.approx(expected[request.tokens[i]].item(), abs=1e-4)
            found = sorted(expected.tolist(), reverse=True)[: request.n_logprobs]
            assert [value for _, value in likeliest] == pytest.approx(found, abs=1e-4)
            assert [expected[token].item() for token, _ in likeliest] == pytest.approx(found, abs=1e-4)
        assert len(request.logprobs) == len(request.tokens)
    assert Request([1], 1).logprobs == []
    stopped = Request([1], 9, n_logprobs=2, temperature=0, stop_tokens=range(29))
    BatchedDecoder(model).run([stopped])
    assert stopped.finish_reason == "stop" and stopped.tokens == stopped.logprobs == []


@COMPILED
@torch.no_grad()
def test_logprobs_of_prompts_are_those_of_one_pass(compiled, monkeypatch):
    """Also where a prompt is read in pieces while others are answered, which do not change by that."""
    monkeypatch.setattr(decoding.engine, "PREFILL_CHUNK", 5)
    model = network()
    decoder, texts = decoder_of(model, 4, compiled), prompts(9)
    decoder.backend.max_logits = 3
    requests = [
        Request(prompt, i % 3 * 6, n_logprobs=i % 4, temperature=0, scores_prompt=i % 2 == 0 or i % 3 == 0)
        for i, prompt in enumerate(texts)
    ]
    decoder.run(requests)
    for i, (prompt, request) in enumerate(zip(texts, requests, strict=True)):
        assert request.tokens == list(generate(model, prompt, i % 3 * 6, temperature=0))
        assert request.finish_reason == "length"
        if i % 2 and i % 3:
            assert request.prompt_logprobs == []
            continue
        expected = model(torch.tensor([prompt]))[0].log_softmax(-1)
        assert len(request.prompt_logprobs) == len(prompt) - 1
        told = zip(expected, prompt[1:], request.prompt_logprobs, strict=False)
        for row, token, (logprob, likeliest) in told:
            assert logprob == pytest.approx(row[token].item(), abs=1e-4)
            best = row.topk(i % 4).values.tolist()
            assert [value for _, value in likeliest] == pytest.approx(best, abs=1e-4)
    assert not decoder.is_busy


@COMPILED
def test_a_long_prompt_is_read_in_pieces_while_others_go_on(compiled, monkeypatch):
    """Every step gives a token to each running request, and reads no more than one piece."""
    monkeypatch.setattr(decoding.engine, "PREFILL_CHUNK", 4)
    model = network(block_size=64)
    decoder, n_read = decoder_of(model, 3, compiled), []
    decoder.step()
    extend = decoder.backend.extend

    def spy(row, tokens, *more):
        n_read.append(len(tokens))
        return extend(row, tokens, *more)

    monkeypatch.setattr(decoder.backend, "extend", spy)
    first, second = (decoder.add(Request([n], 40, temperature=0)) for n in (1, 2))
    decoder.step()
    long = random_tokens(42, seed=5, vocab_size=29).tolist()
    gone, late = (decoder.add(Request(long, 5, temperature=0)) for _ in range(2))
    for n in range(2, 6):
        assert decoder.step() == [first, second] and len(first.tokens) == n
    assert n_read == [4] * 4
    decoder.remove(gone)
    decoder.remove(first)  # the second one moves to its row
    decoder.run([])
    assert max(n_read) == 4 and sum(n_read) == 4 * 4 + 41
    assert second.tokens == list(generate(model, [2], 40, temperature=0))
    assert late.tokens == list(generate(model, long, 5, temperature=0)) and gone.tokens == []


def test_bad_requests_are_refused_and_the_others_go_on():
    decoder = BatchedDecoder(network(), 2)
    good = decoder.add(Request([1, 2], 5, temperature=0))
    for prompt, options in (
        ([], {}),
        ([29], {}),
        ([-1], {}),
        ([1], dict(temperature=-1)),
        ([1], dict(top_p=0)),
        ([1], dict(logit_bias={29: 1.0})),
        ([1] * 25, dict(scores_prompt=True, n_logprobs=0)),
    ):
        with pytest.raises(ValueError):
            decoder.add(Request(prompt, 5, **options))
    assert decoder.add(Request([1], 0)).finish_reason == "length"
    decoder.run([])
    assert len(good.tokens) == 5 and decoder.step() == []


def test_unknown_options_are_not_ignored():
    """Somebody who adds an option need not know that greedy text takes a short cut."""
    assert Request([1], 5, temperature=0).is_greedy
    assert Request([1], 5, temperature=0, repetition_penalty=1.0, top_k=3, top_p=0.5, min_p=0.1).is_greedy
    for options in ({}, dict(temperature=1), dict(temperature=0, repetition_penalty=1.1)):
        assert not Request([1], 5, **options).is_greedy
    assert not Request([1], 5, temperature=0, bias={3: -100}).is_greedy


# ---- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])
@settings(deadline=None)
@given(text=any_text | awkward, stop=st.lists(st.text("abc \n狐1+", min_size=1, max_size=4), max_size=3))
def test_a_stream_is_the_text_up_to_a_stop_string(tokenizer, text, stop):
    ids = tokenizer.encode(text).tolist()
    whole = tokenizer.decode(ids)
    # Of strings that overlap, the one that is complete first ends the text, whatever the tokens are.
    beginnings = (whole[:n] for n in range(1, len(whole) + 1))
    last = next((text for text in beginnings if any(s in text for s in stop)), None)
    places = [] if last is None else [last.find(s) for s in stop if s in last]
    stream, pieces = TextStream(tokenizer, stop), []
    for i in ids:
        if stream.is_stopped:
            break
        pieces.append(stream.feed(i))
        said = "".join(pieces)
        assert whole.startswith(said) and not any(s in said for s in stop)
    pieces.append(stream.end())
    assert "".join(pieces) == whole[: min(places, default=len(whole))]
    assert stream.is_stopped == bool(places)


def test_a_stream_holds_back_only_what_is_uncertain():
    stream = TextStream(CHAR, ["fox."])
    fed = [stream.feed(i) for i in CHAR.encode("The fo brown").tolist()]
    assert fed == ["T", "h", "e", " ", "", "", "fo ", "b", "r", "o", "w", "n"]
    assert TextStream(CHAR).feed(CHAR.vocab_size + 3) == "<|unknown|>"


@pytest.mark.parametrize(
    "text", ["a" * 20_000, "ab" * 10_000, ("a" * 255 + "c") * 80], ids=["a", "ab", "almost"]
)
def test_stop_strings_take_constant_time_per_character(text):
    """Whatever the stop strings are, and however many."""
    stop = ["a" * n + "b" * 3 for n in range(1, 253)] + ["b" * n for n in range(4, 253)]
    n_looks = 0

    class Counted(dict):
        def __contains__(self, character):
            nonlocal n_looks
            n_looks += 1
            return super().__contains__(character)

    strings = StopStrings(stop)
    strings.next = [Counted(longer) for longer in strings.next]
    stream = TextStream(CharTokenizer.train([text]), strings)
    said = sum(len(stream.feed(token)) for token in stream.tokenizer.encode(text).tolist())
    assert said + len(stream.end()) == len(text) and not stream.is_stopped
    assert n_looks < 2 * len(text)
