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
from matplotlib.figure import Figure

import plot_loss
from plot_loss import Log, draw, duration, finite, smooth, thin

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


def plot(*arguments, cwd=None):
    environment = {key: value for key, value in os.environ.items() if "DISPLAY" not in key} | {
        "MPLBACKEND": "agg"
    }
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def taken(line):
    log = Log(Path("x.log"))
    log.take(line)
    return log.train, log.val, log.rate, log.speed


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
    assert log.read() and log.train == [(1, 7.5)]
    assert not log.read()
    with open(path, "a") as file:
        file.write(TRAIN.format(1, 2, 7.25)[90:])
    assert log.read() and log.train == [(1, 7.5), (2, 7.25)]
    path.write_text(TRAIN.format(1, 1, 5.0))  # begun anew
    assert log.read() and log.train == [(1, 5.0)]


def test_smoothing_keeps_constants_the_start_and_the_length():
    assert smooth(np.full(1000, 3.0)) == pytest.approx(3.0)
    noisy = 3 + np.random.default_rng(0).normal(size=6400)
    assert len(smooth(noisy)) == 6400 and smooth(noisy)[0] == noisy[0]
    assert smooth(noisy)[200:].std() < 0.15
    assert smooth(np.array([5.0])).tolist() == [5.0]


def test_thinning_keeps_every_extreme():
    x, y = np.arange(100_000.0), np.random.default_rng(0).normal(size=100_000)
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == len(thin_y) <= 2400
    assert thin_y.min() == y.min() and thin_y.max() == y.max() and (np.diff(thin_x) >= 0).all()
    assert thin(x[:5], y[:5])[0] is not thin_x and len(thin(x[:5], y[:5])[0]) == 5


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
        plot_loss.run(plot_loss.main)
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
    with pytest.raises(plot_loss.UserError, match="no train_"):
        plot_loss.find_logs(None)
    for age, name in enumerate(("train_b.log", "train_a.log")):
        os.utime(write_log(tmp_path / name), (1e9 - age, 1e9 - age))
    assert plot_loss.find_logs(None) == [tmp_path / "train_b.log"]
    assert plot_loss.find_logs(["train_a.log"]) == [tmp_path / "train_a.log"]  # from any folder


def test_follow_waits_for_the_first_step_and_ends_at_ctrl_c(tmp_path):
    log, picture = tmp_path / "train_x.log", tmp_path / "x.png"
    log.write_text("# " + json.dumps(HEADER) + "\n")
    code = (
        "import sys, signal, plot_loss\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a child of `nohup` ignores it
        "plot_loss.to_file.__defaults__ = (0.1,)\n"  # seconds between looks
        f"sys.argv = ['plot_loss.py', '-n', {str(log)!r}, '-o', {str(picture)!r}, '--follow']\n"
        "plot_loss.run(plot_loss.main)"
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

        def pause(self, seconds):
            self.pauses += 1
            write_log(path, steps=20 * self.pauses)

        def fignum_exists(self, number):
            return self.pauses < 3

    path, window = write_log(tmp_path / "a.log"), Pyplot()
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
    assert list(log.watched) == ["mtp_loss", "expert_load"] and list(log.watched["expert_load"]) == [1, 12]
    assert log.watched["expert_load"][12] == [(step, 2.5) for step in range(1, 101)]
    assert log.watched["mtp_loss"] == {None: [(step, 8 - step / 100) for step in range(1, 101)]}
    assert len(log.train) == len(log.rate) == len(log.speed) == 100 and log.train[0] == (1, 6.99)

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
