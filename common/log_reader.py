"""Reads the logs of runs: their curves of loss, learning rate, speed and of the model's own numbers.

The numbers come from train_x.metrics.jsonl. Readable logs without such a file beside them are read as well:
those of earlier versions of train.py, and those of the original Nano. Their lines are fields joined by
" | "; lines that are neither a training nor a validation step are skipped, and so is a last line that is
still being written.

A run that was stopped and resumed is one curve: of steps that were trained twice, the later ones count.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.metrics import FIELDS, METRICS_SUFFIX, duration, name_of

Points = list[tuple[int, float]]  # (step, value)

# Limits, so that reading takes time in proportion to a file's size and a bounded amount of memory.
LINE = 1 << 20  # bytes; a longer line is skipped
LARGE = 100 << 20  # bytes; a file that takes some seconds to read
POINTS = 1_000_000  # per run; beyond it, every second training step is dropped
RUNS = 16  # per file
COMMANDS = 100  # per run
NAMES, CURVES = 12, 256  # of the model's own numbers: names, and curves including all layers
TASKS = 12

# Readable logs.
DECIMAL = r"[-+]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?(?:[eE][-+]?[0-9]{1,3})?|(?i:nan|inf))"
VALUE = re.compile(rf"({DECIMAL})(?![^ %]) ?(\S*)")
UNITS = {
    "": 1, "%": 0.01, "ms": 1e-3, "kJ": 1e3, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "GFLOPS": 1e9, "TFLOPS": 1e12,
}  # fmt: skip
MODEL_METRIC = re.compile(r"train/([a-z][a-z0-9_]{0,40})(?:/([0-9]{1,5}))?")  # "expert_load/2": of layer 2
PART = re.compile(r"val/loss/([0-9]{1,5})")  # the loss on one of several validation files
STANDARD = (
    "train/loss", "val/loss", "val/accuracy", "train/lr", "train/flops_per_second",
    "train/tokens_per_second", "train/step_seconds", "val/bpb",
)  # fmt: skip
SAVED = re.compile(r"(?:.*[/\\])?([a-z]+)_(.{1,200})_step_[0-9]+\.pt")  # <task>_<run>_step_<N>.pt
NAME = re.compile(r"\S.{0,199}")

# The original Nano wrote, over the years: "Epoch-Step: 0-10", "Step: 10", "Iteration #10";
# "Loss: 3.2", "Loss 3.2", "Train loss = 3.2"; "Val_loss: 3.2", "Val loss 3.2".
NUMBER = f"({DECIMAL})" + r"(?!\.?\w)"
STEP = re.compile(r"(?:Epoch-Step: *[0-9]{1,12}-|Step: *|[Ii]teration #)([0-9]{1,12})\b")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
TRAIN_LOSS = re.compile(r"(?:\bLoss:?|Train loss =) *" + NUMBER)
VAL_LOSS = re.compile(r"Val[_ ]loss:? *" + NUMBER)
SPEED = re.compile(r"(?<![0-9.])" + NUMBER + r" ([GT]FLOP(?:/s|S))")


# ---- lines ---------------------------------------------------------------------------------------------


def parse_line(line: str) -> dict[str, Any] | None:
    """The event in a line, as common/metrics.py describes it; None if the line holds none."""
    try:
        if line.startswith("{"):
            return dict(json.loads(line))
        # The header of a readable log may follow half a line, or zeros that a power cut left behind.
        if (at := line.find("# {")) >= 0:
            return {**json.loads(line[at + 2 :]), "event": "start"}
    except (ValueError, TypeError, RecursionError):
        return None
    time, *fields = line.rstrip().split(" | ")
    kinds = ("Train", "Val", "Save", "Task")
    if len(fields) > 2 and fields[0] in kinds and fields[1].startswith("Epoch-Step: "):
        return parse_readable(time[-19:], *fields)
    return parse_original(line) if len(line) < 1000 else None


def parse_readable(time: str, event: str, position: str, *fields: str) -> dict[str, Any]:
    """The event in the fields of a readable log."""
    event, step = event.lower(), position.removeprefix("Epoch-Step: ").partition("-")[2]
    number = int(step) if step.isascii() and step.isdigit() and len(step) <= 12 else None
    head = {"event": event, "time": time, "step": number}
    if event == "save":
        return {**head, "path": fields[0]}
    metrics: dict[str, Any] = {"task": fields[0]} if event == "task" else {}
    for title, text in dict(field.partition(": ")[::2] for field in fields).items():
        if (found := VALUE.match(text)) and found[2] in UNITS:
            metrics[name_of(event, title)] = float(found[1]) * UNITS[found[2]]
    return {**metrics, **head}


def parse_original(line: str) -> dict[str, Any] | None:
    """The event in a line of the original Nano's logs."""
    step, validation = STEP.search(line), VAL_LOSS.search(line)
    loss = validation or TRAIN_LOSS.search(line)
    if not step or not loss:
        return None
    event: dict[str, Any] = {"event": "val" if validation else "train", "step": int(step[1])}
    event["loss"] = float(loss[1])
    if speed := SPEED.search(line):
        event["flops_per_second"] = float(speed[1]) * UNITS[speed[2]]
    if found := TIME.search(line):
        event["time"] = found[0]
    return event


def to_float(value: object) -> float | None:
    """A number of an event as a float, with null as NaN; None if it is no number."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def to_count(value: object) -> int:
    """A count from a header; 0 for anything else."""
    return value if type(value) is int and 0 <= value <= 10**15 else 0


def timestamp(text: str) -> float | None:
    """Seconds since 1970 for a time in a log; times without a zone are local. None if it is no time."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def is_finite(loss: Any) -> Any:
    """False for NaN, infinity and what is about to become infinite. Takes a number or an array."""
    return abs(loss) < 1e30


# ---- runs ----------------------------------------------------------------------------------------------


class Run:
    """The curves of one run, which may have been started several times and logged in several files.

    curves: {name: list of (step, value)}, where a name is an event and a metric of it, as in "train/loss",
    "val/accuracy", "val/loss/0" (of the first of several validation files), "train/expert_load/2" (one of
    the model's own numbers, of layer 2), or "task/score/arithmetic" (the score on a task).
    base_rates: {task: the score of a model that knows nothing}
    """

    def __init__(self, path: Path, label: str) -> None:
        self.paths, self.label = [path], label
        self.header: dict[str, Any] = {}
        self.starts: list[int] = []  # for each start, the step it went on from
        self.origin: dict[str, Any] = {}  # of a branch: {"run": name, "step": where it leaves that run}
        self.curves: collections.defaultdict[str, Points] = collections.defaultdict(list)
        self.n_points, self.n_train_events, self.every = 0, 0, 1
        self.saved: set[tuple[str, ...]] = set()  # (task, run) in the names of its checkpoints
        self.base_rates: dict[str, float] = {}
        self.names: set[str] = set()  # of the model's own numbers
        self.left_out = False  # whether it has more of them than a chart has room for
        self.began = self.first_time = self.last_time = ""  # first_time: of the last start
        self.seconds = 0.0  # of the starts before the last one
        self.joules: list[float | None] = []  # of each start
        self.commands: list[str] = []  # the commands of the starts

    @property
    def train(self) -> Points:
        return self.curves["train/loss"]

    @property
    def val(self) -> Points:
        return self.curves["val/loss"]

    @property
    def model_metrics(self) -> dict[str, dict[int | None, Points]]:
        """{name: {layer or None: list of (step, value)}}, the model's own numbers."""
        found: dict[str, dict[int | None, Points]] = {}
        for curve, points in self.curves.items():
            if points and curve not in STANDARD and (match := MODEL_METRIC.fullmatch(curve)):
                found.setdefault(match[1], {})[int(match[2]) if match[2] else None] = points
        return found

    def scores(self, metric: str = "score") -> dict[str, Points]:
        """{task: its scores, or its perplexities}; "validation" is the accuracy of a toy problem."""
        start = f"task/{metric}/"
        curves = {name.removeprefix(start): p for name, p in self.curves.items() if name.startswith(start)}
        accuracy = self.curves.get("val/accuracy")
        if metric == "score" and accuracy:
            curves = {"validation": accuracy, **curves}
        return {name: points for name, points in curves.items() if points}

    @property
    def parts(self) -> dict[int, Points]:
        """{i: validation losses on the i-th file}, if there are several."""
        matches = [(PART.fullmatch(curve), points) for curve, points in self.curves.items()]
        return {int(match[1]): points for match, points in matches if match and points}

    @property
    def part_names(self) -> dict[int, str]:
        """{i: name of the i-th validation file or task}, from the header if it has them."""
        with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
            parts = self.header["train_config"]["dataset_path"]
            # A part is a pair of paths, or in a mixture {"path": such a pair or null, "task": ...}.
            pairs = [part["path"] if isinstance(part, dict) else part for part in parts]
            last = [pair[1] if pair else part["task"] for pair, part in zip(pairs, parts, strict=True)]
            files = dict.fromkeys(re.split(r"[/\\]", path)[-1] for path in last)
            names = (file.removesuffix(".bin")[:40] for file in files)
            return dict(zip(sorted(self.parts), names, strict=True))
        return {i: f"file {i}" for i in self.parts}

    @property
    def key(self) -> tuple[str, ...] | None:
        """(task, name), which identifies the run across files; None if its logs do not say."""
        name = self.header.get("run")
        if isinstance(name, str) and NAME.fullmatch(name):
            return str(self.header.get("task")), name
        return next(iter(self.saved)) if self.starts and len(self.saved) == 1 else None

    @property
    def since(self) -> int:
        """The step after which these logs begin."""
        return min(self.starts, default=0)

    @property
    def has_begun(self) -> bool:
        return bool(self.starts or self.n_points)

    def start(self, header: dict[str, Any]) -> None:
        """The run was started again, from a step: later steps logged so far are superseded."""
        step = to_count(header.get("resumed_from_step"))
        self.header = header
        self.starts.append(step)
        if isinstance(origin := header.get("branched_from"), dict):
            self.origin = origin
        if isinstance(command := header.get("command"), str) and len(self.commands) < COMMANDS:
            self.commands.append(command)
        self.joules.append(None)
        began = header.get("time")
        self.seconds += self.span
        self.first_time = self.last_time = began if isinstance(began, str) and len(began) < 40 else ""
        self.cut(step)

    def cut(self, step: int) -> None:
        """Drop all points after this step."""
        for points in self.curves.values():
            while points and points[-1][0] > step:
                points.pop()
                self.n_points -= 1

    def take(self, event: dict[str, Any]) -> None:
        """Take in a training step, a validation or a checkpoint."""
        kind, step = event.get("event"), event.get("step")
        if kind == "save" and len(self.saved) < 2 and (saved := SAVED.fullmatch(str(event.get("path")))):
            self.saved.add(saved.groups())
        if kind not in ("train", "val", "task") or type(step) is not int or not 0 <= step < 10**12:
            return
        if isinstance(when := event.get("time"), str) and len(when) < 40:
            self.began = self.began or when
            self.first_time, self.last_time = self.first_time or when, when
        if kind == "task":
            self.take_score(event, step)
            return
        numbers = {f"{kind}/{name}": to_float(value) for name, value in event.items()
                   if name not in ("event", "time", "epoch", "step")}  # fmt: skip
        if numbers.get(f"{kind}/loss") is None:
            return
        if kind == "train":
            if self.joules:  # the machine may stop to tell
                self.joules[-1] = numbers.get("train/energy_joules")
            self.n_train_events += 1
            if (self.n_train_events - 1) % self.every:
                return
        for curve, number in numbers.items():
            if number is not None and self.has_room(curve):
                self.curves[curve].append((step, number))
                self.n_points += 1
        if self.n_points > POINTS:
            self.every *= 2
            for points in self.curves.values():
                del points[1::2]
            self.n_points = sum(map(len, self.curves.values()))

    def take_score(self, event: dict[str, Any], step: int) -> None:
        """Take in the score on a task."""
        task, base_rate = str(event.get("task"))[:200], to_float(event.get("base_rate"))
        for metric in ("score", "perplexity"):
            number, curve = to_float(event.get(metric)), f"task/{metric}/{task}"
            if metric not in event or number is None:
                continue
            if not self.curves.get(curve) and len(self.scores(metric)) >= TASKS:
                self.left_out = True
                return
            self.curves[curve].append((step, number))
            self.n_points += 1
            if base_rate is not None and is_finite(base_rate):
                self.base_rates[task] = base_rate

    def has_room(self, curve: str) -> bool:
        """Whether to draw this curve: a standard one, or one of the model's own unless there are too many."""
        if curve in STANDARD or curve in self.curves:
            return True
        event, _, name = curve.partition("/")
        match = MODEL_METRIC.fullmatch(curve)
        if name in FIELDS[event] or not (match or PART.fullmatch(curve)):
            return False
        names = self.names | {match[1]} if match else self.names
        if len(names) > NAMES or len(self.curves) > CURVES:
            self.left_out = True
            return False
        self.names = names
        return True

    def with_metrics(self, exact: Run) -> Run:
        """This run of a readable log, with the numbers of its metrics file wherever it has them."""
        run = copy.copy(self)
        run.curves = collections.defaultdict(list, self.curves)
        for name, points in exact.curves.items():
            run.curves[name] = sorted({**dict(self.curves.get(name, ())), **dict(points)}.items())
        run.base_rates = {**self.base_rates, **exact.base_rates}
        if len(exact.starts) == len(self.starts):  # only the metrics file says when they began
            run.joules, run.seconds, run.first_time = exact.joules, exact.seconds, exact.first_time
            run.last_time = exact.last_time
        run.left_out = self.left_out or exact.left_out
        return run

    @property
    def span(self) -> float:
        """Seconds from the first to the last event of the last start."""
        first, last = timestamp(self.first_time), timestamp(self.last_time)
        return max(0.0, last - first) if first is not None and last is not None else 0.0

    @property
    def energy(self) -> float | None:
        """Joules of all starts; None if one of them does not tell."""
        known = [joules for joules in self.joules if joules is not None]
        return sum(known) if known and len(known) == len(self.joules) else None

    def total(self, rate: str | None = None) -> float | None:
        """Seconds of training or, with a rate such as "flops_per_second", how much that was in all.

        Counts each step once, and neither validations nor saving. None if it was not logged.
        """
        rates = dict(self.curves[f"train/{rate}"]) if rate else {}
        total, last = 0.0, self.since
        for step, seconds in self.curves["train/step_seconds"]:
            total += (step - last) * seconds * (rates.get(step, math.nan) if rate else 1)
            last = step
        return total if last > self.since and math.isfinite(total) else None

    @property
    def is_drawable(self) -> bool:
        return any(is_finite(loss) for _, loss in self.train)

    @property
    def task(self) -> str | None:
        task = self.header.get("task")
        if not isinstance(task, str) or not NAME.fullmatch(task):
            return None
        return {"pretrain": "Pretraining", "sft": "Supervised fine-tuning"}.get(task, task[:40].capitalize())

    @property
    def summary(self) -> str:
        """The line under the title: files, size of the model, steps, starts, duration."""
        names = [path.name if len(path.name) <= 60 else f"{path.name[:59]}…" for path in self.paths]
        facts = [", ".join(names[:2]) + f" and {len(names) - 2} more" * (len(names) > 2)]
        if 0 < (n := to_count(self.header.get("n_params"))):
            facts.append(f"{n / 1e6:.3g} M parameters" if n >= 1e6 else f"{n:,} parameters")
        last = max(step for step, _ in self.train)
        facts.append(f"steps {self.since + 1:,} to {last:,}" if 0 < self.since < last else f"{last:,} steps")
        if isinstance(origin := self.origin.get("run"), str) and NAME.fullmatch(origin):
            facts.append(f"branched from {origin[:60]}")
        if len(self.starts) > 1:
            facts.append(f"{len(self.starts):,} starts")
        if seconds := self.seconds + self.span:
            facts.append(duration(seconds))
        return "  ·  ".join(facts)


def merge_runs(logs: Sequence[Log]) -> list[Run]:
    """The drawable runs in these logs. What several logs hold of the same run is put together."""
    pieces: dict[object, list[Run]] = {}
    for piece in (piece for log in logs for piece in log.runs if piece.is_drawable):
        pieces.setdefault(piece.key or id(piece), []).append(piece)
    return [merge_pieces(several) if len(several) > 1 else several[0] for several in pieces.values()]


def merge_pieces(pieces: list[Run]) -> Run:
    """One run from the pieces of it in several files: a later piece supersedes the steps it did again."""
    pieces = sorted(pieces, key=lambda piece: timestamp(piece.began) or 0.0)
    merged = Run(pieces[0].paths[0], pieces[0].label)
    for piece in pieces:
        merged.cut(piece.since)
        for name, points in piece.curves.items():
            merged.curves[name] += points
        merged.base_rates |= piece.base_rates
        merged.starts += piece.starts
        merged.joules += piece.joules
        merged.commands += piece.commands
        merged.seconds += piece.seconds + piece.span
    merged.header = pieces[-1].header
    merged.origin = next((piece.origin for piece in pieces if piece.origin), {})
    merged.paths = [piece.paths[0] for piece in pieces]
    return merged


# ---- logs ----------------------------------------------------------------------------------------------


def label_of(path: Path) -> str:
    return path.name.removesuffix(METRICS_SUFFIX) if path.name.endswith(METRICS_SUFFIX) else path.stem


class LogFile:
    """One file, read as far as it has been written.

    It holds one run with all its starts, or several runs if somebody put logs together in a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restart()

    def restart(self) -> None:
        self.runs = [Run(self.path, label_of(self.path))]
        self.offset, self.n_runs, self.n_lines, self.n_too_long = 0, 1, 0, 0
        self.skips = False  # whether it is in the middle of a line that is too long
        self.n_damaged = self.first_damaged = 0  # lines of a metrics file that are no JSON

    def read(self) -> bool:
        """Take in the lines added since the last call; True if there were any."""
        size = self.path.stat().st_size
        if size < self.offset:
            self.restart()
        before = self.offset
        if size - before > LARGE:
            print(f"reading {self.path}, {size >> 20:,} MB", file=sys.stderr)
        with open(self.path, "rb") as file:
            file.seek(before)
            while line := file.readline(LINE):
                is_complete = line.endswith(b"\n")
                if not is_complete and len(line) < LINE and not self.skips:
                    break
                self.offset += len(line)
                self.n_lines += is_complete
                if is_complete and not self.skips:
                    self.take(line.decode("utf-8", "replace"))
                self.n_too_long += not is_complete and not self.skips
                self.skips = not is_complete
        return self.offset > before

    def take(self, line: str) -> None:
        """Take in one line."""
        event = parse_line(line)
        if event is None:
            if self.path.suffix == ".jsonl":
                self.n_damaged += 1
                self.first_damaged = self.first_damaged or self.n_lines
        elif event.get("event") == "start":
            self.start(event)
        else:
            self.runs[-1].take(event)

    def start(self, header: dict[str, Any]) -> None:
        """A header: of the same run, or of the next one."""
        last = self.runs[-1]
        if last.has_begun and header.get("format") != "nano-log":
            return
        if last.has_begun and not (header.get("run") and header.get("run") == last.header.get("run")):
            self.n_runs += 1
            last = Run(self.path, f"{label_of(self.path)} ({self.n_runs})")
            self.runs = [*self.runs[1 - RUNS :], last]
        last.start(header)

    def notices(self) -> Iterator[str]:
        """What of the file is not drawn, in sentences."""
        if self.n_runs > RUNS:
            yield f"{self.path} holds {self.n_runs:,} runs; the last {RUNS} are drawn"
        if self.n_too_long:
            yield f"{self.path}: lines of more than {LINE >> 20} MB are passed over: {self.n_too_long:,}"
        if self.n_damaged:
            where = f"the first one is line {self.first_damaged:,}"
            yield f"{self.path}: damaged lines are passed over: {self.n_damaged:,}; {where}"


class Log:
    """A log: a readable log, a metrics file, or a readable log with its metrics file beside it.

    Where there are both, the readable log tells how the run was started and resumed, and the metrics file
    has the numbers. Steps that the metrics file lacks, because an earlier version logged them or the file was
    damaged, keep the numbers of the readable log. If the files do not tell of the same starts, the metrics
    file is ignored, and `notices` says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = LogFile(path)
        self.metrics = LogFile(path.with_suffix(METRICS_SUFFIX)) if path.suffix == ".log" else None
        self.runs, self.ignores_metrics = self.file.runs, False

    @property
    def run(self) -> Run:
        """The last run in it."""
        return self.runs[-1]

    def read(self) -> bool:
        """Take in the lines added since the last call; True if there were any."""
        has_changed = self.file.read()
        self.runs, self.ignores_metrics = self.file.runs, False
        if not self.metrics or not self.metrics.path.is_file():
            return has_changed
        has_changed |= self.metrics.read()
        last, exact = self.run, self.metrics.runs[-1]
        n = min(len(last.starts), len(exact.starts))
        if not last.has_begun:
            self.runs = self.metrics.runs
        elif n and last.key == exact.key and last.starts[-n:] == exact.starts[-n:]:
            merged = exact if len(exact.starts) > n else last.with_metrics(exact)
            self.runs = [*self.runs[:-1], merged]
        else:
            self.ignores_metrics = exact.has_begun
        return has_changed

    @property
    def is_drawable(self) -> bool:
        return any(run.is_drawable for run in self.runs)

    @property
    def is_waiting(self) -> bool:
        """Whether train.py may just have created it."""
        return not self.run.train and (not self.file.offset or "train_config" in self.run.header)

    def check(self) -> None:
        """Raises UserError if there is nothing to draw."""
        if self.is_drawable:
            return
        if self.run.train:
            raise UserError(f"{self.path}: every loss is NaN or infinite, there is nothing to draw")
        if self.is_waiting:
            raise UserError(f"{self.path} holds no training step yet; --follow waits for the first one")
        raise UserError(f"{self.path} is not a training log: no line in it is a training step")

    def notices(self) -> Iterator[str]:
        """What of the log is not drawn, in sentences."""
        for run in self.runs:
            if lost := sum(not is_finite(loss) for _, loss in run.train):
                yield f"{run.label}: {lost:,} of {len(run.train):,} losses NaN or infinite"
            if run.every > 1:
                yield f"{run.label}: one of {run.every} of its {run.n_train_events:,} training steps is drawn"
            if run.left_out:
                yield f"{run.label}: it logs more than a chart has room for; the first are drawn"
        yield from self.file.notices()
        if self.metrics:
            yield from self.metrics.notices()
            if self.ignores_metrics:
                yield f"{self.metrics.path} does not match {self.path}; the numbers of the latter are drawn"
