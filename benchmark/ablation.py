"""How much each optimization for speed gains: Nano's training step with it and without it.

    python benchmark/ablation.py                 # about four minutes
    python benchmark/ablation.py --compile       # with torch.compile; takes longer

In float32 on the CPU, with the models of train_speed.py. For each row, two processes take turns of half a
second, because one kernel gains less than the speed of a machine drifts.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import train_speed  # noqa: E402
from common.errors import UserError, run  # noqa: E402

KERNELS = {  # a kernel of common/kernels.py -> the class of model.py that uses it
    "causal attention": {"Attention"},
    "head and loss": {"GPT"},
}
LEFT_OUT = {"kept memory": {"kept memory"}, **KERNELS, "both kernels": set().union(*KERNELS.values())}
TURN = 0.5  # seconds


def prepare(shape, batch_size, compiled, without):
    """Build this process's model and warm it up."""
    global step, batches
    import torch

    torch.manual_seed(0)
    model, step = train_speed.nano(shape, None, without)
    if compiled:
        model.train().compile()
    batches = train_speed.random_batches(shape, batch_size)
    for batch in batches[: train_speed.WARM_UP]:
        step(*batch)


def turn():
    """Train for one turn. Returns [(milliseconds, minor page faults)] of each step."""
    import resource

    taken, end = [], time.perf_counter() + TURN
    while time.perf_counter() < end:
        start, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step(*batches[len(taken) % len(batches)])
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        taken.append((1e3 * (time.perf_counter() - start), faults))
    return taken


def compare(seconds, without, *setting):
    """Returns the steps' median (milliseconds, page faults) with everything, and without some of it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as one, ProcessPoolExecutor(1, context) as other:
        pools, steps = (one, other), ([], [])
        for pool, missing in zip(pools, ((), without), strict=True):
            pool.submit(prepare, *setting, missing).result()
        for _ in range(max(1, round(seconds / 2 / TURN))):
            for pool, taken in zip(pools, steps, strict=True):
                taken += pool.submit(turn).result()
    return [[statistics.median(values) for values in zip(*taken, strict=True)] for taken in steps]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile, which needs a C++ compiler"
    )
    parser.add_argument("--seconds", type=float, default=15, help="time to measure per row (15)")
    args = parser.parse_args()
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds must be above 0, not {args.seconds}")

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for (title, shape), batch_size in zip(train_speed.MODELS.items(), (4, 12), strict=True):
        title += f", batch {batch_size} x {shape.block_size}" + ", torch.compile" * args.compile
        table = Table("left out", title=title)
        for name in ("ms/step", "without", "slower by", "page faults", "without"):
            table.add_column(name, justify="right")
        with console.status("") as status:
            for name, without in LEFT_OUT.items():
                status.update(f"{title}: {name}")
                (whole, faults), (partial, more) = compare(
                    args.seconds, without, shape, batch_size, args.compile
                )
                table.add_row(
                    name, f"{whole:.1f}", f"{partial:.1f}", f"{partial / whole - 1:+.1%}",
                    f"{faults:,.0f}", f"{more:,.0f}",
                )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    run(main)
