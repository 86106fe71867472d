"""What distributed training costs: time with DDP, memory with ZeRO, the link between machines.

python benchmark/spread_cost.py time          # DDP: 2 processes with one thread each, against 1 with two
python benchmark/spread_cost.py memory        # bytes in each process, and the formulas of the ZeRO paper
python benchmark/spread_cost.py link          # two network namespaces, with links of different speeds
python -m torch.distributed.run --nnodes 2 ... benchmark/spread_cost.py check      # a real link, on both
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import run_launched  # noqa: E402
from config.schema import DeepSpeedConfig, ModelConfig, TrainConfig  # noqa: E402

MODELS = {  # name -> (shape, rows of a global batch)
    "4 M": (dict(block_size=256, vocab_size=4000, n_layer=4, n_head=4, n_embd=256), 8),
    "21 M": (dict(block_size=256, vocab_size=4000, n_layer=6, n_head=8, n_embd=512), 4),
}
MEMORY_MODEL = dict(block_size=64, vocab_size=4000, n_layer=8, n_head=8, n_embd=512)
WAYS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
# Weights + gradients + optimizer state: two moments and, in DeepSpeed, a copy of the weights.
FORMULAS = ("4 + 4 + 8", "4 + 4 + 12/N", "4 + (4 + 12)/N", "(4 + 4 + 12)/N")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=("time", "memory", "link", "check"))
    parser.add_argument("--steps", type=int, default=10, help="steps of each measurement (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measurements (default: 3)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(**json.loads(args.worker))
    {"time": measure_time, "memory": measure_memory, "link": measure_link, "check": check}[args.what](args)


def launch(n_processes, n_threads, **job):
    """Run `worker` in n_processes processes. Returns the result of rank 0."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
    with tempfile.NamedTemporaryFile() as result:
        job = json.dumps({**job, "out": result.name, "n_threads": n_threads})
        environment = {"OMP_NUM_THREADS": str(n_threads), "DS_ACCELERATOR": "cpu"}
        subprocess.run(
            [sys.executable, "-m", *launcher, __file__, "time", "--worker", job],
            check=True, stderr=subprocess.PIPE, env={**os.environ, **environment},
        )  # fmt: skip
        return json.loads(Path(result.name).read_text("utf-8"))


def measure_time(args):
    from rich.console import Console
    from rich.table import Table

    table = Table(title="milliseconds a step, and the exchange of gradients")
    for name in ("model", "accu-\nmulation", "1 process,\n2 threads", "2 processes,\n1 thread", "ratio",
                 "buckets\na step", "first bucket is sent\nafter, of a backward"):  # fmt: skip
        table.add_column(name, justify="right")
    for name in MODELS:
        for accumulation in (1, 4):
            job = dict(kind="time", model=name, accumulation=accumulation, steps=args.steps)
            runs = [(launch(1, 2, **job), launch(2, 1, **job)) for _ in range(args.rounds)]
            one, two = (statistics.median(run[i]["ms"] for run in runs) for i in (0, 1))
            spread = runs[-1][1]
            table.add_row(
                name, str(accumulation), f"{one:.0f}", f"{two:.0f}", f"{one / two:.2f}",
                f"{spread['buckets']:.0f}", f"{spread['first']:.0%}",
            )  # fmt: skip
    Console().print(table)


def measure_memory(args):
    from rich.console import Console
    from rich.table import Table

    table = Table(title="bytes per parameter in each of N = 2 processes, float32, AdamW")
    for name in ("", "formula", "formula, N = 2", "at the end of the backward pass", "between steps"):
        table.add_column(name, justify="right")
    for stage, (way, formula) in enumerate(zip(WAYS, FORMULAS, strict=True)):
        found = launch(2, 1, kind="memory", stage=stage)
        by_formula = eval(formula, {"N": 2})
        measured = (f"{found[moment]:.2f}" for moment in ("backward", "between"))
        table.add_row(way, formula, f"{by_formula:.1f}", *measured)
    Console().print(table)


TWO_MACHINES = """
set -e
mount -t tmpfs none /run
for n in 1 2; do ip netns add node$n; ip -n node$n link set lo up; done
ip link add cable1 netns node1 type veth peer name cable2 netns node2
for n in 1 2; do
    ip -n node$n addr add 10.77.0.$n/24 dev cable$n
    ip -n node$n link set cable$n up
    ip netns exec node$n tc qdisc add dev cable$n root tbf rate {gbit}gbit burst 1mb latency 400ms
done
for n in 2 1; do
    GLOO_SOCKET_IFNAME=cable$n OMP_NUM_THREADS=1 ip netns exec node$n {python} -m torch.distributed.run \\
        --nnodes 2 --node_rank $((n - 1)) --nproc_per_node 1 --master_addr 10.77.0.1 --master_port 29500 \\
        {script} time --worker {job} &
done
wait
"""


def measure_link(args):
    """Time DDP over links of different speeds, beside the estimate of `train.py --plan`."""
    from types import SimpleNamespace

    from rich.console import Console
    from rich.table import Table

    from common.hardware import detect_machine, resolve_compute
    from config.stages import STAGES
    from engine.plan import RunEstimate

    table = Table(title="2 machines with one thread each: milliseconds per step")
    for name in ("model", "Gbit/s", "1 machine", "2 machines", "speed-up", "estimate"):
        table.add_column(name, justify="right")
    for name, (shape, rows) in MODELS.items():
        job = dict(kind="time", model=name, accumulation=1, steps=args.steps)
        alone = launch(1, 1, **job)["ms"]
        config, model = built(shape, batch_size=rows)
        batches = SimpleNamespace(sequences_per_epoch=1, batch_size=rows)
        compute = resolve_compute(detect_machine("cpu"), "cpu", "float32")
        estimate = RunEstimate(STAGES["pretrain"], config, compute, model, batches)
        for gbit in (10, 1, 0.3):
            with tempfile.NamedTemporaryFile() as result:
                worker = json.dumps({**job, "out": result.name, "n_threads": 1})
                words = {"python": sys.executable, "script": str(Path(__file__).resolve()), "job": worker}
                script = TWO_MACHINES.format(
                    gbit=gbit, **{key: shlex.quote(word) for key, word in words.items()}
                )
                command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-c", script]
                subprocess.run(command, check=True, stderr=subprocess.PIPE)
                both = json.loads(Path(result.name).read_text("utf-8"))["ms"]
            least, most = estimate.speed_up(2, gbit, alone / 1000)
            table.add_row(name, f"{gbit:g}", f"{alone:.0f}", f"{both:.0f}", f"{alone / both:.2f}",
                          f"{least:.2f} to {most:.2f}")  # fmt: skip
    Console().print(table)


def check(args):
    """Measure the speed of all-reducing gradients. Start it on all machines with the launcher."""
    import torch
    import torch.distributed as dist

    from common.hardware import detect_machine, resolve_compute
    from engine.parallel import DataParallel

    with DataParallel("auto", resolve_compute(detect_machine("auto"), "auto", "float32")) as parallel:
        for megabytes in (1, 4, 16, 64):
            gradients = torch.ones(megabytes * 2**18, device=parallel.device)
            times = []
            for _ in range(5):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(gradients)
                float(gradients[0])  # waits for a GPU
                times.append(time.perf_counter() - began)
            seconds = statistics.median(times)
            moved = 2 * (parallel.world_size - 1) / parallel.world_size * megabytes * 2**20 * 8
            if not parallel.rank:
                speed = moved / seconds / 1e9
                print(f"{megabytes:3} MiB of gradients: {1000 * seconds:7.1f} ms = {speed:.2f} Gbit/s")


# ---- in the processes ------------------------------------------------------------------------------------


def worker(kind, out, n_threads, **job):
    import torch

    from common.hardware import detect_machine, keep_freed_memory, resolve_compute

    torch.set_num_threads(n_threads)
    keep_freed_memory()
    compute = resolve_compute(detect_machine("cpu"), "cpu", "float32")
    result = {"time": time_worker, "memory": memory_worker}[kind](compute, **job)
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(result), "utf-8")


def built(shape, **settings):
    import torch

    from model import GPT

    torch.manual_seed(0)
    config = TrainConfig(dataset_path=[("", "")], decay_lr=False, **settings)
    return config, GPT(ModelConfig(**shape).resolved(0))


class Training:
    """A model as the training loop (train.py) has it, and the two halves of a step."""

    def __init__(self, parallel, model, config, compute):
        import objectives
        from engine.optimizer import make_optimizer
        from objectives import LossModule

        self.parallel, self.model, self.config = parallel, model, config
        optimizer = make_optimizer(model, config, compute.dtype, parallel.muon)
        module = LossModule(model, objectives.find("lm"))
        self.rows = parallel.rows(config)  # first: DeepSpeed's batch sizes follow from them
        self.module, self.optimizer = parallel.wrap(module, optimizer, config, compute)

    def passes(self, tokens, seen):
        """One step's forward and backward passes. seen: when the last backward pass began and ended."""
        import torch

        for first in self.rows:
            with self.parallel.micro_batch(first == self.rows[-1]):
                x = tokens[first : first + self.rows.step]
                loss, _ = self.module({"x": x, "y": x, "mask": torch.ones(x.shape)})
                seen["backward"] = time.perf_counter()
                self.parallel.backward(loss / tokens.numel())
                seen["end"] = time.perf_counter()

    def update(self):
        """Change the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        self.parallel.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def time_worker(compute, model, accumulation, steps):
    """Milliseconds of a step; buckets of gradients sent per step; when the first of them is ready."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from engine.parallel import DataParallel

    shape, rows = MODELS[model]
    config, model = built(shape, batch_size=rows // accumulation, gradient_accumulation_steps=accumulation)
    seen = {"buckets": 0, "first": []}
    with DataParallel("gloo", compute) as parallel:
        model.use_custom_kernels(True)
        training = Training(parallel, model, config, compute)

        def hook(group, bucket):
            seen["buckets"] += 1
            if bucket.index() == 0:
                seen["sent"] = time.perf_counter()
            return allreduce_hook(group, bucket)

        training.module.register_comm_hook(None, hook)
        tokens = torch.randint(shape["vocab_size"], (rows, shape["block_size"]))
        for step in range(3 + steps):
            if step == 3:  # DDP arranges its buckets in the first steps
                began, seen["buckets"], seen["first"] = time.perf_counter(), 0, []
            training.passes(tokens, seen)
            seen["first"].append((seen["sent"] - seen["backward"]) / (seen["end"] - seen["backward"]))
            training.update()
        took = time.perf_counter() - began
    first = statistics.median(seen["first"])
    return {"ms": 1000 * took / steps, "buckets": seen["buckets"] / steps, "first": first}


def memory_worker(compute, stage):
    """Bytes of all tensors of this process, per parameter, at two moments of the third step."""
    import torch

    from engine.parallel import DataParallel
    from engine.zero import Zero

    config, model = built(MEMORY_MODEL, batch_size=2)
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
    if stage == 3:
        zero = {**zero, "stage3_param_persistence_threshold": 0}
    settings = DeepSpeedConfig(zero_optimization=zero)
    make = (lambda: Zero(settings, "", "gloo", compute)) if stage else (lambda: DataParallel("gloo", compute))
    found = {}
    with make() as parallel:
        training = Training(parallel, model, config, compute)
        tokens = torch.zeros(2, 8, dtype=torch.long)
        for _ in range(3):
            training.passes(tokens, {})
            found["backward"] = tensor_bytes()
            training.update()
            found["between"] = tensor_bytes()
    return {moment: size / model.n_params for moment, size in found.items()}


def tensor_bytes():
    """Bytes of all tensors in this process, counting each storage once."""
    import torch

    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    run_launched(main) if "RANK" in os.environ else main()
