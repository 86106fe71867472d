"""What a record, the JSON value of a line, holds: a text, or a conversation in one of the shapes people use.

The functions here return (what the record holds, notes for Found.counts), or raise UserError if it cannot be
used. Nothing is dropped in silence: a field that is not read is noted, and one without which the rest would
mean something else makes the record unusable.
"""

import functools
from typing import NamedTuple

from common.errors import UserError
from sources.reading import BYTE_ORDER_MARK

EMPTY = (None, "", [], {})


def text_of(record):
    """The text of {"text": "..."}."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'needs {{"text": "..."}}, but {is_like(record)}')
    marks = marks_of(record["text"])
    text = record["text"].replace(BYTE_ORDER_MARK, "")
    if not text or text.isspace():
        raise UserError("its text is empty")
    return text, [("read", "JSON lines with text"), *unread(record, {"text"}), *marks]


def words_of(record):
    """All texts of a record of either kind: a list."""
    if isinstance(record, dict) and "text" in record:
        text, notes = text_of(record)
        return [text], notes
    messages, notes = messages_of(record)
    return [message["content"] for message in messages], notes


def is_like(record):
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}"
    return f"its fields are {', '.join(map(name, record))}" if record else "it is empty"


def name(field):
    """A field's name, as far as it can be printed."""
    return (field if field.isprintable() and field else repr(field))[:40]


def unread(record, read, place="", matters=None):
    """Notes of the fields that hold something and are not among those `read`, a set; `place`: where they are.

    matters: {field: its usual value}; UserError for another value of one of these.
    """
    notes = []
    for field, value in record.items():
        if field in read or value in EMPTY or (matters and field in matters and value == matters[field]):
            continue
        if matters and field in matters:
            raise UserError(
                f"its {place}{field} cannot be used, and an answer may mean something else without it"
            )
        notes.append(("not read", place + name(field)))
    return notes


def marks_of(text):
    """A note of each byte-order mark in it. UserError if it is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair (like \\ud800), no character") from None
    return [("marks", "")] * text.count(BYTE_ORDER_MARK)


# ---- conversations ---------------------------------------------------------------------------------


class Shape(NamedTuple):
    name: str
    needs: tuple  # the fields by which it is known
    messages: callable  # record -> [{"role", "content"} or {"from", "value"}, ...], not yet checked
    may_have: tuple = ()  # fields that are read, too; `system` always is


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_history(record, question, answer):
    pairs = record.get("history")
    if not pairs:
        return turns(question, answer)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError('its history is not a list like [["question", "answer"], ...]')
    return [message for pair in [*pairs, (question, answer)] for message in turns(*pair)]


def of_alpaca(record):
    question, more = record["instruction"], record.get("input")
    if more and isinstance(question, str) and isinstance(more, str):
        question = f"{question}\n{more}"
    elif more:
        raise UserError("its instruction or its input is not text")
    return with_history(record, question, record["output"])


def of_prompt(record):
    sides = turns(record["prompt"], record["completion"])
    lists = (side["content"] if isinstance(side["content"], list) else [side] for side in sides)
    return [message for messages in lists for message in messages]


SHAPES = (
    Shape(
        "conversations of question and answer",
        ("question", "answer"),
        lambda record: with_history(record, record["question"], record["answer"]),
        ("history",),
    ),
    Shape("conversations in Alpaca's shape", ("instruction", "output"), of_alpaca, ("input", "history")),
    Shape("conversations of prompt and completion", ("prompt", "completion"), of_prompt),
    Shape("conversations of messages", ("messages",), lambda record: record["messages"]),
    Shape("conversations in MiniMind's shape", ("conversations",), lambda record: record["conversations"]),
)
SHAREGPT = "conversations in ShareGPT's shape"  # has "conversations", too: of {"from": ..., "value": ...}

PLAIN, OF_SHAREGPT = {"role", "content"}, {"from", "value"}  # the fields of a message
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}  # fmt: skip
# Fields of a conversation or a message without which an answer may mean something else: their usual values.
MATTERS = dict.fromkeys(
    ("audio", "audios", "context", "documents", "function_call", "functions", "history", "image", "images",
     "input", "system", "system_prompt", "tool_calls", "tools", "video", "videos")
) | {"train": True, "weight": 1}  # fmt: skip


def messages_of(record):
    """The conversation: [{"role": "system", "user" or "assistant", "content": str}, ...].

    The chat template asks for more than that: see tokenizer.check_messages.
    """
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise UserError(f"needs a JSON object, but {is_like(record)}")
    shape, fields = shape_of(tuple([field for field, value in record.items() if value is not None]))
    notes = [] if record.keys() <= fields else unread(record, fields, matters=MATTERS)
    messages = shape.messages(record)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"its {shape.needs[0]} must be a list of at least one message")
    is_sharegpt = isinstance(messages[0], dict) and "from" in messages[0]
    notes.append(("read", SHAREGPT if is_sharegpt else shape.name))
    messages = [message_of(message, number, notes) for number, message in enumerate(messages, 1)]
    if system := record.get("system"):
        if not isinstance(system, str):
            raise UserError("its system is not text")
        if messages[0]["role"] == "system":
            raise UserError("has two system texts: a field, and its message 1")
        messages.insert(0, {"role": "system", "content": system})
    if marks := marks_of("".join([message["content"] for message in messages])):
        notes += marks
        for message in messages:
            message["content"] = message["content"].replace(BYTE_ORDER_MARK, "")
    return messages, notes


@functools.lru_cache(1000)
def shape_of(held):
    """(the Shape of a record with these fields, the names of those that are read)"""
    shapes = [shape for shape in SHAPES if set(held).issuperset(shape.needs)]
    if len(shapes) > 1:
        raise UserError(
            f"is two conversations at once: it has {' and '.join('/'.join(s.needs) for s in shapes)}"
        )
    if shapes:
        [shape] = shapes
        return shape, {"system", *shape.needs, *shape.may_have}
    for shape in SHAPES:
        if there := set(held).intersection(shape.needs):
            [missing] = set(shape.needs) - there
            raise UserError(f"has {there.pop()}, but no {missing}")
    wanted = ", ".join(" and ".join(shape.needs) for shape in SHAPES)
    raise UserError(f"has no fields of a conversation ({wanted}): {is_like(dict.fromkeys(held))}")


def message_of(message, number, notes):
    """{"role", "content"} of a message in one of the ways to write it."""
    if not isinstance(message, dict):
        raise UserError(f"its message {number} is not a JSON object")
    role, content, fields = message.get("role"), message.get("content"), PLAIN
    if "from" in message:
        role, content, fields = message["from"], message.get("value"), OF_SHAREGPT
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"its message {number} is from {str(role)[:40]!r}, "
            "and the chat template knows system, user and assistant only"
        )
    if not message.keys() <= fields:
        notes += unread(message, fields, "messages.", MATTERS)
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"its message {number} holds a part that is not text: {str(kind)[:40]!r}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"its message {number} from {role} is not text")
    return {"role": ROLES[role], "content": content}
