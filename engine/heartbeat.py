"""Who of several processes does not answer: each of them beats, and watches the others.

A process that is stopped (SIGSTOP, a debugger, a machine asleep) keeps its connections, so the others would
wait for it in silence until TIMEOUT of engine/parallel.py. So each one counts, in the store by which the
processes have found each other, while its main thread works: a long validation, the writing of a checkpoint
and waiting for somebody else do not keep it from counting. Whose count stands still for a minute, by the
clock of the one that looks, is named, and again each minute, by the lowest-ranked process that answers.
"""

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

import torch.distributed as dist

from common.metrics import duration

MINUTE = 60.0  # seconds; there are twelve beats in it
SHOWN = 8  # names at once
LAUNCHER = -1  # in place of a rank
FOREVER = datetime.timedelta(days=365)


class Heartbeat:
    """Beats and watches from its making to `stop`. `step`: the one this process is in, or None.

    The store is the launcher's or, where that has none, the first process's. While its owner is stopped, a
    call waits and cannot be ended; hence one thread that calls, and another one that watches.
    """

    def __init__(self, rank, world):
        self.rank, self.world, self.step = rank, world, None
        self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        owner = LAUNCHER if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self.watch = Watch(rank, world, int(os.environ["LOCAL_RANK"]), owner, self.address)
        self.counts = {}  # as `Watch.look` needs them
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=one, daemon=True) for one in (self._beat, self._look)]
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.ended.set()
        for thread in self.threads:
            thread.join(1)  # not longer: it may be in a call that waits

    def _beat(self):
        rounds = 0
        while not self.ended.wait(MINUTE / 60):
            # A connection of its own tells when the store ends: its calls then print a page of C++.
            with (
                contextlib.suppress(OSError, dist.DistError),
                socket.create_connection(self.address, MINUTE) as owner,
            ):
                store = dist.TCPStore(*self.address, wait_for_workers=False, timeout=FOREVER)
                store, there = dist.PrefixStore("heartbeat", store), []
                while not select.select([owner], [], [], 0)[0]:
                    rounds += 1
                    mine = [rounds, self.step, os.getpid(), socket.gethostname()]
                    store.set(str(self.rank), json.dumps(mine))
                    there += [rank for rank in map(str, range(self.world))
                              if rank not in there and store.check([rank])]  # fmt: skip
                    theirs = zip(map(int, there), map(json.loads, store.multi_get(there)), strict=True)
                    self.counts = {**dict(theirs), LAUNCHER: [rounds]}
                    if self.ended.wait(MINUTE / 12):
                        return

    def _look(self):
        last = time.monotonic()
        while not self.ended.wait(MINUTE / 12):
            now = time.monotonic()
            # Was this process stopped itself, or the machine asleep, no more than one look has been missed.
            elapsed, last = min(now - last, MINUTE / 6), now
            for line in self.watch.look(self.counts, self.step, elapsed):
                with contextlib.suppress(OSError):  # stderr has been closed
                    print(line, file=sys.stderr, flush=True)


class Watch:
    """What one process knows of the others, and has to say.

    owner: of the store, 0 or LAUNCHER. While it is silent, nothing is known of the others: they are taken to
    be as they were, and on each machine one process says so, as they cannot agree on one.
    """

    def __init__(self, rank, world, local_rank, owner, address):
        self.rank, self.first_here, self.owner, self.address = rank, rank - local_rank, owner, address
        self.silence = {one: 0.0 for one in (*range(world), owner) if one != rank}  # seconds
        self.since_owner = 0.0  # has answered
        self.since_said = math.inf
        self.counts, self.step, self.known, self.told = {}, None, {}, {}

    def look(self, counts, step, elapsed):
        """-> lines to say. step: of this process; elapsed: seconds since the last look.

        counts: {rank: [count, step, pid, host]} as last read, and at LAUNCHER how often they were read.
        """
        answered = counts.get(LAUNCHER) != self.counts.get(LAUNCHER)
        moved = step != self.step  # which takes all of them
        self.since_owner = 0.0 if answered or moved else self.since_owner + elapsed
        self.since_said += elapsed
        for one in self.silence:
            beats = counts.get(one) != self.counts.get(one)
            if beats and one in self.counts:  # the first may be what is left of a process before a restart
                self.known[one] = counts[one]
            if beats or moved:
                self.silence[one] = 0.0
            elif answered or one == self.owner:
                self.silence[one] += elapsed
        self.counts, self.step = counts, step
        missing = {one: seconds for one, seconds in self.silence.items() if seconds >= MINUTE}
        lines = [
            f"No longer waiting for {self._name(one)}, after {duration(self.told.pop(one))}."
            for one in sorted(self.told.keys() - missing.keys())
        ]
        self.told |= {one: missing[one] for one in self.told}
        if missing and self.since_said >= MINUTE and self._speaks():
            self.since_said, self.told = 0.0, missing
            lines += [self._waiting(*one) for one in [*missing.items()][:SHOWN]]
            if len(missing) > SHOWN:
                lines.append(f"... and for {len(missing) - SHOWN} more.")
        return lines

    def _speaks(self):
        """Whether this is the lowest-ranked process that answers, of its machine if they cannot ask."""
        alone = self.since_owner >= MINUTE
        lower = range(self.first_here if alone else 0, self.rank)
        return not any(self.silence[one] < MINUTE and (alone or one in self.known) for one in lower)

    def _waiting(self, one, seconds):
        if one not in self.known:
            return f"Waiting for {self._name(one)}: not there after {duration(seconds)}."
        step = one != LAUNCHER and self.known[one][1]
        seen = f", last seen in step {step}" if step else ""
        return f"Waiting for {self._name(one)}: no answer for {duration(seconds)}{seen}."

    def _name(self, one):
        if one == LAUNCHER:
            return "the launcher at {}:{}".format(*self.address)
        if one not in self.known:
            return f"process {one}"
        _, _, pid, host = self.known[one]
        return f"process {one} on {host} (pid {pid})"
