"""A task as a part of a mixture: which examples, and what they look like in ids."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

import tasks
from common.errors import UserError
from tasks import DrawnTask, Example, ListedTask, option
from tasks.parts import TaskPart
from tokenizer import CharTokenizer

TOKENIZER = CharTokenizer.train(["0123456789=ab"])
KEYS = np.arange(9).astype(np.uint64)


@dataclass
class Repeat(DrawnTask):
    """Write a character up to `longest` times."""

    longest: int = option(40, "the most")
    name = "repeat"

    def draw_example(self, random):
        number = random.randint(1, self.longest)
        return Example(f"{number}", "a" * number)


@dataclass
class Few(ListedTask):
    name = "few"

    def listed(self, split):
        return [Example(str(i), "b" * i) for i in range(1, 21)] if split == "train" else [Example("0", "a")]


def texts(part, numbers):
    return [TOKENIZER.decode(ids) for ids, _ in part.rows(np.array(numbers), KEYS)]


def test_an_example_is_a_conversation_whose_answer_counts():
    part = TaskPart(tasks.parse("q:digits=3"), TOKENIZER, 32)
    for ids, mask in part.rows(np.arange(50), KEYS):
        text = TOKENIZER.decode(ids)
        question, answer = text.removeprefix("<|instruct_mark|>").split("=<|response_mark|>")
        loops = sum({"0": 1, "6": 1, "8": 2, "9": 1}.get(digit, 0) for digit in question)
        assert answer == f"{loops}<|eos|>" and len(mask) == len(ids) - 1
        assert TOKENIZER.decode(ids[1:][mask == 1]) == answer
    assert part.n_sequences == math.inf and part.tokens_counted == 2


def test_training_never_takes_what_is_for_testing():
    task = tasks.parse("sort:digits=4")
    train, test = (TaskPart(task, TOKENIZER, 32, is_test) for is_test in (False, True))
    asked = {text.split("<|response_mark|>")[0] for text in texts(train, range(3000))}
    held_out = {text.split("<|response_mark|>")[0] for text in texts(test, range(int(test.n_sequences)))}
    assert test.n_sequences == len(held_out) == 500 and len(asked) > 1000 and not asked & held_out


def test_what_is_too_long_is_left_out_and_told():
    part = TaskPart(Repeat(), TOKENIZER, 20)
    [note] = part.notes
    assert "of the examples of task repeat:longest=40 are left out: they are longer than block_size" in note
    lengths = [len(ids) for ids, _ in part.rows(np.arange(400), KEYS)]
    assert max(lengths) == 21 and abs(float(note.split("%")[0]) - 60) < 10
    one_by_one = [texts(part, [number])[0] for number in range(20)]
    assert one_by_one == texts(part, range(20))  # a number is an example, whatever it is drawn with
    assert not TaskPart(Repeat(), TOKENIZER, 44).notes
    with pytest.raises(
        UserError, match="% of the examples of task repeat:longest=400 are longer than block_size"
    ):
        TaskPart(Repeat(400), TOKENIZER, 20)
    assert not TaskPart(Repeat(5), TOKENIZER, 8).notes
    with pytest.raises(UserError, match="which is 1; with 8, all would fit"):
        TaskPart(Repeat(5), TOKENIZER, 1)


def test_a_task_with_a_list_is_passed_through():
    part = TaskPart(Few(), TOKENIZER, 64)
    assert part.n_sequences == 20 and part.size == "20 examples of few"
    assert sorted(texts(part, range(20)), key=len) == [
        f"<|instruct_mark|>{i}<|response_mark|>{'b' * i}<|eos|>" for i in range(1, 21)
    ]
    assert TaskPart(Few(), TOKENIZER, 64, is_test=True).n_sequences == 1
    assert part.n_tokens == sum(len(str(i)) + i + 2 for i in range(1, 21))


def test_unknown_characters_are_named():
    tokenizer = CharTokenizer.train(["0123456789"])
    with pytest.raises(
        UserError, match="repeat:longest=40 has characters that the tokenizer does not know: a; "
    ):
        TaskPart(Repeat(), tokenizer, 64)


def test_another_option_or_tokenizer_or_rule_is_another_content(monkeypatch):
    prints = [
        TaskPart(tasks.parse(spec), tokenizer, 64, is_test).fingerprint
        for spec in ("sort:digits=6", "sort:digits=7")
        for tokenizer in (TOKENIZER, CharTokenizer.train(["!0123456789"]))
        for is_test in (False, True)
    ]
    again = TaskPart(tasks.parse("sort:digits=6"), TOKENIZER, 64).fingerprint
    monkeypatch.setattr(type(tasks.parse("sort")), "answer", lambda self, question: question)
    changed = TaskPart(tasks.parse("sort:digits=6"), TOKENIZER, 64).fingerprint
    assert again == prints[0] and len({*prints, changed}) == 9
