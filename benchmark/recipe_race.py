"""Nano against nanoGPT on nanoGPT's own CPU recipe: how long until the same validation loss is reached?

    git clone https://github.com/karpathy/nanoGPT
    python dataset/download.py tinyshakespeare
    python benchmark/recipe_race.py --nanogpt nanoGPT --text dataset/downloads/tinyshakespeare.txt

Takes about a quarter of an hour. Both train on the first 90 % of the characters of a text, with 12 blocks of
64 tokens per step, in float32. Each uses its own train.py as a user would, and both evaluate every 250 steps.
nanoGPT takes the 2,000 steps of its README; Nano takes fewer, with a model that is no larger. Then the final
models are evaluated on all of the last 10 %, in blocks of 64 that do not overlap.

The time is that of the whole training command. The two take turns, because the speed of a machine drifts. The
table has the median over all rounds, with minimum and maximum.
"""

import argparse
import contextlib
import itertools
import json
import pickle
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import figures  # noqa: E402
from benchmark.copies import copy_of_project, timed  # noqa: E402
from benchmark.train_speed import check_nanogpt, load_nanogpt  # noqa: E402
from common.errors import UserError, run  # noqa: E402

BLOCK, BATCH, EVALUATE = 64, 12, {"eval_interval": 250, "eval_iters": 20}

# From nanoGPT's README, for a CPU. always_save_checkpoint, so that the last model can be evaluated: by
# default, nanoGPT keeps the one with the best loss on 20 batches.
NANOGPT = {
    **EVALUATE, "device": "cpu", "compile": False, "log_interval": 1, "block_size": BLOCK,
    "batch_size": BATCH, "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000,
    "lr_decay_iters": 2000, "dropout": 0.0, "always_save_checkpoint": True,
}  # fmt: skip

# The same depth and width; with this n_hidden, the model is smaller than nanoGPT's, with or without the
# latter's position embedding. A short run needs a high learning rate that decays to zero.
OUR_MODEL = {"block_size": BLOCK, "n_layer": 4, "n_head": 4, "n_embd": 128, "n_hidden": 336}
OUR_RUN = {
    **EVALUATE, "device": "cpu", "dtype": "float32", "batch_size": BATCH, "learning_rate": 3e-3,
    "min_lr": 0.0, "warmup_iters": 50, "weight_decay": 0.1, "beta2": 0.99, "log_interval": 50,
}  # fmt: skip


def prepare(text, folder):
    """Write both trainers' token files of the same split to `folder`.

    Returns the validation ids as each of them numbers characters: {"Nano": [n], "nanoGPT": [n]}.
    """
    import numpy as np
    import torch

    from common.files import AtomicFiles
    from preparation.corpus import encode_texts
    from preparation.token_file import TokenWriter
    from tokenizer import N_SPECIAL, CharTokenizer

    tokenizer = CharTokenizer.train([text])
    tokenizer.save(folder / "tokenizer.json")
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        with AtomicFiles() as files:
            writer = TokenWriter(files, folder / f"pretrain_{name}", "pretrain", tokenizer)
            writer.add(*encode_texts(tokenizer, [part], continues=False, is_open=False))
            writer.finish()
        # nanoGPT numbers the characters in the same order, but without special tokens before them.
        ids = tokenizer.encode(part)
        (ids - N_SPECIAL).astype(np.uint16).tofile(folder / f"{name}.bin")
    # nanoGPT reads the size of its vocabulary from a pickle, which is only written here, never read.
    meta = {"vocab_size": tokenizer.vocab_size - N_SPECIAL}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    ids = torch.from_numpy(ids.astype(np.int64))
    return {"Nano": ids, "nanoGPT": ids - N_SPECIAL}


def train_nanogpt(clone, folder):
    """Train nanoGPT on the files in `folder`. Returns (model, seconds)."""
    import torch

    settings = NANOGPT | {"dataset": folder, "out_dir": folder / "out"}
    options = [f"--{key}={value}" for key, value in settings.items()]
    seconds = timed("nanoGPT", clone.resolve() / "train.py", "config/train_shakespeare_char.py", *options)
    state = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    module = load_nanogpt(clone)
    with contextlib.redirect_stdout(None):
        model = module.GPT(module.GPTConfig(**state["model_args"]))
    model.load_state_dict(state["model"])
    return model, seconds


def train_nano(steps, folder):
    """Train Nano on the files in `folder`. Returns (model, seconds)."""
    copy = copy_of_project(folder)
    config = OUR_RUN | {
        "max_steps": steps,
        "warmup_iters": min(OUR_RUN["warmup_iters"], steps - 1),
        "dataset_path": [[str(folder / f"pretrain_{name}.bin") for name in ("train", "val")]],
        "tokenizer_path": str(folder / "tokenizer.json"),
    }
    (copy / "race.json").write_text(json.dumps(config), encoding="utf-8")
    (copy / "model.json").write_text(json.dumps(OUR_MODEL), encoding="utf-8")
    seconds = timed("Nano", copy / "train.py", "-t", "pretrain", "-c", "race.json", "-m", "model.json")

    from engine import checkpoint as checkpoints

    (path,) = copy.glob(f"checkpoint/*_step_{steps}.pt")
    return checkpoints.build(checkpoints.load(path), path.name)[0], seconds


def validation_loss(model, ids):
    """Loss in nats per token of ids [n]. Each is predicted from those before it in its block."""
    import torch
    from torch.nn.functional import cross_entropy

    from model import GPT

    def total_loss(x, y):
        # nanoGPT's model returns (logits, loss), and the logits of all positions only if it gets the targets.
        logits = model(x) if isinstance(model, GPT) else model(x, y)[0]
        return cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()

    x, y = ids[:-1], ids[1:]
    whole = len(x) // BLOCK * BLOCK  # the rest makes a shorter block
    parts = [tokens[:whole].view(-1, BLOCK).split(64) + (tokens[None, whole:],) for tokens in (x, y)]
    model.eval()
    with torch.no_grad():
        losses = [total_loss(x, y) for x, y in zip(*parts, strict=True) if y.numel()]
    return sum(losses) / len(y)


def result_table(title, runs):
    """runs: {name: [(parameters, steps, loss, seconds) of each round]}"""
    from rich.table import Table

    table = Table("", title=title)
    for name in ("parameters", "steps", "validation loss", "seconds"):
        table.add_column(name, justify="right")
    for name, rounds in runs.items():
        columns = zip(zip(*rounds, strict=True), (",", ",", ".4f", ".1f"), strict=True)
        table.add_row(name, *(figures.spread(values, spec) for values, spec in columns))
    return table


def verdict(runs):
    """One sentence on who is faster. runs: see `result_table`."""
    (*_, losses, seconds), (*_, their_losses, their_seconds) = (
        list(zip(*runs[name], strict=True)) for name in ("Nano", "nanoGPT")
    )
    above = max(losses) - min(their_losses)
    if above > 0:
        return f"Nano ends above nanoGPT's loss, by {above:.4f}: it needs more --steps."
    ratio = figures.ahead(seconds, their_seconds)
    return f"Nano's time to a loss that is at most nanoGPT's, as a multiple of nanoGPT's time: {ratio}."


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nanogpt", type=Path, required=True, metavar="DIR", help="a clone of nanoGPT")
    add("--text", type=Path, required=True, metavar="FILE", help="a text in UTF-8")
    add("--steps", type=int, default=620, help="Nano's steps (620)")
    add("--rounds", type=int, default=5, help="rounds of measurements (5)")
    args = parser.parse_args()
    check_nanogpt(args.nanogpt)
    if args.rounds < 1:
        raise UserError(f"--rounds must be 1 or more, not {args.rounds}")
    if args.steps < 2:
        raise UserError(f"--steps must be 2 or more, not {args.steps}")
    return args


def main():
    args = parse_arguments()

    from sources import texts_of

    text = "".join(texts_of([args.text]))
    if len(text) < 20 * BLOCK:
        raise UserError(f"{args.text} is too short: {len(text)} characters, and {20 * BLOCK} are needed")

    from rich.console import Console

    console, runs = Console(highlight=False), {"Nano": [], "nanoGPT": []}
    with tempfile.TemporaryDirectory() as folder, console.status("preparing the text") as status:
        folder = Path(folder)
        ids = prepare(text, folder)
        for number, name in itertools.product(range(1, args.rounds + 1), runs):
            steps = args.steps if name == "Nano" else NANOGPT["max_iters"]
            status.update(f"round {number} of {args.rounds}: {name} trains {steps:,} steps")
            if name == "Nano":
                model, seconds = train_nano(steps, folder)
            else:
                model, seconds = train_nanogpt(args.nanogpt, folder)
            n_params = sum(p.numel() for p in model.parameters())
            runs[name].append((n_params, steps, validation_loss(model, ids[name]), seconds))
    title = f"{args.text.name}: {len(text):,} characters; commit {figures.commit()}, {args.rounds} rounds"
    console.print(result_table(title, runs))
    console.print(verdict(runs))


if __name__ == "__main__":
    run(main)
