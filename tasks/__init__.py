"""Tasks: one file each, found by its name. doc/extending.md adds one as an example.

A task has examples, writes a prompt for each, and scores an answer. Toy problems are tasks; so are the
questions of `inference.py --eval`, and what evaluation and rewards will need.

A toy problem (`Problem`) is a dataclass. Its fields are its sizes, which become options of the command line;
its methods draw a question, know the answer, and say how large a model to train on it for how long. Which
questions are held out for testing follows from the questions alone, so no model of any seed is ever trained
on one.
"""

import functools
import hashlib
import importlib
import itertools
import math
import pkgutil
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from tokenizer import CharTokenizer, Tokenizer

HELD_OUT = 10  # one question in ten is for testing
SORTED_TOGETHER = 8  # steps whose questions are drawn at once


class Example(NamedTuple):
    """One example of a task.

    question  for a chat, all messages before the answer; else a text
    answer    the right answer, or one of them
    kind      the group it belongs to, where scores should be shown for each of several
    """

    question: Any
    answer: str
    kind: str = ""


class Task(ABC):
    """Something to learn, to be scored on, or to be rewarded by."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for tables and files."""

    @abstractmethod
    def examples(self, split: str, seed: int) -> Iterator[Example]:
        """The examples of a split, "train" or "test", perhaps without end; the same ones for the same
        seed."""

    def prompt(self, example: Example) -> Any:
        """What the model reads: a text, or the messages of a chat."""
        return example.question

    def score(self, example: Example, answer: str) -> float:
        """How good an answer is, from 0 to 1. By default it has to be the right one."""
        return float(answer.strip() == example.answer.strip())


def option(default: int, help: str, lowest: int = 1, highest: int = 1000) -> Any:
    """A size of a problem: a whole number that the command line can set."""
    return field(default=default, metadata={"help": help, "lowest": lowest, "highest": highest})


class Problem(Task):
    """A toy problem: a dataclass derived from this, in a file of its own.

    characters   what questions and answers are written with, one token each
    is_causal    True: the answer follows question and `mark` token by token;
                 False: it is as long as the question and comes in one pass, in which every token sees all
                 others
    """

    characters = ""
    is_causal = True
    mark = "="

    @abstractmethod
    def draw(self, random: random.Random) -> str:
        """A random question. `random` is the only source of randomness."""

    @abstractmethod
    def answer(self, question: str) -> str:
        """The right answer."""

    @abstractmethod
    def read(self, text: str) -> str:
        """What a user typed, written as `draw` would. Raises UserError if it is no question of this size."""

    def check(self, question: str, answer: str) -> bool:
        """Whether this is a right answer."""
        return answer == self.answer(question)

    def subproblems(self, question: str) -> Any:
        """[(start, end, answer), ...]: parts question[start:end] that are questions themselves. A causal
        model is also trained to give each one's answer, a single character, at the end of the part: process
        supervision (Uesato et al. 2022), which shows where a wrong answer went wrong."""
        return ()

    def kind(self, question: str) -> str:
        """The kind of a question, where accuracy should be shown for each of several."""
        return ""

    @property
    @abstractmethod
    def longest(self) -> tuple[int, int]:
        """(characters of the longest question, of the longest answer)"""

    @abstractmethod
    def model(self) -> dict[str, Any]:
        """Keys of config/model_config.json: a shape that can learn this size of the problem."""

    @abstractmethod
    def training(self) -> dict[str, Any]:
        """Keys of config/config_pretrain.json: the training that does it."""

    # ---- the same for all problems --------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def sizes(self) -> dict[str, int]:
        """For example {"digits": 6}."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass

    @property
    def description(self) -> str:
        return " ".join([self.name, *(f"--{name} {value}" for name, value in self.sizes.items())])

    def example(self, question: str) -> Example:
        return Example(question, self.answer(question), self.kind(question))

    def examples(self, split: str, seed: int) -> Iterator[Example]:
        """Of the test split every question once, as far as they are found; of the training split without
        end."""
        if split == "test":
            yield from map(self.example, held_out_questions(self, seed))
            return
        chance = random.Random(f"{self.name}/training/{seed}")
        while True:
            if not is_held_out(question := self.draw(chance)):
                yield self.example(question)

    def prompt(self, example: Example) -> str:
        return example.question + self.mark * self.is_causal

    def score(self, example: Example, answer: str) -> float:
        return float(self.check(example.question, answer))

    def tokenizer(self) -> CharTokenizer:
        return CharTokenizer("".join(sorted({*self.characters, *(self.mark if self.is_causal else "")})))

    @property
    def block_size(self) -> int:
        question, answer = self.longest
        return question + len(self.mark) + answer if self.is_causal else question

    def encode(
        self, tokenizer: Tokenizer, questions: list[str], subproblems: bool = False
    ) -> dict[str, np.ndarray]:
        """A batch of questions with their answers: "x" and "y" [B, T] int64, "mask" [B, T] float32.

        subproblems: with the answers of their parts, too, except those that are held out.
        """
        answers = [self.answer(question) for question in questions]
        if not self.is_causal:
            x, y = (
                np.stack(tokenizer.encode_batch(texts)).astype(np.int64) for texts in (questions, answers)
            )
            return {"x": x, "y": y, "mask": np.ones(x.shape, np.float32)}
        texts = [question + self.mark + answer for question, answer in zip(questions, answers, strict=True)]
        rows = tokenizer.encode_batch(texts)
        width = max(map(len, rows))
        ids = np.full((len(rows), width + 1), tokenizer.padding_id, np.int64)
        mask = np.zeros((len(rows), width), np.float32)
        for row, (tokens, answer) in enumerate(zip(rows, answers, strict=True)):
            ids[row, : len(tokens)] = tokens
            ids[row, len(tokens)] = tokenizer.eos_id
            mask[row, len(tokens) - len(answer) - 1 : len(tokens)] = 1  # the answer and its end
        x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
        for row, question in enumerate(questions if subproblems else ()):
            for start, end, answer in self.subproblems(question):
                if not is_held_out(question[start:end]):
                    y[row, end - 1], mask[row, end - 1] = tokenizer.encode(answer)[0], 1
        return {"x": x, "y": y, "mask": mask}


@dataclass
class DigitProblem(Problem):
    """A problem whose questions are strings of so many digits."""

    digits: int = option(6, "how many digits a number has")

    characters = "0123456789"

    def draw(self, random: random.Random) -> str:
        # Independent digits would hardly ever give 888088: first draw which digits may occur.
        digits = random.sample("0123456789", random.randint(1, 10))
        return "".join(random.choices(digits, k=self.digits))

    def read(self, text: str) -> str:
        if not re.fullmatch(f"[0-9]{{{self.digits}}}", text):
            raise UserError(f"{text} is not a string of {self.digits} digits")
        return text

    @property
    def longest(self) -> tuple[int, int]:
        return self.digits, self.digits

    def model(self) -> dict[str, Any]:
        return dict(n_layer=2, n_head=4, n_embd=64)

    def training(self) -> dict[str, Any]:
        return dict(max_steps=max(600, 75 * self.digits), batch_size=256, learning_rate=3e-3)


def is_held_out(question: str) -> bool:
    """Whether a question is for testing only."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def held_out_questions(problem: Problem, seed: int) -> Iterator[str]:
    """Different held-out questions, until no new one turns up."""
    chance = random.Random(f"{problem.name}/test/{seed}")
    seen, in_vain = set(), 0
    while in_vain < 20_000:  # a small problem has few of them
        question = problem.draw(chance)
        in_vain += 1
        if is_held_out(question) and question not in seen:
            seen.add(question)
            in_vain = 0
            yield question


# ---- batches (see data.BatchSource) ------------------------------------------------------------------


class ProblemSource:
    """What the two sources of a problem's batches share."""

    notes: list[str] = []
    text_size = None

    def __init__(self, problem: Problem, tokenizer: Tokenizer, batch_size: int):
        self.problem, self.tokenizer, self.batch_size = problem, tokenizer, batch_size

    def position(self, first: int) -> tuple[int, int, int]:
        return 0, 0, first

    def fingerprints_of(self, size: str) -> list[dict[str, str]]:
        return [{"fingerprint": self.problem.description, "size": size}]


class TrainingQuestions(ProblemSource):
    """Training batches, drawn as they are needed.

    The questions of a batch depend on (problem, seed, batch size, number of the batch) alone.
    """

    sequences_per_epoch = math.inf
    description = "examples drawn anew for every step"
    n_loss_tokens = math.inf

    def __init__(self, problem: Problem, tokenizer: Tokenizer, batch_size: int, seed: int):
        super().__init__(problem, tokenizer, batch_size)
        self.seed = seed
        self._drawn = functools.lru_cache(maxsize=1)(self._draw)

    def questions(self, step: int) -> list[str]:
        group, which = divmod(step, SORTED_TOGETHER)
        return self._drawn(group)[which]

    def _draw(self, group: int) -> list[list[str]]:
        """The questions of SORTED_TOGETHER steps, those of a step of similar length, which needs less
        padding."""
        chance = random.Random(f"{self.problem.name}/training/{self.seed}/{group}")
        questions: list[str] = []
        while len(questions) < SORTED_TOGETHER * self.batch_size:
            question = self.problem.draw(chance)
            if not is_held_out(question):
                questions.append(question)
        questions.sort(key=len)
        steps = [questions[i : i + self.batch_size] for i in range(0, len(questions), self.batch_size)]
        chance.shuffle(steps)
        return steps

    def __call__(self, first: int) -> dict[str, np.ndarray]:
        """The batch in which question number `first` lies."""
        questions = self.questions(first // self.batch_size)
        return self.problem.encode(self.tokenizer, questions, subproblems=True)

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        return self.fingerprints_of(self.description)


class HeldOutQuestions(ProblemSource):
    """At most `count` different held-out questions. Raises UserError if there is none."""

    def __init__(self, problem: Problem, tokenizer: Tokenizer, batch_size: int, seed: int, count: int):
        super().__init__(problem, tokenizer, batch_size)
        self.questions = list(itertools.islice(held_out_questions(problem, seed), count))
        if not self.questions:
            raise UserError(f"{problem.name} of this size has too few questions to keep some for testing")
        self.sequences_per_epoch = self.n_loss_tokens = len(self.questions)
        self.description = f"{len(self.questions):,} questions"

    def __call__(self, first: int) -> dict[str, np.ndarray]:
        return self.problem.encode(self.tokenizer, self.questions[first : first + self.batch_size])

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        return self.fingerprints_of(self.description)


# ---- finding problems --------------------------------------------------------------------------------


def _in_file(name: str) -> type[Problem] | None:
    """The Problem defined in tasks/<name>.py; None if it defines none."""
    module = importlib.import_module(f"{__name__}.{name}")
    here = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    return next((v for v in here if isinstance(v, type) and issubclass(v, Problem)), None)


def names() -> list[str]:
    """The names of all toy problems."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if _in_file(module.name))


def find(name: str) -> type[Problem]:
    """The class of the problem of this name."""
    problem = _in_file(name)
    assert problem, f"tasks/{name}.py defines no problem"
    return problem


def make(name: str, values: dict[str, Any]) -> Problem:
    """The problem of this name in the sizes of `values`; None, and what is missing, is the default."""
    sizes = {}
    problem = find(name)
    for size in fields(problem):  # type: ignore[arg-type]  # a dataclass
        value = values.get(size.name)
        sizes[size.name] = value = size.default if value is None else value
        lowest, highest = size.metadata["lowest"], size.metadata["highest"]
        if type(value) is not int or not lowest <= value <= highest:
            raise UserError(f"--{size.name} must be a whole number from {lowest} to {highest}, not {value}")
    return problem(**sizes)
