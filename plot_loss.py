"""Charts from training logs: loss, validation loss, learning rate, speed, and what a model has to watch.

Reads the logs that train.py writes and those of the original Nano. Both are lines of fields
joined by " | "; a line that is neither a training nor a validation step is passed over, so is
a last line that is still being written.

A picture has one column per task (a pretraining step and an SFT step are different things),
in which the runs of that task lie over each other. A run that was stopped and resumed is one
curve: what was trained twice is drawn as it was trained last.
"""

import argparse
import collections
import contextlib
import io
import json
import logging
import re
import sys
import textwrap
import time
import warnings
from datetime import datetime
from pathlib import Path

from common.errors import UserError, describe_os_error, run
from common.files import atomic_write

ROOT = Path(__file__).resolve().parent
FORMATS = ("png", "pdf", "svg", "jpg")
EXAMPLES = """examples:
  python plot_loss.py                                  newest log; a PNG beside it where there is no display
  python plot_loss.py -n train_20260102_030405.log -o loss.png
  python plot_loss.py -n pretrain.log sft.log -o both.svg
  python plot_loss.py -n train_20260102_030405.log --follow
"""

# What is read takes time in proportion to its length, and no more memory than this allows.
LINE = 1 << 20  # bytes; a longer line is passed over
LARGE = 100 << 20  # bytes; they take some seconds to read
POINTS = 1_000_000  # of a run; beyond it, every second of its lines is left out
RUNS = 16  # in one file
NAMES, CURVES = 12, 256  # that a model gives to watch; and with all layers
KEYS = 30  # lines of a legend

# The fields of our lines.
DECIMAL = r"[-+]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?(?:[eE][-+]?[0-9]{1,3})?|(?i:nan|inf))"
VALUE = re.compile(DECIMAL + "(?![^ %])")
WATCHED = re.compile(r"([a-z][a-z0-9_]{0,40})(?:/([0-9]{1,5}))?")  # "expert_load/2": of layer 2
PART = re.compile(r"Loss/([0-9]{1,5})")  # "Loss/0": of the first of several validation files
SAVED = re.compile(r"(?:.*[/\\])?([a-z]+)_(.{1,200})_step_[0-9]+\.pt")  # <task>_<run>_step_<N>.pt
NAME = re.compile(r"\S.{0,199}")
FLOPS = {"GFLOP/s": 1e9, "TFLOP/s": 1e12, "GFLOPS": 1e9, "TFLOPS": 1e12}

# The original Nano wrote, over the years: "Epoch-Step: 0-10", "Step: 10", "Iteration #10";
# "Loss: 3.2", "Loss 3.2", "Train loss = 3.2"; "Val_loss: 3.2", "Val loss 3.2".
NUMBER = f"({DECIMAL})" + r"(?!\.?\w)"
STEP = re.compile(r"(?:Epoch-Step: *[0-9]{1,12}-|Step: *|[Ii]teration #)([0-9]{1,12})\b")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
TRAIN_LOSS = re.compile(r"(?:\bLoss:?|Train loss =) *" + NUMBER)
VAL_LOSS = re.compile(r"Val[_ ]loss:? *" + NUMBER)
SPEED = re.compile(r"(?<![0-9.])" + NUMBER + r" ([GT]FLOP(?:/s|S))")
BLUE, ORANGE, INK, GREY = "#2563eb", "#e8590c", "#1f2933", "#7b8794"
PALETTE = (BLUE, ORANGE, "#0f9d72", "#9333ea", "#d6336c", "#8a6d3b", "#0891b2", "#64748b")


CHINESE = {
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti TC",
}  # fmt: skip


def is_number(loss):
    """False for NaN, infinity and what is about to become infinite."""
    return abs(loss) < 1e30


class Run:
    """The curves of one run, which may have been started several times, and logged in several files.

    curves: {name: list of (step, value)}. The names are train, val, accuracy (in percent), rate and speed
    (in FLOP/s), ("Loss", i) for the i-th of several validation files, and (name, layer or None) for what the
    model gives to watch.
    """

    def __init__(self, path, label):
        self.paths, self.label = [path], label
        self.header, self.starts, self.since = {}, 0, 0
        self.origin = {}  # of a branch: {"run": name, "step": where it leaves that run}
        self.curves = collections.defaultdict(list)
        self.points, self.lines, self.every = 0, 0, 1
        self.saved, self.left_out = set(), False
        self.began, self.first_time, self.last_time = "", None, None
        self.seconds = 0.0  # of the starts before this one

    train, val, accuracy, rate, speed = (
        property(lambda self, name=name: self.curves[name])
        for name in ("train", "val", "accuracy", "rate", "speed")
    )

    @property
    def watched(self):
        """{name: {layer, or None: list of (step, value)}}"""
        found = {}
        for key, points in self.curves.items():
            if isinstance(key, tuple) and key[0] != "Loss" and points:
                found.setdefault(key[0], {})[key[1]] = points
        return found

    @property
    def parts(self):
        """{i: validation losses of the i-th file, where there are several}"""
        return {key[1]: points for key, points in self.curves.items() if key[0] == "Loss" and points}

    @property
    def part_names(self):
        """{i: name of the i-th validation file}, as far as the header tells"""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            pairs = self.header["train_config"]["dataset_path"]
            files = dict.fromkeys(re.split(r"[/\\]", path)[-1] for _, path in pairs)
            names = (file.removesuffix(".bin")[:40] for file in files)
            return dict(zip(sorted(self.parts), names, strict=True))
        return {i: f"file {i}" for i in self.parts}

    @property
    def key(self):
        """(task, name), by which a run is known in several files; None if its logs do not tell."""
        name = self.header.get("run")
        if isinstance(name, str) and NAME.fullmatch(name):
            return str(self.header.get("task")), name
        return next(iter(self.saved)) if self.starts and len(self.saved) == 1 else None

    def start(self, header):
        """It is started once more, from a step: what was logged of later steps is superseded."""
        step = count(header.get("resumed_from_step"))
        self.since = min(self.since, step) if self.starts else step
        self.header, self.starts = header, self.starts + 1
        if isinstance(origin := header.get("branched_from"), dict):
            self.origin = origin
        self.seconds, self.first_time = self.seconds + self.span, None
        self.cut(step)

    def cut(self, step):
        for points in self.curves.values():
            while points and points[-1][0] > step:
                points.pop()
                self.points -= 1

    def add(self, name, step, value):
        if value is None:
            return
        self.curves[name].append((step, value))
        self.points += 1
        if self.points > POINTS:
            self.every *= 2
            for points in self.curves.values():
                del points[1::2]
            self.points = sum(map(len, self.curves.values()))

    def watch(self, name, part, step, value):
        if (name, part) not in self.curves:
            names = {name, *(key[0] for key in self.curves if isinstance(key, tuple))} - {"Loss"}
            if len(names) > NAMES or len(self.curves) > CURVES:
                self.left_out = True
                return
        self.add((name, part), step, value)

    def is_next(self):
        """Whether this line of training is one to draw."""
        self.lines += 1
        return not (self.lines - 1) % self.every

    def saw(self, when):
        self.began = self.began or when
        self.first_time, self.last_time = self.first_time or when, when

    @property
    def span(self):
        """Seconds from the first line of this start to its last."""
        try:
            first, last = (
                datetime.strptime(at, "%Y-%m-%d %H:%M:%S") for at in (self.first_time, self.last_time)
            )
            return max(0.0, (last - first).total_seconds())
        except (TypeError, ValueError):
            return 0.0

    @property
    def drawable(self):
        return any(is_number(loss) for _, loss in self.train)

    @property
    def task(self):
        task = self.header.get("task")
        if not isinstance(task, str) or not NAME.fullmatch(task):
            return None
        return {"pretrain": "Pretraining", "sft": "Supervised fine-tuning"}.get(task, task[:40].capitalize())

    @property
    def facts(self):
        """The line under the title: file, size of the model, steps, starts, duration."""
        names = [path.name if len(path.name) <= 60 else f"{path.name[:59]}…" for path in self.paths]
        facts = [", ".join(names[:2]) + f" and {len(names) - 2} more" * (len(names) > 2)]
        if 0 < (n := count(self.header.get("n_params"))):
            facts.append(f"{n / 1e6:.3g} M parameters" if n >= 1e6 else f"{n:,} parameters")
        last = max(step for step, _ in self.train)
        facts.append(f"steps {self.since + 1:,} to {last:,}" if 0 < self.since < last else f"{last:,} steps")
        if isinstance(origin := self.origin.get("run"), str) and NAME.fullmatch(origin):
            facts.append(f"branched from {origin[:60]}")
        if self.starts > 1:
            facts.append(f"{self.starts:,} starts")
        if seconds := self.seconds + self.span:
            facts.append(duration(seconds))
        return "  ·  ".join(facts)


class Log:
    """One log file, read as far as it has been written. What is asked of it is asked of the last run in it.

    It holds one run, all starts of it included; several ones if somebody has put logs together in a file.
    """

    def __init__(self, path):
        self.path = path
        self.restart()

    def restart(self):
        self.runs = [Run(self.path, self.path.stem)]
        self.offset, self.n_runs, self.too_long, self.skips = 0, 1, 0, False

    def __getattr__(self, name):
        return getattr(self.runs[-1], name)

    def read(self):
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
                whole = line.endswith(b"\n")
                if not whole and len(line) < LINE and not self.skips:
                    break
                self.offset += len(line)
                if whole and not self.skips:
                    self.take(line.decode("utf-8", "replace"))
                self.too_long += not whole and not self.skips
                self.skips = not whole
        return self.offset > before

    def take(self, line):
        """Take in one line: a header, a training step, a validation, a checkpoint, or nothing of interest."""
        # A header may stand behind half a line of a process that was killed, or what a power cut has left.
        if (at := line.find("# {")) >= 0:
            try:
                return self.start(dict(json.loads(line[at + 2 :])))
            except (ValueError, TypeError, RecursionError):
                return None
        when, *fields = line.rstrip().split(" | ")
        if len(fields) > 2 and fields[0] in ("Train", "Val", "Save") and fields[1].startswith("Epoch-Step: "):
            self.take_ours(when[-19:], *fields)
        elif len(line) < 1000:
            self.take_original(line)

    def start(self, header):
        """A header: of the same run, or of the next one."""
        this = self.runs[-1]
        begun = this.starts or this.points
        if begun and header.get("format") != "nano-log":
            return
        if begun and not (header.get("run") and header.get("run") == this.header.get("run")):
            self.n_runs += 1
            this = Run(self.path, f"{self.path.stem} ({self.n_runs})")
            self.runs = [*self.runs[1 - RUNS :], this]
        this.start(header)

    def take_ours(self, when, kind, step, *fields):
        this, step = self.runs[-1], step.removeprefix("Epoch-Step: ").partition("-")[2]
        if kind == "Save":
            if len(this.saved) < 2 and (saved := SAVED.fullmatch(fields[0])):
                this.saved.add(saved.groups())
            return
        this.saw(when)
        if kind == "Train" and not this.is_next():
            return
        values = dict(field.partition(": ")[::2] for field in fields)
        loss = value(values.get("Loss", ""))
        if loss is None or not (step.isascii() and step.isdigit() and len(step) <= 12):
            return
        step = int(step)
        if kind == "Val":
            this.add("val", step, loss)
            this.add("accuracy", step, value(values.get("Accuracy", "")))
            for name in values:
                if part := PART.fullmatch(name):
                    this.watch("Loss", int(part[1]), step, value(values[name]))
        else:
            this.add("train", step, loss)
            this.add("rate", step, value(values.get("LR", "")))
            for name in values:
                if name[:1].islower() and (watched := WATCHED.fullmatch(name)):
                    layer = int(watched[2]) if watched[2] else None
                    this.watch(watched[1], layer, step, value(values[name]))
            speed, _, unit = values.get("Speed", "").partition(" ")
            if (speed := value(speed)) is not None and unit in FLOPS:
                this.add("speed", step, speed * FLOPS[unit])

    def take_original(self, line):
        this, step = self.runs[-1], STEP.search(line)
        if not step:
            return
        step = int(step[1])
        if found := VAL_LOSS.search(line):
            this.add("val", step, float(found[1]))
        elif found := TRAIN_LOSS.search(line):
            if this.is_next():
                this.add("train", step, float(found[1]))
                if found := SPEED.search(line):
                    this.add("speed", step, float(found[1]) * FLOPS[found[2]])
        else:
            return
        if found := TIME.search(line):
            this.saw(found[0])

    @property
    def drawable(self):
        return any(one.drawable for one in self.runs)

    @property
    def waiting(self):
        """A log that may just have been opened by train.py."""
        return not self.train and (not self.offset or "train_config" in self.header)

    def check(self):
        """UserError unless there is something to draw."""
        if self.drawable:
            return
        if self.train:
            raise UserError(f"{self.path}: every loss is NaN or infinite, there is nothing to draw")
        if self.waiting:
            raise UserError(f"{self.path} holds no training step yet; --follow waits for the first one")
        raise UserError(f"{self.path} is not a training log: no line in it is a training step")

    def notices(self):
        """What of it is not drawn: sentences."""
        for one in self.runs:
            if lost := sum(not is_number(loss) for _, loss in one.train):
                yield f"{one.label}: {lost:,} of {len(one.train):,} losses NaN or infinite"
            if one.every > 1:
                yield f"{one.label}: one of {one.every} of its {one.lines:,} training steps is drawn"
            if one.left_out:
                yield f"{one.label}: more is watched than a picture has room for; the first numbers are drawn"
        if self.n_runs > RUNS:
            yield f"{self.path} holds {self.n_runs:,} runs; the last {RUNS} are drawn"
        if self.too_long:
            yield f"{self.path}: lines of more than {LINE >> 20} MB are passed over: {self.too_long:,}"


def joined(logs):
    """The runs in these logs that can be drawn. What several of them hold of one run is put together."""
    pieces = {}
    for one in (one for log in logs for one in log.runs if one.drawable):
        pieces.setdefault(one.key or id(one), []).append(one)
    return [together(several) if len(several) > 1 else several[0] for several in pieces.values()]


def together(pieces):
    """One run of pieces of it that lie in several files: the later one supersedes what it did anew."""
    pieces = sorted(pieces, key=lambda piece: piece.began)
    whole = Run(pieces[0].paths[0], pieces[0].label)
    for piece in pieces:
        whole.cut(piece.since)
        for name, points in piece.curves.items():
            whole.curves[name] += points
        whole.starts += piece.starts
        whole.seconds += piece.seconds + piece.span
    whole.header, whole.since = pieces[-1].header, min(piece.since for piece in pieces)
    whole.origin = next((piece.origin for piece in pieces if piece.origin), {})
    whole.paths = [piece.paths[0] for piece in pieces]
    return whole


def count(value):
    """A number of things as it stands in a header: 0 for all that is none."""
    return value if type(value) is int and 0 <= value <= 10**15 else 0


def value(text):
    """A number at the start of a field; None if there is none."""
    found = VALUE.match(text)
    return float(found[0]) if found else None


def duration(seconds):
    """170 -> "2 min 50 s", the two largest units."""
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def finite(points):
    """[(step, value), ...] -> steps, values: two float arrays in order of steps, without NaN and infinity."""
    import numpy as np

    points = np.array(points, dtype=float).reshape(-1, 2)
    points = points[is_number(points).all(axis=1)]
    points = points[np.argsort(points[:, 0], kind="stable")]
    return points[:, 0], points[:, 1]


def smooth(values):
    """Moving average over about 3 % of the run; narrower at the start, where the loss falls steeply."""
    import numpy as np

    i, total = np.arange(len(values)), np.concatenate(([0.0], np.cumsum(values)))
    reach = np.minimum(i, len(values) // 64)
    first, end = i - reach, np.minimum(i + reach + 1, len(values))
    return (total[end] - total[first]) / (end - first)


def thin(x, y, bins=1200):
    """At most 2 * bins points that draw the same line: the lowest and the highest of each bin."""
    import numpy as np

    if len(x) <= 2 * bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    return np.repeat(x[edges], 2), np.stack(
        (np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)), axis=1
    ).ravel()


def draw(figure, logs):
    """Draw all logs into a matplotlib Figure: a column per task, a row for each kind of curve."""
    runs = joined(logs)
    # A log of the original Nano names no task: it joins the first column.
    named = [one.task for one in runs if one.task]
    columns = {}
    for one in runs:
        columns.setdefault(one.task or (named[0] if named else "Training"), []).append(one)
    heights = {"train": 4.2, "accuracy": 2.2, "rate": 1.1, "speed": 1.1}
    heights = {name: height for name, height in heights.items() if any(one.curves[name] for one in runs)}
    watched = dict.fromkeys(name for one in runs for name in one.watched)
    heights |= dict.fromkeys(watched, 1.6)
    figure.set_size_inches(9 if len(columns) == 1 else 7 * len(columns), 1.5 + sum(heights.values()))
    figure.set_layout_engine("constrained", h_pad=0.08, hspace=0.02, wspace=0.04, w_pad=0.12)
    grid = figure.subplots(
        len(heights), len(columns), squeeze=False, sharex="col", height_ratios=list(heights.values())
    )
    below = 0
    for (title, group), panels in zip(columns.items(), grid.T, strict=True):
        alone = len(group) == 1
        subtitle = group[0].facts.replace("  ·", "\xa0\xa0·") if alone else f"{len(group)} runs"
        subtitle = textwrap.wrap(subtitle, 90)
        title = title + "\n" * len(subtitle)
        panels[0].set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK)
        place = {"transform": panels[0].transAxes, "fontsize": 9, "color": GREY}
        panels[0].text(0, 1.03, "\n".join(subtitle), **place)
        for name, panel in zip(heights, panels, strict=True):
            if name == "train":
                below = max(below, draw_loss(panel, group))
            elif name in watched:
                draw_watched(panel, group, name)
            else:
                DRAW[name](panel, group)
        for panel in panels:
            dress(panel)
        panels[-1].set_xlabel("step")
    figure.align_ylabels(grid[:, 0])
    if below:
        figure.set_size_inches(9 * len(columns), figure.get_figheight() + 0.18 * below)


def color_of(i, group):
    """Of the i-th run."""
    from matplotlib import colormaps

    return PALETTE[i] if len(group) <= len(PALETTE) else colormaps["turbo"](i / (len(group) - 1))


def draw_loss(panel, group):
    """Each run's loss: thin as logged, thick smoothed, dots for validation. -> lines of legend below it."""
    import numpy as np
    from matplotlib.lines import Line2D

    alone, keys, lows, highs = len(group) == 1, [], [], []
    for i, log in enumerate(group):
        steps, losses = finite(log.train)
        val_steps, val_losses = finite(log.val)
        mean, short = smooth(losses), len(losses) < 64
        color = color_of(i, group)
        dots = {"color": ORANGE if alone else color, "linewidth": 1, "marker": "o", "markersize": 5}
        dots |= {"markeredgecolor": "white", "markeredgewidth": 0.8}
        crowded = {"markersize": 2.5, "markeredgewidth": 0} if len(val_steps) > 60 else {}
        if not short:
            panel.plot(*thin(steps, losses), color=color, linewidth=0.6, alpha=0.28, zorder=2)
        panel.plot(*thin(steps, mean), color=color, linewidth=1.9, marker="o" if short else "", zorder=4)
        panel.plot(*thin(val_steps, val_losses), zorder=5, **(dots | crowded))
        parts = draw_parts(panel, log) if alone else []  # of several runs, one line each is enough
        lows += [mean.min(), *val_losses, np.percentile(losses[len(losses) // 10 :], 1)]
        highs += [mean.max(), *val_losses]

        line = Line2D([], [], color=color, linewidth=1.9)
        train_label = f"training {number(mean[-1])}" + " (smoothed)" * (not short)
        val_label = ""
        if len(val_losses):
            best = val_losses.argmin()
            val_label = f"validation {number(val_losses[-1])}, best {number(val_losses[best])}"
            val_label += f" at step {val_steps[best]:,.0f}"
        if alone:
            keys.append((line, train_label))
            keys += [(Line2D([], [], **dots), val_label)] if val_label else []
            keys += [(part, part.get_label()) for part in parts]
            lows += [min(part.get_ydata()) for part in parts]
            highs += [max(part.get_ydata()) for part in parts]
        else:
            name = log.label.lstrip("_")  # which would keep it out of the legend
            if sum(other.label == log.label for other in group[:KEYS]) > 1:
                name = f"{log.paths[0].absolute().parent.name}/{name}"
            name = name if len(name) <= 48 else f"{name[:30]}…{name[-17:]}"
            keys.append((line, f"{name}: training {number(mean[-1])}" + f", {val_label}" * bool(val_label)))
        lost = [step for step, loss in log.train if not is_number(loss)]
        red = {"color": "#c92a2a", "linewidth": 0.9, "linestyle": "--"}
        for step in lost[:50]:
            panel.axvline(step, zorder=1, **red)
        if lost:
            where = f"step {lost[0]:,}" if len(lost) == 1 else f"{len(lost):,} steps"
            keys.append((Line2D([], [], **red), f"NaN or infinite loss at {where}"))
    if not alone and any(log.val for log in group):
        keys.append((Line2D([], [], **(dots | {"color": GREY})), "validation"))
    low, high = min(lows), max(highs)
    if low > 0 and high / low > 10:  # a loss that falls to nearly nothing shows its end on a log axis only
        panel.set_yscale("log")
        panel.set_ylim(low / 1.15, high * 1.25)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1
        panel.set_ylim(low - margin, high + margin)
    panel.set_ylabel("loss (nats per token)")
    if len(keys) > KEYS:
        keys[KEYS:] = [(Line2D([], [], linestyle=""), f"and {len(keys) - KEYS:,} more")]
    where = {"loc": "best" if short else "upper right", "fontsize": 9}
    below = len(keys) > 6  # in the panel, it would hide curves
    if below:
        where = {"loc": "upper left", "bbox_to_anchor": (0, -0.02), "borderaxespad": 0, "fontsize": 8}
    legend = panel.legend(*zip(*keys, strict=True), **where)
    legend.set_zorder(6)
    legend.get_frame().set(facecolor="white", edgecolor="none", alpha=0.85)
    return below * len(keys)


def draw_parts(panel, log):
    """The validation loss of each file where there are several: thin lines -> the lines."""
    lines = []
    for i, points in sorted(log.parts.items()):
        steps, losses = finite(points)
        if len(losses):
            color, label = PALETTE[2 + i % 6], f"validation of {log.part_names[i]}: {number(losses[-1])}"
            lines += panel.plot(steps, losses, color=color, linewidth=0.9, zorder=3, label=label)
    return lines


def lighter(color, share):
    """The colour with this share of white."""
    from matplotlib.colors import to_rgb

    return [c + (1 - c) * share for c in to_rgb(color)]


def draw_accuracy(panel, group):
    """Share of exact answers at each validation."""
    for i, log in enumerate(group):
        color = ORANGE if len(group) == 1 else color_of(i, group)
        steps, values = finite(log.accuracy)
        panel.plot(*thin(steps, values), color=color, linewidth=1.4, marker="o", markersize=3.5)
        if len(group) == 1 and len(values):
            place = {"xytext": (-4, -14), "textcoords": "offset points", "ha": "right"}
            panel.annotate(f"{values[-1]:.2f} %", (steps[-1], values[-1]), color=INK, fontsize=9, **place)
    panel.set_ylabel("accuracy (%)")
    panel.set_ylim(0, 104)


def draw_rate(panel, group):
    for i, log in enumerate(group):
        panel.plot(*thin(*finite(log.rate)), color=color_of(i, group), linewidth=1.4)
    panel.set_ylabel("learning\nrate")
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="y", nbins=4)


def draw_speed(panel, group):
    import numpy as np

    series = [finite(log.speed) for log in group]
    values = np.concatenate([flops for _, flops in series])
    top = np.percentile(values, 99) if len(values) else 1.0
    unit, name = (1e12, "TFLOP/s") if top >= 1e12 else (1e9, "GFLOP/s")
    for i, (steps, flops) in enumerate(series):
        color = color_of(i, group)
        panel.plot(*thin(steps, flops / unit), color=color, linewidth=0.6, alpha=0.28)
        panel.plot(*thin(steps, smooth(flops / unit)), color=color, linewidth=1.4)
    panel.set_ylabel(f"speed\n({name})")
    panel.set_ylim(0, 1.15 * top / unit or 1)
    panel.locator_params(axis="y", nbins=3)


def draw_watched(panel, group, name):
    """One of the model's own numbers: a line, or one for each layer that has it, the deeper the lighter."""
    for i, log in enumerate(group):
        curves = log.watched.get(name, {})
        for k, (layer, points) in enumerate(curves.items()):
            color = lighter(color_of(i, group), 0.6 * k / len(curves))
            steps, values = finite(points)
            tells = layer is not None and len(group) == 1 and (len(curves) <= 8 or k in (0, len(curves) - 1))
            label = f"layer {layer}" if tells else None
            panel.plot(*thin(steps, smooth(values)), color=color, linewidth=1.2, label=label)
    low, high = panel.get_ylim()
    if high - low < 1e-6 * max(abs(low), abs(high)):  # a constant, but for the rounding of `smooth`
        panel.set_ylim(0.9 * low, 1.1 * high)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8, frameon=False, ncols=4)
    panel.set_ylabel(name.replace("_", "\n", 1).replace("_", " "))
    panel.locator_params(axis="y", nbins=4)


DRAW = {"accuracy": draw_accuracy, "rate": draw_rate, "speed": draw_speed}


def dress(panel):
    """The look that all panels share."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#cbd2d9")
    panel.grid(color="#e4e7eb", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=GREY, labelsize=9, length=3, color="#cbd2d9")
    panel.xaxis.label.set_color(INK)
    panel.yaxis.label.set_color(INK)
    panel.margins(x=0.015)
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x)))
    if panel.get_yscale() == "log":
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.6g}"))


def short_count(steps):
    """9,000 -> "9,000"; 25_000 -> "25k"; 1_250_000 -> "1.25M"; there are also G and T."""
    power = 0 if abs(steps) < 10_000 else min(4, int(len(f"{abs(steps):.0f}") - 1) // 3)
    return f"{steps:,.0f}" if not power else f"{steps / 1000**power:.6g}{' kMGT'[power]}"


def number(loss):
    """Four significant digits: 3.214, 0.01234."""
    return f"{loss:#.4g}"


def prepare_matplotlib():
    """Fonts for Chinese file names, file names free of formulas. True if the system has such a font."""
    try:
        import matplotlib
    except ValueError as error:  # of MPLBACKEND or a matplotlibrc
        raise UserError(f"matplotlib does not start: {error}") from None
    from matplotlib import font_manager

    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a Chinese font may have one weight
    fonts = font_manager.fontManager
    if not (chinese := CHINESE & {font.name for font in fonts.ttflist}):
        listed = {font.fname for font in fonts.ttflist}  # on the day matplotlib was first used
        for path in {*font_manager.findSystemFonts()} - listed:
            with contextlib.suppress(OSError, RuntimeError):
                fonts.addfont(path)
        chinese = CHINESE & {font.name for font in fonts.ttflist}
    matplotlib.rcParams.update(
        {
            "font.family": ["DejaVu Sans", *sorted(chinese)],
            "text.parse_math": False,
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "savefig.facecolor": "white",
        }
    )
    return bool(chinese)


def save(logs, path):
    """Draw into `path`; a viewer never sees half a picture."""
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, logs)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:].lower())
    with atomic_write(path) as file:
        file.write(picture.getbuffer())


def find_logs(names):
    """Paths of the logs to draw: as given (from here or from the repository), or the newest one."""
    if not names:
        newest = max(ROOT.glob("train_[0-9]*.log"), default=None)  # runs are named in their order
        if newest is None:
            raise UserError(f"there is no train_*.log in {ROOT}; train first, or name a log with -n")
        return [newest]
    paths = []
    for name in names:
        path = next((p for p in (Path(name), ROOT / name) if p.exists()), None)
        if path is None:
            raise UserError(f"there is no file {name}")
        if not path.is_file():
            raise UserError(f"{name} is not a file")
        paths.append(path)
    return paths


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Charts from training logs: loss, validation loss, learning rate and speed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-n", "--name", nargs="+", metavar="LOG", help="logs to draw (default: the newest)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"save as {', '.join(FORMATS)}")
    parser.add_argument("--follow", action="store_true", help="redraw as the log grows, until Ctrl-C")
    arguments = parser.parse_args()
    if output := arguments.output:
        output = arguments.output = output if output.suffix else output.with_name(output.name + ".png")
        if output.suffix[1:].lower() not in FORMATS:
            raise UserError(f"-o {output}: cannot draw {output.suffix}; use one of .{', .'.join(FORMATS)}")
        if not output.parent.is_dir():
            raise UserError(f"-o {output}: there is no folder {output.parent}")
        if output.is_dir():
            raise UserError(f"-o {output} is a folder; name a file")
    return arguments


def main():
    arguments = parse_arguments()
    logs = read([Log(path) for path in find_logs(arguments.name)], arguments.follow)
    if not prepare_matplotlib() and any(letter > "\u2e80" for log in logs for letter in log.path.stem):
        print("warning: no Chinese font was found; install one, fonts-noto-cjk for example", file=sys.stderr)
    output = arguments.output
    if not output:
        from matplotlib import pyplot

        try:
            has_window = pyplot.figure().canvas.required_interactive_framework
        except (ImportError, RuntimeError):  # MPLBACKEND asks for what is not here
            has_window = False
        if not has_window:
            output = logs[0].path.with_suffix(".png")
            print("there is no display here, so the chart becomes a file")
    try:
        if output:
            to_file(logs, output, arguments.follow)
        else:
            to_window(logs, pyplot, arguments.follow)
    except KeyboardInterrupt:
        if not arguments.follow:
            raise


def read(logs, follow):
    """Those that can be drawn, or waited for; the others are named. UserError if there are none."""
    good, faults = [], []
    for log in logs:
        try:
            log.read()
            if not (follow and log.waiting):
                log.check()
            good.append(log)
        except UserError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(describe_os_error(error))
    if not good:
        raise UserError(f"none of these {len(logs)} logs can be drawn: " * (len(logs) > 1) + faults[0])
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    for notice in (notice for log in good for notice in log.notices()):
        print(f"warning: {notice}", file=sys.stderr)
    return good


def to_file(logs, output, follow, seconds=5):
    drawn = False
    while True:
        ready = [log for log in logs if log.drawable]
        if ready:
            save(ready, output)
            if not drawn:
                print(f"saved {output}" + ", again at each change until Ctrl-C" * follow, flush=True)
            drawn = True
        if not follow:
            return
        time.sleep(seconds)
        while not any([log.read() for log in logs]):
            time.sleep(seconds)


def to_window(logs, pyplot, follow, seconds=2):
    figure = pyplot.gcf()
    changed = True
    while True:
        ready = [log for log in logs if log.drawable]
        if changed and ready:
            figure.clear()
            draw(figure, ready)
        if not follow:
            pyplot.show()
            return
        pyplot.pause(seconds)
        if not pyplot.fignum_exists(figure.number):
            return
        changed = any([log.read() for log in logs])


if __name__ == "__main__":
    run(main)
