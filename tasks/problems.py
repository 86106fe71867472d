"""Toy problems: tasks that a small model learns from nothing, and the batches it learns from.

A `Problem` is a dataclass in a file of its own, and problem.py trains it. Its fields are its sizes. Its
methods draw a question, compute the answer, and give the model and the training that can learn it.
"""

import functools
import itertools
import math
import random
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

import tasks
from common.errors import UserError
from tasks import DrawnTask, Example, is_held_out, option
from tokenizer import CharTokenizer, Tokenizer

STEPS_DRAWN_TOGETHER = 8  # so that questions of similar length can share a batch


class Problem(DrawnTask):
    """The base class of toy problems. Each is a dataclass in its own file.

    characters   the characters of questions and answers, one token each
    is_causal    True: the answer follows the question and `mark`, token by token
                 False: the answer is as long as the question and computed in one pass, in which every token
                 sees all others
    """

    characters = ""
    is_causal = True
    mark = "="

    @abstractmethod
    def draw(self, random: random.Random) -> str:
        """A random question, in which all randomness comes from `random`."""

    @abstractmethod
    def answer(self, question: str) -> str:
        """The right answer."""

    @abstractmethod
    def read(self, text: str) -> str:
        """Normalize what a user typed to a question as from `draw`. Raises UserError if it is not one."""

    def check(self, question: str, answer: str) -> bool:
        """Whether the answer is right."""
        return answer == self.answer(question)

    def subproblems(self, question: str) -> Any:
        """[(start, end, answer), ...]: parts question[start:end] that are questions themselves.

        A causal model is also trained to predict the answer of each part, a single character, at its end.
        This is process supervision (Uesato et al. 2022): it shows in which step an answer went wrong.
        """
        return ()

    def kind(self, question: str) -> str:
        """The kind of a question, if accuracy should be reported per kind."""
        return ""

    @property
    @abstractmethod
    def longest(self) -> tuple[int, int]:
        """The lengths of the longest question and of the longest answer, in characters."""

    @abstractmethod
    def model(self) -> dict[str, Any]:
        """Keys of config/model_config.json: a model that can learn the problem in this size."""

    @abstractmethod
    def training(self) -> dict[str, Any]:
        """Keys of config/config_pretrain.json: training that is long enough."""

    # ---- the same for all problems --------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """For example {"digits": 6}."""
        return tasks.options_of(self)

    @property
    def description(self) -> str:
        return " ".join([self.name, *(f"--{name} {value}" for name, value in self.sizes.items())])

    def example(self, question: str) -> Example:
        return Example(question, self.answer(question), self.kind(question))

    def draw_example(self, random: random.Random) -> Example:
        return self.example(self.draw(random))

    def prompt(self, example: Example) -> str:
        return str(example.question) + self.mark * self.is_causal

    def score(self, example: Example, answer: str) -> float:
        return float(self.check(str(example.question), answer))

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

        subproblems: also train on the answers of the questions' parts, except held-out ones.
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
            mask[row, len(tokens) - len(answer) - 1 : len(tokens)] = 1  # the answer and the end token
        x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
        for row, question in enumerate(questions if subproblems else ()):
            for start, end, answer in self.subproblems(question):
                if not is_held_out(question[start:end]):
                    y[row, end - 1], mask[row, end - 1] = tokenizer.encode(answer)[0], 1
        return {"x": x, "y": y, "mask": mask}


@dataclass
class DigitProblem(Problem):
    """A problem whose questions are strings of digits."""

    digits: int = option(6, "number of digits")

    characters = "0123456789"

    def draw(self, random: random.Random) -> str:
        # First draw which digits may occur: independent digits would hardly ever give 888088.
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


# ---- batches (see data.BatchSource) ------------------------------------------------------------------


class ProblemSource:
    """The base class of the two sources of a problem's batches."""

    text_size = None

    def __init__(self, problem: Problem, tokenizer: Tokenizer, batch_size: int):
        self.problem, self.tokenizer, self.batch_size = problem, tokenizer, batch_size

    def notes(self, n_sequences: float) -> list[str]:
        return []

    def position(self, first: int) -> tuple[int, int, int]:
        return 0, 0, first

    def fingerprints_of(self, size: str) -> list[dict[str, str]]:
        return [{"fingerprint": self.problem.description, "size": size}]


class TrainingQuestions(ProblemSource):
    """Training batches, drawn as they are needed.

    The questions of a batch depend only on the problem, the seed, the batch size and the batch's number.
    """

    sequences_per_epoch = size = loss_weight = math.inf
    description = "examples drawn anew for every step"

    def __init__(self, problem: Problem, tokenizer: Tokenizer, batch_size: int, seed: int):
        super().__init__(problem, tokenizer, batch_size)
        self.seed = seed
        self._drawn = functools.lru_cache(maxsize=1)(self._draw)

    def questions(self, step: int) -> list[str]:
        group, which = divmod(step, STEPS_DRAWN_TOGETHER)
        return self._drawn(group)[which]

    def _draw(self, group: int) -> list[list[str]]:
        """The questions of STEPS_DRAWN_TOGETHER steps. Each step gets similar lengths, for less padding."""
        chance = random.Random(f"{self.problem.name}/training/{self.seed}/{group}")
        questions: list[str] = []
        while len(questions) < STEPS_DRAWN_TOGETHER * self.batch_size:
            question = self.problem.draw(chance)
            if not is_held_out(question):
                questions.append(question)
        questions.sort(key=len)
        steps = [questions[i : i + self.batch_size] for i in range(0, len(questions), self.batch_size)]
        chance.shuffle(steps)
        return steps

    def __call__(self, first: int) -> dict[str, np.ndarray]:
        """The batch that holds question number `first`."""
        questions = self.questions(first // self.batch_size)
        return self.problem.encode(self.tokenizer, questions, subproblems=True)

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        return self.fingerprints_of(self.description)


class HeldOutQuestions(ProblemSource):
    """At most `count` distinct held-out questions. Raises UserError if there are none."""

    def __init__(self, problem: Problem, tokenizer: Tokenizer, batch_size: int, seed: int, count: int):
        super().__init__(problem, tokenizer, batch_size)
        self.questions = [
            str(example.question) for example in itertools.islice(problem.examples("test", seed), count)
        ]
        if not self.questions:
            raise UserError(f"{problem.name} of this size has too few questions to keep some for testing")
        self.sequences_per_epoch = self.size = self.loss_weight = len(self.questions)
        self.description = f"{len(self.questions):,} questions"

    def __call__(self, first: int) -> dict[str, np.ndarray]:
        return self.problem.encode(self.tokenizer, self.questions[first : first + self.batch_size])

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        return self.fingerprints_of(self.description)


# ---- finding problems --------------------------------------------------------------------------------


def names() -> list[str]:
    """The names of all toy problems."""
    return tasks.names(Problem)


def find(name: str) -> type[Problem]:
    """The class of the problem of this name."""
    problem = tasks.find(name)
    assert issubclass(problem, Problem)
    return problem


def make(name: str, values: dict[str, Any]) -> Problem:
    """The problem of this name in the sizes of `values`; see `tasks.make`."""
    problem = tasks.make(name, values)
    assert isinstance(problem, Problem)
    return problem
