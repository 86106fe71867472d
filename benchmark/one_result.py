"""Show that one process, DDP and ZeRO have the same losses: train in six ways and compare.

    python benchmark/one_result.py -o doc/one_result.png       # on the prepared data: some minutes

Every run uses the script and the launcher as a user would, in a copy of the project.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UserError, run  # noqa: E402
from common.log_reader import Log  # noqa: E402

CPU = {"device": "cpu"}
THREE = {"stage": 3, "stage3_param_persistence_threshold": 0}
WAYS = {  # name -> DeepSpeed's section zero_optimization; None: without DeepSpeed
    "1 process": None,
    "DDP": None,
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": THREE,
    "ZeRO-3, offload": {**THREE, "offload_optimizer": CPU, "offload_param": CPU},
}
SETTINGS = dict(device="cpu", dtype="float32", max_steps=50, warmup_iters=10, log_interval=1,
                eval_interval=25, batch_size=8, gradient_accumulation_steps=2,
                learning_rate=5e-4, min_lr=5e-5)  # fmt: skip


def train(way, task, project):
    """Train in one way, in the folder `project`. Returns {step: loss} from the log."""
    arguments = ["-t", task]
    for key, value in SETTINGS.items():
        arguments += ["--set", f"{key}={value}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if way == "1 process":
        command = [sys.executable, "train.py", *arguments]
    elif way == "DDP":
        command = [*torchrun, "train_ddp.py", *arguments]
    else:
        path = project / "config" / "one_result.json"
        path.write_text(json.dumps({"zero_optimization": WAYS[way]}), "utf-8")
        command = [*torchrun, "train_deepspeed.py", *arguments, "--deepspeed_config", str(path)]
    before = set(project.glob("train_*.log"))
    done = subprocess.run(command, cwd=project, env={**os.environ, "DS_ACCELERATOR": "cpu"},
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise UserError(f"{way}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'failed'}")
    [path] = set(project.glob("train_*.log")) - before
    log = Log(path)
    log.read()
    return dict(log.run.train)


def draw(curves, path):
    """Plot the curves {task: {way: {step: loss}}}, and below them their differences from the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, squeeze=False, height_ratios=(2, 1))
    for (above, below), (task, ways) in zip(axes.T, curves.items(), strict=True):
        reference = ways["1 process"]
        for i, (way, curve) in enumerate(ways.items()):
            above.plot(curve.keys(), curve.values(), label=way, linewidth=9 - 1.5 * i, alpha=0.6)
            distance = [max(abs(curve[step] - reference[step]), 1e-7) for step in curve]
            below.plot(curve.keys(), distance, color=f"C{i}")
        above.set(title=task, ylabel="loss (nats per token)")
        below.set(yscale="log", ylabel="distance from 1 process", xlabel="step", ylim=(5e-8, 1e-3))
        below.axhline(1e-4, color="grey", linestyle=":")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", default="one_result.png", metavar="FILE", help="the chart (default: %(default)s)"
    )
    args = parser.parse_args()
    if not (ROOT / "dataset" / "prepared").is_dir():
        raise UserError("there is no prepared data: run data.py first")
    from rich.console import Console
    from rich.table import Table

    curves = {"pretrain": {}, "sft": {}}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            project = Path(folder) / str(len(curves["pretrain"]))
            shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "*.log", "checkpoint", "doc"))
            for task in curves:
                print(f"{way}: {task} ...", flush=True)
                curves[task][way] = train(way, task, project)
    table = Table(title="largest difference of any logged loss from that of one process")
    for name in ("", *curves):
        table.add_column(name, justify="right")
    for way in list(WAYS)[1:]:
        ones = [(curves[task][way], curves[task]["1 process"]) for task in curves]
        table.add_row(way, *(f"{max(abs(a[step] - b[step]) for step in b):.0e}" for a, b in ones))
    Console().print(table)
    draw(curves, args.output)
    print(f"chart: {args.output}")


if __name__ == "__main__":
    run(main)
