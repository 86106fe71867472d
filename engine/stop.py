"""How a run ends before its end: by a signal, with its terminal, or with the launcher that started it."""

import contextlib
import os
import signal
import sys
import threading
import time

GRACE = 30.0  # seconds for a step to end when the launcher has: the other processes may be gone


class StopRequest:
    """Ctrl-C, SIGTERM, or SIGHUP of a terminal that closes: `asked` becomes true, and the loop ends after its
    step. The second Ctrl-C or SIGTERM ends it at once.

    launcher: None, or the `Launcher` of one of several processes. It passes on what the terminal has sent
    already, and ends the processes itself if they take too long; so the second signal is not another wish.
    Nor is the second SIGHUP: shell and terminal send one each. What nohup has started ignores it still.
    """

    def __init__(self, launcher=None):
        self.asked, self.launcher = False, launcher
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self)

    def __call__(self, number, frame):
        self.asked = True
        if number in self.before and not self.launcher:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def heard(self):
        """The loop has ended: what is still to be written may take its time."""
        if self.launcher:
            self.launcher.step_ended = True


class Launcher(threading.Thread):
    """The process that has started this one. When it ends first (killed, say), this process does what SIGTERM
    asks for; if its step does not end within GRACE seconds, it ends all the same.
    """

    def __init__(self):
        import psutil

        super().__init__(daemon=True)
        self.step_ended, self.is_double = False, False
        with contextlib.suppress(psutil.Error):  # it is out of sight, or about to end
            parent = psutil.Process(os.getppid())
            # The `deepspeed` command starts another process, and that one those that train.
            self.is_double = "deepspeed.launcher.launch" in parent.cmdline() and any(
                "deepspeed" in word for word in parent.parent().cmdline()
            )
        self.processes = self._processes()
        self.start()

    def _processes(self):
        """By which this one was started: these numbers change when one of them ends."""
        import psutil

        parent = os.getppid()
        with contextlib.suppress(psutil.Error):
            return parent, psutil.Process(parent).ppid() if self.is_double else None

    def run(self):
        while self._processes() == self.processes:
            time.sleep(1)
        if os.environ["LOCAL_RANK"] == "0":
            _say("The launcher has ended, and so does this run.")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        if not self.step_ended:
            _say(f"Process {os.environ['RANK']} cannot end its step; it ends at once.")
            os._exit(1)


def _say(line):
    with contextlib.suppress(OSError):  # nobody may be left to read it
        print(line, file=sys.stderr, flush=True)
