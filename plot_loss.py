"""Charts from training logs: loss, scores, learning rate, speed, and the model's own numbers.

It draws what common/log_reader.py reads: the logs of train.py, and those of the original Nano. A chart has
one column per task, since a pretraining step and an SFT step are not comparable; runs of the same task share
a column.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from common.errors import UserError, describe_os_error
from common.errors import run as run_script
from common.files import atomic_write
from common.log_reader import Log, Points, Run, is_finite, label_of, merge_runs
from common.metrics import METRICS_SUFFIX

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent
FORMATS = ("png", "pdf", "svg", "jpg")
EXAMPLES = """examples:
  python plot_loss.py                                  newest log; a PNG beside it where there is no display
  python plot_loss.py -n train_20260102_030405.log -o loss.png
  python plot_loss.py -n pretrain.log sft.log -o both.svg
  python plot_loss.py -n train_20260102_030405.log --follow
"""
KEYS = 30  # lines of a legend
SCORES = ("score", "perplexity")  # of tasks, each a row of panels
MARKERS = "os^Dvph*<>XP"
BLUE, ORANGE, INK, GREY = "#2563eb", "#e8590c", "#1f2933", "#7b8794"
PALETTE = (BLUE, ORANGE, "#0f9d72", "#9333ea", "#d6336c", "#8a6d3b", "#0891b2", "#64748b")
CHINESE = {
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti TC",
}  # fmt: skip


def finite(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values): two float arrays in order of steps, without NaN and infinity."""
    import numpy as np

    array = np.array(points, dtype=float).reshape(-1, 2)
    array = array[is_finite(array).all(axis=1)]
    array = array[np.argsort(array[:, 0], kind="stable")]
    return array[:, 0], array[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over about 3 % of the run; narrower at the start, where the loss falls steeply."""
    import numpy as np

    i, total = np.arange(len(values)), np.concatenate(([0.0], np.cumsum(values)))
    reach = np.minimum(i, len(values) // 64)
    first, end = i - reach, np.minimum(i + reach + 1, len(values))
    return (total[end] - total[first]) / (end - first)


def downsample(x: np.ndarray, y: np.ndarray, bins: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * bins points that draw the same line: the lowest and the highest of each bin."""
    import numpy as np

    if len(x) <= 2 * bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    return np.repeat(x[edges], 2), np.stack(
        (np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)), axis=1
    ).ravel()


def draw(figure: Figure, logs: Sequence[Log]) -> None:
    """Draw all logs into a matplotlib Figure: a column per task, a row per kind of curve."""
    runs = merge_runs(logs)
    # A log of the original Nano names no task. It goes into the first column.
    named = [run.task for run in runs if run.task]
    columns: dict[str, list[Run]] = {}
    for run in runs:
        columns.setdefault(run.task or (named[0] if named else "Training"), []).append(run)
    heights = {"train/loss": 4.2, "score": 2.4, "perplexity": 2.0}
    heights |= {"train/lr": 1.1, "train/flops_per_second": 1.1}
    heights = {name: height for name, height in heights.items()
               if any(run.scores(name) if name in SCORES else run.curves[name] for run in runs)}  # fmt: skip
    model_metrics = dict.fromkeys(name for run in runs for name in run.model_metrics)
    heights |= dict.fromkeys(model_metrics, 1.6)
    figure.set_size_inches(9 if len(columns) == 1 else 7 * len(columns), 1.5 + sum(heights.values()))
    figure.set_layout_engine("constrained", h_pad=0.08, hspace=0.02, wspace=0.04, w_pad=0.12)
    grid = figure.subplots(
        len(heights), len(columns), squeeze=False, sharex="col", height_ratios=list(heights.values())
    )
    below = 0
    for (title, group), panels in zip(columns.items(), grid.T, strict=True):
        alone = len(group) == 1
        subtitle = group[0].summary.replace("  ·", "\xa0\xa0·") if alone else f"{len(group)} runs"
        lines = textwrap.wrap(subtitle, 90)
        title += "\n" * len(lines)
        panels[0].set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK)
        place = {"transform": panels[0].transAxes, "fontsize": 9, "color": GREY}
        panels[0].text(0, 1.03, "\n".join(lines), **place)
        for name, panel in zip(heights, panels, strict=True):
            if name == "train/loss":
                below = max(below, draw_loss(panel, group))
            elif name in SCORES:
                draw_scores(panel, group, name)
            elif name in model_metrics:
                draw_model_metric(panel, group, name)
            else:
                DRAW[name](panel, group)
        for panel in panels:
            style_axes(panel)
        panels[-1].set_xlabel("step")
    figure.align_ylabels(grid[:, 0])
    if below:
        figure.set_size_inches(9 * len(columns), figure.get_figheight() + 0.18 * below)


def color_of(i: int, group: Sequence[Run]) -> Any:
    """The colour of the i-th run."""
    from matplotlib import colormaps

    return PALETTE[i] if len(group) <= len(PALETTE) else colormaps["turbo"](i / (len(group) - 1))


def draw_loss(panel: Axes, group: Sequence[Run]) -> int:
    """Each run's loss: a thin line as logged, a thick smoothed one, dots for validation.

    Returns how many lines of legend are below the panel.
    """
    import numpy as np
    from matplotlib.lines import Line2D

    alone, lows, highs = len(group) == 1, [], []
    keys: list[tuple[Artist, str]] = []
    for i, run in enumerate(group):
        steps, losses = finite(run.train)
        val_steps, val_losses = finite(run.val)
        mean, short = smooth(losses), len(losses) < 64
        color = color_of(i, group)
        dots: dict[str, Any] = {"color": ORANGE if alone else color, "linewidth": 1, "marker": "o"}
        dots |= {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.8}
        crowded = {"markersize": 2.5, "markeredgewidth": 0} if len(val_steps) > 60 else {}
        if not short:
            panel.plot(*downsample(steps, losses), color=color, linewidth=0.6, alpha=0.28, zorder=2)
        marker = "o" if short else ""
        panel.plot(*downsample(steps, mean), color=color, linewidth=1.9, marker=marker, zorder=4)
        panel.plot(*downsample(val_steps, val_losses), zorder=5, **(dots | crowded))
        parts = draw_parts(panel, run) if alone else []  # for several runs, one line each is enough
        lows += [mean.min(), *val_losses, np.percentile(losses[len(losses) // 10 :], 1)]
        highs += [mean.max(), *val_losses]

        line = Line2D([], [], color=color, linewidth=1.9)
        label = f"training {four_digits(mean[-1])}"
        val_label = ""
        if len(val_losses):
            best = val_losses.argmin()
            val_label = f"validation {four_digits(val_losses[-1])}, best {four_digits(val_losses[best])}"
            val_label += f" at step {val_steps[best]:,.0f}"
        if alone:
            keys.append((line, label + " (smoothed)" * (not short)))
            keys += [(Line2D([], [], **dots), val_label)] if val_label else []
            for part in parts:
                keys.append((part, str(part.get_label())))
                lows.append(np.min(part.get_ydata()))
                highs.append(np.max(part.get_ydata()))
        else:
            name = run.label.lstrip("_")  # a leading underscore would keep it out of the legend
            if sum(other.label == run.label for other in group[:KEYS]) > 1:
                name = f"{run.paths[0].absolute().parent.name}/{name}"
            name = name if len(name) <= 48 else f"{name[:30]}…{name[-17:]}"
            keys.append((line, f"{name}: {label}" + f", {val_label}" * bool(val_label)))
        lost = [step for step, loss in run.train if not is_finite(loss)]
        red: dict[str, Any] = {"color": "#c92a2a", "linewidth": 0.9, "linestyle": "--"}
        for step in lost[:50]:
            panel.axvline(step, zorder=1, **red)
        if lost:
            at = f"step {lost[0]:,}" if len(lost) == 1 else f"{len(lost):,} steps"
            keys.append((Line2D([], [], **red), f"NaN or infinite loss at {at}"))
    if not alone and any(run.val for run in group):
        keys.append((Line2D([], [], **(dots | {"color": GREY})), "validation"))
    low, high = min(lows), max(highs)
    if low > 0 and high / low > 10:  # only a log axis shows the end of a loss that falls to almost zero
        panel.set_yscale("log")
        panel.set_ylim(low / 1.15, high * 1.25)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1
        panel.set_ylim(low - margin, high + margin)
    panel.set_ylabel("loss (nats per token)")
    if len(keys) > KEYS:
        keys[KEYS:] = [(Line2D([], [], linestyle=""), f"and {len(keys) - KEYS:,} more")]
    where: dict[str, Any] = {"loc": "best" if short else "upper right", "fontsize": 9}
    below = len(keys) > 6  # a legend this long would hide curves
    if below:
        where = {"loc": "upper left", "bbox_to_anchor": (0, -0.02), "borderaxespad": 0, "fontsize": 8}
    legend = panel.legend(*zip(*keys, strict=True), **where)
    legend.set_zorder(6)
    legend.get_frame().set(facecolor="white", edgecolor="none", alpha=0.85)
    return below * len(keys)


def draw_parts(panel: Axes, run: Run) -> list[Line2D]:
    """Thin lines for the validation loss on each of several files; returns these lines."""
    lines: list[Line2D] = []
    for i, points in sorted(run.parts.items()):
        steps, losses = finite(points)
        if len(losses):
            color, label = PALETTE[2 + i % 6], f"validation of {run.part_names[i]}: {four_digits(losses[-1])}"
            lines += panel.plot(steps, losses, color=color, linewidth=0.9, zorder=3, label=label)
    return lines


def lighten(color: Any, share: float) -> list[float]:
    """Mix a colour with this share of white."""
    from matplotlib.colors import to_rgb

    return [c + (1 - c) * share for c in to_rgb(color)]


def draw_scores(panel: Axes, group: Sequence[Run], metric: str) -> None:
    """The score on each task, with a dashed line for its base rate; or its perplexity.

    Of one run, each task has a colour; of several, each run has one, and tasks differ in markers.
    """
    alone = len(group) == 1
    names = list(dict.fromkeys(name for run in group for name in run.scores(metric)))
    scale, unit = (100, " %") if metric == "score" else (1, "")
    for i, run in enumerate(group):
        for name, points in run.scores(metric).items():
            k = names.index(name)
            color = PALETTE[(k + 1) % len(PALETTE)] if alone else color_of(i, group)
            steps, values = finite(points)
            if not len(values):
                continue
            shown = name.lstrip("_")  # a leading underscore would keep it out of the legend
            label = f"{shown}: {scale * values[-1]:.2f}{unit}" if alone else "_"
            style: dict[str, Any] = {"marker": MARKERS[0 if alone else k % len(MARKERS)], "markersize": 3.5}
            panel.plot(*downsample(steps, scale * values), color=color, linewidth=1.4, label=label, **style)
    rates = {name: rate for run in group for name, rate in run.base_rates.items() if name in names}
    for name, rate in rates.items():
        k = names.index(name)
        color = PALETTE[(k + 1) % len(PALETTE)] if alone else GREY
        panel.axhline(100 * rate, color=color, linewidth=0.9, linestyle="--", zorder=1)
        if not alone:  # the marker at its end says which task it is of
            end: dict[str, Any] = {"marker": MARKERS[k % len(MARKERS)], "markersize": 3.5, "clip_on": False}
            panel.plot([1], [100 * rate], color=color, transform=panel.get_yaxis_transform(), **end)
    if not alone and names != ["validation"]:
        for k, name in enumerate(names):
            panel.plot(
                [], [], color=GREY, marker=MARKERS[k % len(MARKERS)], markersize=3.5, label=name.lstrip("_")
            )
    if rates:
        panel.plot([], [], color=GREY, linewidth=0.9, linestyle="--", label="base rate")
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8, frameon=False, ncols=2, loc="best")
    if metric == "score":
        panel.set_ylim(-3, 104)
    panel.set_ylabel("accuracy (%)" if names == ["validation"] else "score (%)" if unit else metric)


def draw_rate(panel: Axes, group: Sequence[Run]) -> None:
    for i, run in enumerate(group):
        panel.plot(*downsample(*finite(run.curves["train/lr"])), color=color_of(i, group), linewidth=1.4)
    panel.set_ylabel("learning\nrate")
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="y", nbins=4)


def draw_speed(panel: Axes, group: Sequence[Run]) -> None:
    import numpy as np

    series = [finite(run.curves["train/flops_per_second"]) for run in group]
    values = np.concatenate([flops for _, flops in series])
    top = np.percentile(values, 99) if len(values) else 1.0
    unit, name = (1e12, "TFLOP/s") if top >= 1e12 else (1e9, "GFLOP/s")
    for i, (steps, flops) in enumerate(series):
        color = color_of(i, group)
        panel.plot(*downsample(steps, flops / unit), color=color, linewidth=0.6, alpha=0.28)
        panel.plot(*downsample(steps, smooth(flops / unit)), color=color, linewidth=1.4)
    panel.set_ylabel(f"speed\n({name})")
    panel.set_ylim(0, 1.15 * top / unit or 1)
    panel.locator_params(axis="y", nbins=3)


def draw_model_metric(panel: Axes, group: Sequence[Run], name: str) -> None:
    """One of the model's own numbers: a line, or one per layer, where deeper layers are lighter."""
    for i, run in enumerate(group):
        curves = run.model_metrics.get(name, {})
        for k, (layer, points) in enumerate(curves.items()):
            color = lighten(color_of(i, group), 0.6 * k / len(curves))
            steps, values = finite(points)
            is_named = len(curves) <= 8 or k in (0, len(curves) - 1)
            label = f"layer {layer}" if is_named and layer is not None and len(group) == 1 else None
            panel.plot(*downsample(steps, smooth(values)), color=color, linewidth=1.2, label=label)
    low, high = panel.get_ylim()
    if high - low < 1e-6 * max(abs(low), abs(high)):  # constant, except for the rounding in `smooth`
        panel.set_ylim(0.9 * low, 1.1 * high)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8, frameon=False, ncols=4)
    panel.set_ylabel(name.replace("_", "\n", 1).replace("_", " "))
    panel.locator_params(axis="y", nbins=4)


DRAW = {"train/lr": draw_rate, "train/flops_per_second": draw_speed}


def style_axes(panel: Axes) -> None:
    """Give a panel the look that all of them share."""
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


def short_count(steps: float) -> str:
    """9,000 -> "9,000"; 25_000 -> "25k"; 1_250_000 -> "1.25M"; there are also G and T."""
    power = 0 if abs(steps) < 10_000 else min(4, int(len(f"{abs(steps):.0f}") - 1) // 3)
    return f"{steps:,.0f}" if not power else f"{steps / 1000**power:.6g}{' kMGT'[power]}"


def four_digits(loss: float) -> str:
    """Four significant digits: 3.214, 0.01234."""
    return f"{loss:#.4g}"


def prepare_matplotlib() -> bool:
    """Set up matplotlib, with fonts for Chinese file names. Returns whether there is one."""
    try:
        import matplotlib
    except ValueError as error:  # from MPLBACKEND or a matplotlibrc
        raise UserError(f"matplotlib does not start: {error}") from None
    from matplotlib import font_manager

    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    # It warns of fonts that have only one weight, as some Chinese ones do.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    fonts = font_manager.fontManager
    if not (chinese := CHINESE & {font.name for font in fonts.ttflist}):
        listed = {font.fname for font in fonts.ttflist}  # those installed when matplotlib was first used
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


def picture(logs: Sequence[Log], format: str) -> bytes:
    """The chart of the logs as the content of a file. format: one of FORMATS."""
    from matplotlib.figure import Figure

    figure, content = Figure(), io.BytesIO()
    draw(figure, logs)
    figure.savefig(content, dpi=150, format=format)
    return content.getvalue()


def save(logs: Sequence[Log], path: Path) -> None:
    """Draw the logs into the file `path`, which is replaced only once the picture is complete."""
    content = picture(logs, path.suffix[1:].lower())
    with atomic_write(path) as file:
        file.write(content)


def find_logs(names: Sequence[str] | None) -> list[Path]:
    """The paths of the logs to draw: those named (here or in the repository), or else the newest one.

    A metrics file stands for the readable log beside it, so that no run is drawn twice.
    """
    if not names:
        newest = max(ROOT.glob("train_[0-9]*.log"), default=None)  # names are in the order of the runs
        if newest is None:
            raise UserError(f"there is no train_*.log in {ROOT}; train first, or name a log with -n")
        return [newest]
    paths: dict[Path, Path] = {}
    for name in names:
        path = next((p for p in (Path(name), ROOT / name) if p.exists()), None)
        if path is None:
            raise UserError(f"there is no file {name}")
        if not path.is_file():
            raise UserError(f"{name} is not a file")
        readable = path.with_name(f"{label_of(path)}.log")
        if path.name.endswith(METRICS_SUFFIX) and readable.is_file():
            path = readable
        paths.setdefault(path.resolve(), path)
    return list(paths.values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Charts from training logs: loss, validation loss, learning rate and speed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    logs = "logs to draw, .log or .metrics.jsonl (default: the newest)"
    parser.add_argument("-n", "--name", nargs="+", metavar="LOG", help=logs)
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


def main() -> None:
    arguments = parse_arguments()
    logs = read([Log(path) for path in find_logs(arguments.name)], arguments.follow)
    if not prepare_matplotlib() and any(letter > "\u2e80" for log in logs for letter in log.path.stem):
        print("warning: no Chinese font was found; install one, fonts-noto-cjk for example", file=sys.stderr)
    output = arguments.output
    if not output:
        from matplotlib import pyplot

        try:
            has_window = bool(pyplot.figure().canvas.required_interactive_framework)
        except (ImportError, RuntimeError):  # MPLBACKEND names a backend that is missing
            has_window = False
        if not has_window:
            output = logs[0].path.with_name(f"{label_of(logs[0].path)}.png")
            print("there is no display here, so the chart becomes a file")
    try:
        if output:
            to_file(logs, output, arguments.follow)
        else:
            to_window(logs, pyplot, arguments.follow)
    except KeyboardInterrupt:
        if not arguments.follow:
            raise


def read(logs: Sequence[Log], follow: bool) -> list[Log]:
    """Read the logs; returns those that can be drawn or, with `follow`, waited for, and reports the others.

    Raises UserError if there are none.
    """
    good: list[Log] = []
    faults: list[str] = []
    for log in logs:
        try:
            log.read()
            if not (follow and log.is_waiting):
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


def to_file(logs: Sequence[Log], output: Path, follow: bool, seconds: float = 5) -> None:
    """Draw into a file; with `follow`, again whenever a log has grown."""
    drawn = False
    while True:
        ready = [log for log in logs if log.is_drawable]
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


def to_window(logs: Sequence[Log], pyplot: ModuleType, follow: bool, seconds: float = 2) -> None:
    """Draw into a window; with `follow`, again whenever a log has grown, until the window is closed."""
    figure = pyplot.gcf()
    changed = True
    while True:
        ready = [log for log in logs if log.is_drawable]
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
    run_script(main)
