"""The run's log file, and what the person in front of it sees.

The file train_<run>.log begins with one line that a program can read, "# " and a JSON object;
then comes one line an event, of fields joined by " | ". A run that is resumed goes on in its log, with
another such first line. In a terminal a single progress line moves instead of the Train lines; elsewhere
(a pipe, nohup, systemd) the same lines are printed plainly. With the key "tensorboard" all numbers go to
runs/train_<run> as well.
"""

import errno
import json
import os
import re
import signal
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common import errors
from common.config import ROOT
from common.errors import UserError
from common.files import LineFile

NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|-?inf|nan)(?:%| \S+)?")  # and its unit
muted = False  # see `mute`


def duration(seconds):
    """Seconds in words: '52 s', '3 min 20 s', '2 h 05 min', '3 d 4 h'."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 1:
        return f"{seconds} s"
    if hours < 1:
        return f"{minutes} min {seconds % 60:02d} s"
    return f"{hours} h {minutes % 60:02d} min" if days < 1 else f"{days} d {hours % 24} h"


class Outlet:
    """Standard output or standard errors of a run, which does not break off when nobody reads them any more.

    A terminal may have been closed: the log file has all. A program that is piped to and leaves (`| head`)
    is a wish to end after the step, as SIGHUP is; what is still to be said then goes to standard errors.
    """

    def __init__(self, stream):
        self.stream = stream
        self.others = [sys.stderr.fileno, lambda: os.open(os.devnull, os.O_WRONLY)][stream is sys.stderr :]

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, do, *args):
        try:
            return do(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) or not self.others:
                raise
            os.dup2(self.others.pop(0)(), self.stream.fileno())
            if error.errno == errno.EPIPE:
                signal.raise_signal(getattr(signal, "SIGHUP", signal.SIGTERM))
            self.flush()  # what could not be written is still there


class RunLog:
    """Writes events to the log file and shows them. A context manager, for the sake of what it shows."""

    def __init__(self, run, header, total_steps, first_step):
        self.path = ROOT / f"train_{run}.log"
        self.file = self._open()
        header = {"format": "nano-log", "version": 1, **header}
        self.file.write("# " + json.dumps(header, ensure_ascii=False) + "\n")
        self.tensorboard = None
        if header.get("train_config", {}).get("tensorboard") and not muted:
            self.tensorboard = self._tensorboard(first_step)
        self.console = Console(highlight=False)
        self.progress = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20),
                TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), console=self.console,
            )  # fmt: skip
            self.bar = self.progress.add_task("", total=total_steps or None, completed=first_step, facts="")

    def _open(self):
        return open(os.devnull, "w", encoding="utf-8") if muted else LineFile(self.path)

    def _tensorboard(self, first_step):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard is true, but the package is missing: pip install tensorboard, or set it to false"
            ) from None
        # What a killed process has noted of later steps is noted again.
        return SummaryWriter(ROOT / "runs" / self.path.stem, purge_step=first_step + 1)

    def __enter__(self):
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(Outlet, self.streams)
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_):
        if self.progress:
            self.progress.stop()
        sys.stdout, sys.stderr = self.streams
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()

    def event(self, kind, position, fields):
        """One line: kind 'Train', 'Val', 'Save', ...; position (epoch, step); fields name -> text."""
        parts = [time.strftime("%Y-%m-%d %H:%M:%S"), kind, f"Epoch-Step: {position[0]}-{position[1]}"]
        line = " | ".join(parts + [f"{name}: {text}" if name else text for name, text in fields.items()])
        self.file.write(line + "\n")
        if self.tensorboard:
            for name, text in fields.items():
                if name != "Remaining" and (number := NUMBER.fullmatch(text)):
                    self.tensorboard.add_scalar(f"{kind}/{name}", float(number[1]), position[1])
        if kind == "Train" and self.progress:
            names = ("Loss", "LR", "Speed", "Tokens/s", "Remaining")
            facts = "  ".join(f"{name.lower()} {fields[name]}" for name in names if name in fields)
            self.progress.update(self.bar, completed=position[1], facts=facts)
        else:
            self.say(line)

    def say(self, line):
        """A line for the person only."""
        if self.progress:
            self.progress.console.print(line, markup=False)
        else:
            print(line, flush=True)


def notice(line):
    """Something the user should know that is no error; not part of a program's output."""
    if not muted:
        print(line, file=sys.stderr)


def mute():
    """Of several processes only one should talk and write: not this one. Errors are told, if it does not."""
    global muted
    muted, errors.exit_delay = True, 5.0
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
