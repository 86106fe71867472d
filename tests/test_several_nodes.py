"""Two machines, as far as programs can tell: two network namespaces, joined by a cable of their own.

Each has its copy of the project, of the configuration and of the data, and only the first has the
checkpoints. This is the recipe of doc/several_machines.md.
"""

import re
import shlex
import subprocess

import pytest
from launching import RUN, largest_difference, losses, settings_of, with_prelude

from engine.checkpoint import load

ROOM = """
set -e
mount -t tmpfs none /run
for node in 1 2; do
    ip netns add node$node
    ip -n node$node link set lo up
done
ip link add cable1 netns node1 type veth peer name cable2 netns node2
for node in 1 2; do
    ip -n node$node addr add 10.77.0.$node/24 dev cable$node
    ip -n node$node link set cable$node up
done
"""


def in_a_room(script):
    """Run a shell script in which node1 and node2 are namespaces, with 10.77.0.1 and 10.77.0.2."""
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-c", ROOM + script]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def room():
    try:
        done = in_a_room("ip netns exec node1 true")
    except FileNotFoundError as error:
        pytest.skip(f"network namespaces need {error.filename}")
    if done.returncode:
        pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
    return in_a_room


TORCHRUN = "torch.distributed.run --nnodes 2 --node_rank {rank} --nproc_per_node 1 " \
           "--master_addr 10.77.0.1 --master_port 29500"  # fmt: skip
DEEPSPEED = "deepspeed.launcher.runner --hostfile {hostfile} --no_ssh --node_rank {rank} " \
            "--master_addr 10.77.0.1 --master_port 29500"  # fmt: skip


def run_on_both(room, projects, launcher, script, *args, **settings):
    """-> the CompletedProcess of both nodes; their exit codes are in its output."""
    commands = []
    for rank, project in enumerate(projects):
        hostfile = project.root / "config" / "hostfile.txt"
        hostfile.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
        module = launcher.format(
            rank=rank, node=rank + 1, first=not rank, hostfile=shlex.quote(str(hostfile))
        )
        rest = shlex.join(map(str, [project.root / script, *args, *settings_of(settings)]))
        commands.append(
            f"cd {shlex.quote(str(project.elsewhere))}; GLOO_SOCKET_IFNAME=cable{rank + 1} "
            f"ip netns exec node{rank + 1} {shlex.quote(project.command('')[0])} -m {module} {rest}"
        )
    first, second = commands
    environment = "export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu\n"
    return room(f"{environment}({second}) & ({first}); echo first: $?; wait $!; echo second: $?")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "script"),
    [(TORCHRUN, "train_ddp.py"), (TORCHRUN, "train_deepspeed.py"), (DEEPSPEED, "train_deepspeed.py")],
)
def test_two_machines_train_and_resume(room, tiny_project, other_project, train, launcher, script):
    assert train("pretrain", **RUN).returncode == 0
    for steps, more in ((30, ()), (50, ("--resume",))):
        settings = {**RUN, "max_steps": steps, "lr_decay_iters": 50}
        both = tiny_project, other_project
        done = run_on_both(room, both, launcher, script, "-t", "pretrain", *more, **settings)
        assert "first: 0" in done.stdout and "second: 0" in done.stdout, done.stdout + done.stderr
        assert done.stdout.count(f"Done: step {steps}") == 1
    assert largest_difference(losses(train), losses(tiny_project)) <= 1e-4
    assert load(tiny_project.checkpoints()[50]).step == 50
    assert not other_project.checkpoints() and not losses(other_project)


@pytest.mark.slow
def test_machines_that_are_not_furnished_alike_are_refused(room, tiny_project, other_project):
    config = other_project.root / "config" / "config_pretrain.json"
    config.write_text(config.read_text("utf-8").replace("0.01", "0.02"), "utf-8")
    done = run_on_both(room, (tiny_project, other_project), TORCHRUN, "train_ddp.py", "-t", "pretrain")
    assert "learning_rate is 0.02 there and 0.01 here" in done.stderr
    assert done.stderr.count("error: ") <= 2  # at most once on each


ELASTIC = "torch.distributed.run --nnodes 2 --nproc_per_node 1 --max-restarts 3 --rdzv_backend c10d " \
          "--rdzv_endpoint 10.77.0.1:29500 --rdzv_conf is_host={first} " \
          "--local_addr 10.77.0.{node}"  # fmt: skip

KILLED = """
import os, signal
import engine.parallel

original, calls = engine.parallel.DataParallel.step, 0

def step(*args):
    global calls
    calls += 1
    if calls == 30 and os.environ["RANK"] == "VICTIM" and not os.path.exists(__file__ + ".killed"):
        open(__file__ + ".killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

engine.parallel.DataParallel.step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_brought_back_on_both(room, tiny_project, other_project, train, victim):
    """The way back of doc/several_machines.md: each machine's launcher starts its process anew."""
    settings = {**RUN, "save_interval": 10}
    assert train("pretrain", **settings).returncode == 0
    for project in (tiny_project, other_project):
        script = with_prelude(project, KILLED.replace("VICTIM", str(victim)))
    done = run_on_both(room, (tiny_project, other_project), ELASTIC, script, "-t", "pretrain", **settings)
    assert "first: 0" in done.stdout and "second: 0" in done.stdout, done.stdout + done.stderr
    assert ((tiny_project, other_project)[victim].root / f"{script}.killed").exists()
    assert done.stdout.count("Done: step 50") == 1
    curve, again = (dict(place.logged("Train", "Loss")) for place in (train, tiny_project))
    assert curve.keys() == again.keys()
    assert max(abs(float(curve[step]) - float(again[step])) for step in curve) <= 1e-5


STOPPED = """
import os, signal, time
import engine.heartbeat, engine.parallel

engine.heartbeat.ANSWER_TIMEOUT = 3.0
original = engine.parallel.DataParallel.reached

def reached(self, step):
    original(self, step)
    if step == 30 and not self.rank:
        if not os.fork():
            time.sleep(8)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)

engine.parallel.DataParallel.reached = reached
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "script"), [(TORCHRUN, "train_ddp.py"), (DEEPSPEED, "train_deepspeed.py")]
)
def test_the_second_machine_says_that_the_first_one_does_not_answer(
    room, tiny_project, other_project, launcher, script
):
    """With DeepSpeed it has the store through which they hear of each other."""
    both = tiny_project, other_project
    for project in both:
        prelude = with_prelude(project, STOPPED, script)
    done = run_on_both(room, both, launcher, prelude, "-t", "pretrain", **RUN)
    assert "first: 0" in done.stdout and "second: 0" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("Done: step 50") == 1
    waits = re.findall(r"^Waiting for (.*): no answer for \d+ s, last seen in step \d+\.$", done.stderr, re.M)
    [ends] = re.findall(r"^No longer waiting for (process 0 on .*), after \d+ s\.$", done.stderr, re.M)
    assert len(waits) in (1, 2) and {*waits} == {ends}
