"""decoding/sampling.py against its definitions in plain Python, and against Transformers."""

import math
import types
from collections import Counter

import pytest
import torch
from test_model import POSITIONS, build, differ, greedy_without_cache, random_tokens

from decoding import sampling
from decoding.sampling import TokenCounts, generate, logits_to_probs, sample

# ---- sampling ------------------------------------------------------------------------------------


def probabilities(logits, **setting):
    """Those of `logits_to_probs`, for all tokens [V]."""
    found, ids = logits_to_probs(logits, **counted(setting, len(logits)))
    return torch.zeros_like(logits).scatter(0, ids, found / found.sum())


def counted(setting, vocab_size):
    """The setting with the TokenCounts of its text: `previous`, the prompt, and `drawn`, what followed it."""
    setting = dict(setting)
    counts = TokenCounts(setting.pop("previous", ()), vocab_size)
    for token in setting.pop("drawn", ()):
        counts.add(token)
    return setting | dict(counts=counts)


def distribution(
    logits, temperature=1.0, top_k=None, top_p=None, min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0,
    presence_penalty=0.0, logit_bias=None, previous=(), drawn=(),
):  # fmt: skip
    """What `sample` should draw from, from the definitions and in plain Python: a list of probabilities."""
    values = []
    for token, value in enumerate(logits.tolist()):
        if token in [*previous, *drawn]:
            value = value / repetition_penalty if value > 0 else value * repetition_penalty
        count = [*drawn].count(token)
        value -= count * frequency_penalty + (count > 0) * presence_penalty
        values.append(value + (logit_bias or {}).get(token, 0.0))
    if temperature == 0:
        return [float(token == values.index(max(values))) for token in range(len(values))]
    order = sorted(range(len(values)), key=lambda token: -values[token])
    kept = order[: top_k or None]
    weights = {token: math.exp((values[token] - values[order[0]]) / temperature) for token in kept}
    total = sum(weights.values())
    nucleus, held = [], 0.0
    for token in kept:
        nucleus.append(token)
        held += weights[token] / total
        if top_p is not None and held >= top_p:
            break
    nucleus = [token for token in nucleus if weights[token] >= min_p]  # the likeliest weighs 1
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(values))]


SETTINGS = [
    dict(),
    dict(temperature=0.3),
    dict(temperature=2.5),
    dict(top_k=1),
    dict(top_k=4),
    dict(top_k=0),
    dict(top_k=99),
    dict(top_p=0.5),
    dict(top_p=0.9),
    dict(top_p=1.0),
    dict(top_p=1e-9),
    dict(top_p=5e-324),
    dict(min_p=0.0),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(repetition_penalty=1.7, previous=[0, 3, 3, 7]),
    dict(repetition_penalty=0.6, previous=[1, 2]),
    dict(repetition_penalty=1.2, previous=range(12)),
    dict(repetition_penalty=1.5),
    dict(temperature=0.7, top_k=6, top_p=0.8, repetition_penalty=1.3, previous=[2, 5, 9, 10]),
    dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.2),
    dict(temperature=1.8, top_k=3, top_p=0.95, repetition_penalty=1.1, previous=[11]),
    dict(frequency_penalty=0.7, drawn=[0, 3, 3, 7, 3]),
    dict(frequency_penalty=-2.0, drawn=[1, 1, 2]),
    dict(presence_penalty=1.5, drawn=[0, 3, 3, 7, 3], previous=[8, 9]),
    dict(presence_penalty=2.0, frequency_penalty=0.1, previous=range(12)),  # the prompt was not drawn
    dict(logit_bias={0: 100.0, 5: -100.0}),
    dict(logit_bias={11: 1.5, 3: 0.0}, temperature=0.5),
    dict(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.3, logit_bias={3: 2.5, 4: -1},
         temperature=0.8, top_k=8, top_p=0.95, previous=[1, 3], drawn=[3, 4, 4]),
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_candidates_have_the_right_probabilities(setting):
    for seed in range(25):
        logits = 3 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
        before = logits.clone()
        found = probabilities(logits, **setting)
        assert torch.equal(logits, before)  # the caller's logits are left alone
        assert differ(found, torch.tensor(distribution(logits, **setting))) < 1e-5


@pytest.mark.parametrize("spread", [0.1, 5])
@pytest.mark.parametrize("setting", [dict(top_p=0.9), dict(top_k=3000, top_p=0.99, min_p=0.1)], ids=str)
def test_most_of_many_tokens_may_be_candidates(setting, spread):
    logits = spread * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(distribution(logits, **setting))
    assert differ(probabilities(logits, **setting), expected) < 1e-5
    # Where the sum of those before it is all but top_p, rounding decides about a token.
    n_found, n_expected = ((p > 0).sum().item() for p in (probabilities(logits, **setting), expected))
    assert abs(n_found - n_expected) <= 1 and (n_expected > 2048) == (spread == 0.1)


@torch.no_grad()
@pytest.mark.parametrize(
    "setting", [dict(temperature=0.6), dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2), "all"], ids=str
)
def test_probabilities_are_those_of_transformers(setting):
    """`logits_to_probs` does what Transformers' logits processors do one after the other."""
    transformers = pytest.importorskip("transformers")
    if setting == "all":
        setting = dict(temperature=1.4, top_k=12, top_p=0.8, min_p=0.1, repetition_penalty=1.25)
    for seed in range(20):
        logits, previous = 2 * torch.randn(1, 40), random_tokens(1, 9, seed=seed, vocab_size=40)
        scores = logits
        for name, process in (
            ("repetition_penalty", transformers.RepetitionPenaltyLogitsProcessor),
            ("temperature", transformers.TemperatureLogitsWarper),
            ("top_k", transformers.TopKLogitsWarper),
            ("top_p", transformers.TopPLogitsWarper),
            ("min_p", transformers.MinPLogitsWarper),
        ):
            if name in setting:
                scores = process(setting[name])(previous, scores)
        found = probabilities(logits[0], **setting, previous=previous[0].tolist())
        assert differ(found, scores[0].softmax(-1)) < 1e-5


@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (0, 1, 4, 7, 12, 14, 18, 19, -1)], ids=str)
def test_sample_draws_as_often_as_it_should(setting):
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    n = 2000
    counts = Counter(sample(logits, generator=generator, **counted(setting, 12)) for _ in range(n))
    expected = distribution(logits, **setting)
    possible = [token for token, p in enumerate(expected) if p > 0]
    assert set(counts) <= set(possible)
    chi_square = sum((counts[t] - n * expected[t]) ** 2 / (n * expected[t]) for t in possible)
    freedom = len(possible) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8  # about one in 10,000 seeds would fail


def test_greedy_sampling():
    logits = torch.tensor([0.5, 2.0, 1.9, -1.0])
    assert sample(logits, temperature=0) == 1
    assert sample(logits, temperature=0, top_k=3, top_p=0.2) == 1
    assert sample(logits, temperature=0, repetition_penalty=1.2, counts=TokenCounts([1], 4)) == 2
    assert sample(logits, temperature=0, frequency_penalty=1.0, counts=TokenCounts([1], 4)) == 1
    (counts := TokenCounts([], 4)).add(1)
    assert sample(logits, temperature=0, frequency_penalty=0.2, counts=counts) == 2
    assert sample(logits, temperature=0, presence_penalty=0.2, counts=counts) == 2
    assert sample(logits, temperature=0, logit_bias={3: 100}) == 3
    assert all(sample(1000 * logits, temperature=t) == 1 for t in (1e-3, 1e-9, 1e-300))


BAD_SETTINGS = [
    dict(temperature=-0.1),
    dict(temperature=math.nan),
    dict(top_k=-1),
    dict(top_p=0.0),
    dict(top_p=1.1),
    dict(min_p=-0.1),
    dict(min_p=1.1),
    dict(repetition_penalty=0.0),
    dict(repetition_penalty=-2.0),
    dict(frequency_penalty=math.nan),
    dict(presence_penalty=math.inf),
    dict(logit_bias={23: 1.0}),
    dict(logit_bias={-1: 1.0}),
]


@pytest.mark.parametrize("setting", BAD_SETTINGS, ids=str)
def test_senseless_settings_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        sample(torch.zeros(3), **setting)
    with pytest.raises(ValueError, match=name):
        next(generate(build(), [1], 5, **setting))


# ---- generation ----------------------------------------------------------------------------------


@POSITIONS
@pytest.mark.parametrize("n_prompt", [1, 5, 15, 16])
def test_greedy_generation_is_argmax(use_rope, n_prompt):
    for seed in range(3):
        model = build(seed, use_rope=use_rope)
        prompt = random_tokens(n_prompt, seed=seed).tolist()
        n = 17 - n_prompt  # as many as the context lets be predicted
        answer = list(generate(model, prompt, n, temperature=0))
        assert answer == greedy_without_cache(model, prompt, n)
        assert len(answer) == n and all(type(token) is int for token in answer)


@POSITIONS
@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("n_prompt", [1, 16, 50])
def test_generation_beyond_the_context(use_rope, block_size, n_prompt):
    model = build(3, use_rope=use_rope, block_size=block_size)
    prompt = random_tokens(n_prompt).tolist()
    answer = list(generate(model, prompt, 45, temperature=0))
    assert answer == greedy_without_cache(model, prompt, 45)


@pytest.mark.parametrize("n_wrong", [0, 1, 4])
@pytest.mark.parametrize("n_prompt", [1, 16, 50])
def test_guesses_change_no_token_and_save_passes(n_wrong, n_prompt, monkeypatch):
    """A drafter of up to four guesses, which knows the text, of which every n_wrong-th is replaced."""
    model = build(3)
    prompt = random_tokens(n_prompt).tolist()
    text, answer, passes = prompt + greedy_without_cache(model, prompt, 45), [], []

    def guess(x, following):
        said, n = prompt + answer, following.shape[1]
        assert x.shape == (1, n, model.config.n_embd) and following[0].tolist() == said[-n:]
        assert model.logits(x[0, -1]).argmax() == said[-1]
        guesses = text[len(said) :][: len(said) % 5]
        return [(token + (n_wrong > 0 and i % n_wrong == 0)) % 23 for i, token in enumerate(guesses, 1)]

    monkeypatch.setattr(model, "drafter", lambda: guess, raising=False)
    model.blocks[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    for token in generate(model, prompt, 45, temperature=0):
        answer.append(token)
    assert prompt + answer == text
    assert {length for length in passes if length <= 5} > {1} and len(passes) <= (45 if n_wrong == 1 else 30)
    passes.clear()
    assert list(generate(model, prompt, 45, temperature=0, draft=False)) == answer
    assert list(generate(model, prompt, 45, temperature=0, repetition_penalty=1.2, seed=1))
    assert len(passes) == 90


def test_generation_is_lazy():
    model = build()
    passes = []

    def count(_, args):
        passes.append(args[0].shape[1])
        assert torch.is_inference_mode_enabled()

    model.blocks[0].register_forward_pre_hook(count)
    answer = generate(model, [1, 2, 3], 10**9, seed=0)
    assert isinstance(answer, types.GeneratorType) and passes == []
    next(answer)
    assert passes == [3]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # between two tokens
    next(answer), next(answer)
    assert passes == [3, 1, 1]
    answer.close()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert list(generate(model, [1], 0)) == []


def test_two_generations_do_not_disturb_each_other():
    model = build()
    alone = [list(generate(model, [n], 12, seed=n)) for n in (1, 2)]
    together = zip(generate(model, [1], 12, seed=1), generate(model, [2], 12, seed=2), strict=True)
    assert [list(answer) for answer in zip(*together, strict=True)] == alone


def test_the_seed_fixes_the_answer():
    model = build()
    state = torch.get_rng_state()
    answers = [tuple(generate(model, [1, 2], 14, seed=seed)) for seed in (7, 7, 8, 9)]
    assert answers[0] == answers[1] and len(set(answers)) == 3
    assert torch.equal(torch.get_rng_state(), state)
    free = {tuple(generate(model, [1, 2], 14)) for _ in range(3)}
    assert len(free) == 3


def test_generate_hands_its_settings_on(monkeypatch):
    model, calls, texts = build(), [], []

    def spy(logits, generator, counts, **options):
        texts.append(counts and (counts.seen.nonzero().flatten().tolist(), counts.drawn[4].item()))
        calls.append(options)
        return 4

    monkeypatch.setattr(sampling, "sample", spy)
    setting = dict(temperature=0.5, top_k=3, top_p=0.8, min_p=0.1, repetition_penalty=1.4)
    list(generate(model, [5, 6], 3, **setting))
    assert calls == [setting] * 3
    assert texts == [([5, 6], 0), ([4, 5, 6], 1), ([4, 5, 6], 2)]  # the prompt counts as said, not as drawn
    calls.clear()
    assert next(generate(model, [5], 1)) == 4
    assert calls == [{}] and texts[3] is None  # nothing is counted unless a penalty needs it


def test_generation_draws_from_the_models_distribution():
    model = build()
    prompt = [3, 1, 4]
    setting = dict(temperature=0.8, top_k=8, top_p=0.9, repetition_penalty=1.3)
    with torch.no_grad():
        expected = distribution(model(torch.tensor([prompt]))[0, -1], previous=prompt, **setting)
    n = 400
    counts = Counter(next(generate(model, prompt, 1, seed=seed, **setting)) for seed in range(n))
    distance = sum(abs(counts[token] / n - p) for token, p in enumerate(expected)) / 2
    assert distance < 0.08


@torch.no_grad()
@pytest.mark.parametrize(
    "setting",
    [
        dict(frequency_penalty=0.3),
        dict(presence_penalty=-0.2, logit_bias={7: 0.4, 2: -100.0}),
        dict(repetition_penalty=1.3, frequency_penalty=0.1, presence_penalty=0.2, logit_bias={1: 1.0}),
    ],
    ids=str,
)
def test_greedy_text_under_penalties_follows_their_definition(setting):
    """Token for token, by plain Python's numbers of 64 bits."""
    model, prompt = build(), [3, 1, 4, 1]
    drawn = list(generate(model, prompt, 12, temperature=0, **setting))
    for i, token in enumerate(drawn):
        logits = model(torch.tensor([prompt + drawn[:i]]))[0, -1]
        expected = distribution(logits, temperature=0, previous=prompt, drawn=drawn[:i], **setting)
        assert expected[token] == 1
    assert drawn != list(generate(model, prompt, 12, temperature=0))


def test_stop_tokens_end_the_answer_and_are_not_part_of_it():
    model = build()
    whole = list(generate(model, [1], 14, temperature=0))
    stop = whole[5]
    end = whole.index(stop)
    assert list(generate(model, [1], 14, temperature=0, stop_tokens=[stop])) == whole[:end]
    assert list(generate(model, [1], 14, temperature=0, stop_tokens=(22, stop))) == whole[:end]
    assert list(generate(model, [stop], 3, temperature=0, stop_tokens=range(23))) == []


def test_generate_takes_any_sequence_of_ids():
    model = build()
    answer = list(generate(model, [1, 2, 3], 5, temperature=0))
    for ids in ((1, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).numpy().astype("uint16")):
        assert list(generate(model, ids, 5, temperature=0)) == answer


def test_bad_prompts_are_refused_in_words():
    model = build()
    with pytest.raises(ValueError, match="no token"):
        next(generate(model, [], 5))
    for ids in ([1, 23], [-1]):
        with pytest.raises(ValueError, match=r"outside 0 \.\. 22"):
            next(generate(model, ids, 5))
