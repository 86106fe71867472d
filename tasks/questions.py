"""Questions with known answers, read from a file: what `inference.py --eval` asks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import Example, Task


class Questions(Task):
    """A file of conversations in any format that `python data.py` accepts.

    The question is everything before the last answer. A record may have a "kind". Raises UserError if the
    file cannot be read.
    """

    name = "questions"

    def __init__(self, path: Path):
        from preparation.corpus import conversation_of
        from sources import ReadReport, Source

        def example_of(record: Any) -> tuple[Example, list[tuple[str, str]]]:
            messages, notes = conversation_of(record)
            kind = record.get("kind", "question") if isinstance(record, dict) else "question"
            example = Example(messages[:-1], messages[-1]["content"], str(kind))
            return example, [note for note in notes if note != ("not read", "kind")]

        source, report = Source(path, example_of, needs_records=True), ReadReport()
        self.list = [example for examples, _ in source.documents(report) for example in examples]
        self.notes = report.summary(str(path))

    def examples(self, split: str = "test", seed: int = 0) -> Iterator[Example]:
        """All questions, in the file's order."""
        yield from self.list
