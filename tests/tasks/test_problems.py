"""The toy problems: answers (also computed in other ways), tokens, and held-out questions."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

import tasks
from common.errors import UserError
from tasks import problems

SMALL = {"q": {"digits": 3}, "sort": {"digits": 3}, "palindrome": {"digits": 3}, "calculator": {"depth": 2}}


def drawn(problem, count=300, seed=0):
    chance = random.Random(seed)
    return [problem.draw(chance) for _ in range(count)]


def test_every_file_is_found():
    assert {"q", "sort", "palindrome", "calculator"} <= set(problems.names())
    assert all(problems.make(name, {}).name == name for name in problems.names())


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("q", "809614", "5"),
        ("q", "123457", "0"),
        ("q", "888888", "12"),
        ("sort", "114515", "111455"),
        ("palindrome", "123456", "654321"),
        ("calculator", "(+(*01)(*11))", "1"),
        ("calculator", "(*(*1(+01))(*0(+11)))", "0"),
        ("calculator", "0", "0"),
    ],
)
def test_answers(name, question, answer):
    problem = problems.make(name, {})
    assert problem.answer(question) == answer and problem.check(question, answer)
    assert not problem.check(question, answer[::-1] + "0") and problem.read(question) == question


def test_the_calculator_agrees_with_python():
    problem = problems.make("calculator", {"depth": 5})

    def evaluate(tokens):
        token = tokens.pop(0)
        if token in "01":
            return token == "1"
        operator = tokens.pop(0)
        left, right = evaluate(tokens), evaluate(tokens)
        assert tokens.pop(0) == ")"
        return left or right if operator == "+" else left and right

    for question in drawn(problem, 1000):
        assert problem.answer(question) == str(int(evaluate(list(question))))


def test_the_calculator_draws_every_depth_and_both_answers():
    problem = problems.make("calculator", {})
    questions = drawn(problem, 2000)
    assert {problem.kind(question) for question in questions} == {f"depth {i}" for i in (1, 2, 3, 4)}
    assert max(map(len, questions)) <= problem.longest[0] and problem.block_size <= 64
    assert 0.4 < np.mean([problem.answer(question) == "1" for question in questions]) < 0.6


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sort", "12345"),
        ("sort", "1234567"),
        ("sort", "12345a"),
        ("q", "１２３４５６"),
        ("calculator", "(+ 0 1"),
        ("calculator", "(- 0 1)"),
        ("calculator", "01"),
        ("calculator", "(+ (+ (+ (+ (+ 0 1) 1) 1) 1) 1)"),
        ("calculator", "="),
    ],
)
def test_what_is_no_question(name, text):
    with pytest.raises(UserError, match=r"\w"):
        problems.make(name, {}).read(text)


def test_a_typed_expression_may_hold_spaces_and_the_mark():
    assert problems.make("calculator", {}).read("(+ (* 0 1) (* 1 1)) =") == "(+(*01)(*11))"


@pytest.mark.parametrize("sizes", [{"digits": 0}, {"digits": 10**6}])
def test_impossible_sizes(sizes):
    with pytest.raises(UserError, match="--digits must be a whole number"):
        problems.make("sort", sizes)


@pytest.mark.parametrize("name", SMALL)
def test_tokens_and_mask(name):
    problem = problems.make(name, SMALL[name])
    tokenizer, questions = problem.tokenizer(), drawn(problem, 50)
    x, y, mask = problem.encode(tokenizer, questions).values()
    assert x.shape == y.shape == mask.shape and x.shape[1] <= problem.block_size
    for row, question in enumerate(questions):
        answer = problem.answer(question)
        told = tokenizer.decode(y[row][mask[row] == 1])
        if problem.is_causal:
            assert told == answer + "<|eos|>"
            assert tokenizer.decode(x[row], skip_special=True) == f"{question}={answer}"
            assert (x[row, 1:] == y[row, :-1]).all()
        else:
            assert (tokenizer.decode(x[row]), told) == (question, answer)


def asked_on_the_way(problem, questions, mask):
    """The subproblems on whose answers there is a loss."""
    for row, question in zip(mask, questions, strict=True):
        for start, end, _ in problem.subproblems(question):
            if row[end - 1]:
                yield question[start:end]


def test_the_calculator_is_asked_for_every_operation_while_training():
    problem = problems.make("calculator", {})
    tokenizer, questions = problem.tokenizer(), drawn(problem, 200)
    x, y, mask = problem.encode(tokenizer, questions, subproblems=True).values()
    parts = set(asked_on_the_way(problem, questions, mask))
    assert "(+01)" in parts and all(problem.read(part) == part for part in parts)
    held_out = 0
    for row, question in enumerate(questions):
        for i, character in enumerate(question):
            if mask[row, i]:
                assert character == ")"
                part = question[opening(question, i) : i + 1]
                assert tokenizer.decode(y[row, i : i + 1]) == problem.answer(part)
            held_out += character == ")" and not mask[row, i]
        assert tokenizer.decode(y[row, len(question) :][mask[row, len(question) :] == 1]) == (
            problem.answer(question) + "<|eos|>"
        )
    assert 0 < held_out < 0.2 * sum(question.count(")") for question in questions)
    assert (x == problem.encode(tokenizer, questions)["x"]).all()


def opening(question, closing):
    depth = 0
    for i in range(closing, -1, -1):
        depth += (question[i] == ")") - (question[i] == "(")
        if not depth:
            return i


@pytest.mark.parametrize("name", SMALL)
def test_no_test_question_is_ever_trained_on(name):
    problem = problems.make(name, SMALL[name])
    tokenizer = problem.tokenizer()
    trained = set()
    for seed in (1, 2):
        examples = problems.TrainingQuestions(problem, tokenizer, 64, seed)
        for step in range(100):
            trained.update(examples.questions(step))
            trained.update(asked_on_the_way(problem, examples.questions(step), examples(64 * step)["mask"]))
    for seed in (1, 2, 3):
        test = problems.HeldOutQuestions(problem, tokenizer, 16, seed, 2000)
        assert len(set(test.questions)) == len(test.questions) >= 5
        assert trained.isdisjoint(test.questions)
        assert sum(len(test(first)["x"]) for first in range(0, len(test.questions), 16)) == len(
            test.questions
        )


def test_at_the_default_sizes_there_are_enough_unseen_questions():
    for name in problems.names():
        problem = problems.make(name, {})
        assert len(problems.HeldOutQuestions(problem, problem.tokenizer(), 100, 1, 2000).questions) == 2000


def test_the_batch_of_a_step_follows_from_problem_seed_and_step():
    problem = problems.make("sort", {})
    one, other = (problems.TrainingQuestions(problem, problem.tokenizer(), 8, 5) for _ in range(2))
    one(0), one(1)
    assert all((a == b).all() for a, b in zip(one(7).values(), other(7).values(), strict=True))
    assert (
        one.questions(7) != one.questions(8) != problems.TrainingQuestions(problem, None, 8, 6).questions(8)
    )


def test_questions_of_a_step_are_of_like_length():
    problem = problems.make("calculator", {})
    tokenizer = problem.tokenizer()
    examples = problems.TrainingQuestions(problem, tokenizer, 64, 5)
    batches = [examples(64 * step)["x"] for step in range(64)]
    assert max(x.shape[1] for x in batches) > 0.9 * problem.block_size
    assert sum((x == tokenizer.padding_id).sum() for x in batches) < 0.1 * sum(x.size for x in batches)


def test_too_few_questions_to_keep_some():
    problem = problems.make("sort", {"digits": 1})
    kept = [question for question in "0123456789" if tasks.is_held_out(question)]
    if kept:
        assert set(problems.HeldOutQuestions(problem, problem.tokenizer(), 8, 1, 100).questions) == set(kept)
    else:
        with pytest.raises(UserError, match="too few questions"):
            problems.HeldOutQuestions(problem, problem.tokenizer(), 8, 1, 100)


def test_the_guides_example_is_a_problem(small_problems):
    project = small_problems
    guide = (Path(__file__).resolve().parents[2] / "doc" / "extending.md").read_text("utf-8")
    [code] = re.findall(r"`tasks/addition.py`:\n\n```python\n(.*?)```", guide, re.DOTALL)
    (project.root / "tasks" / "addition.py").write_text(code, "utf-8")
    done = project.run("problem.py", "addition", "--digits", 2, "--steps", 3, "--play", input="57+68\n5+\n")
    assert done.returncode == 0, done.stderr
    assert "accuracy, with carries" in done.stdout and "5+ is not a sum" in done.stderr
    assert done.stdout.splitlines()[-1].endswith("✓") or "right answer: 521" in done.stdout
