"""Multiple-choice questions per second, beside the Hugging Face backend of lm-evaluation-harness.

    python benchmark/eval_speed.py                            # 1,000 questions of 84 tokens, 4 choices of 16
    python benchmark/eval_speed.py --choice 4 16 50           # question and choice have 100 tokens together
    python benchmark/eval_speed.py --questions 100 --rounds 5

Both sides get the same token ids and compute the log-likelihoods of all choices with the same number of
threads, in turns. The harness gets the batch size that is fastest on the first questions. Both must come to
the same numbers. The model is that of decode_speed.py: 12.9 M parameters with random values.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import figures  # noqa: E402
from common.errors import UserError, run  # noqa: E402
from common.packages import require  # noqa: E402

TOKENS = 100  # of a question with a choice
BATCH_SIZES = (1, 4, 16, 64)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--threads", type=int, default=2, help="threads of both (2)")
    add("--questions", type=int, default=1000, help="how many questions (1000)")
    add("--choice", type=int, nargs="+", default=[16], metavar="N", help="tokens of each choice (16)")
    add("--rounds", type=int, default=3, help="rounds of measurements (3)")
    args = parser.parse_args()
    if min(args.threads, args.questions, args.rounds, *args.choice) < 1 or max(args.choice) >= TOKENS:
        raise UserError(f"all numbers must be 1 or more, and --choice less than {TOKENS}")
    require("lm_eval", "transformers")
    return args


def make_requests(n_questions: int, n_choice: int, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """(question, choice), four for each question, of random ids."""
    import numpy as np

    draw = np.random.default_rng(0)
    requests = []
    for _ in range(n_questions):
        question = draw.integers(7, vocab_size, TOKENS - n_choice).tolist()
        requests += [(question, draw.integers(7, vocab_size, n_choice).tolist()) for _ in range(4)]
    return requests


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    args = parse_arguments()
    import torch
    from lm_eval.models.huggingface import HFLM
    from rich.console import Console
    from rich.table import Table

    from benchmark.decode_speed import random_checkpoint
    from decoding.likelihood import log_likelihoods
    from decoding.packed import quantize
    from engine.checkpoint import build
    from formats import huggingface

    torch.set_num_threads(args.threads)
    checkpoint = random_checkpoint()
    model, int8 = build(checkpoint, "the benchmark")[0], quantize(build(checkpoint, "the benchmark")[0])
    vocab_size = model.config.vocab_size
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        huggingface.write(checkpoint, "the benchmark", Path(name) / "hf")
        harness = HFLM(pretrained=str(Path(name) / "hf"), device="cpu", dtype="float32")

    def theirs(requests: list[tuple[list[int], list[int]]], batch_size: int) -> list[tuple[float, bool]]:
        harness.batch_size_per_gpu = batch_size
        keyed = [((str(number), ""), *request) for number, request in enumerate(requests)]
        return harness._loglikelihood_tokens(keyed, disable_tqdm=True)

    table = Table("tokens", "", "questions/s", "x harness")
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for n_choice in args.choice:
        requests = make_requests(args.questions, n_choice, vocab_size)
        few = requests[:32]
        theirs(few, 8)  # to warm up
        best = min(BATCH_SIZES, key=functools.partial(seconds, theirs, few))
        programs: dict[str, Callable[[], Any]] = {
            f"harness, batches of {best}": functools.partial(theirs, requests, best),
            "Nano": functools.partial(log_likelihoods, model, requests),
            "Nano int8": functools.partial(log_likelihoods, int8, requests),
        }
        times: dict[str, list[float]] = {name: [] for name in programs}
        results: dict[str, Any] = {}
        for _ in range(args.rounds):
            for name, program in programs.items():
                start = time.perf_counter()
                results[name] = program()
                times[name].append(time.perf_counter() - start)
        expected, found, _ = results.values()
        worst = max(abs(one[0] - two.logprob) for one, two in zip(expected, found, strict=True))
        if worst > 1e-2:
            raise UserError(f"the log-likelihoods differ by {worst:.2g}")
        reference = next(iter(times.values()))
        for name, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(reference, own, strict=True))
            speed = figures.spread([args.questions / took for took in own], ",.1f")
            table.add_row(f"{TOKENS - n_choice} + {n_choice}", name, speed, f"{ratio:.2f}")
        table.add_section()
    table.title = f"{args.questions:,} questions with 4 choices, {args.threads} threads, {args.rounds} rounds"
    table.caption = f"commit {figures.commit()}"
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run(main)
