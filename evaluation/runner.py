"""Run a task on a model: `evaluate_task`.

    result = evaluate_task(model, tokenizer, tasks.parse("arithmetic:digits=2"), chat=True, limit=200)
    print(result.score, result.standard_error, result.base_rate, result.n)

How a metric is measured:

- exact, contains, numeric: the model writes an answer, always with the likeliest token, up to a token that
  ends it. It is cut off when it is longer than the right one (exact), or than the longest right one of the
  task and 64 more tokens (contains, numeric). A cut answer is wrong, except for "contains".
- choice: the likelihood of each choice after the question; the likeliest is the answer ("acc" of
  EleutherAI's lm-evaluation-harness). Beside it, that with the highest log-likelihood per byte is chosen.
- perplexity: exp of the mean negative log-likelihood of a token, pooled over all tokens; and bits per byte,
  which can be compared between tokenizers. It is that of the answer after the question or, without a
  question, of the whole text. The token that ends an answer or a text does not count.

What the model reads: evaluation/prompts.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from common.errors import UserError
from decoding.text_generator import answer_greedily, stop_tokens
from evaluation import statistics, toys
from evaluation.prompts import Prepared, prepare
from tasks import DrawnTask, Example, Task, options_of
from tasks.problems import Problem
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from decoding.likelihood import Likelihood
    from model import GPT

N_DRAWN = 1_000  # examples of a task that are drawn at random, unless a limit is given
# Examples are scored in groups. Rounding may depend on what else is in a batch, so an evaluation that goes on
# after a group gives the same scores, bit for bit, as one in one go.
GROUP = 128


class ExampleScore(NamedTuple):
    """How one example went. The score of a task is sum(value) / sum(weight) over its examples.

    number  of the example in its task, from 0
    kind    of the example
    value   its score, from 0 to 1; for perplexity, nats
    weight  1; for perplexity, tokens
    answer  what the model wrote or chose
    is_cut  whether the answer was cut off because it became too long
    more    for choice {"by_bytes": the score of that choice}, for perplexity {"bytes": of the text}
    """

    number: int
    kind: str
    value: float
    weight: float = 1.0
    answer: str = ""
    is_cut: bool = False
    more: dict[str, float] = {}


@dataclass
class TaskResult:
    """The scores of a model on the examples of a task.

    name       the task, with those options that are not the default ones
    metric     of the scores: one of tasks.Metric, or of a public benchmark
    base_rate  the score of a model that knows nothing, if there is one
    scores     of each example
    n_all      so many examples the task has in all; infinite if they are drawn
    seconds    it took; None if a part of it was done earlier
    notes      sentences that a user must read
    """

    name: str
    metric: str
    base_rate: float | None
    scores: list[ExampleScore]
    n_all: float = math.inf
    seconds: float | None = 0.0
    notes: Sequence[str] = ()

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.scores)

    @property
    def score(self) -> float:
        """From 0 to 1; for perplexity and bits per byte, from 0, and lower is better."""
        return self._score_and_error()[0]

    @property
    def standard_error(self) -> float | None:
        """Of the score; None for a single example."""
        return self._score_and_error()[1]

    def _score_and_error(self) -> tuple[float, float | None]:
        if not self.scores:
            raise UserError(f"{self.name}: no example was scored, so there is no score")
        mean, error = statistics.ratio([s.value for s in self.scores], [s.weight for s in self.scores])
        if "perplexity" in self.metric:
            perplexity = math.exp(mean) if mean < 700 else math.inf
            return perplexity, error and error * perplexity  # the error to first order
        return mean, error

    def by_kind(self) -> dict[str, TaskResult]:
        """The part of each kind of example, in alphabetical order; nothing if all are of one kind."""
        kinds = sorted({score.kind for score in self.scores})
        parts = {kind: [score for score in self.scores if score.kind == kind] for kind in kinds}
        if len(kinds) < 2:
            return {}
        return {
            kind: dataclasses.replace(self, base_rate=None, scores=scores) for kind, scores in parts.items()
        }

    def beside(self) -> TaskResult | None:
        """The same answers in the second metric: choice by bytes, or bits per byte."""
        metric, change = {
            "choice": ("choice by bytes", lambda s: s._replace(value=s.more["by_bytes"])),
            "perplexity": (
                "bits per byte",
                lambda s: s._replace(value=s.value / math.log(2), weight=s.more["bytes"]),
            ),
        }.get(self.metric, ("", None))
        if change is None:
            return None
        return dataclasses.replace(self, metric=metric, scores=[change(score) for score in self.scores])


# ---- the whole of it ---------------------------------------------------------------------------------


def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example] | None = None,
    *,
    chat: bool,
    limit: int | None = None,
    seed: int = 0,
    on_each: Callable[[], object] = lambda: None,
) -> TaskResult:
    """The scores of a model on examples of a task (by default `examples_of(task, limit, seed)`).

    chat: whether the model answers in the chat template. on_each is called as each example ends.

    Training can call it on the model that it trains: the weights, train() or eval(), and the global random
    state stay as they are. To share the examples among processes, give each a part of them, gather the
    `scores`, and make one TaskResult. Raises UserError if the task does not suit the model; `prepare` finds
    that out, without a model.
    """
    examples = examples_of(task, limit, seed) if examples is None else examples
    prepared = prepare(task, examples, tokenizer, model.config, chat)
    start = time.perf_counter()
    scores = list(score(model, prepared, on_each=on_each))
    return result_of(prepared, scores, time.perf_counter() - start)


def examples_of(task: Task, limit: int | None = None, seed: int = 0) -> list[Example]:
    """The examples to test with: N_DRAWN of a task that draws them, all of a list, or at most `limit`.

    A part of a list is chosen at random, because its order often has a meaning, and stays in order.
    """
    if isinstance(task, DrawnTask):
        examples = list(itertools.islice(task.examples("test", seed), limit or N_DRAWN))
    else:
        examples = list(task.examples("test", seed))
        if limit is not None and limit < len(examples):
            chosen = sorted(random.Random(f"{task.name}/{seed}").sample(range(len(examples)), limit))
            examples = [examples[number] for number in chosen]
    if not examples:
        raise UserError(f"{task.spec} has no examples to test with")
    return examples


def result_of(prepared: Prepared, scores: list[ExampleScore], seconds: float | None) -> TaskResult:
    """The result, from all scores or those so far."""
    task, examples = prepared.task, prepared.examples
    n_all = math.inf
    if not isinstance(task, DrawnTask):
        n_all = max(len(examples), sum(1 for _ in task.examples("test", 0)))
    base_rate = task.base_rate([examples[score.number] for score in scores]) if scores else None
    return TaskResult(title_of(task), task.metric, base_rate, scores, n_all, seconds, prepared.notes)


def title_of(task: Task) -> str:
    """The name of a task for tables, with those options that are not the default ones."""
    if not dataclasses.is_dataclass(task):
        return task.spec
    usual = {field.name: field.default for field in dataclasses.fields(task)}
    changed = [
        f"{name}={str(value).lower()}" for name, value in options_of(task).items() if value != usual[name]
    ]
    return f"{task.name}:{','.join(changed)}" if changed else task.name


# ---- what the model answers --------------------------------------------------------------------------


def score(
    model: GPT, prepared: Prepared, n_done: int = 0, on_each: Callable[[], object] = lambda: None
) -> Iterator[ExampleScore]:
    """Score the examples in their order, a GROUP at a time, beginning with number `n_done`.

    The scores do not depend on n_done if that is a multiple of GROUP. on_each is called as each example ends.
    """
    assess = {"choice": _choose, "perplexity": _read}.get(prepared.task.metric, _write)
    assess = _solve if prepared.style == "toy" else assess
    for first in range(n_done, len(prepared.examples), GROUP):
        numbers = range(first, min(first + GROUP, len(prepared.examples)))
        with eval_mode(model):
            scores = assess(model, prepared, numbers, on_each)
        yield from scores


@contextlib.contextmanager
def eval_mode(model: GPT) -> Iterator[None]:
    """A context in which the model is in eval()."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _solve(
    model: GPT, prepared: Prepared, numbers: range, on_each: Callable[[], object]
) -> list[ExampleScore]:
    """Toy problems."""
    task, scores = prepared.task, []
    assert isinstance(task, Problem)
    examples = [prepared.examples[number] for number in numbers]
    given = toys.answers(model, task, prepared.tokenizer, [str(example.question) for example in examples])
    for number, example, text in zip(numbers, examples, given, strict=True):
        scores.append(ExampleScore(number, example.kind, task.score(example, text), answer=text))
        on_each()
    return scores


def _write(
    model: GPT, prepared: Prepared, numbers: range, on_each: Callable[[], object]
) -> list[ExampleScore]:
    """Answers that the model writes."""
    task, tokenizer, scores = prepared.task, prepared.tokenizer, []
    stops = {*stop_tokens(tokenizer)}
    if prepared.end_of_line:
        stops |= {i for i, text in enumerate(tokenizer.token_bytes) if b"\n" in text and not text.strip()}
    answers = answer_greedily(
        model,
        [prepared.prompts[number] for number in numbers],
        [prepared.max_tokens[number] for number in numbers],
        stops,
        on_answer=on_each,
    )
    for number, (ids, has_ended) in zip(numbers, answers, strict=True):
        ids = [i if i < tokenizer.vocab_size else tokenizer.unknown_id for i in ids]
        text, example = tokenizer.decode(ids), prepared.examples[number]
        if prepared.end_of_line:  # a token may hold more than the end of the line
            text, line_end, _ = text.partition("\n")
            has_ended = has_ended or bool(line_end)
        text = text.strip()
        counts = has_ended or task.metric == "contains"
        value = task.score(example, text) if counts else 0.0
        scores.append(ExampleScore(number, example.kind, value, answer=text, is_cut=not has_ended))
    return scores


def _choose(
    model: GPT, prepared: Prepared, numbers: range, on_each: Callable[[], object]
) -> list[ExampleScore]:
    """The likeliest of the choices."""
    scores = []
    for number, likelihoods in zip(numbers, _likelihoods(model, prepared, numbers, on_each), strict=True):
        example = prepared.examples[number]
        logprobs = [likelihood.logprob for likelihood in likelihoods]
        per_byte = [
            logprob / len(choice.encode()) for logprob, choice in zip(logprobs, example.choices, strict=True)
        ]
        chosen, by_bytes = (
            example.choices[max(range(len(values)), key=values.__getitem__)]
            for values in (logprobs, per_byte)
        )
        scores.append(
            ExampleScore(
                number,
                example.kind,
                float(chosen == example.answer),
                answer=chosen,
                more={"by_bytes": float(by_bytes == example.answer)},
            )
        )
    return scores


def _read(
    model: GPT, prepared: Prepared, numbers: range, on_each: Callable[[], object]
) -> list[ExampleScore]:
    """How well the model predicts texts."""
    scores = []
    for number, likelihoods in zip(numbers, _likelihoods(model, prepared, numbers, on_each), strict=True):
        example = prepared.examples[number]
        nats = -math.fsum(likelihood.logprob for likelihood in likelihoods)
        n_tokens = sum(likelihood.n_tokens for likelihood in likelihoods)
        n_bytes = len(example.answer.encode())
        scores.append(
            ExampleScore(number, example.kind, nats, float(n_tokens), more={"bytes": float(n_bytes)})
        )
    return scores


def _likelihoods(
    model: GPT, prepared: Prepared, numbers: range, on_each: Callable[[], object]
) -> list[list[Likelihood]]:
    """Of the requests of each example."""
    from decoding.likelihood import log_likelihoods

    requests = [prepared.requests[number] for number in numbers]
    owners = [owner for owner, own in enumerate(requests) for _ in own]
    n_left = [len(own) for own in requests]

    def on_done(place: int, _: Likelihood) -> None:
        n_left[owners[place]] -= 1
        if not n_left[owners[place]]:
            on_each()

    flat = iter(log_likelihoods(model, [request for own in requests for request in own], on_done))
    return [[next(flat) for _ in own] for own in requests]
