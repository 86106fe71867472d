"""Tasks: one file each, found by its name. doc/extending.md shows how to write one.

A task yields examples, writes each as a conversation, and scores answers. The same file can be trained on (as
a part of a mixture in dataset_path), evaluated (evaluate.py), and give rewards.

A task that can be named on a command line is a dataclass, and its fields are its options:
"arithmetic:digits=3,steps=true". Most tasks draw their examples at random (`DrawnTask`), without end. Whether
an example is for training or for testing depends on the example alone, so no run, with any seed, trains on
what another is tested on.
"""

import collections
import contextlib
import difflib
import functools
import hashlib
import importlib
import itertools
import math
import pkgutil
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, NamedTuple

from common.errors import UserError
from tokenizer import Message

HELD_OUT = 10  # one example in ten is for testing

# How answers are scored. "choice" and "perplexity" generate nothing: they compare likelihoods.
Metric = Literal["exact", "contains", "numeric", "choice", "perplexity"]


class Example(NamedTuple):
    """One example of a task.

    question  a text, or for a chat all messages before the answer; "" if the answer is a text of its own
    answer    the right answer, or one of them
    kind      its group, if scores should be reported per group
    choices   the answers to choose from, of which `answer` is one
    key       what it is about: examples of one key are all for training or all for testing ("": the question)
    """

    question: str | list[Message]
    answer: str
    kind: str = ""
    choices: tuple[str, ...] = ()
    key: str = ""


class Task(ABC):
    """Something to learn, to be scored on, or to be rewarded by.

    metric   how answers are scored
    notes    sentences that a user must read, such as what a file holds besides
    n_train  how many examples there are to train on; infinite if they are drawn as needed
    """

    metric: Metric = "exact"
    notes: Sequence[str] = ()
    n_train: float = math.inf

    @property
    def name(self) -> str:
        """A short name for tables and files: that of the task's own file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def spec(self) -> str:
        """The name with all options, such as "arithmetic:digits=2,steps=false"; see `make`."""
        options = ",".join(f"{key}={str(value).lower()}" for key, value in options_of(self).items())
        return f"{self.name}:{options}" if options else self.name

    @abstractmethod
    def examples(self, split: str, seed: int) -> Iterator[Example]:
        """The examples of a split, "train" or "test", possibly endless. The seed determines them."""

    def train_example(self, seed: int, number: int) -> Example:
        """The training example of this number, from 0 to n_train - 1: a pure function."""
        raise UserError(f"{self.name} has no examples to train on")

    def prompt(self, example: Example) -> str | list[Message]:
        """What the model reads: a text, or the messages of a chat."""
        return example.question

    def messages(self, example: Example) -> list[Message]:
        """The prompt as the messages of a chat."""
        prompt = self.prompt(example)
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}] if prompt else []
        return list(prompt)

    def conversation(self, example: Example) -> list[Message]:
        """The whole example as a chat, to be trained on."""
        return [*self.messages(example), {"role": "assistant", "content": example.answer}]

    def text(self, example: Example) -> str:
        """The prompt for a model that only continues texts: the answer follows on a new line."""
        return "".join(message["content"] + "\n" for message in self.messages(example))

    def score(self, example: Example, answer: str) -> float:
        """How good an answer is, from 0 to 1. By default, `metric` decides."""
        right, given = essence(self.metric, example.answer), essence(self.metric, answer)
        if right is None or given is None:
            return 0.0
        return float(right in given if self.metric == "contains" else right == given)

    def base_rate(self, examples: Sequence[Example]) -> float | None:
        """What a model that knows nothing scores: by guessing among the choices, or else by always giving the
        most frequent answer. None for perplexity, which has no such score."""
        if self.metric == "perplexity":
            return None
        if self.metric == "choice":
            return sum(1 / len(example.choices) for example in examples) / len(examples)
        answers = collections.Counter(essence(self.metric, example.answer) for example in examples)
        return max(answers.values()) / len(examples)


NUMBER = re.compile(r"(?:(?<![0-9.])[-−])?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")


def essence(metric: str, answer: str) -> str | None:
    """What of an answer is compared; None: nothing in it can be. For "numeric", it is the last number."""
    if metric == "contains":
        return " ".join(answer.casefold().split())
    if metric != "numeric":
        return answer.strip()
    numbers = NUMBER.findall(answer)
    if not numbers:
        return None
    sign = "-" * (numbers[-1][0] in "-−")
    whole, _, fraction = numbers[-1].lstrip("-−").replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = whole + f".{fraction}" * bool(fraction)
    return number if number == "0" else sign + number


class DrawnTask(Task):
    """A task whose examples are drawn at random as they are needed."""

    @abstractmethod
    def draw_example(self, random: random.Random) -> Example:
        """A random example, in which all randomness comes from `random`."""

    def is_test(self, example: Example) -> bool:
        """Whether an example is for testing only."""
        return is_held_out(key_of(example))

    def train_example(self, seed: int, number: int) -> Example:
        chance = random.Random(f"{self.name}/train/{seed}/{number}")
        for _ in range(10_000):
            if not self.is_test(example := self.draw_example(chance)):
                return example
        raise UserError(f"{self.spec} is so small that all of its examples are for testing")

    def examples(self, split: str, seed: int) -> Iterator[Example]:
        """An endless stream for "train"; for "test", one of each key, until no new one is found."""
        if split == "train":
            yield from (self.train_example(seed, number) for number in itertools.count())
        chance = random.Random(f"{self.name}/test/{seed}")
        seen, in_vain = set(), 0
        while in_vain < 20_000:  # a small task has few of them
            example = self.draw_example(chance)
            in_vain += 1
            if self.is_test(example) and (key := key_of(example)) not in seen:
                seen.add(key)
                in_vain = 0
                yield example


class ListedTask(Task):
    """A task with a list of examples for each split."""

    @abstractmethod
    def listed(self, split: str) -> Sequence[Example]:
        """All examples of "train" or of "test"."""

    @property
    def n_train(self) -> float:  # type: ignore[override]
        return len(self.listed("train"))

    def examples(self, split: str, seed: int) -> Iterator[Example]:
        """All examples of the split, in their own order."""
        yield from self.listed(split)

    def train_example(self, seed: int, number: int) -> Example:
        examples = self.listed("train")
        return examples[number] if examples else super().train_example(seed, number)


def key_of(example: Example) -> str:
    """What an example is about: its key, or else its question."""
    if example.key or isinstance(example.question, str):
        return example.key or str(example.question)
    return "\n".join(message["content"] for message in example.question)


def is_held_out(key: str) -> bool:
    """Whether examples of this key are for testing only."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


# ---- options and names -------------------------------------------------------------------------------


Option = int | float | bool


def option(default: Option, help: str, lowest: float = 1, highest: float = 1000) -> Any:
    """An option of a task: true or false, or a number in a range, which is whole if the default is."""
    return field(default=default, metadata={"help": help, "lowest": lowest, "highest": highest})


def options_of(task: Task) -> dict[str, Any]:
    """For example {"digits": 6}."""
    if not is_dataclass(task):
        return {}
    return {f.name: getattr(task, f.name) for f in fields(task)}


@functools.cache
def _in_file(name: str) -> type[Task] | None:
    """The task that tasks/<name>.py defines and that can be named, or None."""
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Task)
    ]
    here = [c for c in classes if c.__module__ == module.__name__ and is_dataclass(c)]
    return next((c for c in here if not getattr(c, "__abstractmethods__", None)), None)


def names(base: type[Any] = Task) -> list[str]:
    """The names of all tasks, or of those of a base class."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if (task := _in_file(name)) and issubclass(task, base))


def find(name: str) -> type[Task]:
    """The class of the task of this name. Raises UserError if there is none."""
    if re.fullmatch(r"\w+", name) and importlib.util.find_spec(f"{__name__}.{name}"):
        if task := _in_file(name):
            return task
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
    raise UserError(f"there is no task {name}; {hint}")


def make(name: str, values: dict[str, Any]) -> Task:
    """The task of this name with the options in `values`. Missing ones, and None, mean the default.

    Raises UserError if an option is not in its range.
    """
    chosen = {}
    task = find(name)
    for f in fields(task):  # type: ignore[arg-type]  # a dataclass
        value = values.get(f.name)
        value = f.default if value is None else value
        if isinstance(f.default, float) and type(value) is int:
            value = float(value)
        lowest, highest = f.metadata["lowest"], f.metadata["highest"]
        if isinstance(f.default, bool):
            if not isinstance(value, bool):
                raise UserError(f"--{f.name} must be true or false, not {value}")
        elif type(value) is not type(f.default) or not lowest <= value <= highest:
            kind = "a whole number" if isinstance(f.default, int) else "a number"
            raise UserError(f"--{f.name} must be {kind} from {lowest} to {highest}, not {value}")
        chosen[f.name] = value
    return task(**chosen)


def value_of(text: str) -> Option | str:
    """The value that a text stands for: true or false, a number, or else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def parse(spec: str) -> Task:
    """The task of "name" or "name:option=value,option=value". Raises UserError if there is no such task."""
    name, _, text = spec.partition(":")
    task, values = find(name), {}
    known = {f.name: f.default for f in fields(task)}  # type: ignore[arg-type]  # a dataclass
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            options = f"its options are {', '.join(known)}" if known else "it has no options"
            raise UserError(f"{spec}: {name} has no option {key}; {options}")
        if not value:
            raise UserError(f"{spec}: {key} needs a value, as in {key}={str(known[key]).lower()}")
        if key in values:
            raise UserError(f"{spec}: {key} is given twice")
        values[key] = value_of(value)
    try:
        return make(name, values)
    except UserError as error:
        raise UserError(f"{spec}: {str(error).removeprefix('--')}") from None
