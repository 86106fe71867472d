"""The log files of a run, and what the user sees while it trains.

A run writes two files, one line per event in each. train_<run>.log is for people: its first line is "# "
and a JSON object (command, configuration and machine), all others are fields joined by " | ".
train_<run>.metrics.jsonl holds the same events as JSON objects, with the exact numbers (common/metrics.py).
A run that is resumed appends to both, beginning with the configuration again.

In a terminal a progress bar replaces the Train lines; anywhere else (a pipe, nohup, systemd) they are
printed. With the key "tracker" the numbers also go to a tracker (common/trackers.py).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common import errors
from common.config import ROOT
from common.files import LineFile
from common.metrics import METRICS_SUFFIX, Metric, readable, to_json, tracked
from common.provenance import command, commit

if TYPE_CHECKING:
    from common.trackers import Tracker

muted = False  # see `mute`


class ResilientStream:
    """Standard output or standard error of a run, which survives the loss of its reader.

    If a terminal was closed, output is dropped: the log file has everything. If a program that read from a
    pipe has left (`| head`), the run ends after this step, as it does on SIGHUP, and what is still to be
    said goes to standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.fallbacks: list[Callable[[], int]] = [lambda: os.open(os.devnull, os.O_WRONLY)]
        if stream is not sys.stderr:
            self.fallbacks.insert(0, sys.stderr.fileno)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int | None:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable[..., int | None], *args: str) -> int | None:
        try:
            return function(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) or not self.fallbacks:
                raise
            os.dup2(self.fallbacks.pop(0)(), self.stream.fileno())
            if error.errno == errno.EPIPE:
                signal.raise_signal(getattr(signal, "SIGHUP", signal.SIGTERM))
            self.flush()  # the text that could not be written is still in the buffer
            return None


class RunLog:
    """Writes the events of a run to its log files and shows them. Use it as a context manager.

    header: the configuration and the machine, for the first line. total_steps: 0 if the run has no end.
    first_step: the step that the run starts or resumes from.
    """

    def __init__(self, run: str, header: Mapping[str, Any], total_steps: int, first_step: int) -> None:
        self.path = ROOT / f"train_{run}.log"
        self.tracker_name = header.get("train_config", {}).get("tracker")
        self.tracker: Tracker | None = None
        if self.tracker_name and not muted:  # first, because it may fail: no package, no login
            from common import trackers

            self.tracker = trackers.start(self.tracker_name, run, header, first_step, ROOT, notice)
        header = {"format": "nano-log", "version": 1, "command": command(), "commit": commit(), **header}
        self.file = self._open(self.path)
        self.file.write("# " + json.dumps(header, ensure_ascii=False) + "\n")
        self.metrics_file = self._open(self.path.with_suffix(METRICS_SUFFIX))
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.metrics_file.write(to_json({"event": "start", "time": time, **header}) + "\n")
        self.console = Console(highlight=False)
        self.progress: Progress | None = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20),
                TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), console=self.console,
            )  # fmt: skip
            self.bar = self.progress.add_task("", total=total_steps or None, completed=first_step, facts="")

    def _open(self, path: Path) -> LineFile | TextIO:
        return open(os.devnull, "w", encoding="utf-8") if muted else LineFile(path)

    def _track(self, action: Callable[[Tracker], None]) -> None:
        """Use the tracker, if there is one. When it fails, the run goes on without it."""
        if self.tracker:
            try:
                action(self.tracker)
            except Exception as error:  # of the tracker's own kind: no network, no space, ...
                self.tracker = None
                why = f"{type(error).__name__}: {error}"
                notice(f"the tracker {self.tracker_name} failed ({why}): the run goes on without it")

    def __enter__(self) -> RunLog:
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = ResilientStream(sys.stdout), ResilientStream(sys.stderr)
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
        sys.stdout, sys.stderr = self.streams
        self.file.close()
        self.metrics_file.close()
        self._track(lambda tracker: tracker.close())

    def write(self, event: str, epoch: int, step: int, metrics: Mapping[str, Metric]) -> None:
        """Log one event: "train", "val", "save", "task" or "sample".

        metrics: {name: value} in the order in which the readable log shows them, with numbers in SI units.
        The names in common.metrics.FIELDS are shown as it says there, others under their own names.
        """
        now = datetime.now(timezone.utc)
        head = {"event": event, "time": now.isoformat(timespec="milliseconds"), "epoch": epoch, "step": step}
        fields = readable(event, metrics)
        parts = [f"{now.astimezone():%Y-%m-%d %H:%M:%S}", event.capitalize(), f"Epoch-Step: {epoch}-{step}"]
        line = " | ".join(parts + [f"{title}: {text}" if title else text for title, text in fields.items()])
        self.file.write(line + "\n")
        self.metrics_file.write(to_json({**head, **metrics, **head}) + "\n")  # no metric replaces the head
        if values := tracked(event, metrics):
            self._track(lambda tracker: tracker.log(step, values))
        if event == "train" and self.progress:
            titles = ("Loss", "LR", "Speed", "Tokens/s", "Remaining")
            facts = "  ".join(f"{title.lower()} {fields[title]}" for title in titles if title in fields)
            self.progress.update(self.bar, completed=step, facts=facts)
        else:
            self.say(line)

    def say(self, line: str) -> None:
        """Show a line to the user without logging it."""
        if self.progress:
            self.progress.console.print(line, markup=False)
        else:
            print(line, flush=True)


def notice(line: str) -> None:
    """Tell the user something that is no error. It goes to standard error, as it is not output."""
    if not muted:
        print(line, file=sys.stderr)


def mute() -> None:
    """Silence this process, one of several that train together, so that only the first one talks and writes.

    Errors are still reported, after a pause that gives the first process the chance to report them alone.
    """
    global muted
    muted, errors.exit_delay = True, 5.0
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
