"""Find out which process of a distributed run has stopped answering.

A process that is stopped (SIGSTOP, a debugger, a sleeping machine) keeps its connections open, so the others
would wait for it silently until TIMEOUT of engine/parallel.py. Therefore a thread of each process keeps
counting in the store through which the processes found each other. It goes on during a long validation, while
a checkpoint is written, and while waiting for other processes. A process whose count has not changed for a
minute, by the clock of the observer, is reported once a minute by the lowest rank that still answers.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import select
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from common.metrics import duration

ANSWER_TIMEOUT = 60.0  # seconds without an answer before a process is reported; it beats twelve times in them
MAX_NAMED = 8  # processes named in one report
LAUNCHER = -1  # stands for the launcher where a rank is expected
FOREVER = datetime.timedelta(days=365)


class Heartbeat:
    """Beats and watches in two background threads until `stop`. step: the one this process is in, or None.

    The store belongs to the launcher or, if that has none, to rank 0. While its owner is stopped, calls to it
    block and cannot be cancelled; that is why one thread makes the calls and another one watches.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.step: int | None = None
        self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        owner = LAUNCHER if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self.watch = Watch(rank, world, int(os.environ["LOCAL_RANK"]), owner, self.address)
        self.counts: dict[int, list[Any]] = {}  # for `Watch.update`
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in (self._beat, self._report)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End both threads."""
        self.ended.set()
        for thread in self.threads:
            thread.join(1)  # no longer, because the thread may be blocked in a call to the store

    def _beat(self) -> None:
        """Write this process's count to the store, and read those of the others."""
        rounds = 0
        while not self.ended.wait(ANSWER_TIMEOUT / 60):
            # A second, plain connection shows when the store is gone: calling it then prints a page of C++.
            with (
                contextlib.suppress(OSError, dist.DistError),
                socket.create_connection(self.address, ANSWER_TIMEOUT) as connection,
            ):
                tcp_store = dist.TCPStore(*self.address, wait_for_workers=False, timeout=FOREVER)
                store = dist.PrefixStore("heartbeat", tcp_store)
                present: list[str] = []  # ranks that have beaten at least once
                while not select.select([connection], [], [], 0)[0]:
                    rounds += 1
                    own = [rounds, self.step, os.getpid(), socket.gethostname()]
                    store.set(str(self.rank), json.dumps(own))
                    present += [rank for rank in map(str, range(self.world))
                                if rank not in present and store.check([rank])]  # fmt: skip
                    read = zip(map(int, present), map(json.loads, store.multi_get(present)), strict=True)
                    self.counts = {**dict(read), LAUNCHER: [rounds]}
                    if self.ended.wait(ANSWER_TIMEOUT / 12):
                        return

    def _report(self) -> None:
        """Print what the watch has to report."""
        last = time.monotonic()
        while not self.ended.wait(ANSWER_TIMEOUT / 12):
            now = time.monotonic()
            # If this process itself was stopped, or the machine asleep, count at most one missed beat.
            elapsed, last = min(now - last, ANSWER_TIMEOUT / 6), now
            for line in self.watch.update(self.counts, self.step, elapsed):
                with contextlib.suppress(OSError):  # stderr has been closed
                    print(line, file=sys.stderr, flush=True)


class Watch:
    """What one process knows about the others, and which reports follow from it. No threads, no clock.

    owner: of the store, 0 or LAUNCHER. While the owner is silent, nothing new is known about the other
    processes, so their state is assumed not to change. The processes cannot agree on a single reporter then,
    so one process on every machine reports.
    """

    def __init__(self, rank: int, world: int, local_rank: int, owner: int, address: tuple[str, int]) -> None:
        self.rank, self.first_rank_here, self.owner, self.address = rank, rank - local_rank, owner, address
        self.silence = {other: 0.0 for other in (*range(world), owner) if other != rank}  # in seconds
        self.owner_silence = 0.0  # the same for the store, whoever owns it
        self.since_report = math.inf
        self.counts: dict[int, list[Any]] = {}
        self.step: int | None = None
        self.last_seen: dict[int, list[Any]] = {}  # {rank: [count, step, pid, host]}
        self.reported: dict[int, float] = {}  # {rank: its silence when it was last missing}

    def update(self, counts: dict[int, list[Any]], step: int | None, elapsed: float) -> list[str]:
        """Update with the latest counts. Returns the lines to print.

        counts: {rank: [count, step, pid, host]} as last read; under LAUNCHER, how often they have been read.
        step: the current one of this process. elapsed: seconds since the previous call.
        """
        store_answered = counts.get(LAUNCHER) != self.counts.get(LAUNCHER)
        stepped = step != self.step  # a step needs all processes, so none of them is stopped
        self.owner_silence = 0.0 if store_answered or stepped else self.owner_silence + elapsed
        self.since_report += elapsed
        for other in self.silence:
            beat = counts.get(other) != self.counts.get(other)
            if beat and other in self.counts:  # the first count may be left from before a restart
                self.last_seen[other] = counts[other]
            if beat or stepped:
                self.silence[other] = 0.0
            elif store_answered or other == self.owner:
                self.silence[other] += elapsed
        self.counts, self.step = counts, step
        missing = {other: seconds for other, seconds in self.silence.items() if seconds >= ANSWER_TIMEOUT}
        lines = [
            f"No longer waiting for {self._name(other)}, after {duration(self.reported.pop(other))}."
            for other in sorted(self.reported.keys() - missing.keys())
        ]
        self.reported |= {other: missing[other] for other in self.reported}
        if missing and self.since_report >= ANSWER_TIMEOUT and self._is_reporter():
            self.since_report, self.reported = 0.0, missing
            lines += [self._waiting(*item) for item in [*missing.items()][:MAX_NAMED]]
            if len(missing) > MAX_NAMED:
                lines.append(f"... and for {len(missing) - MAX_NAMED} more.")
        return lines

    def _is_reporter(self) -> bool:
        """Whether this is the lowest rank that answers; of this machine, if the store does not answer."""
        store_lost = self.owner_silence >= ANSWER_TIMEOUT
        lower = range(self.first_rank_here if store_lost else 0, self.rank)
        return not any(
            self.silence[other] < ANSWER_TIMEOUT and (store_lost or other in self.last_seen)
            for other in lower
        )

    def _waiting(self, other: int, seconds: float) -> str:
        if other not in self.last_seen:
            return f"Waiting for {self._name(other)}: it has not joined after {duration(seconds)}."
        step = other != LAUNCHER and self.last_seen[other][1]
        seen = f", last seen in step {step}" if step else ""
        return f"Waiting for {self._name(other)}: no answer for {duration(seconds)}{seen}."

    def _name(self, other: int) -> str:
        if other == LAUNCHER:
            return "the launcher at {}:{}".format(*self.address)
        if other not in self.last_seen:
            return f"process {other}"
        _, _, pid, host = self.last_seen[other]
        return f"process {other} on {host} (pid {pid})"
