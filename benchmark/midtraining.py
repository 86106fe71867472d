"""Does mid-training help? The same number of steps, with and without it, on the sample world.

    python benchmark/midtraining.py                               # an hour on two cores
    python benchmark/midtraining.py --size 0.25 --width 64        # a smaller world and model: 15 minutes

Every recipe trains from each seed: `--steps` steps, some of them perhaps mid-training (they cost the same),
and an eighth as many of fine-tuning. Then the model answers the questions of the world's eval.jsonl.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark.copies import copy_of_project  # noqa: E402
from common.errors import UserError, run  # noqa: E402

CONSTANT = {"min_lr": 4e-3}  # pretraining's learning_rate
# {recipe: [(stage, its share of the steps, other settings), ...]}
RECIPES: dict[str, list[tuple[str, float, dict[str, float]]]] = {
    "pretrain, SFT": [("pretrain", 1, {})],
    "pretrain that cools down, SFT": [("pretrain", 1, {"warmdown_ratio": 1 / 4})],
    "pretrain, mid, SFT": [("pretrain", 3 / 4, {}), ("mid", 1 / 4, {})],
    "pretrain at a constant rate, mid cools down, SFT": [
        ("pretrain", 3 / 4, CONSTANT), ("mid", 1 / 4, {"learning_rate": 4e-3}),
    ],
}  # fmt: skip


def command(folder: Path, *args: object) -> str:
    """What `python ARGS` prints in a copy of the project. Raises UserError if it fails."""
    words = [sys.executable, *map(str, args)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words[1:])} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.stdout


def score(data: Path, recipe: str, steps: int, seed: int, width: int) -> tuple[int, int]:
    """Train by a recipe, in a copy of the project. Returns (right answers, questions)."""
    with tempfile.TemporaryDirectory() as place:
        folder = copy_of_project(place)
        (folder / "dataset").mkdir()
        (folder / "dataset" / "prepared").symlink_to(data / "prepared")
        for stage, share, others in [*RECIPES[recipe], ("sft", 1 / 8, {})]:
            settings = {
                "max_steps": round(share * steps),
                "random_seed": seed,
                "eval_interval": steps,
                "n_embd": width,
                **others,
            }
            sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
            command(folder, "train.py", "-t", stage, *sets)
        told = command(folder, "inference.py", "-i", "--eval", data / "eval.jsonl")
        right, questions = re.findall(r"exact match: (\d+) of (\d+)", told)[-1]
        return int(right), int(questions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800, metavar="N", help="steps before fine-tuning (800)")
    parser.add_argument("--size", type=float, default=1.0, metavar="X", help="of the world (1)")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="n_embd of the model (128)")
    parser.add_argument("--seed", type=int, action="append", metavar="N", help="may be repeated (1 and 7)")
    parser.add_argument("--only", action="append", choices=[*RECIPES], help="this recipe; may be repeated")
    args = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    seeds = args.seed or [1, 7]
    table = Table(title=f"right answers after {args.steps} + {args.steps // 8} steps")
    for name in ("recipe", *(f"seed {seed}" for seed in seeds)):
        table.add_column(name)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place)
        command(ROOT, "dataset/sample_world.py", "--out", data, "--size", args.size)
        command(ROOT, "data.py", "--pretrain", data / "pretrain.txt", "--sft", data / "sft.jsonl",
                "--out", data / "prepared")  # fmt: skip
        for recipe in args.only or RECIPES:
            scores = [score(data, recipe, args.steps, seed, args.width) for seed in seeds]
            table.add_row(recipe, *(f"{right} of {questions}" for right, questions in scores))
            print(recipe, scores, flush=True)
    Console().print(table)


if __name__ == "__main__":
    run(main)
