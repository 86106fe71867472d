"""Toy problems: one file each, found by its name. doc/extending.md adds one as an example.

A problem is a dataclass. Its fields are its sizes, which become options of the command line; its
methods draw a question, know the answer, and say how large a model to train on it for how long.
Which questions are held out for testing follows from the questions alone, so that no
model of any seed is ever trained on one.
"""

import functools
import hashlib
import importlib
import math
import pkgutil
import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields

import numpy as np

from common.errors import UserError
from tokenizer import CharTokenizer

HELD_OUT = 10  # one question in ten is for testing
SORTED_TOGETHER = 8  # steps whose questions are drawn at once


def option(default, help, lowest=1, highest=1000):
    """A size of a problem: a whole number that the command line can set."""
    return field(default=default, metadata={"help": help, "lowest": lowest, "highest": highest})


class Problem(ABC):
    """What a file of this folder defines: a dataclass derived from this, named as it likes.

    characters   what questions and answers are written with: a token each
    is_causal    True: the answer comes token by token after question and `mark`;
                 False: the answer, as long as the question, comes in one pass, in which each token sees all
    """

    characters = ""
    is_causal = True
    mark = "="

    @abstractmethod
    def draw(self, random):
        """A random question (str). `random`: a random.Random, the only source of chance."""

    @abstractmethod
    def answer(self, question):
        """The right answer (str)."""

    @abstractmethod
    def read(self, text):
        """What a user typed, as `draw` would have written it. UserError if it is no question of this size."""

    def check(self, question, answer):
        """Whether this is a right answer."""
        return answer == self.answer(question)

    def subproblems(self, question):
        """[(start, end, answer), ...]: parts question[start:end] that are questions, too. A causal model is
        trained to know each answer, a character, at the end of its part already: process supervision
        (Uesato et al. 2022), which says where a wrong answer went wrong."""
        return ()

    def kind(self, question):
        """Of which kind a question is, where accuracy should be told for each of several."""
        return ""

    @property
    @abstractmethod
    def longest(self):
        """(characters of the longest question, of the longest answer)."""

    @abstractmethod
    def model(self):
        """Keys of config/model_config.json: the shape that learns this size of the problem."""

    @abstractmethod
    def training(self):
        """Keys of config/config_pretrain.json: the training that does."""

    # ---- the same for all ---------------------------------------------------------------------------

    @property
    def name(self):
        return type(self).__module__.rpartition(".")[2]

    @property
    def sizes(self):
        """{"digits": 6}"""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def described(self):
        return " ".join([self.name, *(f"--{name} {value}" for name, value in self.sizes.items())])

    def tokenizer(self):
        return CharTokenizer("".join(sorted({*self.characters, *(self.mark if self.is_causal else "")})))

    @property
    def block_size(self):
        question, answer = self.longest
        return question + len(self.mark) + answer if self.is_causal else question

    def encode(self, tokenizer, questions, subproblems=False):
        """x, y [B, T] int64 and the loss mask [B, T] float32 of questions and their answers.

        subproblems: with their answers, too, but for those that are held out.
        """
        answers = [self.answer(question) for question in questions]
        if not self.is_causal:
            x, y = (
                np.stack(tokenizer.encode_batch(texts)).astype(np.int64) for texts in (questions, answers)
            )
            return x, y, np.ones(x.shape, np.float32)
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
        return x, y, mask


@dataclass
class DigitProblem(Problem):
    """A problem whose questions are strings of so many digits."""

    digits: int = option(6, "how many digits a number has")

    characters = "0123456789"

    def draw(self, random):
        # Of any ten digits alike, 888088 would hardly ever come: first draw which digits there are.
        digits = random.sample("0123456789", random.randint(1, 10))
        return "".join(random.choices(digits, k=self.digits))

    def read(self, text):
        if not re.fullmatch(f"[0-9]{{{self.digits}}}", text):
            raise UserError(f"{text} is not a string of {self.digits} digits")
        return text

    @property
    def longest(self):
        return self.digits, self.digits

    def model(self):
        return dict(n_layer=2, n_head=4, n_embd=64)

    def training(self):
        return dict(max_steps=max(600, 75 * self.digits), batch_size=256, learning_rate=3e-3)


def is_held_out(question):
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def as_batch(x, y, mask):
    """A batch as training takes it: see data.BatchSource."""
    return {"x": x, "y": y, "mask": mask}


class Examples:
    """Training batches, drawn as they are needed.

    What is drawn for a batch depends on (problem, seed, batch size, number of the batch) alone.
    """

    sequences_per_epoch = n_loss_tokens = math.inf
    description = "examples drawn anew for every step"
    notes: list[str] = []

    def __init__(self, problem, tokenizer, batch_size, seed):
        self.problem, self.tokenizer, self.batch_size, self.seed = problem, tokenizer, batch_size, seed
        self._drawn = functools.lru_cache(maxsize=1)(self._draw)

    def questions(self, step):
        group, which = divmod(step, SORTED_TOGETHER)
        return self._drawn(group)[which]

    def _draw(self, group):
        """The questions of SORTED_TOGETHER steps, each step's of about one length: less padding that way."""
        chance = random.Random(f"{self.problem.name}/training/{self.seed}/{group}")
        questions = []
        while len(questions) < SORTED_TOGETHER * self.batch_size:
            question = self.problem.draw(chance)
            if not is_held_out(question):
                questions.append(question)
        questions.sort(key=len)
        steps = [questions[i : i + self.batch_size] for i in range(0, len(questions), self.batch_size)]
        chance.shuffle(steps)
        return steps

    def __call__(self, first):
        """The batch of the examples from this number on; of the batch it lies in, if the size has changed."""
        questions = self.questions(first // self.batch_size)
        return as_batch(*self.problem.encode(self.tokenizer, questions, subproblems=True))

    def position(self, first):
        return 0, 0, first

    @property
    def fingerprints(self):
        return [{"fingerprint": self.problem.described, "size": self.description}]


class Test:
    """At most `count` different held-out questions; test(first) are those from this number on, as a batch."""

    notes: list[str] = []

    def __init__(self, problem, tokenizer, batch_size, seed, count):
        self.problem, self.tokenizer, self.batch_size = problem, tokenizer, batch_size
        chance = random.Random(f"{problem.name}/test/{seed}")
        questions, in_vain = {}, 0
        while len(questions) < count and in_vain < 20_000:  # a small problem has fewer of them
            question = problem.draw(chance)
            in_vain += 1
            if is_held_out(question) and question not in questions:
                questions[question], in_vain = None, 0
        if not questions:
            raise UserError(f"{problem.name} of this size has too few questions to keep some for testing")
        self.questions = list(questions)

    @property
    def sequences_per_epoch(self):
        return len(self.questions)

    n_loss_tokens = sequences_per_epoch

    @property
    def description(self):
        return f"{len(self.questions):,} questions"

    @property
    def fingerprints(self):
        return [{"fingerprint": self.problem.described, "size": self.description}]

    def position(self, first):
        return 0, 0, first

    def __call__(self, first):
        questions = self.questions[first : first + self.batch_size]
        return as_batch(*self.problem.encode(self.tokenizer, questions))


def names():
    """Of all problems there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name):
    """The class of the problem of this name."""
    module = importlib.import_module(f"{__name__}.{name}")
    here = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    return next(value for value in here if isinstance(value, type) and issubclass(value, Problem))


def make(name, values):
    """The problem of this name in the sizes of `values`; None, and what is missing, is the default."""
    sizes = {}
    for size in fields(problem := find(name)):
        value = values.get(size.name)
        sizes[size.name] = value = size.default if value is None else value
        lowest, highest = size.metadata["lowest"], size.metadata["highest"]
        if type(value) is not int or not lowest <= value <= highest:
            raise UserError(f"--{size.name} must be a whole number from {lowest} to {highest}, not {value}")
    return problem(**sizes)
