"""A user's own questions, read from a JSON lines file. The first line decides what kind of file it is:

    {"question": "2+2?", "answer": "4"}                                  a conversation in any usual format
    {"question": "2+2?", "choices": ["3", "4"], "answer": 1}             multiple choice
    {"text": "Two and two are four."}                                    a text

Of multiple choice, "answer" (or "label", "index", "gold") says which choice is right: its number, from 0, or
its letter, or its text. Every record may have a "kind".
"""

import string
from pathlib import Path
from typing import Any

from common.config import display_path
from common.errors import UserError
from tasks import Example, ListedTask, Metric, essence
from tokenizer import Message

INDICES = ("answer", "label", "index", "gold")
FORMATS = {"question": "an answer", "choices": "choices", "text": "a text"}
METRICS: dict[str, tuple[Metric, ...]] = {  # by format; the first is the default
    "question": ("exact", "contains", "numeric", "perplexity"),
    "choices": ("choice", "exact", "contains", "numeric", "perplexity"),
    "text": ("perplexity",),
}


class Questions(ListedTask):
    """The questions in a file, to test with.

    The question of a conversation is everything before its last answer. The `metric` follows from the file
    unless it is given: choice, perplexity of texts, or exact. Raises UserError if the file cannot be read, or
    if the metric does not suit it.
    """

    def __init__(self, path: Path, metric: Metric | None = None):
        from sources import ReadReport, Source

        self.path, self._metric, self._format = path, metric, ""
        source, report = Source(path, self._example_of, needs_records=True), ReadReport()
        self.list = [example for examples, _ in source.documents(report) for example in examples]
        self.metric = metric or METRICS[self._format][0]
        self.notes = report.summary(str(path))

    @property
    def spec(self) -> str:
        """The path of the file."""
        return display_path(self.path)

    def listed(self, split: str) -> list[Example]:
        return self.list if split == "test" else []

    def _example_of(self, record: Any) -> tuple[Example, list[tuple[str, str]]]:
        form = format_of(record)
        self._format = self._format or form
        if form != self._format:
            raise UserError(f"has {FORMATS[form]}, and the lines before it have {FORMATS[self._format]}")
        if self._metric and self._metric not in METRICS[form]:
            usable = ", ".join(METRICS[form])
            raise UserError(f"has {FORMATS[form]}: the metric can be {usable}, not {self._metric}")
        example, notes = READERS[form](record)
        if self._metric == "numeric" and essence("numeric", example.answer) is None:
            raise UserError(
                f"its answer {short(example.answer)} holds no number, which the metric numeric needs"
            )
        kind = record.get("kind") if isinstance(record, dict) else None
        return example._replace(kind="question" if kind in (None, "") else str(kind)), notes


def format_of(record: Any) -> str:
    """Which of FORMATS a record has."""
    from sources.records import SHAPES

    present = (
        {key for key, value in record.items() if value is not None} if isinstance(record, dict) else set()
    )
    if "choices" in present:
        return "choices"
    is_chat = any(present.issuperset(shape.required) for shape in SHAPES)
    return "text" if "text" in present and not is_chat else "question"


def read_conversation(record: Any) -> tuple[Example, list[tuple[str, str]]]:
    """{"question", "answer"} and the other formats of conversations."""
    from preparation.corpus import conversation_of

    messages, notes = conversation_of(record)
    question: str | list[Message] = messages[:-1]
    if len(messages) == 2:  # a user, an assistant
        question = messages[0]["content"]
    return Example(question, messages[-1]["content"]), [n for n in notes if n != ("not read", "kind")]


def read_choices(record: dict[str, Any]) -> tuple[Example, list[tuple[str, str]]]:
    """{"question", "choices", "answer"}."""
    from sources.records import SIGNIFICANT, unread_fields

    question, choices = record.get("question"), record["choices"]
    if not isinstance(question, str) or not question.strip():
        raise UserError("has choices, but no question")
    if not isinstance(choices, list) or not all(
        isinstance(choice, str) and choice.strip() for choice in choices
    ):
        raise UserError('its choices are not a list of texts like ["Rome", "Paris"]')
    if len(choices) < 2:
        raise UserError(f"needs two choices or more, but has {len(choices)}")
    if same := next((choice for choice in choices if choices.count(choice) > 1), None):
        raise UserError(f"has the choice {short(same)} twice")
    given = [field for field in INDICES if record.get(field) is not None]
    if not given:
        raise UserError(f"does not say which choice is right; that goes into {' or '.join(INDICES)}")
    if len(given) > 1:
        raise UserError(f"has {' and '.join(given)}; keep the one that says which choice is right")
    [field] = given
    answer = choices[index_of(record[field], choices, field)]
    notes = unread_fields(record, {"question", "choices", "kind", field}, significant=SIGNIFICANT)
    return Example(question, answer, choices=tuple(choices)), [("read", "multiple-choice questions"), *notes]


def index_of(value: Any, choices: list[str], field: str) -> int:
    """Which choice an answer means: a number from 0, a letter, or the text of a choice."""
    letters = string.ascii_uppercase[: len(choices)]
    found = set()
    if type(value) is int and 0 <= value < len(choices):
        found.add(value)
    if isinstance(value, str) and len(value) == 1 and value in letters:
        found.add(letters.index(value))
    if value in choices:
        found.add(choices.index(value))
    if len(found) > 1:
        raise UserError(
            f"its {field} {short(value)} is one choice as a letter, and another as a text; use a number"
        )
    if not found:
        lettered = f", or {letters[0]} to {letters[-1]}" if len(letters) == len(choices) else ""
        numbered = f"they are numbered from 0 to {len(choices) - 1}{lettered}"
        raise UserError(f"its {field} {short(value)} is none of the choices: {numbered}")
    return found.pop()


def read_text(record: dict[str, Any]) -> tuple[Example, list[tuple[str, str]]]:
    """{"text"}: an answer without a question."""
    from sources.records import text_of

    text, notes = text_of(record)
    return Example("", text), [note for note in notes if note != ("not read", "kind")]


def short(value: Any) -> str:
    """A value as a sentence can quote it."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:40] + "..."


READERS = {"question": read_conversation, "choices": read_choices, "text": read_text}
