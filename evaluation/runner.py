"""Run a task on a model: `evaluate_task`.

    result = evaluate_task(model, tokenizer, tasks.parse("arithmetic:digits=2"), chat=True, limit=200)
    print(result.score, result.standard_error, result.base_rate, result.n)

How a metric is measured:

- exact, contains, numeric: the model writes an answer, always with the likeliest token, up to a token that
  ends it. It is cut off when it is longer than the right one (exact), or than the longest right one of the
  task and ANSWER_ROOM more tokens (contains, numeric). A cut answer is wrong, except for "contains".
- choice: the likelihood of each choice after the question; the likeliest is the answer ("acc" of
  EleutherAI's lm-evaluation-harness). Beside it, that with the highest log-likelihood per byte is chosen.
- perplexity: exp of the mean negative log-likelihood of a token, pooled over all tokens; and bits per byte,
  which can be compared between tokenizers. It is that of the answer after the question or, without a
  question, of the whole text. The token that ends an answer or a text does not count.

A model with a chat template reads `task.messages` in it. One that only continues texts reads <|bos|> and
`task.text`, and its answer ends with the line, unless right answers of the task have several lines. A model
that has learned a toy problem reads that as in training.
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
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import UserError
from decoding.text_generator import answer_greedily, stop_tokens
from evaluation import statistics, toys
from tasks import DrawnTask, Example, Task, essence, options_of
from tasks.problems import Problem
from tokenizer import Tokenizer, render_chats

if TYPE_CHECKING:
    from decoding.likelihood import Likelihood
    from model import GPT

N_DRAWN = 1_000  # examples of a task that are drawn at random, unless a limit is given
ANSWER_ROOM = 64  # tokens
# Examples are scored in groups. Rounding may depend on what else is in a batch, so an evaluation that goes on
# after a group gives the same scores, bit for bit, as one in one go.
GROUP = 256


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

    name       the task with its options
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
        if self.metric.endswith("perplexity"):  # the error of exp(mean), to first order
            return math.exp(mean), error and error * math.exp(mean)
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
    return TaskResult(task.spec, task.metric, base_rate, scores, n_all, seconds, prepared.notes)


# ---- what the model reads ----------------------------------------------------------------------------


@dataclass
class Prepared:
    """A task made ready for a model.

    style        how it is asked: "chat", "text", or "toy" for a toy problem and a model of it
    prompts      the ids before each answer
    max_tokens   how many ids each answer may have, with its end
    requests     (context, continuation) of each example, whose likelihoods count for choice and perplexity
    end_of_line  whether an answer ends with its line
    notes        sentences that a user must read
    """

    task: Task
    examples: Sequence[Example]
    tokenizer: Tokenizer
    style: str
    prompts: list[list[int]] = dataclasses.field(default_factory=list)
    max_tokens: list[int] = dataclasses.field(default_factory=list)
    requests: list[list[tuple[list[int], list[int]]]] = dataclasses.field(default_factory=list)
    end_of_line: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)


def prepare(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, config: Any, chat: bool
) -> Prepared:
    """Write the examples as a model with this configuration reads them.

    Raises UserError if it cannot: for answers that do not fit in the context, or prompts that do not, unless
    they are from a list; then their oldest tokens are left out, and a note says so.
    """
    if isinstance(task, Problem) and tokenizer.to_dict() == task.tokenizer().to_dict():
        if task.block_size > config.block_size or task.is_causal != config.is_causal:
            raise UserError(f"{task.spec} does not fit a model that has learned another problem or size")
        if task.metric != "exact":
            raise UserError(f"the answers of {task.spec} are whole: its metric is exact, not {task.metric}")
        return Prepared(task, examples, tokenizer, "toy", notes=list(task.notes))
    if not config.is_causal:
        raise UserError(f"{task.spec} needs a model that writes: this one sees all tokens at once")
    prepared = Prepared(task, examples, tokenizer, "chat" if chat else "text", notes=list(task.notes))
    for example in examples:
        _check(task, example)
    answers = [_answers(task, example) for example in examples]
    encoded = iter(tokenizer.encode_batch([text for texts in answers for text in texts]))
    context, n_cut, n_unknown = config.block_size, 0, 0
    for example, texts, prompt in zip(examples, answers, _prompts(prepared, chat), strict=True):
        continuations = [next(encoded).tolist() for _ in texts]
        longest = max(map(len, continuations))
        n_unknown += tokenizer.unknown_id in itertools.chain(prompt, *continuations)
        if task.metric == "perplexity" and not example.question:
            prepared.requests.append(windows(continuations[0], tokenizer.bos_id, context))
            continue
        if longest >= context:
            raise UserError(
                f"{_place(task, example)} has an answer of {longest:,} tokens, which leaves no room for the "
                f"question in the context of {context:,}{_advice(task)}"
            )
        if len(prompt) + longest > context:
            n_cut += 1
            n_kept = context - longest  # the first token stays: it says what kind of text this is
            prompt = prompt[:1] + prompt[len(prompt) - n_kept + 1 :]
        prepared.prompts.append(prompt)
        prepared.max_tokens.append(longest + 1)
        prepared.requests.append([(prompt, continuation) for continuation in continuations])
    if n_cut and isinstance(task, DrawnTask):
        raise UserError(
            f"{task.spec}: {n_cut:,} of {len(examples):,} questions do not fit in the context of {context:,} "
            f"tokens{_advice(task)}"
        )
    if n_cut:
        prepared.notes.append(
            f"{n_cut:,} questions are too long for the context: their oldest tokens are left out"
        )
    if n_unknown:
        prepared.notes.append(
            f"{task.spec}: {n_unknown:,} of {len(examples):,} examples hold characters that are unknown to "
            "this model: <|unknown|>"
        )
    if task.metric in ("contains", "numeric"):
        prepared.max_tokens = [max(prepared.max_tokens) + ANSWER_ROOM] * len(examples)
    prepared.end_of_line = not chat and not any("\n" in example.answer.strip() for example in examples)
    return prepared


def _check(task: Task, example: Example) -> None:
    """Raise UserError if the metric does not fit the example."""
    problem = ""
    if task.metric == "numeric" and essence("numeric", example.answer) is None:
        problem = "has no number in its answer"
    elif task.metric == "choice" and (len(example.choices) < 2 or example.answer not in example.choices):
        problem = "has no choices with the right one among them"
    elif task.metric in ("choice", "perplexity") and not all(_answers(task, example)):
        problem = "has no text in its answer"
    if problem:
        raise UserError(f"{_place(task, example)} {problem}, which the metric {task.metric} needs")


def _answers(task: Task, example: Example) -> Sequence[str]:
    """The texts whose tokens count: the choices, a text as it is, or an answer without the space around."""
    if task.metric == "choice":
        return example.choices
    return [example.answer if task.metric == "perplexity" else example.answer.strip()]


def _prompts(prepared: Prepared, chat: bool) -> list[list[int]]:
    """The ids before each answer; for an example without a question, just <|bos|>."""
    task, tokenizer = prepared.task, prepared.tokenizer
    asked = [example for example in prepared.examples if example.question]
    if chat:
        chats = render_chats(tokenizer, [task.messages(e) for e in asked], add_generation_prompt=True)
        prompts = iter([ids.tolist() for ids, _ in chats])
    else:
        texts = tokenizer.encode_batch([task.text(example) for example in asked])
        prompts = iter([[tokenizer.bos_id, *ids.tolist()] for ids in texts])
    return [next(prompts) if example.question else [tokenizer.bos_id] for example in prepared.examples]


def _place(task: Task, example: Example) -> str:
    """Which example of a task, as the beginning of a sentence."""
    text = " ".join(str(part["content"]) for part in task.messages(example)) or example.answer
    text = " ".join(text.split())
    return f'{task.spec}: "{text if len(text) <= 60 else text[:57] + "..."}"'


def _advice(task: Task) -> str:
    """What to do about examples that are too long, as the end of a sentence."""
    sizes = [name for name, value in options_of(task).items() if type(value) is int and name != "seed"]
    return f"; lower {' or '.join(sizes)}" if sizes else ""


def windows(ids: list[int], first: int, context: int) -> list[tuple[list[int], list[int]]]:
    """Cut a text into (context, continuation) that predict every token once, as lm-evaluation-harness does.

    The first token is predicted from the id `first`, that of every further window from the one before it;
    the last window reads as much as fits of what is before it. All fit in a context of this many tokens.
    """
    cut = []
    for start in range(0, len(ids), context):
        end = min(start + context, len(ids))
        cut.append((ids[max(0, end - context - 1) : start] or [first], ids[start:end]))
    return cut


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
