"""Charts through the real command line, and the log lines that the original Nano wrote over the years."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import plot_loss
from common import log_reader
from common.errors import UserError, run
from common.log_reader import Log, LogFile
from common.metrics import duration
from plot_loss import downsample, draw, finite, smooth

matplotlib.use("agg")
SCRIPT = Path(plot_loss.__file__)
HEADER = {"format": "nano-log", "version": 1, "model_config": {}, "train_config": {}, "n_params": 3_214_336}
TRAIN = (
    "2026-01-02 03:{:02d}:05 | Train | Epoch-Step: 0-{} | Curriculum: 0-2560 | Loss: {} | LR: 6.00e-04 | "
    "Grad-Norm: 0.512 | Time: 52 ms | Speed: 91.20 GFLOP/s | Tokens/s: 14200\n"
)
VAL = "2026-01-02 03:04:05 | Val | Epoch-Step: 0-{} | Loss: {} | BPB: 1.7321 | Best: 3.101234\n"
SAVE = "2026-01-02 03:04:05 | Save | Epoch-Step: 0-100 | checkpoint/pretrain_step_100.pt\n"


def write_log(path, task="pretrain", steps=20, header=True):
    lines = ["# " + json.dumps(HEADER | {"task": task}) + "\n"] if header else []
    lines += [TRAIN.format(step % 60, step, 7 - step / steps) for step in range(1, steps + 1)]
    path.write_text("".join(lines) + VAL.format(steps, 6.1) + SAVE, encoding="utf-8")
    return path


def plot(*arguments, cwd=None, backend="agg"):
    environment = {key: value for key, value in os.environ.items() if "DISPLAY" not in key} | {
        "MPLBACKEND": backend
    }
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def taken(line):
    file = LogFile(Path("x.log"))
    file.take(line)
    curves = file.runs[0].curves
    return tuple(curves[name] for name in ("train/loss", "val/loss", "train/lr", "train/flops_per_second"))


# What the original Nano wrote over the years, newest first: line -> speed in FLOP/s.
ORIGINAL_TRAIN = {
    "INFO:__main__:2024-10-01 12:00:00 | Train | Epoch-Step: 0-10 | Curriculum: 0-2560 | Loss: 3.214"
    " | Time: 52 ms | Speed: 91.20 GFLOP/s": 91.2e9,
    "2024-09-30 12:00:00 | Epoch: 0 | Step: 10 | Dataset: 0-2560 | Loss: 3.214"
    " | 52 ms/step , 91.20 GFLOP/s , 1000.0 tokens/s": 91.2e9,
    "2024-09-20 12:00:00 | Phase: Train | Step: 10 | TrainDataPos: 77 | Loss: 3.214"
    " | Time: 52 ms | Speed: 91.20 GFLOP/s": 91.2e9,
    "2024-05-01 12:00:00 Iteration #10: Train loss = 3.2140, Duration = 52 ms, "
    "MFU = 1.00% (3.12 TFLOPS)": 3.12e12,
    "[2024-04-01 12:00:00] Train iteration #10 | Loss 3.2140 | 52 ms | 91.20 GFLOPS": 91.2e9,
}
ORIGINAL_VALIDATION = [
    "2024-10-01 12:00:00 | Validation | Step: 10 | Val_loss: 3.101 | Best_val_loss: 3.2000",
    "2024-09-01 12:00:00 | Phase: Validation | Step: 10 | Val_loss: 3.101 | Best_val_loss: 3.2",
    "[2024-04-01 12:00:00] Eval @ iteration #10 | Train loss 3.3 | Val loss 3.101 | Best val loss 3.2",
    "Iteration #10: Train loss 3.3000, Val loss 3.1010, Best val loss 3.2000",
]
PASSED_OVER = [
    SAVE,
    "2024-10-01 12:00:00 | Start training from iteration #10",
    "2024-10-01 12:00:00 | Step: 99999999999999999999 | Loss: 1",
    "2024-10-01 12:00:00 | Step: 10 | Loss: abc",
    "# {broken",
    "# {" + '"a":[' * 5000,
]


def test_our_lines():
    assert taken(TRAIN.format(4, 10, 3.214159)) == ([(10, 3.214159)], [], [(10, 6e-4)], [(10, 91.2e9)])
    assert taken(VAL.format(10, 3.101234)) == ([], [(10, 3.101234)], [], [])


@pytest.mark.parametrize("line", ORIGINAL_TRAIN)
def test_training_lines_of_the_original(line):
    assert taken(line) == ([(10, 3.214)], [], [], [(10, pytest.approx(ORIGINAL_TRAIN[line]))])


@pytest.mark.parametrize("line", ORIGINAL_VALIDATION)
def test_validation_lines_of_the_original(line):
    assert taken(line) == ([], [(10, 3.101)], [], [])


@pytest.mark.parametrize("line", PASSED_OVER)
def test_other_lines_are_passed_over(line):
    assert taken(line) == ([], [], [], [])


def test_losses_that_are_not_numbers_are_kept_apart():
    assert math.isnan(taken(TRAIN.format(4, 10, "nan"))[0][0][1])
    steps, losses = finite([(3, 1.0), (1, 2.0), (2, math.nan), (4, math.inf)])
    assert steps.tolist() == [1, 3] and losses.tolist() == [2, 1]


def test_reads_only_what_is_new_and_complete(tmp_path):
    path = tmp_path / "train_x.log"
    path.write_text(TRAIN.format(1, 1, 7.5) + TRAIN.format(1, 2, 7.25)[:90])
    log = Log(path)
    assert log.read() and log.run.train == [(1, 7.5)]
    assert not log.read()
    with open(path, "a") as file:
        file.write(TRAIN.format(1, 2, 7.25)[90:])
    assert log.read() and log.run.train == [(1, 7.5), (2, 7.25)]
    path.write_text(TRAIN.format(1, 1, 5.0))  # begun anew
    assert log.read() and log.run.train == [(1, 5.0)]


def test_smoothing_keeps_constants_the_start_and_the_length():
    assert smooth(np.full(1000, 3.0)) == pytest.approx(3.0)
    noisy = 3 + np.random.default_rng(0).normal(size=6400)
    assert len(smooth(noisy)) == 6400 and smooth(noisy)[0] == noisy[0]
    assert smooth(noisy)[200:].std() < 0.15
    assert smooth(np.array([5.0])).tolist() == [5.0]


def test_thinning_keeps_every_extreme():
    x, y = np.arange(100_000.0), np.random.default_rng(0).normal(size=100_000)
    thin_x, thin_y = downsample(x, y)
    assert len(thin_x) == len(thin_y) <= 2400
    assert thin_y.min() == y.min() and thin_y.max() == y.max() and (np.diff(thin_x) >= 0).all()
    assert downsample(x[:5], y[:5])[0] is not thin_x and len(downsample(x[:5], y[:5])[0]) == 5


def test_durations():
    assert [duration(s) for s in (5, 170, 21180)] == ["5 s", "2 min 50 s", "5 h 53 min"]


def drawn(*paths):
    logs, figure = [Log(path) for path in paths], Figure()
    for log in logs:
        log.read()
    draw(figure, logs)
    return figure.axes


def test_a_column_per_task_and_a_row_per_kind_of_value(tmp_path):
    one, two = write_log(tmp_path / "a.log"), write_log(tmp_path / "b.log", "sft", steps=100)
    axes = drawn(one, two)
    assert len(axes) == 6
    assert [a.get_title("left").strip() for a in axes[:2]] == ["Pretraining", "Supervised fine-tuning"]
    axes = drawn(one, write_log(tmp_path / "c.log", steps=200, header=False))
    assert len(axes) == 3
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels[0].startswith("a: training 6.000, validation 6.100") and labels[-1] == "validation"


def test_an_original_log_has_no_learning_rate_row(tmp_path):
    path = tmp_path / "old.log"
    path.write_text("2024-10-01 12:00:00 | Epoch: 0 | Step: 1 | Loss: 3.2 | 52 ms/step , 91.20 GFLOP/s\n")
    assert len(drawn(path)) == 2


def test_command_line(tmp_path):
    folder = tmp_path / "图 表"
    folder.mkdir()
    log = write_log(folder / "train_$训练_1.log")
    write_log(folder / "b.log", "sft", steps=300)
    done = plot("-n", log.name, "b.log", "-o", "两个.png", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "") and "两个.png" in done.stdout
    assert (folder / "两个.png").read_bytes().startswith(b"\x89PNG")
    done = plot("-n", str(log))
    assert done.returncode == 0 and "no display" in done.stdout
    assert log.with_suffix(".png").exists()
    done = plot("-n", str(log), "-o", str(folder / "without"))
    assert (folder / "without.png").exists()
    assert not [path for path in folder.iterdir() if "tmp" in path.name]


def test_no_window_no_silence(tmp_path):
    log = write_log(tmp_path / "train_x.log")
    for backend in ("svg", "webagg", "module://nothing"):
        done = plot("-n", str(log), backend=backend)
        assert done.returncode == 0 and "no display" in done.stdout and not done.stderr
        log.with_suffix(".png").unlink()
    done = plot("-n", str(log), backend="abc")
    assert done.returncode == 2 and "matplotlib does not start" in done.stderr


def test_nan_is_told_and_the_rest_drawn(tmp_path):
    log = write_log(tmp_path / "train_x.log")
    with open(log, "a") as file:
        file.write(TRAIN.format(1, 21, "nan") + TRAIN.format(1, 22, "inf"))
        file.write(TRAIN.format(1, 23, "1e305") + TRAIN.format(1, 24, "-5").replace("91.20", "1.2.3"))
    done = plot("-n", str(log), "-o", str(tmp_path / "x.svg"))
    assert done.returncode == 0 and "3 of 24 losses NaN or infinite" in done.stderr
    assert (tmp_path / "x.svg").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file"),
        (b"", "holds no training step yet"),
        (b"# " + json.dumps(HEADER).encode() + b"\n", "holds no training step yet"),
        (b"Dear diary,\ntoday I trained nothing.\n", "not a training log"),
        (VAL.format(1, 3.0).encode(), "not a training log"),
        (bytes(range(256)) * 50, "not a training log"),
        (os.urandom(20000).replace(b"\0", b"\1"), "not a training log"),
        ((TRAIN.format(1, 1, "nan") * 3).encode(), "every loss is NaN"),
        (TRAIN.format(1, 1, 7.5)[:70].encode(), "holds no training step yet"),
    ],
)
def test_bad_logs(tmp_path, content, says, capsys, monkeypatch):
    path = tmp_path / "train_x.log"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["plot_loss.py", "-n", str(path), "-o", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as left:
        run(plot_loss.main)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and says in error
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("x.log", "cannot draw .log"),
        ("no/x.png", "there is no folder"),
        ("d.png", "is a folder"),
        ("/proc/x.png", ""),
    ],
)
def test_bad_outputs(tmp_path, output, says):
    (tmp_path / "d.png").mkdir()
    done = plot("-n", write_log(tmp_path / "a.log"), "-o", output, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_is_not_a_log(tmp_path):
    done = plot("-n", str(tmp_path))
    assert done.returncode == 2 and "is not a file" in done.stderr


def test_the_newest_log_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_loss, "ROOT", tmp_path)
    with pytest.raises(UserError, match="no train_"):
        plot_loss.find_logs(None)
    older, newer = "train_20260102_030405.log", "train_20260102_030406.log"  # by name, whatever clocks say
    for age, name in enumerate((older, newer)):
        os.utime(write_log(tmp_path / name), (1e9 - age, 1e9 - age))
    assert plot_loss.find_logs(None) == [tmp_path / newer]
    assert plot_loss.find_logs([older]) == [tmp_path / older]  # from any folder


def test_follow_waits_for_the_first_step_and_ends_at_ctrl_c(tmp_path):
    log, picture = tmp_path / "train_x.log", tmp_path / "x.png"
    log.write_text("# " + json.dumps(HEADER) + "\n")
    code = (
        "import sys, signal, plot_loss\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a child of `nohup` ignores it
        "plot_loss.to_file.__defaults__ = (0.1,)\n"  # seconds between looks
        f"sys.argv = ['plot_loss.py', '-n', {str(log)!r}, '-o', {str(picture)!r}, '--follow']\n"
        "plot_loss.run_script(plot_loss.main)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=SCRIPT.parent, stdout=subprocess.PIPE, text=True
    )
    try:
        for steps in (10, 20):
            write_log(log, steps=steps)
            before = time.time()
            while not picture.exists() and time.time() < before + 30:
                time.sleep(0.05)
            assert picture.exists()
            time.sleep(0.3)
            picture.unlink()
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 0 and "saved" in child.stdout.read()
    finally:
        child.kill()


def test_window_redraws_until_it_is_closed(tmp_path):
    class Pyplot:
        def __init__(self):
            self.pauses = 0

        def figure(self):
            self.shown = type("NumberedFigure", (Figure,), {"number": 1})()
            return self.shown

        def gcf(self):
            return self.shown

        def pause(self, seconds):
            self.pauses += 1
            write_log(path, steps=20 * self.pauses)

        def fignum_exists(self, number):
            return self.pauses < 3

    path, window = write_log(tmp_path / "a.log"), Pyplot()
    window.figure()
    plot_loss.to_window([Log(path)], window, follow=True)
    assert window.shown.axes[0].get_xlim()[1] > 39


def test_help_is_quick_and_without_matplotlib():
    start = time.perf_counter()
    done = plot("--help")
    assert done.returncode == 0 and "examples:" in done.stdout and time.perf_counter() - start < 2
    code = "import sys, plot_loss; sys.exit('numpy' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0


def test_what_a_model_gives_to_watch_has_panels_of_its_own(tmp_path):
    path = tmp_path / "train_x.log"
    lines = ["# " + json.dumps(HEADER | {"task": "pretrain"}) + "\n"]
    for step in range(1, 101):
        line = TRAIN.format(step % 60, step, 7 - step / 100)
        lines.append(line.replace(" | Time", f" | mtp_loss: {8 - step / 100} | expert_load/1: 1.{step:03d}"
                                         f" | expert_load/12: 2.5e+00 | Time"))  # fmt: skip
    path.write_text("".join(lines), "utf-8")
    (log := Log(path)).read()
    metrics = log.run.model_metrics
    assert list(metrics) == ["mtp_loss", "expert_load"] and list(metrics["expert_load"]) == [1, 12]
    assert metrics["expert_load"][12] == [(step, 2.5) for step in range(1, 101)]
    assert metrics["mtp_loss"] == {None: [(step, 8 - step / 100) for step in range(1, 101)]}
    assert {len(log.run.curves[name]) for name in log_reader.STANDARD[::3]} == {100}
    assert log.run.train[0] == (1, 6.99) and len(log.run.curves["train/flops_per_second"]) == 100

    plain = Log(write_log(tmp_path / "plain.log"))
    plain.read()
    for logs in ([log], [log, plain]):
        figure = Figure()
        draw(figure, logs)
        panels = {panel.get_ylabel().replace("\n", " "): panel for panel in figure.axes}
        assert list(panels)[-2:] == ["mtp loss", "expert load"]
        load, loss = panels["expert load"], panels["mtp loss"]
        assert [len(line.get_xdata()) for line in load.lines] == [100, 100]
        assert loss.lines[0].get_ydata()[-1] == pytest.approx(7.0, abs=0.02)
    assert load.get_legend() is None  # with several runs, colour tells the run
    draw(figure := Figure(), [log])
    [load] = [panel for panel in figure.axes if panel.get_ylabel() == "expert\nload"]
    assert [text.get_text() for text in load.get_legend().get_texts()] == ["layer 1", "layer 12"]


# ---- runs that were stopped and resumed ------------------------------------------------------------------

AT = "2026-01-02 03:04:05 | "
STEP_TRAIN = AT + "Train | Epoch-Step: 0-{0} | Loss: {1} | LR: 1e-3 | load/2: {1} | "
STEP_TRAIN += "Time: 52 ms | Speed: 9.5 GFLOP/s | Tokens/s: 14200\n"
STEP_VAL = (
    AT + "Val | Epoch-Step: 0-{0} | Loss: {1} | Loss/0: {1} | Accuracy: 50.00% | Best: 1.0 | BPB: 1.5\n"
)
STEP_SAVE = AT + "Save | Epoch-Step: 0-{0} | checkpoint/pretrain_{2}_step_{0}.pt\n"
NAME = "20260102_030405"


def steps(first, last, run=NAME, task="pretrain"):
    """What is logged from one step to another: each step has its own loss, every third a validation, too."""
    lines = [form.format(step, 9 - step / 50, run) for step in range(first, last + 1)
             for form in (STEP_TRAIN, *(STEP_VAL, STEP_SAVE) * (step % 3 == 0))]  # fmt: skip
    return "".join(lines).replace("pretrain_", f"{task}_")


def header(since=0, task="pretrain", **more):
    return "# " + json.dumps(HEADER | {"task": task, "resumed_from_step": since, **more}) + "\n"


def curves(*paths):
    """[{name of a curve: its points}] of the runs in these logs."""
    logs = [Log(path) for path in paths]
    for log in logs:
        log.read()
    runs = log_reader.merge_runs(logs)
    return [{name: points for name, points in run.curves.items() if points} for run in runs]


def atomic_write(tmp_path, last=30):
    path = tmp_path / "whole.log"
    path.write_text(header(run=NAME) + steps(1, last), "utf-8")
    [run] = curves(path)
    assert run["train/loss"] == [(step, 9 - step / 50) for step in range(1, last + 1)]
    assert {*log_reader.STANDARD, "val/loss/0", "train/load/2"} == run.keys()
    return run


@st.composite
def starts(draw):
    """[(step it goes on from, last step it logs)]: killed anywhere, resumed from any step up to there."""
    pieces, reached = [(0, draw(st.integers(0, 29)))], 0
    for _ in range(draw(st.integers(0, 4))):
        reached = max(reached, pieces[-1][1])
        since = draw(st.integers(0, min(reached, pieces[-1][1])))
        pieces.append((since, draw(st.integers(since, 29))))
    since = draw(st.integers(0, pieces[-1][1]))
    return [*pieces, (since, 30)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(starts(), st.data())
def test_a_resumed_run_is_one_curve_however_it_was_cut(tmp_path, pieces, data):
    text = ""
    for since, last in pieces:
        text += header(since, run=NAME) + steps(since + 1, last)
        if last < 30:  # killed while it wrote one more line, or after a power cut: zeros
            line = STEP_TRAIN.format(last + 1, 1.25)
            text += line[: data.draw(st.integers(0, len(line)))]
            text += data.draw(st.sampled_from(["", "\n", "\0\0"]))
    path = tmp_path / "train_x.log"
    path.write_text(text, "utf-8")
    assert curves(path) == [atomic_write(tmp_path)]
    (log := Log(path)).read()
    assert f"{len(pieces)} starts" in log.run.summary or len(pieces) == 1

    # The same for one that is followed while it is written.
    log, rest = Log(path), text.encode()
    path.write_bytes(b"")
    while rest:
        size = data.draw(st.integers(1, 9000))
        with open(path, "ab") as file:
            file.write(rest[:size])
        log.read()
        rest = rest[size:]
    assert {name: points for name, points in log.run.curves.items() if points} == atomic_write(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(starts(), st.randoms())
def test_logs_of_before_one_for_each_start_are_joined(tmp_path, pieces, random):
    """Their headers name no run, but their checkpoints do. They may be given in any order."""
    paths = []
    for number, (since, last) in enumerate(pieces):
        path = tmp_path / f"train_{number}.log"
        text = header(since) + steps(since + 1, last) + STEP_SAVE.format(last, 0, NAME)
        path.write_text(text.replace("03:04:05", f"03:04:{number:02d}"), "utf-8")
        paths.append(path)
    random.shuffle(paths)
    assert curves(*paths) == [atomic_write(tmp_path)]


def test_what_is_not_known_to_be_one_run_is_not_joined(tmp_path):
    texts = {
        "first": header() + steps(1, 9),
        "of another run": header(9) + steps(10, 20, run="20260102_999999"),
        "of another task": header(9, task="sft") + steps(10, 20, task="sft"),
        "without a checkpoint": header(9) + steps(10, 11),
        "of two runs": header(9) + steps(10, 20) + steps(21, 30, run="20260102_999999"),
        "branch": header(9, run="b", branched_from={"run": NAME, "step": 9}) + steps(10, 20, run="b"),
        "without a header": steps(10, 20),
    }
    paths = [tmp_path / f"{name}.log" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, "utf-8")
    runs = curves(*paths)
    assert len(runs) == len(texts)
    assert [run["train/loss"][0][0] for run in runs] == [1, 10, 10, 10, 10, 10, 10]
    (log := Log(paths[-2])).read()
    assert f"steps 10 to 20  ·  branched from {NAME}" in log.run.summary


def test_a_run_that_began_anew_has_nothing_of_before(tmp_path):
    path = tmp_path / "x.log"
    path.write_text(header(run=NAME) + steps(1, 20) + header(run=NAME) + steps(1, 3), "utf-8")
    [run] = curves(path)
    assert run == atomic_write(tmp_path, last=3)


def test_logs_put_together_in_one_file_stay_several_runs(tmp_path):
    path = tmp_path / "all.log"
    path.write_text(header() + steps(1, 9) + header() + steps(1, 12, run="20260102_999999"), "utf-8")
    assert [len(run["train/loss"]) for run in curves(path)] == [9, 12]
    labels = [text.get_text() for text in drawn(path)[0].get_legend().get_texts()]
    assert [label.partition(":")[0] for label in labels[:2]] == ["all", "all (2)"]
    path.write_text(steps(1, 5) + header() + steps(1, 6, run="20260102_999999"), "utf-8")
    assert [len(run["train/loss"]) for run in curves(path)] == [5, 6]
    path.write_text("".join(header(run=f"r{i}") + steps(1, i) for i in range(1, 40)), "utf-8")
    assert [len(run["train/loss"]) for run in curves(path)] == list(range(40 - log_reader.RUNS, 40))
    done = plot("-n", str(path), "-o", str(tmp_path / "x.png"))
    assert done.returncode == 0 and f"holds 39 runs; the last {log_reader.RUNS} are drawn" in done.stderr


def test_the_time_of_a_run_is_that_of_its_starts(tmp_path):
    path = tmp_path / "x.log"
    text = header(run=NAME) + steps(1, 9) + steps(10, 10).replace("03:04:05", "03:14:10")
    text += (header(10, run=NAME) + steps(11, 19) + steps(20, 20).replace("03:04:05", "03:14:10")).replace(
        "2026-01-02", "2026-01-09"
    )
    path.write_text(text, "utf-8")
    (log := Log(path)).read()
    assert log.run.summary == "x.log  ·  3.21 M parameters  ·  20 steps  ·  2 starts  ·  20 min 10 s"


# ---- metrics files ---------------------------------------------------------------------------------------


def metrics_of(text):
    """The lines of the metrics file for this readable log, with losses that are a little different."""
    lines = []
    for line in text.splitlines():
        if event := log_reader.parse_line(line + "\n"):
            if event["event"] == "train":
                event["loss"] += 1e-9
            lines.append(json.dumps(event) + "\n")
    return lines


def exactly(run, *changed):
    """The curves of `whole`, with the losses of these steps as its metrics file has them."""
    train = [(step, loss + 1e-9 * (step in changed)) for step, loss in run["train/loss"]]
    return run | {"train/loss": train}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(starts(), st.data())
def test_the_numbers_are_those_of_the_metrics_file_as_far_as_it_has_them(tmp_path, pieces, data):
    """It may have been begun by a later start only, have lost lines, or end in half a line."""
    texts = [header(since, run=NAME) + steps(since + 1, last) for since, last in pieces]
    log, metrics = tmp_path / "train_x.log", tmp_path / "train_x.metrics.jsonl"
    log.write_text("".join(texts), "utf-8")
    lines = [metrics_of(text) for text in texts]
    metrics.write_text("".join(line for one in lines for line in one), "utf-8")
    everything = exactly(atomic_write(tmp_path), *range(31))
    assert curves(log) == curves(metrics) == curves(metrics, log) == [everything]

    kept = lines[data.draw(st.integers(0, len(lines) - 1)) :]
    kept = [
        line for first, *others in kept for line in (first, *(x for x in others if data.draw(st.booleans())))
    ]
    half = metrics_of(steps(5, 5))[0][: data.draw(st.integers(1, 40))] + "\n"
    damaged = data.draw(st.lists(st.sampled_from([half, "\0\0\n", "null\n"]), max_size=3))
    metrics.write_text(
        "".join([*kept, *damaged, '{"event": "train", "step": "5", "loss": 1}\n', "{}\n"]), "utf-8"
    )
    (file := LogFile(metrics)).read()
    assert curves(log) == [exactly(atomic_write(tmp_path), *dict(file.runs[0].train))]
    assert file.n_damaged == len(damaged)


def test_a_followed_run_with_its_metrics_file(tmp_path):
    log, metrics = tmp_path / "train_x.log", tmp_path / "train_x.metrics.jsonl"
    log.write_text(header(run=NAME))
    follower = Log(log)
    assert follower.read() and follower.is_waiting and not follower.read()
    log.write_text(header(run=NAME) + steps(1, 2))
    assert follower.read() and follower.run.train == [(1, 8.98), (2, 8.96)]
    metrics.write_text("".join(metrics_of(header(run=NAME) + steps(1, 2))))
    assert follower.read() and follower.run.train == [(1, 8.98 + 1e-9), (2, 8.96 + 1e-9)]
    with open(metrics, "a") as file:
        file.write("".join(metrics_of(steps(3, 3))))
    assert follower.read() and [step for step, _ in follower.run.train] == [1, 2, 3]
    assert not follower.read() and not [*follower.notices()]


def test_a_run_whose_two_files_are_named_is_drawn_once(tmp_path, monkeypatch):
    text = header(run=NAME) + steps(1, 9)
    for name in ("train_1", "train_2"):
        (tmp_path / f"{name}.log").write_text(text.replace(NAME, name))
        (tmp_path / f"{name}.metrics.jsonl").write_text("".join(metrics_of(text.replace(NAME, name))))
    monkeypatch.chdir(tmp_path)
    names = ["train_1.log", "train_1.metrics.jsonl", "train_2.metrics.jsonl", "./train_2.log"]
    assert plot_loss.find_logs(names) == [Path("train_1.log"), Path("train_2.log")]
    assert len(curves(*plot_loss.find_logs(names))) == 2
    Path("train_2.log").unlink()
    assert plot_loss.find_logs(names[:3]) == [Path("train_1.log"), Path("train_2.metrics.jsonl")]
    done = plot("-n", "train_2.metrics.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and Path("train_2.png").exists()


def test_a_metrics_file_that_does_not_match_its_log_is_named(tmp_path):
    log, metrics = tmp_path / "train_x.log", tmp_path / "train_x.metrics.jsonl"
    log.write_text(header(run=NAME) + steps(1, 20) + header(9, run=NAME) + steps(10, 30))
    for other in (header(run="another") + steps(1, 5), header(3, run=NAME) + steps(4, 5), steps(1, 5)):
        metrics.write_text("".join(metrics_of(other)))
        assert curves(log) == [atomic_write(tmp_path)]
        (one := Log(log)).read()
        assert list(one.notices()) == [f"{metrics} does not match {log}; the numbers of the latter are drawn"]
    log.write_text(header(9, run=NAME) + steps(10, 30))  # the first part of the readable log is lost
    metrics.write_text(
        "".join(metrics_of(header(run=NAME) + steps(1, 20) + header(9, run=NAME) + steps(10, 30)))
    )
    assert curves(log) == [exactly(atomic_write(tmp_path), *range(31))]
    log.write_text(header(run=NAME) + steps(1, 30))
    for other in (b"", bytes(range(256)) * 50, b"1" * 3_000_000 + b"\n"):
        metrics.write_bytes(other)
        assert curves(log) == [atomic_write(tmp_path)]
        (one := Log(log)).read()
        assert all(notice.startswith(f"{metrics}: ") for notice in one.notices())


def test_damaged_lines_and_null_in_a_metrics_file_are_told(tmp_path):
    path = tmp_path / "train_x.metrics.jsonl"
    lines = metrics_of(header(run=NAME) + steps(1, 9))
    lines[3:3] = ['{"event": "tra\n', "Train | Epoch\n", "[1]\n"]
    lost = {"event": "train", "epoch": 0, "step": 10, "loss": None, "lr": 1, "odd": True, "big": 10**400}
    path.write_text("".join([*lines, json.dumps(lost) + "\n"]))
    (log := Log(path)).read()
    assert (
        len(log.run.train) == 10 and "odd" not in log.run.model_metrics and "big" not in log.run.model_metrics
    )
    assert list(log.notices()) == [
        "train_x: 1 of 10 losses NaN or infinite",
        f"{path}: damaged lines are passed over: 3; the first one is line 4",
    ]


# ---- several validation files ----------------------------------------------------------------------------


def test_the_loss_of_one_validation_file_is_not_that_of_all(tmp_path):
    path = tmp_path / "train_x.log"
    pairs = [["a", "data/wiki_val.bin"], ["b", "data\\novel_val.bin"]]
    line = VAL.replace("| BPB", "| Loss/0: 2.5 | Loss/1: 4.5 | BPB")
    text = header(run="x", train_config={"dataset_path": pairs})
    text += "".join(TRAIN.format(1, i, 7 - i / 50) for i in range(1, 101))
    text += line.format(50, 3.5) + line.format(100, 3.5)
    path.write_text(text, "utf-8")
    (log := Log(path)).read()
    assert log.run.val == [(50, 3.5), (100, 3.5)]
    assert log.run.parts == {0: [(50, 2.5), (100, 2.5)], 1: [(50, 4.5), (100, 4.5)]}
    loss = drawn(path)[0]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels[-2:] == ["validation of wiki_val: 2.500", "validation of novel_val: 4.500"]
    assert loss.get_ylim()[0] < 2.5  # they are seen whole
    assert len(drawn(path, write_log(tmp_path / "other.log"))[0].get_legend().get_texts()) == 3


@pytest.mark.parametrize("path", [None, 3, [], [["a"]], [["a", 3], ["b", "c"]], [["a", "b"]], {"a": "b"}])
def test_validation_files_that_the_header_does_not_name(tmp_path, path):
    log = tmp_path / "train_x.log"
    text = header(run="x", train_config={"dataset_path": path}) + TRAIN.format(1, 1, 7)
    log.write_text(text + VAL.replace("| BPB", "| Loss/0: 2 | Loss/1: 4 | BPB").format(1, 3), "utf-8")
    labels = [text.get_text() for text in drawn(log)[0].get_legend().get_texts()]
    assert labels[-2:] == ["validation of file 0: 2.000", "validation of file 1: 4.000"]
    log.write_text(log.read_text("utf-8").replace("Loss/0", "Loss/3").replace("Loss/1", "Loss/99"), "utf-8")
    assert drawn(log)[0].get_legend()


# ---- logs that cannot be drawn, and such as nobody has written ---------------------------------------------


def test_one_log_that_cannot_be_drawn_does_not_keep_back_the_others(tmp_path):
    good, empty, foreign = tmp_path / "good.log", tmp_path / "empty.log", tmp_path / "foreign.log"
    write_log(good)
    empty.write_text(header(run="x"))
    foreign.write_bytes(bytes(range(256)) * 50)
    done = plot("-n", str(empty), str(good), str(foreign), "-o", str(tmp_path / "x.png"))
    assert done.returncode == 0 and (tmp_path / "x.png").exists()
    assert done.stderr.splitlines() == [
        f"left out: {empty} holds no training step yet; --follow waits for the first one",
        f"left out: {foreign} is not a training log: no line in it is a training step",
    ]
    done = plot("-n", str(empty), str(foreign), "-o", str(tmp_path / "y.png"))
    assert done.returncode == 2 and not (tmp_path / "y.png").exists()
    assert done.stderr == f"error: none of these 2 logs can be drawn: {empty} holds no training step yet; " \
                          "--follow waits for the first one\n"  # fmt: skip


ODD = [None, True, -1, 1.5, 10**20, "", "x" * 300, "a\nb", [], [1], {}, {"run": 3, "step": "x"}]
KEYS = ["task", "n_params", "run", "resumed_from_step", "branched_from", "train_config"]


@pytest.mark.parametrize("key", KEYS)
def test_odd_headers(tmp_path, key):
    for number, value in enumerate(ODD):
        path = tmp_path / f"{number}.log"
        path.write_text(header(**{key: value}) * 2 + steps(1, 9), "utf-8")
        axes = drawn(path)
        assert len(axes) == 5 and axes[0].lines
    assert drawn(*tmp_path.glob("*.log"))


HOSTILE = {
    "a line without an end": b"1" * 30_000_000,
    "a line without an end, of fields": b" | Val | Loss: " * 2_000_000,
    "digits": (b"Step: 1 Loss " + b"1" * 900_000 + b"\n") * 20,
    "digits and points": (b"Step: 1 Loss 1.0 " + b"1." * 490 + b"\n") * 2000,
    "our fields": (TRAIN.format(1, 1, 1).strip() + " | a: 1" * 100_000 + "\n").encode() * 20,
    "blanks": (b"Step:" + b" " * 990 + b"\n") * 2000,
    "headers": (header(run="x").encode() + TRAIN.format(1, 1, 1).encode()) * 30_000,
    "a deep object": (b'{"event": "train", "step": 1, "loss": ' + b"[" * 900_000 + b"\n") * 20,
    "a long number": (b'{"event": "train", "step": 1, "loss": ' + b"1" * 900_000 + b"}\n") * 20,
    "names": b'{"event": "train", "step": 1, "loss": 1%s}\n'
    % b"".join(b', "n%d": 1' % i for i in range(60_000))
    * 5,
    "a deep header": (b'# {"a": ' + b"[" * 900_000 + b"\n") * 20,
    "a long number in a header": (b'# {"resumed_from_step": ' + b"1" * 900_000 + b"}\n") * 20,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lines_are_read_in_time_and_the_rest_drawn(tmp_path, content):
    path = tmp_path / "train_x.log"
    path.write_bytes(TRAIN.format(1, 1, 7.5).encode() + content + b"\n" + TRAIN.format(1, 2, 7.25).encode())
    log, before = Log(path), time.process_time()
    log.read()
    assert time.process_time() - before < 10  # what grows with the square takes hours
    assert log.run.train[-1] == (2, 7.25) and not log.read()


def test_a_long_line_is_passed_over_and_told(tmp_path):
    path = tmp_path / "train_x.log"
    path.write_bytes(b"x" * (5 * log_reader.LINE) + b"\n")
    write_log(tmp_path / "good.log")
    with open(path, "ab") as file:
        file.write((tmp_path / "good.log").read_bytes() + b"y" * (log_reader.LINE + 9))
    done = plot("-n", str(path), "-o", str(tmp_path / "x.png"))
    assert done.returncode == 0 and "lines of more than 1 MB are passed over: 2\n" in done.stderr
    (log := Log(path)).read()
    offset = log.file.offset
    assert not log.read() and offset == path.stat().st_size  # what is passed over is not read again


def test_numbers_that_are_none():
    for loss in ("9" * 5000, "1." + "9" * 5000, "1e99999", "١", "1_0", "0x10", "", "-"):
        assert taken(TRAIN.format(1, 10, loss)) == ([], [], [], [])
        assert not taken(f"2024-04-01 | Step: 10 | Loss: {loss} |")[0]
    for step in ("9" * 5000, 10**15, "-1", "1.5", "x", ""):
        assert taken(TRAIN.format(1, step, 3.5)) == ([], [], [], [])
    [(step, _)] = taken(TRAIN.format(1, 999_999_999_999, 3.5))[0]
    assert plot_loss.short_count(step + 1) == "1T"


def test_a_long_log_is_thinned_and_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(log_reader, "POINTS", 2000)
    path = tmp_path / "train_x.log"
    text = header(run="x") + "".join(TRAIN.format(1, i, 7) for i in range(1, 5001))
    path.write_text(text + VAL.format(5000, 6))
    (log := Log(path)).read()
    assert sum(map(len, log.run.curves.values())) <= 2000 and log.run.val == [(5000, 6)]
    assert np.diff([step for step, _ in log.run.train]).tolist() == [16] * (len(log.run.train) - 1)
    assert list(log.notices()) == ["train_x: one of 16 of its 5,000 training steps is drawn"]


def test_more_is_watched_than_a_picture_holds(tmp_path):
    path = tmp_path / "train_x.log"
    names = [f"| n{i}: 3 | deep/{i}: 4 | Time" for i in range(1, 301)]
    path.write_text("".join(TRAIN.format(1, i, 7).replace("| Time", more) for i, more in enumerate(names, 1)))
    (log := Log(path)).read()
    assert len(log.run.model_metrics) == log_reader.NAMES and len(log.run.curves) <= log_reader.CURVES + 1
    done = plot("-n", str(path), "-o", str(tmp_path / "x.png"))
    assert done.returncode == 0 and "logs more than a chart has room for" in done.stderr


# ---- legends and axes ------------------------------------------------------------------------------------


def test_a_legend_of_many_runs_hides_no_curve(tmp_path):
    paths = [write_log(tmp_path / f"{'long ' * 20}{i}.log", steps=100) for i in range(40)]
    figure = Figure()
    logs = [Log(path) for path in paths]
    for log in logs:
        log.read()
    draw(figure, logs)
    figure.canvas.draw()
    loss = figure.axes[0]
    assert loss.get_legend().get_window_extent().y1 <= loss.get_window_extent().y0
    texts = [text.get_text() for text in loss.get_legend().get_texts()]
    assert len(texts) == plot_loss.KEYS + 1 and texts[-1] == "and 11 more"
    assert all("…" in text and len(text) < 120 for text in texts[:-1]) and len({*texts}) == len(texts)
    assert loss.get_window_extent().width > 0.6 * figure.bbox.width
    thick = [line.get_color() for line in loss.lines if line.get_linewidth() == 1.9]
    assert len({*map(str, thick)}) == 40


def test_a_long_line_under_the_title_takes_no_room_from_the_curves(tmp_path):
    one, two = write_log(tmp_path / f"{'long ' * 20}.log"), write_log(tmp_path / "b.log", "sft")
    logs, figure = [Log(path) for path in (one, two)], Figure()
    for log in logs:
        log.read()
    draw(figure, logs)
    figure.canvas.draw()
    assert "\n" in figure.axes[0].texts[0].get_text()
    widths = [panel.get_window_extent().width for panel in figure.axes[:2]]
    assert min(widths) > 0.35 * figure.bbox.width


def test_logs_of_one_name_are_told_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_log(tmp_path / folder / "train.log")
    labels = drawn(tmp_path / "a" / "train.log", tmp_path / "b" / "train.log")[0].get_legend().get_texts()
    assert [label.get_text().partition(":")[0] for label in labels[:2]] == ["a/train", "b/train"]


def test_counts_on_the_axis():
    counts = {0: "0", 9_999: "9,999", 10_000: "10k", 12_500: "12.5k", 1_250_000: "1.25M", 3 * 10**9: "3G"}
    assert {steps: plot_loss.short_count(steps) for steps in counts} == counts


# ---- scores of tasks ---------------------------------------------------------------------------------------


def scored_log(path, steps, resumed_from=0, **scores):
    """A metrics file with a score for each task at each of these steps; base rates are 0.25."""
    with open(path, "a", encoding="utf-8") as file:
        events = [HEADER | {"event": "start", "run": path.name[6:21], "resumed_from_step": resumed_from}]
        for step in steps:
            events.append({"event": "train", "step": step, "loss": 3.0})
            for task, score in scores.items():
                values = {"task": task, "score": score + step / 100, "base_rate": 0.25, "n": 9}
                events.append({"event": "task", "step": step, **values})
        file.writelines(json.dumps(event) + "\n" for event in events)
    return path


def score_panel(*paths):
    logs = [Log(path) for path in paths]
    for log in logs:
        log.read()
    draw(figure := Figure(), logs)
    [panel] = [axes for axes in figure.axes if axes.get_ylabel() == "score (%)"]
    lines = [line for line in panel.lines if len(line.get_xdata()) > 1 and line.get_linestyle() == "-"]
    rates = [
        line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == "--" and len(line.get_xdata())
    ]
    return lines, rates, [text.get_text() for text in panel.get_legend().get_texts()]


def test_scores_of_a_run_that_was_resumed(tmp_path):
    path = tmp_path / "train_20260102_030405.metrics.jsonl"
    scored_log(path, (10, 20, 30), spelling=0.1, _own=0.2)
    scored_log(path, (30, 40), resumed_from=20, spelling=0.2, _own=0.3)
    lines, rates, keys = score_panel(path)
    assert [line.get_ydata().round(6).tolist() for line in lines] == [[20, 30, 50, 60], [30, 40, 60, 70]]
    assert [line.get_xdata().tolist() for line in lines] == [[10, 20, 30, 40]] * 2
    assert rates == [25, 25] and keys == ["spelling: 60.00 %", "own: 70.00 %", "base rate"]


def test_scores_of_several_runs(tmp_path):
    one = scored_log(tmp_path / "train_20260102_030405.metrics.jsonl", (10, 20), spelling=0.1, world=0.2)
    two = scored_log(tmp_path / "train_20260102_040405.metrics.jsonl", (10, 20), world=0.3)
    lines, rates, keys = score_panel(one, two)
    assert [line.get_marker() for line in lines] == ["o", "s", "s"]  # a marker for each task
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()  # a colour for each run
    assert rates == [25, 25] and keys == ["spelling", "world", "base rate"]


def test_more_tasks_than_a_chart_has_room_for(tmp_path):
    path = scored_log(tmp_path / "train_x.metrics.jsonl", (10, 20), **{f"task{i}": 0.1 for i in range(20)})
    lines, _, _ = score_panel(path)
    (log := Log(path)).read()
    assert len(lines) == log_reader.TASKS and any("more than a chart" in notice for notice in log.notices())
