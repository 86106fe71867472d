"""What a record (the JSON value of a line) holds: a text, or a conversation in one of the usual shapes.

The functions here return (what the record holds, notes for ReadReport.counts), or raise UserError if it
cannot be used. Nothing is dropped silently: a field that is not read is noted, and if the rest would mean
something else without it, the record cannot be used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from common.errors import UserError
from sources.reading import BYTE_ORDER_MARK, Note

EMPTY: tuple = (None, "", [], {})


def text_of(record: Any) -> tuple[str, list[Note]]:
    """The text of {"text": "..."}."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'needs {{"text": "..."}}, but {describe(record)}')
    marks = byte_order_marks(record["text"])
    text = record["text"].replace(BYTE_ORDER_MARK, "")
    if not text or text.isspace():
        raise UserError("its text is empty")
    return text, [("read", "JSON lines with text"), *unread_fields(record, {"text"}), *marks]


def texts_in(record: Any) -> tuple[list[str], list[Note]]:
    """All texts in a record of either kind."""
    if isinstance(record, dict) and "text" in record:
        text, notes = text_of(record)
        return [text], notes
    messages, notes = messages_of(record)
    return [message["content"] for message in messages], notes


def describe(record: Any) -> str:
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}"
    return f"its fields are {', '.join(map(printable, record))}" if record else "it is empty"


def printable(field: str) -> str:
    """The name of a field, shortened, and quoted if it cannot be printed as it is."""
    return (field if field.isprintable() and field else repr(field))[:40]


def unread_fields(
    record: dict[str, Any], read: set[str], prefix: str = "", significant: Mapping[str, Any] | None = None
) -> list[Note]:
    """Notes of the fields that are not empty and not among those `read`; `prefix` precedes their names.

    significant: {field: its usual value}; UserError if one of these fields has any other value.
    """
    notes = []
    for field, value in record.items():
        if field in read or value in EMPTY:
            continue
        if significant and field in significant:
            if value == significant[field]:
                continue
            raise UserError(
                f"its {prefix}{field} cannot be used, and an answer may mean something else without it"
            )
        notes.append(("not read", prefix + printable(field)))
    return notes


def byte_order_marks(text: str) -> list[Note]:
    """A note for each byte-order mark in the text. UserError if it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair (like \\ud800), which is not a character") from None
    return [("marks", "")] * text.count(BYTE_ORDER_MARK)


# ---- conversations ---------------------------------------------------------------------------------


class Shape(NamedTuple):
    """One way to write a conversation as a record."""

    name: str
    required: tuple[str, str] | tuple[str]  # the fields by which it is recognised
    # record -> [{"role", "content"} or {"from", "value"}, ...], not checked yet
    messages: Callable[[dict[str, Any]], Any]
    optional: tuple[str, ...] = ()  # fields that are read as well, besides `system`, which always is


def question_and_answer(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_history(record: dict[str, Any], question: Any, answer: Any) -> list[dict[str, Any]]:
    pairs = record.get("history")
    if not pairs:
        return question_and_answer(question, answer)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError('its history is not a list like [["question", "answer"], ...]')
    return [message for pair in [*pairs, (question, answer)] for message in question_and_answer(*pair)]


def from_alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    question, more = record["instruction"], record.get("input")
    if more and isinstance(question, str) and isinstance(more, str):
        question = f"{question}\n{more}"
    elif more:
        raise UserError("its instruction or its input is not text")
    return with_history(record, question, record["output"])


def from_prompt_and_completion(record: dict[str, Any]) -> list[Any]:
    """Each of the two is a text, or a list of messages."""
    both = question_and_answer(record["prompt"], record["completion"])
    lists = (side["content"] if isinstance(side["content"], list) else [side] for side in both)
    return [message for messages in lists for message in messages]


SHAPES = (
    Shape(
        "conversations of question and answer",
        ("question", "answer"),
        lambda record: with_history(record, record["question"], record["answer"]),
        ("history",),
    ),
    Shape("conversations in Alpaca's shape", ("instruction", "output"), from_alpaca, ("input", "history")),
    Shape("conversations of prompt and completion", ("prompt", "completion"), from_prompt_and_completion),
    Shape("conversations of messages", ("messages",), lambda record: record["messages"]),
    Shape("conversations in MiniMind's shape", ("conversations",), lambda record: record["conversations"]),
)
SHAREGPT = "conversations in ShareGPT's shape"  # also "conversations", but of {"from": ..., "value": ...}

PLAIN_FIELDS, SHAREGPT_FIELDS = {"role", "content"}, {"from", "value"}  # the fields of a message
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}  # fmt: skip
# Fields of a conversation or a message without which an answer may mean something else: their usual values.
SIGNIFICANT: dict[str, Any] = dict.fromkeys(
    ("audio", "audios", "context", "documents", "function_call", "functions", "history", "image", "images",
     "input", "system", "system_prompt", "tool_calls", "tools", "video", "videos")
) | {"train": True, "weight": 1}  # fmt: skip


@functools.lru_cache(1000)
def shape_of(fields: tuple[str, ...]) -> tuple[Shape, set[str]]:
    """The Shape of a record with these (non-null) fields, and the names of those that are read."""
    present = set(fields)
    shapes = [shape for shape in SHAPES if present.issuperset(shape.required)]
    if len(shapes) > 1:
        names = " and ".join("/".join(shape.required) for shape in shapes)
        raise UserError(f"is two conversations at once: it has {names}")
    if shapes:
        [shape] = shapes
        return shape, {"system", *shape.required, *shape.optional}
    for shape in SHAPES:
        if found := present.intersection(shape.required):
            [missing] = set(shape.required) - found
            raise UserError(f"has {found.pop()}, but no {missing}")
    wanted = ", ".join(" and ".join(shape.required) for shape in SHAPES)
    raise UserError(f"has no fields of a conversation ({wanted}): {describe(dict.fromkeys(fields))}")


def message_of(message: Any, number: int, notes: list[Note]) -> dict[str, str]:
    """{"role", "content"} of a message, however it is written."""
    if not isinstance(message, dict):
        raise UserError(f"its message {number} is not a JSON object")
    role, content, fields = message.get("role"), message.get("content"), PLAIN_FIELDS
    if "from" in message:
        role, content, fields = message["from"], message.get("value"), SHAREGPT_FIELDS
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"its message {number} is from {str(role)[:40]!r}, "
            "and the chat template knows system, user and assistant only"
        )
    if not message.keys() <= fields:
        notes += unread_fields(message, fields, "messages.", SIGNIFICANT)
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UserError(f"its message {number} holds a part that is not text: {str(kind)[:40]!r}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"its message {number} from {role} is not text")
    return {"role": ROLES[role], "content": content}


def messages_of(record: Any) -> tuple[list[dict[str, str]], list[Note]]:
    """The conversation in a record: [{"role": "system", "user" or "assistant", "content": str}, ...].

    The chat template is stricter about the order of roles: see tokenizer.check_messages.
    """
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise UserError(f"needs a JSON object, but {describe(record)}")
    shape, fields = shape_of(tuple([field for field, value in record.items() if value is not None]))
    notes = [] if record.keys() <= fields else unread_fields(record, fields, significant=SIGNIFICANT)
    raw = shape.messages(record)
    if not isinstance(raw, list) or not raw:
        raise UserError(f"its {shape.required[0]} must be a list of at least one message")
    is_sharegpt = isinstance(raw[0], dict) and "from" in raw[0]
    notes.append(("read", SHAREGPT if is_sharegpt else shape.name))
    messages = [message_of(message, number, notes) for number, message in enumerate(raw, 1)]
    if system := record.get("system"):
        if not isinstance(system, str):
            raise UserError("its system is not text")
        if messages[0]["role"] == "system":
            raise UserError("has two system texts: a field, and its message 1")
        messages.insert(0, {"role": "system", "content": system})
    if marks := byte_order_marks("".join([message["content"] for message in messages])):
        notes += marks
        for message in messages:
            message["content"] = message["content"].replace(BYTE_ORDER_MARK, "")
    return messages, notes
