"""Signals and dying launchers. Real runs are stopped in tests/test_train.py and tests/test_faults.py."""

import os
import signal
import subprocess
import sys

import pytest
from launching import deepspeed, finish

from common.config import ROOT
from engine.stop import StopRequest

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def caught():
    """The signals that reached the previous handlers."""
    numbers, before = [], {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        signal.signal(number, lambda number, frame: numbers.append(number))
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_asks_and_a_second_one_insists(caught, number):
    stop = StopRequest()
    signal.raise_signal(number)
    assert stop.requested and not caught
    signal.raise_signal(number)
    # Shell and terminal send one SIGHUP each, so a second one means nothing new.
    assert caught == ([] if number == signal.SIGHUP else [number])


@pytest.mark.parametrize("number", ENDING)
def test_a_launcher_may_send_it_twice(caught, number):
    stop = StopRequest(launcher=object())
    for _ in range(3):
        signal.raise_signal(number)
    assert stop.requested and not caught


def test_what_nohup_ignores_stays_ignored(caught):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---- the launcher is killed --------------------------------------------------------------------------------

LAUNCHED = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from engine import stop
stop.GRACE = 1.5
os.environ.update(RANK="3", LOCAL_RANK="0")
launcher = stop.Launcher()
"""
STARTS = 'print("started", flush=True)\ntime.sleep(60)'
TRAINS = """
request = stop.StopRequest(launcher)
print("started", flush=True)
while not request.requested:
    time.sleep(0.1)
"""
STUCK = TRAINS + "time.sleep(60)"  # because the other processes are gone
SAVES = TRAINS + 'request.loop_ended()\ntime.sleep(2.5)\nprint("saved", flush=True)'


@pytest.mark.parametrize(
    ("works", "output", "errors"),
    [(STARTS, "", 1), (STUCK, "", 2), (SAVES, "saved\n", 1)],
    ids=["before it trains", "its step does not end", "saving takes long"],
)
def test_a_process_ends_when_its_launcher_is_killed(works, output, errors):
    launch = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCHED + works!r}])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", launch], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "started\n"
    launcher.kill()
    stdout, stderr = launcher.communicate(timeout=20)  # until the child ends, too: it has the same pipes
    said = "The launcher has ended, and so does this run.", "Process 3 cannot finish its step and ends now."
    assert stdout == output and tuple(stderr.splitlines()) == said[:errors]


@pytest.mark.slow
def test_both_launchers_of_deepspeed_are_watched(tmp_path):
    """`deepspeed` starts a second launcher, and that the training processes. Killing the first stops all."""
    (tmp_path / "works.py").write_text(LAUNCHED + STARTS)
    command = [sys.executable, "-m", *deepspeed(), tmp_path / "works.py"]
    runner = subprocess.Popen(
        command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    for _ in range(2):
        assert any(line == "started\n" for line in runner.stdout)
    runner.kill()
    _, stderr = finish(runner)
    assert stderr.count("The launcher has ended, and so does this run.") == 2
