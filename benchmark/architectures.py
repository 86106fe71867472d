"""Compare all architectures on one text, at equal numbers of parameters: for equal steps and for equal time.

    python benchmark/architectures.py --text book.txt -o architectures.png     # about half an hour
    python benchmark/architectures.py --text book.txt --steps 200 --minutes 1
    python benchmark/architectures.py --text book.txt --minutes 0 --set random_seed=2

Each is trained by train.py, as a user would start it, on the first 95 % of the text's paragraphs, with a
character tokenizer, in float32. First, all take the same number of steps. Then each takes as many steps as
fit in the same time, by the speed of its first run. The learning rate's schedule always ends with the run.
The loss is measured on all of the held-out text.

The width inside the MLP (or inside an expert) is chosen so that all have the same number of parameters. With
experts, a token uses only a part of them, so such an architecture computes less for its size.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
from benchmark.copies import copy_of_project, timed  # noqa: E402
from common.errors import UserError, run  # noqa: E402
from common.log_reader import Log  # noqa: E402
from common.metrics import METRICS_SUFFIX  # noqa: E402
from plot_loss import PALETTE  # noqa: E402

COMMON = {"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128}
# name -> (further keys, the key that sets the number of parameters)
ARCHITECTURES = {
    "nano": ({"n_kv_head": 2}, "n_hidden"),
    "llama3": (
        {"n_kv_head": 2, "qk_norm": False, "tie_embeddings": False, "rope_theta": 500000.0},
        "n_hidden",
    ),
    "nanochat": ({"architecture": "nanochat", "n_kv_head": 2}, "n_hidden"),
    "deepseek_v3": (
        {
            "architecture": "deepseek_v3", "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
            "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
        },
        "moe_intermediate_size",
    ),
}  # fmt: skip
RUN = {
    "device": "cpu", "dtype": "float32", "batch_size": 16, "learning_rate": 3e-3, "min_lr": 0.0,
    "warmup_iters": 30, "log_interval": 10, "eval_interval": 100, "eval_iters": 100_000,
    "save_interval": 1 << 40,
}  # fmt: skip


def sized(name, vocab_size, n_params):
    """The configuration of an architecture whose number of parameters is closest to n_params."""
    import torch

    shape, key = ARCHITECTURES[name]

    def built(width):
        config = models.check_config({**COMMON, **shape, key: width}, name).resolved(vocab_size)
        with torch.device("meta"):
            return config, models.build(config).n_params

    low, high = 1, 1 << 14
    while high - low > 1:  # the number of parameters grows with the width
        middle = (low + high) // 2
        low, high = (middle, high) if built(middle)[1] <= n_params else (low, middle)
    return min((built(low), built(high)), key=lambda pair: abs(pair[1] - n_params))[0]


def train(config, steps, folder, changes):
    """Train on the data in `folder`. Returns a Result. changes: "key=value" for --set of train.py."""
    import torch

    copy = copy_of_project(folder)
    paths = [str(folder / f"pretrain_{split}.bin") for split in ("train", "val")]
    settings = RUN | {"max_steps": steps, "warmup_iters": min(RUN["warmup_iters"], steps - 1)}
    settings |= {"dataset_path": [paths], "tokenizer_path": str(folder / "tokenizer.json")}
    (copy / "run.json").write_text(json.dumps(settings), "utf-8")
    (copy / "model.json").write_text(config.model_dump_json(), "utf-8")
    changes = [part for change in changes for part in ("--set", change)]
    arguments = ["-t", "pretrain", "-c", "run.json", "-m", "model.json", *changes]
    timed(config.architecture, copy / "train.py", *arguments)
    [path] = copy.glob("train_*.log")
    log, text = Log(path), path.with_suffix(METRICS_SUFFIX).read_text("utf-8")
    log.read()
    events = [json.loads(line) for line in text.splitlines()]
    times = [event["step_seconds"] for event in events if event["event"] == "train"]
    seconds = statistics.median(times[1:] or times)  # the first steps also load libraries
    tokens = RUN["batch_size"] * config.block_size / seconds
    with torch.device("meta"):
        model = models.build(config)
    cache = model.new_cache(1)
    kept = [tensor for layer in cache.layers if layer for tensor in vars(layer).values()]
    n_bytes = 4 * sum(tensor.numel() for tensor in kept) // cache.capacity  # of float32
    row = {
        "parameters": f"{model.n_params:,}",
        "weights used a token": f"{model.costs(config.block_size, training=False).weights:,}",
        "steps": f"{steps:,}",
        "loss": f"{log.run.val[-1][1]:.4f}",
        "bits per byte": f"{[event['bpb'] for event in events if event['event'] == 'val'][-1]:.4f}",
        "tokens/s": f"{tokens:,.0f}",
        "GFLOP/s": f"{tokens * model.flops_per_token() / 1e9:.0f}",
        "cache, bytes a token": f"{n_bytes:,}",
    }
    return Result(row, seconds, log)


@dataclass
class Result:
    row: dict
    seconds_per_step: float
    log: Log


def draw(results, path):
    """Plot losses over steps and over time. results: {"equal steps": {name: Result}, "equal time": ...}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    plots = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (title, runs) in zip(plots, results.items(), strict=True):
        lowest = []
        for i, (name, result) in enumerate(runs.items()):
            scale = result.seconds_per_step if title == "equal time" else 1
            thin, dots = {"alpha": 0.35, "linewidth": 1}, {"marker": "o", "markersize": 4, "label": name}
            for points, style in ((result.log.run.train, thin), (result.log.run.val, dots)):
                x, y = zip(*((step * scale, loss) for step, loss in points), strict=True)
                axes.plot(x, y, color=PALETTE[i], **style)
            lowest.append(result.log.run.val[-1][1])
        axes.set(title=title, xlabel="seconds" if title == "equal time" else "step")
        axes.set_ylim(0.97 * min(lowest), 1.35 * max(lowest))
        axes.grid(alpha=0.3)
        axes.legend(title="validation loss", frameon=False)
    figure.axes[0].set_ylabel("loss (nats per token)")
    figure.savefig(path, dpi=120)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="any text in UTF-8")
    add("--steps", type=int, default=600, help="training steps of the first comparison (600)")
    add("--minutes", type=float, default=2.0, help="training time of the second comparison (2); 0: skip it")
    add("--parameters", type=int, default=1_500_000, metavar="N", help="size of every model (1,500,000)")
    add("--only", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES), help="compare only these")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; see train.py")
    add("-o", "--output", metavar="FILE", help="plot the losses to this file")
    args = parser.parse_args()
    if args.steps < 2 or args.minutes < 0:
        raise UserError("--steps must be 2 or more, and --minutes 0 or more")
    return args


def main():
    args = parse_arguments()
    from rich.console import Console
    from rich.table import Table

    from preparation.corpus import prepare

    console, results = Console(highlight=False), {"equal steps": {}, "equal time": {}}
    with tempfile.TemporaryDirectory() as folder, console.status("preparing the text") as status:
        folder = Path(folder)
        _, tokenizer, _ = prepare({"pretrain": [args.text]}, folder)
        for name in args.only:
            config = sized(name, tokenizer.vocab_size, args.parameters)
            status.update(f"{name} trains {args.steps:,} steps")
            first = results["equal steps"][name] = train(config, args.steps, folder, args.set)
            if args.minutes:
                steps = max(2, round(60 * args.minutes / first.seconds_per_step))
                status.update(f"{name} trains {steps:,} steps, {args.minutes:g} minutes")
                results["equal time"][name] = train(config, steps, folder, args.set)
    results = {title: runs for title, runs in results.items() if runs}
    for title, runs in results.items():
        table = Table("", title=title)
        for name in runs:
            table.add_column(name, justify="right")
        for fact in next(iter(runs.values())).row:
            table.add_row(fact, *(result.row[fact] for result in runs.values()))
        console.print(table)
    if args.output:
        draw(results, args.output)
        print(f"chart: {args.output}")


if __name__ == "__main__":
    run(main)
