"""Which processes are reported when some stop. tests/test_faults.py does it with real launchers."""

import re

import pytest
import torch.distributed as dist
import warm
from hypothesis import given
from hypothesis import strategies as st
from launching import free_port

from engine.heartbeat import ANSWER_TIMEOUT, LAUNCHER, MAX_NAMED, Watch

TICK = ANSWER_TIMEOUT / 12  # between two updates


class Processes:
    """Simulated processes that beat and watch. On each tick, every running one updates its watch once.

    per_machine: how many are on each; owner: of the store, 0 or LAUNCHER.
    """

    def __init__(self, world, per_machine, owner):
        address = "10.77.0.1", 29500
        self.watches = [Watch(rank, world, rank % per_machine, owner, address) for rank in range(world)]
        self.read, self.rounds = [{} for _ in range(world)], [0] * world
        self.owner, self.stored, self.step = owner, {}, 1
        self.stopped, self.said = set(), []  # said: (minute, reporting rank, line)
        self.now = 0.0

    def tick(self, n=1):
        for _ in range(n):
            self.now += TICK
            running = [rank for rank in range(len(self.watches)) if rank not in self.stopped]
            self.step += len(running) == len(self.watches)  # a step needs all processes
            for rank in running:
                self.rounds[rank] += 1
                if self.owner not in self.stopped:
                    self.stored[rank] = [self.rounds[rank], self.step, 4000 + rank, "box"]
                    self.read[rank] = {**self.stored, LAUNCHER: [self.rounds[rank]]}
            for rank in running:
                for line in self.watches[rank].update(self.read[rank], self.step, TICK):
                    self.said.append((self.now / ANSWER_TIMEOUT, rank, line))

    def names(self, since=0.0):
        """{reporting rank: set of ranks (or LAUNCHER) that it reported as missing}"""
        found = {}
        for when, by, line in self.said:
            if when >= since and line.startswith("Waiting"):
                whom = re.match(r"Waiting for process (\d+)|Waiting for the launcher", line)[1]
                found.setdefault(by, set()).add(int(whom) if whom else LAUNCHER)
        return found


@given(st.integers(2, 6), st.data())
def test_the_lowest_that_answers_names_all_that_do_not(world, data):
    run = Processes(world, per_machine=data.draw(st.integers(1, world)), owner=LAUNCHER)
    run.tick(3)
    run.stopped = data.draw(st.sets(st.integers(0, world - 1), min_size=1, max_size=world - 1))
    run.tick(12 * 4)
    lowest = min(set(range(world)) - run.stopped)
    assert run.names() == {lowest: run.stopped}
    minutes = sorted({when for when, *_ in run.said})
    assert len(minutes) in (3, 4) and minutes[0] >= 1
    assert all(later - sooner >= 1 - 1e-9 for sooner, later in zip(minutes, minutes[1:], strict=False))

    back, run.stopped, run.said = sorted(run.stopped), set(), []
    run.tick(12 * 4)
    assert [by for _, by, _ in run.said] == [lowest] * len(back)
    for (_, _, line), rank in zip(run.said, back, strict=True):
        pattern = rf"No longer waiting for process {rank} on box \(.*\), after [34] min \d\d s\."
        assert re.fullmatch(pattern, line)


@given(st.integers(2, 6), st.sampled_from([0, LAUNCHER]), st.data())
def test_nobody_is_named_who_was_stopped_for_less_than_a_minute(world, owner, data):
    run = Processes(world, per_machine=world, owner=owner)
    run.tick(3)
    for _ in range(5):
        run.stopped = data.draw(st.sets(st.integers(0, world - 1)))
        run.tick(data.draw(st.integers(0, 10)))
        run.stopped = set()
        run.tick(2)
    assert not run.said


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_when_the_owner_of_the_store_is_stopped_each_machine_is_told(machines, per_machine, others):
    """Rank 0 owns it. Other processes of its machine may have been stopped earlier."""
    world = machines * per_machine
    run = Processes(world, per_machine, owner=0)
    run.tick(3)
    early = set(range(1, min(1 + others, per_machine)))
    run.stopped = set(early)
    run.tick(14 * bool(early))
    run.stopped.add(0)
    run.said = []
    run.tick(12 * 3)
    speakers = {min(set(range(first, first + per_machine)) - run.stopped, default=None)
                for first in range(0, world, per_machine)} - {None}  # fmt: skip
    assert run.names(since=run.now / ANSWER_TIMEOUT - 1) == {speaker: early | {0} for speaker in speakers}
    run.stopped, run.said = set(), []
    run.tick(2)
    assert {by for _, by, _ in run.said} <= speakers | {0}  # rank 0 knows who was stopped before it
    run.said = []
    run.tick(12 * 3)
    assert not run.said


def test_a_launcher_that_is_stopped_is_named_only_if_no_step_goes_on():
    run = Processes(4, per_machine=2, owner=LAUNCHER)
    run.tick(3)
    run.stopped = {LAUNCHER}  # Ctrl-Z stops PyTorch's launcher, but not the processes
    run.tick(40)
    assert not run.said
    run.stopped = {LAUNCHER, 0, 1}  # its machine is asleep
    run.tick(15)
    assert run.names() == {2: {LAUNCHER}}
    assert "Waiting for the launcher at 10.77.0.1:29500: no answer for 1 min 00 s." in run.said[0]


def test_who_has_not_arrived_and_where_somebody_was_seen_last():
    run = Processes(3, per_machine=3, owner=LAUNCHER)
    run.stored[2] = [77, 500, 3999, "box"]  # left in the store from before the launcher restarted
    run.stopped = {2}
    run.tick(15)
    assert [line for _, _, line in run.said] == ["Waiting for process 2: it has not joined after 1 min 00 s."]
    run.stopped, run.said = set(), []
    run.tick(3)
    assert [line for _, _, line in run.said] == ["No longer waiting for process 2, after 1 min 10 s."]
    run.stopped, run.said = {2}, []
    run.tick(14)
    [(_, by, line)] = run.said
    pattern = r"Waiting for process 2 on box \(pid 4002\): no answer for 1 min 00 s, last seen in step \d+\."
    assert by == 0 and re.fullmatch(pattern, line)


def test_before_the_first_process_has_come_nobody_has_a_store():
    run = Processes(3, per_machine=3, owner=0)
    run.stopped = {0}
    run.tick(15)
    assert run.names() == {1: {0}}


def test_many_are_counted():
    run = Processes(40, per_machine=4, owner=LAUNCHER)
    run.tick(3)
    run.stopped = set(range(2, 40))
    run.tick(14)
    assert len(run.said) == MAX_NAMED + 1 and run.said[-1][2] == f"... and for {38 - MAX_NAMED} more."


# ---- with a store, threads and SIGSTOP ---------------------------------------------------------------------

BEATS = """
import os, signal, time
import torch.distributed as dist
from engine import heartbeat

heartbeat.ANSWER_TIMEOUT = 2.4
rank, victim, port = (int(os.environ[name]) for name in ("RANK", "VICTIM", "MASTER_PORT"))
heart = heartbeat.Heartbeat(rank, 3)
heart.step = 7
if not rank and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
time.sleep(1)
if rank == victim:
    if not os.fork():
        time.sleep(4)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
ends = time.monotonic() + (1.5 if rank == victim else 5.5)
while time.monotonic() < ends:
    sum(range(1_000_000)) if rank == 2 else time.sleep(0.1)  # rank 2 is busy, rank 1 waits
heart.stop()
time.sleep(0.5)  # the others need the store to stop
os._exit(0)
"""


@pytest.mark.parametrize("owner", ["first process", pytest.param("launcher", marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_and_goes_on(shared_project, owner, request):
    """Rank 0 is stopped: the others' calls to its store block. A busy process is not reported."""
    script = shared_project.root / "beats.py"
    script.write_text(BEATS, "utf-8")
    request.addfinalizer(script.unlink)
    port = int(free_port())
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "VICTIM": "0"}
    if owner == "launcher":
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: F841
        told["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    envs = [shared_project.environment | told | {"RANK": rank, "LOCAL_RANK": rank} for rank in "012"]
    done = warm.run_together([str(script)], envs, cwd=shared_project.elsewhere, timeout=30)
    assert [one.returncode for one in done] == [0, 0, 0], b"".join(one.stderr for one in done).decode()
    first, second, third = (one.stderr.decode() for one in done)
    assert first == third == ""
    name = r"process 0 on \S+ \(pid \d+\)"
    waits, *more, ends = second.splitlines()
    assert re.fullmatch(rf"Waiting for {name}: no answer for [23] s, last seen in step 7\.", waits)
    assert len(more) <= 1
    assert re.fullmatch(rf"No longer waiting for {name}, after [345] s\.", ends)
