"""How a run ends early: by a signal, with its terminal, or with the launcher that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType

GRACE = 30.0  # seconds for the current step to end after the launcher died: other processes may be gone, too


class StopRequest:
    """Turns Ctrl-C, SIGTERM and the SIGHUP of a closing terminal into `requested = True`.

    The training loop then ends after its current step. A second Ctrl-C or SIGTERM ends the process at once.

    launcher: None, or the `Launcher` of a launched process. A launcher forwards what the terminal has already
    sent, and kills slow processes itself, so there a second signal means nothing new. The same goes for a
    second SIGHUP, because shell and terminal send one each. Under nohup, SIGHUP stays ignored.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.requested, self.launcher = False, launcher
        self.previous = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number in self.previous and not self.launcher:
            for previous_number, handler in self.previous.items():
                signal.signal(previous_number, handler)

    def loop_ended(self) -> None:
        """Tell that the training loop has ended. Saving may now take longer than GRACE."""
        if self.launcher:
            self.launcher.step_ended = True


class Launcher(threading.Thread):
    """Watches the process that started this one.

    If the launcher ends first (it was killed, say), this process sends itself SIGTERM. If its step does not
    end within GRACE seconds, it exits anyway.
    """

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self.step_ended, self.is_double = False, False
        with contextlib.suppress(psutil.Error):  # the parent is not visible, or about to end
            parent = psutil.Process(os.getppid())
            # The `deepspeed` command starts a second launcher, which starts the training processes.
            self.is_double = "deepspeed.launcher.launch" in parent.cmdline() and any(
                "deepspeed" in word for word in parent.parent().cmdline()
            )
        self.pids = self._pids()
        self.start()

    def _pids(self) -> tuple[int, int | None] | None:
        """The IDs of the parent and, with two launchers, of its parent. They change when one of them ends."""
        import psutil

        parent = os.getppid()
        with contextlib.suppress(psutil.Error):
            return parent, psutil.Process(parent).ppid() if self.is_double else None
        return None

    def run(self) -> None:
        while self._pids() == self.pids:
            time.sleep(1)
        if os.environ["LOCAL_RANK"] == "0":
            _say("The launcher has ended, and so does this run.")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        if not self.step_ended:
            _say(f"Process {os.environ['RANK']} cannot finish its step and ends now.")
            os._exit(1)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed
        print(line, file=sys.stderr, flush=True)
