"""Charts from training logs: loss, validation loss, learning rate, speed, and what a model has to watch.

Reads the logs that train.py writes and those of the original Nano. Both are lines of fields
joined by " | "; a line that is neither a training nor a validation step is passed over, so is
a last line that is still being written.

A picture has one column per task (a pretraining step and an SFT step are different things),
in which the runs of that task lie over each other.
"""

import argparse
import io
import json
import re
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path

from engine.errors import UserError, run
from engine.files import whole

ROOT = Path(__file__).resolve().parent
FORMATS = ("png", "pdf", "svg", "jpg")
EXAMPLES = """examples:
  python plot_loss.py                                  newest log; a PNG beside it where there is no display
  python plot_loss.py -n train_20260102_030405.log -o loss.png
  python plot_loss.py -n pretrain.log sft.log -o both.svg
  python plot_loss.py -n train_20260102_030405.log --follow
"""

# The original Nano wrote, over the years: "Epoch-Step: 0-10", "Step: 10", "Iteration #10";
# "Loss: 3.2", "Loss 3.2", "Train loss = 3.2"; "Val_loss: 3.2", "Val loss 3.2".
NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|(?i:nan|inf)))\b"
STEP = re.compile(r"(?:Epoch-Step: *\d+-|Step: *|[Ii]teration #)(\d{1,15})\b")
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
TRAIN_LOSS = re.compile(r"(?:\bLoss:?|Train loss =) *" + NUMBER)
VAL_LOSS = re.compile(r"(?:Val[_ ]loss:?|\| Val \|.*\| Loss:) *" + NUMBER)
LEARNING_RATE = re.compile(r"\| LR: *" + NUMBER)
ACCURACY = re.compile(r"\| Accuracy: *" + NUMBER + "%")
WATCHED = re.compile(r"\| ([a-z][a-z0-9_]*)(?:/(\d{1,5}))?: *" + NUMBER)  # "expert_load/2: 1.31": of layer 2
SPEED = re.compile(NUMBER + r" ([GT])FLOP(?:/s|S)")
BLUE, ORANGE, INK, GREY = "#2563eb", "#e8590c", "#1f2933", "#7b8794"
PALETTE = (BLUE, ORANGE, "#0f9d72", "#9333ea", "#d6336c", "#8a6d3b", "#0891b2", "#64748b")


def is_number(loss):
    """False for NaN, infinity and what is about to become infinite."""
    return abs(loss) < 1e30


class Log:
    """One log file, read as far as it has been written.

    `train`, `val`, `accuracy`, `rate`, `speed`: lists of (step, value); accuracy in percent, speed in FLOP/s.
    `watched`: {name: {layer, or None: such a list}}, what the model gave in training.
    """

    def __init__(self, path):
        self.path = path
        self.restart()

    def restart(self):
        self.offset, self.header, self.first_time, self.last_time = 0, {}, None, None
        self.train, self.val, self.accuracy, self.rate, self.speed = [], [], [], [], []
        self.watched = {}

    def read(self):
        """Take in the lines added since the last call; True if there were any."""
        if self.path.stat().st_size < self.offset:
            self.restart()
        before = self.offset
        with open(self.path, "rb") as file:
            file.seek(before)
            for line in file:
                if b"\0" in line:
                    raise UserError(f"{self.path} is not a training log: it holds binary data")
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                self.take(line.decode("utf-8", "replace"))
        return self.offset > before

    def take(self, line):
        """Take in one line: the header, a training step, a validation, or nothing of interest."""
        if line.startswith("# {"):
            try:
                self.header = dict(json.loads(line[2:]))
            except (ValueError, TypeError, RecursionError):
                pass
            return
        if not (step := STEP.search(line)):
            return
        step = int(step[1])
        if found := VAL_LOSS.search(line):
            self.val.append((step, float(found[1])))
            if found := ACCURACY.search(line):
                self.accuracy.append((step, float(found[1])))
        elif found := TRAIN_LOSS.search(line):
            self.train.append((step, float(found[1])))
            if found := LEARNING_RATE.search(line):
                self.rate.append((step, float(found[1])))
            for name, layer, value in WATCHED.findall(line):
                curves = self.watched.setdefault(name, {})
                curves.setdefault(int(layer) if layer else None, []).append((step, float(value)))
            if found := SPEED.search(line):
                self.speed.append((step, float(found[1]) * {"G": 1e9, "T": 1e12}[found[2]]))
        else:
            return
        if found := TIME.search(line):
            self.first_time, self.last_time = self.first_time or found[0], found[0]

    def check(self):
        """UserError unless there is something to draw."""
        if self.drawable:
            return
        if self.train:
            raise UserError(f"{self.path}: every loss is NaN or infinite, there is nothing to draw")
        if self.waiting:
            raise UserError(f"{self.path} holds no training step yet; --follow waits for the first one")
        raise UserError(f"{self.path} is not a training log: no line in it is a training step")

    @property
    def drawable(self):
        return any(is_number(loss) for _, loss in self.train)

    @property
    def waiting(self):
        """A log that may just have been opened by train.py."""
        return not self.train and (not self.offset or "train_config" in self.header)

    @property
    def task(self):
        task = str(self.header.get("task", ""))
        return {"pretrain": "Pretraining", "sft": "Supervised fine-tuning"}.get(
            task, task.capitalize()
        ) or None

    @property
    def facts(self):
        """The line under the title: file, size of the model, steps, duration."""
        facts = [self.path.name]
        if isinstance(n := self.header.get("n_params"), int) and 0 < n < 1e15:
            facts.append(f"{n / 1e6:.3g} M parameters" if n >= 1e6 else f"{n:,} parameters")
        facts.append(f"{max(step for step, _ in self.train):,} steps")
        try:
            form = "%Y-%m-%d %H:%M:%S"
            seconds = datetime.strptime(self.last_time, form) - datetime.strptime(self.first_time, form)
            facts.append(duration(seconds.total_seconds()))
        except (TypeError, ValueError):
            pass
        return "  ·  ".join(facts)


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
    # A log of the original Nano names no task: it joins the first column.
    named = [log.task for log in logs if log.task]
    columns = {}
    for log in logs:
        columns.setdefault(log.task or (named[0] if named else "Training"), []).append(log)
    heights = {"train": 4.2, "accuracy": 2.2, "rate": 1.1, "speed": 1.1}
    heights = {name: height for name, height in heights.items() if any(getattr(log, name) for log in logs)}
    watched = dict.fromkeys(name for log in logs for name in log.watched)
    heights |= dict.fromkeys(watched, 1.6)
    figure.set_size_inches(9 if len(columns) == 1 else 7 * len(columns), 1.5 + sum(heights.values()))
    figure.set_layout_engine("constrained", h_pad=0.08, hspace=0.02, wspace=0.04, w_pad=0.12)
    grid = figure.subplots(
        len(heights), len(columns), squeeze=False, sharex="col", height_ratios=list(heights.values())
    )
    for (title, group), panels in zip(columns.items(), grid.T, strict=True):
        alone = len(group) == 1
        subtitle = group[0].facts if alone else f"{len(group)} runs"
        panels[0].set_title(f"{title}\n", loc="left", fontsize=14, fontweight="bold", color=INK)
        panels[0].text(0, 1.03, subtitle, transform=panels[0].transAxes, fontsize=9, color=GREY)
        for name, panel in zip(heights, panels, strict=True):
            if name in watched:
                draw_watched(panel, group, name)
            else:
                DRAW[name](panel, group)
        for panel in panels:
            dress(panel)
        panels[-1].set_xlabel("step")
    figure.align_ylabels(grid[:, 0])


def draw_loss(panel, group):
    """Each run's loss: thin as logged, thick smoothed, dots for validation."""
    import numpy as np
    from matplotlib.lines import Line2D

    alone, keys, lows, highs = len(group) == 1, [], [], []
    for i, log in enumerate(group):
        steps, losses = finite(log.train)
        val_steps, val_losses = finite(log.val)
        mean, short = smooth(losses), len(losses) < 64
        color = PALETTE[i % len(PALETTE)]
        dots = {"color": ORANGE if alone else color, "linewidth": 1, "marker": "o", "markersize": 5}
        dots |= {"markeredgecolor": "white", "markeredgewidth": 0.8}
        crowded = {"markersize": 2.5, "markeredgewidth": 0} if len(val_steps) > 60 else {}
        if not short:
            panel.plot(*thin(steps, losses), color=color, linewidth=0.6, alpha=0.28, zorder=2)
        panel.plot(*thin(steps, mean), color=color, linewidth=1.9, marker="o" if short else "", zorder=4)
        panel.plot(val_steps, val_losses, zorder=5, **(dots | crowded))
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
        else:
            name = log.path.stem.lstrip("_")
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
    legend = panel.legend(*zip(*keys, strict=True), loc="best" if short else "upper right", fontsize=9)
    legend.set_zorder(6)
    legend.get_frame().set(facecolor="white", edgecolor="none", alpha=0.85)


def draw_accuracy(panel, group):
    """Share of exact answers at each validation."""
    for i, log in enumerate(group):
        color = ORANGE if len(group) == 1 else PALETTE[i % len(PALETTE)]
        steps, values = finite(log.accuracy)
        panel.plot(steps, values, color=color, linewidth=1.4, marker="o", markersize=3.5)
        if len(group) == 1 and len(values):
            place = {"xytext": (-4, -14), "textcoords": "offset points", "ha": "right"}
            panel.annotate(f"{values[-1]:.2f} %", (steps[-1], values[-1]), color=INK, fontsize=9, **place)
    panel.set_ylabel("accuracy (%)")
    panel.set_ylim(0, 104)


def draw_rate(panel, group):
    for i, log in enumerate(group):
        panel.plot(*thin(*finite(log.rate)), color=PALETTE[i % len(PALETTE)], linewidth=1.4)
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
        color = PALETTE[i % len(PALETTE)]
        panel.plot(*thin(steps, flops / unit), color=color, linewidth=0.6, alpha=0.28)
        panel.plot(*thin(steps, smooth(flops / unit)), color=color, linewidth=1.4)
    panel.set_ylabel(f"speed\n({name})")
    panel.set_ylim(0, 1.15 * top / unit or 1)
    panel.locator_params(axis="y", nbins=3)


def draw_watched(panel, group, name):
    """One of the model's own numbers: a line, or one for each layer that has it, the deeper the lighter."""
    from matplotlib.colors import to_rgb

    for i, log in enumerate(group):
        curves = log.watched.get(name, {})
        for k, (layer, points) in enumerate(curves.items()):
            shade = 0.6 * k / len(curves)
            color = [c + (1 - c) * shade for c in to_rgb(PALETTE[i % len(PALETTE)])]
            steps, values = finite(points)
            label = f"layer {layer}" if layer is not None and len(group) == 1 else None
            panel.plot(*thin(steps, smooth(values)), color=color, linewidth=1.2, label=label)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8, frameon=False, ncols=4)
    panel.set_ylabel(name.replace("_", "\n", 1).replace("_", " "))
    panel.locator_params(axis="y", nbins=4)


DRAW = {"train": draw_loss, "accuracy": draw_accuracy, "rate": draw_rate, "speed": draw_speed}


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
    panel.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 10000 else f"{x:,.0f}")
    )
    if panel.get_yscale() == "log":
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.6g}"))


def number(loss):
    """Four significant digits: 3.214, 0.01234."""
    return f"{loss:#.4g}"


def prepare_matplotlib():
    """Fonts for Chinese file names where the system has one, file names free of formulas."""
    import matplotlib
    from matplotlib import font_manager

    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    chinese = (
        "Noto Sans CJK SC",
        "Microsoft YaHei",
        "PingFang SC",
        "Hiragino Sans GB",
        "WenQuanYi Zen Hei",
        "SimHei",
    )
    found = {font.name for font in font_manager.fontManager.ttflist}
    matplotlib.rcParams.update(
        {
            "font.family": ["DejaVu Sans", *(name for name in chinese if name in found)],
            "text.parse_math": False,
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "savefig.facecolor": "white",
        }
    )


def save(logs, path):
    """Draw into `path`; a viewer never sees half a picture."""
    from matplotlib.figure import Figure

    figure = Figure()
    draw(figure, logs)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:].lower())
    with whole(path) as file:
        file.write(picture.getbuffer())


def find_logs(names):
    """Paths of the logs to draw: as given (from here or from the repository), or the newest one."""
    if not names:
        newest = max(ROOT.glob("train_*.log"), key=lambda path: path.stat().st_mtime, default=None)
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
    logs = [Log(path) for path in find_logs(arguments.name)]
    for log in logs:
        log.read()
        if not (arguments.follow and log.waiting):
            log.check()
        if lost := sum(not is_number(loss) for _, loss in log.train):
            print(
                f"warning: {log.path}: {lost:,} of {len(log.train):,} losses NaN or infinite", file=sys.stderr
            )

    import matplotlib

    prepare_matplotlib()
    output = arguments.output
    if not output:
        from matplotlib import pyplot

        if pyplot.get_backend().lower() == "agg":
            output = logs[0].path.with_suffix(".png")
            print("there is no display here, so the chart becomes a file")
    if output:
        matplotlib.use("agg")
    try:
        if output:
            to_file(logs, output, arguments.follow)
        else:
            to_window(logs, pyplot, arguments.follow)
    except KeyboardInterrupt:
        if not arguments.follow:
            raise


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
    figure = pyplot.figure()
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
