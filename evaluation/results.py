"""Results on disk: one file for each evaluation, checkpoint/evaluation/<checkpoint>_<task>_<digest>.jsonl.

Its first line says what was evaluated; then there is a line for each example, in order; the last line has
the score. Lines are appended as examples are scored, to a file that is called .part until it is complete:

    {"format": "nano-evaluation", "version": 1, "identity": {...}, "about": {...}}
    {"number": 0, "kind": "2 digits +", "value": 1.0, "weight": 1.0, "answer": "42", ...}
    ...
    {"n": 1000, "metric": "numeric", "score": 0.86, "standard_error": 0.011, "base_rate": 0.02, ...}

identity   all that the scores depend on: hashes of the checkpoint file and of what the model reads, the
           task, the metric, the seed, the kind of numbers. Only a file with the very same identity is taken
           up again, whatever its name.
about      for people: the checkpoint's name, stage, run and step; when, and with which commit of Nano
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from common.config import display_path
from common.errors import UserError
from common.files import LineFile, atomic_write, sync_folder
from common.provenance import commit
from evaluation import runner
from evaluation.runner import ExampleScore, Prepared, TaskResult

if TYPE_CHECKING:
    from decoding.text_generator import LoadedModel

FORMAT, VERSION = "nano-evaluation", 1
SCORE = TypeAdapter(ExampleScore)


class ResultFile:
    """The file of an evaluation. `identity` also holds the weights and how they are computed with."""

    def __init__(self, loaded: LoadedModel, quantize: str | None, identity: dict[str, Any]) -> None:
        from engine import checkpoint

        state, model = loaded.checkpoint, loaded.model
        self.identity = {
            "weights": file_digest(loaded.path), **identity, "quantize": quantize,
            "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type,
        }  # fmt: skip
        self.about = {
            "checkpoint": loaded.name, "stage": state.stage, "run": state.run, "step": state.step,
            "parameters": model.n_params, "commit": commit(),
        }  # fmt: skip
        name = re.sub(r"[^\w=-]+", "_", f"{loaded.path.stem}_{identity['task']}")[:80]
        self.path = checkpoint.FOLDER / "evaluation" / f"{name}_{digest(self.identity)[:8]}.jsonl"
        self.part = self.path.with_name(self.path.name + ".part")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process has the file. Raises UserError if one has it already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.part}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is writing {display_path(self.path)}") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows cannot delete an open file
                os.unlink(lock.lock_file)
            lock.release()

    @contextlib.contextmanager
    def writing(self, lines: Iterable[dict[str, Any]] = ()) -> Iterator[LineFile]:
        """Begin anew with these lines, and yield the file to append to, which is complete when the block
        ends without an exception."""
        about = {**self.about, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        header = {"format": FORMAT, "version": VERSION, "identity": self.identity, "about": about}
        with atomic_write(self.part) as start:
            for line in (header, *lines):
                start.write(to_line(line).encode("utf-8", "backslashreplace"))
        file = LineFile(self.part)
        try:
            yield file
        finally:
            file.close()
        os.replace(self.part, self.path)
        sync_folder(self.path.parent)

    def keep(self, result: TaskResult, lines: Iterable[dict[str, Any]]) -> None:
        """Write a whole result at once, with a line of each example."""
        with self.locked(), self.writing(lines) as file:
            file.write(to_line(total(result)), sync=True)


class Evaluation:
    """A task on a loaded model, kept on disk.

    scores   of the examples so far
    seconds  it took; None if a part of it was done by an earlier process
    """

    def __init__(self, loaded: LoadedModel, prepared: Prepared, seed: int, quantize: str | None) -> None:
        task = prepared.task
        self.model, self.prepared = loaded.model, prepared
        identity = {
            "task": task.spec,
            "metric": task.metric,
            "style": prepared.style,
            "examples": len(prepared.examples),
            "content": digest([prepared.examples, prepared.prompts]),
            "seed": seed,
        }
        self.file = ResultFile(loaded, quantize, identity)
        self.scores: list[ExampleScore] = []
        self.seconds: float | None = 0.0

    @property
    def result(self) -> TaskResult:
        """Of the scores so far."""
        return runner.result_of(self.prepared, self.scores, self.seconds)

    @property
    def is_complete(self) -> bool:
        return len(self.scores) == len(self.prepared.examples)

    def run(self, resume: bool, on_each: Callable[[], object] = lambda: None) -> None:
        """Score the examples, and keep the scores. resume: take up what is on disk; otherwise begin anew.

        on_each is called as each example ends, also for those on disk. Raises UserError if another process
        does the same.
        """
        with self.file.locked():
            if resume:
                self.take_up()
            for _ in self.scores:
                on_each()
            if not self.is_complete:
                self._go_on(on_each)

    def take_up(self) -> None:
        """Read the scores on disk: all, or of whole groups."""
        self.scores, footer = read_scores(self.file.path, self.file.identity)
        if self.is_complete and footer:
            self.seconds = footer.get("seconds")
            return
        self.scores, _ = read_scores(self.file.part, self.file.identity)
        del self.scores[len(self.scores) // runner.GROUP * runner.GROUP :]
        self.seconds = None if self.scores else 0.0

    def _go_on(self, on_each: Callable[[], object]) -> None:
        began = time.perf_counter()
        with self.file.writing(map(self._line, self.scores)) as file:
            for one in runner.score(self.model, self.prepared, len(self.scores), on_each):
                file.write(to_line(self._line(one)))
                self.scores.append(one)
                if self.seconds is not None:
                    self.seconds = time.perf_counter() - began
            file.write(to_line(total(self.result)), sync=True)

    def _line(self, one: ExampleScore) -> dict[str, Any]:
        example = self.prepared.examples[one.number]
        return {**one._asdict(), "question": example.question, "right": example.answer}


def total(result: TaskResult) -> dict[str, Any]:
    """The last line of a file."""
    names = ("n", "metric", "score", "standard_error", "base_rate", "seconds")
    return {name: getattr(result, name) for name in names}


def read_scores(path: Path, identity: dict[str, Any]) -> tuple[list[ExampleScore], dict[str, Any] | None]:
    """The scores in a file of this identity, up to the first line that is damaged, and its last line.

    Returns ([], None) for a file that is missing, of another identity, or something else.
    """
    try:
        first, *lines = path.read_bytes().split(b"\n")[:-1]  # without what follows the last line end
        header = json.loads(first)
    except (FileNotFoundError, ValueError, RecursionError):
        return [], None
    kept = [header.get(key) for key in ("format", "version", "identity")] if isinstance(header, dict) else []
    if kept != [FORMAT, VERSION, identity]:
        return [], None
    scores: list[ExampleScore] = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if not isinstance(values, dict):
                break
            if "number" not in values:
                return scores, values
            with contextlib.suppress(ValidationError):
                known = {key: value for key, value in values.items() if key in ExampleScore._fields}
                one = SCORE.validate_python(known)
                if one.number == len(scores):
                    scores.append(one)
                    continue
        break
    return scores, None


def to_line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def digest(value: Any) -> str:
    """A hash (hex) of a value that JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """A hash (hex) of a file's content."""
    content = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            content.update(part)
    return content.hexdigest()
