"""Scores are right: of models whose answers and probabilities are known, and beside plain computations."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from made_models import Listed, bigram, chain, small_model

import tasks
from common.errors import UserError
from evaluation import prompts, runner
from tasks import DrawnTask, Example
from tasks.questions import Questions
from tokenizer import CharTokenizer

LETTERS = "abcdefgh 0123456789.\n"


class Drawn(DrawnTask):
    """Random letters, whose answer is the last one."""

    name = "drawn"

    def draw_example(self, random):
        text = "".join(random.choices("abcdefgh", k=random.randint(4, 9)))
        return Example(text, text[-1])


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer(LETTERS)


def says(tokenizer, chain_of, start, block_size=64):
    """A model that says chain_of after the token `start`, and then <|eos|>."""
    ids = [start, *tokenizer.encode(chain_of).tolist()]
    return chain(tokenizer, dict(itertools.pairwise(ids)), block_size)[1]


def ask(model, tokenizer, examples, metric="exact", chat=True, **options):
    return runner.evaluate_task(model, tokenizer, Listed(examples, metric), chat=chat, **options)


# ---- written answers -----------------------------------------------------------------------------------


def test_written_answers(tokenizer):
    model = says(tokenizer, "ab 12.", tokenizer.response_id)
    rows = [("a", " ab 12. ", "x"), ("b", "ab 12", "x"), ("c", "AB 12.", "y"), ("d", "12", "y")]
    exact = ask(model, tokenizer, rows)
    assert [score.value for score in exact.scores] == [1, 0, 0, 0]
    assert [score.is_cut for score in exact.scores] == [False, True, False, True]  # room for the right ones
    assert exact.scores[3].answer == "ab" and exact.score == 0.25 and exact.n == 4
    assert exact.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert {kind: part.score for kind, part in exact.by_kind().items()} == {"x": 0.5, "y": 0}
    assert exact.base_rate == 0.25
    contains = ask(model, tokenizer, rows, "contains")
    assert [score.value for score in contains.scores] == [1, 1, 1, 1]
    assert {score.answer for score in contains.scores} == {"ab 12."}
    numeric = ask(model, tokenizer, [("a", "12"), ("b", "it is 12.0"), ("c", "1")], "numeric")
    assert [score.value for score in numeric.scores] == [1, 1, 0]


def test_an_answer_without_an_end_is_cut(tokenizer):
    a, b = tokenizer.encode("a1").tolist()
    model = chain(tokenizer, {tokenizer.response_id: a, a: b, b: b}, block_size=256)[1]
    for metric, value in ("exact", 0), ("numeric", 0), ("contains", 1):
        result = ask(model, tokenizer, [("b", "a11")], metric)
        (score,) = result.scores
        assert (score.value, score.is_cut, result.standard_error) == (value, True, None)
        room = 4 if metric == "exact" else 4 + prompts.ANSWER_ROOM
        assert score.answer == "a" + (room - 1) * "1"


def test_a_model_without_a_template_reads_a_text_and_answers_with_a_line(tokenizer):
    """Unless right answers have several lines."""
    a, b, end = tokenizer.encode("ab\n").tolist()
    model = chain(tokenizer, {end: a, a: b, b: end})[1]  # ab, ab, ab ...
    result = ask(model, tokenizer, [("what is it", "ab"), ("and this", "abab")], chat=False)
    assert [(s.value, s.answer, s.is_cut) for s in result.scores] == [(1, "ab", False), (0, "ab", False)]
    result = ask(model, tokenizer, [("what is it", "ab\na"), ("and this", "ab")], "contains", chat=False)
    assert [(s.value, s.is_cut) for s in result.scores] == [(1, True), (1, True)]
    assert result.scores[0].answer.startswith("ab\nab\nab")
    task = Listed([("cd", "a")])
    prompts = runner.prepare(task, task.list, tokenizer, model.config, chat=False).prompts
    assert prompts == [[tokenizer.bos_id, *tokenizer.encode("cd\n").tolist()]]


def test_answers_are_those_of_a_plain_loop(tokenizer):
    """Beside greedy decoding without a cache, one prompt at a time."""
    model = small_model(tokenizer)
    task = Drawn()
    examples = runner.examples_of(task, limit=40, seed=3)
    result = runner.evaluate_task(model, tokenizer, task, examples, chat=True)
    for example, score in zip(examples, result.scores, strict=True):
        ids = [
            tokenizer.instruct_id,
            *tokenizer.encode(str(example.question)).tolist(),
            tokenizer.response_id,
        ]
        written = []
        for _ in range(2):
            written.append(int(model(torch.tensor([ids + written]))[0, -1].argmax()))
            if written[-1] < tokenizer.unknown_id + 6 and written[-1] != tokenizer.unknown_id:
                break
        ended = written[-1] in range(7) and written[-1] != tokenizer.unknown_id
        text = tokenizer.decode(written[:-1] if ended else written).strip()
        assert (score.answer, score.is_cut) == (text, not ended)
        assert score.value == float(ended and text == example.answer)


# ---- likelihoods ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tokenizer):
    """Log-probabilities of each token after each token [V, V]."""
    logits = np.random.default_rng(0).normal(0, 2, (tokenizer.vocab_size, tokenizer.vocab_size))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def logprob(table, ids):
    return sum(table[before, after] for before, after in itertools.pairwise(ids))


def test_choices(tokenizer, table):
    model = bigram(tokenizer, table)[1]
    chance, rows, first, by_bytes = random.Random(0), [], [], []
    for number in range(60):
        choices = tuple({"".join(chance.choices("abcdefgh", k=chance.randint(1, 6))): 0 for _ in range(4)})
        rows.append((f"{number}", choices[0], "", choices))
        values = [
            logprob(table, [tokenizer.response_id, *tokenizer.encode(choice).tolist()]) for choice in choices
        ]
        first.append(choices[int(np.argmax(values))])
        by_bytes.append(np.argmax([v / len(c) for v, c in zip(values, choices, strict=True)]) == 0)
    result = ask(model, tokenizer, rows, "choice")
    assert [score.answer for score in result.scores] == first
    assert result.score == np.mean([answer == row[1] for answer, row in zip(first, rows, strict=True)])
    assert result.beside().score == np.mean(by_bytes) != result.score
    assert result.base_rate == pytest.approx(np.mean([1 / len(row[3]) for row in rows]))


def test_perplexity_is_pooled_over_all_tokens(tokenizer, table):
    model = bigram(tokenizer, table, block_size=16)[1]
    chance = random.Random(1)
    texts = ["".join(chance.choices(LETTERS, k=k)) for k in (1, 15, 16, 17, 33, 100)]
    for chat in False, True:  # a text is the same to both
        result = ask(model, tokenizer, [("", text) for text in texts], "perplexity", chat=chat)
        ids = [[tokenizer.bos_id, *tokenizer.encode(text).tolist()] for text in texts]
        nats, n = -sum(logprob(table, one) for one in ids), sum(map(len, texts))
        assert result.score == pytest.approx(math.exp(nats / n), rel=1e-5)
        assert result.beside().score == pytest.approx(nats / math.log(2) / n, rel=1e-5)
        assert result.base_rate is None
    (one,) = ask(model, tokenizer, [("ab", "cd")], "perplexity").scores
    expected = -logprob(table, [tokenizer.response_id, *tokenizer.encode("cd").tolist()])
    assert (one.value, one.weight) == (pytest.approx(expected, rel=1e-5), 2)


def test_a_perplexity_beyond_all_numbers_is_infinite(tokenizer):
    model = chain(tokenizer, {})[1]
    with torch.no_grad():
        model.lm_head.weight *= 10
    result = ask(model, tokenizer, [("", "abc"), ("", "ab")], "perplexity")
    assert result.score == math.inf and math.isfinite(result.beside().score)


def test_bits_per_byte_count_bytes():
    text = "你好，世界"
    tokenizer = CharTokenizer(text)
    model = chain(tokenizer, {})[1].eval()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely
    result = ask(model, tokenizer, [("", text)], "perplexity")
    assert result.score == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    assert result.beside().score == pytest.approx(5 * math.log2(tokenizer.vocab_size) / 15, rel=1e-5)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 17, 30])
def test_windows_predict_every_token_once(n):
    """As lm-evaluation-harness cuts texts."""
    ids, context = list(range(100, 100 + n)), 8
    cut = prompts.windows(ids, 1, context)
    assert [token for _, part in cut for token in part] == ids
    assert all(len(before) + len(part) <= context + 1 for before, part in cut)
    everything = [1, *ids]
    for before, part in cut:
        start = everything.index(part[0])
        assert everything[start - len(before) : start] == before
    utils = pytest.importorskip("lm_eval.utils")
    theirs = utils.get_rolling_token_windows(ids, prefix_token=1, max_seq_len=context, context_len=1)
    assert [tuple(map(list, utils.make_disjoint_window(pair))) for pair in theirs] == cut


# ---- training can call it ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["exact", "choice", "perplexity"])
def test_nothing_of_the_model_or_of_chance_changes(tokenizer, metric):
    model = small_model(tokenizer).set_dropout(0.5)
    kinds = [type(module) for module in model.modules()]
    places = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    rows = [(f"ab{i}", "c", "", ("c", "d")) for i in range(5)]
    quiet = ask(model, tokenizer, rows, metric)
    model.train()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert ask(model, tokenizer, rows, metric).scores == quiet.scores  # without dropout
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    assert [type(module) for module in model.modules()] == kinds
    for name, p in model.named_parameters():
        assert p.data_ptr() == places[name][0] and torch.equal(p, places[name][1]) and p.grad is None
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()  # it can still be trained


@pytest.mark.parametrize("metric", ["exact", "choice", "perplexity"])
def test_scores_do_not_depend_on_where_it_went_on(tokenizer, metric, monkeypatch):
    monkeypatch.setattr(runner, "GROUP", 8)
    model, chance = small_model(tokenizer), random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 9))) for _ in range(60)]
    rows = [(words[i], words[i + 1], "", (words[i + 1], words[i + 2] + "a")) for i in range(30)]
    task = Listed(rows, metric)
    prepared = runner.prepare(task, task.list, tokenizer, model.config, chat=True)
    whole = list(runner.score(model, prepared))
    for n_done in 8, 24:
        assert list(runner.score(model, prepared, n_done)) == whole[n_done:]


def test_progress_is_told_for_each_example(tokenizer):
    model, rows = small_model(tokenizer), [("ab", "c", "", ("c", "d", "e"))] * 3
    for metric in "exact", "choice", "perplexity":
        calls = []
        ask(model, tokenizer, rows, metric, on_each=lambda calls=calls: calls.append(1))
        assert len(calls) == 3


# ---- toy problems --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["q:digits=3", "sort:digits=4", "palindrome:digits=4", "calculator:depth=2"])
def test_toy_problems_are_asked_as_in_training(spec):
    problem = tasks.parse(spec)
    tokenizer = problem.tokenizer()
    shape = {"block_size": problem.block_size, "is_causal": problem.is_causal}
    model = small_model(tokenizer, **shape)
    examples = runner.examples_of(problem, limit=30)
    result = runner.evaluate_task(model, tokenizer, problem, examples, chat=False)
    for example, score in zip(examples, result.scores, strict=True):
        ids = tokenizer.encode(example.question).tolist()
        if problem.is_causal:
            ids += tokenizer.encode("=").tolist()
            n_prompt = len(ids)
            while len(ids) - n_prompt <= problem.longest[1] and ids[-1] != tokenizer.eos_id:
                ids.append(int(model(torch.tensor([ids[: problem.block_size]]))[0, -1].argmax()))
            text = tokenizer.decode([i for i in ids[n_prompt:] if i != tokenizer.eos_id])
        else:
            text = tokenizer.decode(model(torch.tensor([ids]))[0].argmax(-1).tolist())
        assert (score.answer, score.value) == (text, float(text == example.answer))
    assert result.base_rate == problem.base_rate(examples)


# ---- which examples ------------------------------------------------------------------------------------


def test_examples_of_a_drawn_task():
    task = Drawn()
    drawn = runner.examples_of(task)
    assert len(drawn) == runner.N_DRAWN and runner.examples_of(task, 7) == drawn[:7]
    assert runner.examples_of(task, 7, seed=1) != drawn[:7]
    assert all(task.is_test(example) for example in drawn)


def test_a_part_of_a_list_is_spread_over_it(tokenizer):
    task = Listed([(str(i), "a") for i in range(100)])
    part = runner.examples_of(task, 10)
    places = [int(example.question) for example in part]
    assert places == sorted(places) and places != list(range(10)) and len(set(places)) == 10
    assert runner.examples_of(task) == task.list == runner.examples_of(task, 1000)
    model = says(tokenizer, "a", tokenizer.response_id)
    result = runner.evaluate_task(model, tokenizer, task, chat=True, limit=10)
    assert (result.n, result.n_all) == (10, 100)


# ---- what does not fit -----------------------------------------------------------------------------------


def test_long_questions_of_a_list_lose_their_oldest_tokens(tokenizer):
    model = says(tokenizer, "ab", tokenizer.response_id, block_size=16)
    result = ask(model, tokenizer, [("c" * 40 + "d" * 10, "ab"), ("c", "ab")])
    assert result.score == 1
    assert result.notes == ["1 questions are too long for the context: their oldest tokens are left out"]
    task = Listed([("c" * 40 + "d" * 10, "ab")])
    prompt = runner.prepare(task, task.list, tokenizer, model.config, True).prompts[0]
    assert len(prompt) + 2 == 16 and prompt[0] == tokenizer.instruct_id
    assert tokenizer.decode(prompt[1:-1]) == "cc" + "d" * 10 and prompt[-1] == tokenizer.response_id


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (Listed([("which", "a" * 16)]), 'listed: "which" has an answer of 16 tokens'),
        (Listed([("which", "")], "perplexity"), 'listed: "which" has no text in its answer'),
        (Listed([("which", "a")], "numeric"), 'listed: "which" has no number in its answer'),
        (Listed([("which", "a")], "choice"), 'listed: "which" has no choices'),
        (Listed([("which", "a", "", ("b", "c"))], "choice"), "has no choices with the right one among them"),
        (Listed([]), "listed has no examples"),
        (tasks.parse("sort:digits=6"), "sees all tokens at once|characters|do not fit|needs a model"),
    ],
)
def test_examples_that_do_not_suit_are_one_sentence(task, sentence, tokenizer):
    model = small_model(tokenizer, block_size=16, is_causal=not task.name == "sort")
    with pytest.raises(UserError, match=sentence):
        runner.evaluate_task(model, tokenizer, task, chat=True)


def test_drawn_questions_that_do_not_fit_are_refused(tokenizer):
    model = small_model(tokenizer, block_size=8)
    with pytest.raises(
        UserError, match=r"drawn: [0-9]+ of 100 questions do not fit in the context of 8 tokens"
    ):
        runner.evaluate_task(model, tokenizer, Drawn(), chat=True, limit=100)


def test_unknown_characters_are_told(tokenizer):
    model = says(tokenizer, "a", tokenizer.response_id)
    result = ask(model, tokenizer, [("你", "a"), ("b", "a")])
    assert result.score == 1 and "1 of 2 examples hold characters that are unknown" in result.notes[0]


def test_a_file_of_a_user(tokenizer, tmp_path):
    path = tmp_path / "我的.jsonl"
    rows = [
        {"question": "a", "choices": ["b", "ab"], "answer": 1},
        {"question": "b", "choices": ["ab", "c"], "answer": 0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    model = says(tokenizer, "ab", tokenizer.response_id)
    result = runner.evaluate_task(model, tokenizer, Questions(path, None), chat=True)
    assert (result.metric, result.score, result.base_rate) == ("choice", 1, 0.5)
