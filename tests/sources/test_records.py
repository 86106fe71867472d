"""sources/records.py: the shapes in use are read, and nothing in them is dropped silently."""

from collections import Counter

import pytest

from common.errors import UserError
from sources.records import messages_of, text_of, texts_in


def said(*turns):
    """("user", "Hi", "assistant", "Hello", ...) as messages."""
    return [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]


TURNS = said("user", "q", "assistant", "a")
TWICE = said("user", "h", "assistant", "i", "user", "q", "assistant", "a")
PARTS = [{"type": "text", "text": "q"}]


def gpt(*turns):
    return [{"from": who, "value": text} for who, text in zip(turns[::2], turns[1::2], strict=True)]


SHAPES = [
    ({"question": "q", "answer": "a"}, "of question and answer", TURNS),
    ({"question": "q", "answer": "a", "system": "", "history": None}, "of question and answer", TURNS),
    ({"question": "q", "answer": "a", "history": [["h", "i"]]}, "of question and answer", TWICE),
    ({"question": "q", "answer": "a", "system": "s"}, "of question and answer", said("system", "s") + TURNS),
    ({"instruction": "q", "input": "", "output": "a"}, "in Alpaca's shape", TURNS),
    ({"instruction": "q", "output": "a"}, "in Alpaca's shape", TURNS),
    ({"instruction": "do", "input": "it", "output": "a"}, "in Alpaca's shape",
     said("user", "do\nit", "assistant", "a")),
    ({"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["h", "i"]]},
     "in Alpaca's shape", said("system", "s") + TWICE),
    ({"prompt": "q", "completion": "a"}, "of prompt and completion", TURNS),
    ({"prompt": TWICE[:3], "completion": TWICE[3:]}, "of prompt and completion", TWICE),
    ({"prompt": said("system", "s", "user", "q"), "completion": "a"}, "of prompt and completion",
     said("system", "s") + TURNS),
    ({"messages": TURNS}, "of messages", TURNS),
    ({"messages": TURNS, "system": "s"}, "of messages", said("system", "s") + TURNS),
    ({"messages": [{"role": "user", "content": PARTS + PARTS}, TURNS[1]]}, "of messages",
     said("user", "qq", "assistant", "a")),
    ({"messages": said("developer", "s") + TURNS}, "of messages", said("system", "s") + TURNS),
    (TURNS, "of messages", TURNS),
    ({"conversations": TURNS}, "in MiniMind's shape", TURNS),
    ({"conversations": gpt("human", "q", "gpt", "a")}, "in ShareGPT's shape", TURNS),
    ({"conversations": gpt("system", "s", "user", "q", "assistant", "a")}, "in ShareGPT's shape",
     said("system", "s") + TURNS),
    ({"conversations": gpt("gpt", "hello", "human", "q", "gpt", "a"), "system": "s", "tools": "[]"[:0]},
     "in ShareGPT's shape", said("system", "s", "assistant", "hello") + TURNS),
    ({"messages": None, "question": "q", "answer": "a"}, "of question and answer", TURNS),
]  # fmt: skip


@pytest.mark.parametrize(("record", "shape", "messages"), SHAPES)
def test_shapes(record, shape, messages):
    assert messages_of(record) == (messages, [("read", f"conversations {shape}")])
    assert texts_in(record)[0] == [message["content"] for message in messages]


def test_what_is_not_read_is_named():
    record = {"id": 7, "text": "words", "meta": {"url": "x"}, "empty": "", "none": None, "zero": 0}
    text, notes = text_of(record)
    assert text == "words" and notes[0] == ("read", "JSON lines with text")
    assert notes[1:] == [("not read", "id"), ("not read", "meta"), ("not read", "zero")]
    record = {
        "id": 7,
        "tools": [],
        "prompt": "q",
        "messages": [{**TURNS[0], "name": "Anna", "weight": 1}, {**TURNS[1], "reasoning_content": "hm"}],
    }
    messages, notes = messages_of(record)
    assert messages == TURNS
    assert Counter(notes) == Counter(
        [("read", "conversations of messages"), ("not read", "id"), ("not read", "prompt"),
         ("not read", "messages.name"), ("not read", "messages.reasoning_content")]
    )  # fmt: skip


def test_names_of_fields_are_printable():
    _, notes = text_of({"text": "words", "\x1b[31m": 1, "\ud800": 1, "": 1, "n" * 100: 1})
    names = [name for what, name in notes if what == "not read"]
    assert names == [r"'\x1b[31m'", r"'\ud800'", "''", "n" * 40]


def test_byte_order_marks_are_removed():
    text, notes = text_of({"text": "\ufeffa\ufeffb"})
    assert text == "ab" and notes.count(("marks", "")) == 2
    messages, notes = messages_of({"question": "\ufeffq", "answer": "a", "system": "s\ufeff"})
    assert messages == said("system", "s") + TURNS and notes.count(("marks", "")) == 2


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"question": "q"}, "has question, but no answer"),
        ({"question": "q", "answer": None}, "has question, but no answer"),
        ({"output": "a"}, "has output, but no instruction"),
        ({"id": 1, "content": "x"}, r"has no fields of a conversation \(.*\): its fields are id, content"),
        ({}, "it is empty"),
        ("words", "needs a JSON object, but it is a str"),
        ({"question": "q", "answer": "a", "messages": TURNS}, "is two conversations at once: it has ques"),
        ({"question": 1, "answer": "a"}, "its message 1 from user is not text"),
        ({"question": "q", "answer": ["a"]}, "its message 2 holds a part that is not text: 'a'"),
        ({"question": "q", "answer": "a", "system": ["s"]}, "its system is not text"),
        ({"question": "q", "answer": "a", "history": [["h"]]}, "its history is not a list like"),
        ({"question": "q", "answer": "a", "history": "h"}, "its history is not a list like"),
        ({"question": "q", "answer": "a", "history": [["h", 3]]}, "its message 2 from assistant"),
        ({"question": "q", "answer": "a", "context": "c"}, "its context cannot be used, and an answer"),
        ({"question": "q", "answer": "a", "input": "c"}, "its input cannot be used"),
        ({"instruction": "q", "input": ["i"], "output": "a"}, "its instruction or its input is not text"),
        ({"messages": TURNS, "history": [["h", "i"]]}, "its history cannot be used"),
        ({"messages": TURNS, "tools": [{"name": "f"}]}, "its tools cannot be used"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{}]}]}, "its messages.tool_calls cannot"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "its messages.weight cannot be used"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": False}]}, "its messages.train cannot be used"),
        ({"messages": [*TURNS, {"role": "tool", "content": "x"}]}, "its message 3 is from 'tool', and the c"),
        ({"conversations": gpt("human", "q", "function_call", "f")}, "its message 2 is from 'function_call'"),
        ({"messages": [{"content": "q"}]}, "its message 1 is from 'None'"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "its message 1 is from"),
        ({"messages": [TURNS[0], "a"]}, "its message 2 is not a JSON object"),
        ({"messages": "q"}, "its messages must be a list of at least one message"),
        ({"messages": []}, "its messages must be a list of at least one message"),
        ({"messages": [{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": "x"}]}]},
         "its message 1 holds a part that is not text: 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part that is not text: 'text'"),
        ({"messages": said("system", "s") + TURNS, "system": "s"}, "has two system texts"),
        ({"question": "\ud800", "answer": "a"}, "holds half a surrogate pair"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_used(record, sentence):
    with pytest.raises(UserError, match=sentence):
        messages_of(record)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"content": "x"}, 'needs {"text": "..."}, but its fields are content'),
        ({"text": ["x"]}, "but its fields are text"),
        ([1], "but it is a list"),
        ({"text": " \n"}, "its text is empty"),
        ({"text": "\ufeff"}, "its text is empty"),
        ({"text": "\ud800"}, "holds half a surrogate pair"),
    ],
)
def test_texts_that_cannot_be_used(record, sentence):
    with pytest.raises(UserError) as error:
        text_of(record)
    assert sentence in str(error.value)
