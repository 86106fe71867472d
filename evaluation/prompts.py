"""What a model reads of a task: `prepare`.

A model with a chat template reads `task.messages` in it. One that only continues texts reads <|bos|> and
`task.text`, and its answer ends with the line, unless right answers of the task have several lines. A model
that has learned a toy problem reads that as in training.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from tasks import DrawnTask, Example, Task, essence, options_of
from tasks.problems import Problem
from tokenizer import Tokenizer, render_chats

ANSWER_ROOM = 64  # tokens that an answer may be longer than the right ones, where that does not make it wrong


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
