"""Tokens per second, for one text and many, beside Transformers, llama2.c and llama.cpp on the same weights.

    python benchmark/decode_speed.py                              # Nano and Transformers
    python benchmark/decode_speed.py --llama2c ~/llama2.c         # a folder in which `make run runq` was run
    python benchmark/decode_speed.py --requests 2 4 8 16 32       # this many texts at once

llama.cpp is measured if llama-cpp-python is installed. All decode greedily with the same number of threads.
Each is measured twice in every round, one after the other; the table has the median over the rounds of the
better measurement, and the smallest and largest. The model has random weights: 12.9 M parameters, of which
8.2 M are the embedding, which is also the output head.

The limit is the speed that would be possible if a step did nothing but read the weights once, as fast as this
machine sums an array of that size (of which a part may stay in its caches), or multiply with them, as fast as
PyTorch multiplies two 1,024 x 1,024 matrices; whichever takes longer. (Integers are multiplied faster, so
there is no limit here for several texts with 8 bits.)

The speed of threads that work together depends on how far apart their cores are. So the time that a number
takes from one core to the other is printed, too: some 30 ns within the cache of one chip, 150 ns or more
between two chips.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import figures  # noqa: E402
from common.errors import UserError, run  # noqa: E402

if TYPE_CHECKING:
    from decoding.engine import BatchedDecoder
    from engine.checkpoint import Checkpoint

Measure = Callable[[], float]  # measures once; returns tokens per second

SHAPE = {
    "block_size": 256, "n_layer": 6, "n_head": 8, "n_kv_head": 4, "n_embd": 256, "n_hidden": 768,
    "vocab_size": 32000, "qk_norm": False,
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--threads", type=int, default=2, help="threads of every program (2)")
    add("--tokens", type=int, default=128, help="tokens to generate in each run (128)")
    add("--rounds", type=int, default=10, help="rounds of measurements (10)")
    add("--requests", type=int, nargs="+", default=[16], metavar="N", help="numbers of texts at once (16)")
    add("--llama2c", type=Path, metavar="FOLDER", help="the folder with llama2.c's run and runq")
    args = parser.parse_args()
    if min(args.threads, args.rounds, *args.requests) < 1 or not 2 <= args.tokens <= 200:
        raise UserError("--threads, --rounds and --requests must be 1 or more, --tokens between 2 and 200")
    if args.llama2c and not (args.llama2c / "run").is_file():
        raise UserError(f"there is no {args.llama2c / 'run'}; `make run runq` makes it")
    return args


def random_checkpoint() -> Checkpoint:
    import torch

    import models
    from engine.checkpoint import Checkpoint
    from tokenizer import CharTokenizer

    torch.manual_seed(0)
    model = models.build(models.check_config(SHAPE, "the benchmark")).eval()
    tokenizer = CharTokenizer.train(["abcdefgh "])
    with torch.no_grad():
        model.wte.weight[:7] *= 0.01  # so special tokens are never the likeliest, and no program stops early
    config, weights = model.config.model_dump(), model.state_dict()
    return Checkpoint(
        "pretrain", "20000101_000000", 0, config, {}, tokenizer.to_dict(), weights, optimizer={}
    )


# ---- what is measured ------------------------------------------------------------------------------


def make_decoder(
    checkpoint: Checkpoint, n_requests: int, int8: bool, compiled: bool = True
) -> BatchedDecoder:
    from decoding.engine import BatchedDecoder
    from decoding.packed import quantize
    from engine.checkpoint import build

    model, _ = build(checkpoint, "the benchmark")
    decoder = BatchedDecoder(quantize(model) if int8 else model, n_requests)
    if compiled:
        decoder.compile(wait=True)
        decoder.step()
    return decoder


def prefill(checkpoint: Checkpoint, int8: bool, compiled: bool) -> Measure:
    """Reading a prompt."""
    decoder = make_decoder(checkpoint, 1, int8, compiled)
    backend, prompt = decoder.backend, [i % decoder.model.config.vocab_size for i in range(200)]

    def measure() -> float:
        start = time.perf_counter()
        backend.refill(0, prompt)
        return len(prompt) / (time.perf_counter() - start)

    return measure


def nano(checkpoint: Checkpoint, n_tokens: int, n_requests: int = 1, int8: bool = False) -> Measure:
    """Generating n_tokens for each of n_requests at once."""
    from decoding.engine import Request

    decoder = make_decoder(checkpoint, n_requests, int8)

    def measure() -> float:
        requests = [Request(range(1, 2 + i), n_tokens, temperature=0) for i in range(n_requests)]
        for request in requests:
            decoder.add(request)
        decoder.step()  # reads the prompts
        start = time.perf_counter()
        while decoder.is_busy:
            decoder.step()
        return n_requests * (n_tokens - 1) / (time.perf_counter() - start)

    return measure


def nano_generate(checkpoint: Checkpoint, n_tokens: int) -> Measure:
    from decoding.sampling import generate
    from engine.checkpoint import build

    model, _ = build(checkpoint, "the benchmark")

    def measure() -> float:
        tokens = generate(model, [1], n_tokens, temperature=0)
        next(tokens)
        start = time.perf_counter()
        count = sum(1 for _ in tokens)
        return count / (time.perf_counter() - start)

    return measure


def transformers(folder: Path, n_tokens: int) -> Measure:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor([[1]])
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None)

    def measure() -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, **options)
        first = time.perf_counter()
        model.generate(prompt, max_new_tokens=n_tokens, **options)
        return (n_tokens - 1) / (time.perf_counter() - first - (first - start))

    return measure


def llama2c(program: Path, folder: Path, n_tokens: int, n_threads: int) -> Measure:
    files: list[str | Path] = [program, folder / "model.bin", "-z", folder / "tokenizer.bin"]
    command = [*files, "-t", "0", "-n", str(n_tokens)]

    def measure() -> float:
        env = os.environ | {"OMP_NUM_THREADS": str(n_threads)}
        done = subprocess.run(command, env=env, capture_output=True)
        if not (found := re.search(rb"tok/s: (\d+\.?\d*)", done.stderr)):
            raise UserError(f"{program} failed: {done.stderr.decode('utf-8', 'replace').strip()}")
        return float(found[1])

    return measure


def llama_cpp(file: Path, n_tokens: int, n_threads: int) -> Measure:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=256, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)

    def measure() -> float:
        model.reset()
        tokens = model.generate([1], temp=0.0, repeat_penalty=1.0)
        next(tokens)
        start = time.perf_counter()
        for _ in range(n_tokens - 1):
            next(tokens)
        return (n_tokens - 1) / (time.perf_counter() - start)

    return measure


# ---- what the machine could do ---------------------------------------------------------------------


def bandwidth(n_bytes: float) -> float:
    """Bytes per second that all threads together read from an array of this size, again and again."""
    import numpy as np
    import torch

    numbers = np.empty(int(n_bytes) // 4, np.float32)  # NumPy puts it in huge pages
    numbers.fill(1)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.from_numpy(numbers).sum()
        times.append(time.perf_counter() - start)
    return n_bytes / min(times)


def multiplications() -> float:
    """Multiply-adds per second in the product of two matrices."""
    import torch

    n, times = 1024, []
    a, b = torch.randn(2, n, n)
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return n**3 / min(times)


def core_to_core_seconds(n_times: int = 20_000) -> float | None:
    """Seconds until a number that one thread writes is seen by another; None without Numba."""
    if not importlib.util.find_spec("numba"):
        return None
    import numpy as np
    from numba import njit

    from decoding.compiled import atomic_load, atomic_store

    @njit(nogil=True)
    def ping_pong(ball, rank):  # type: ignore[no-untyped-def]  # compiled by Numba
        for i in range(n_times):
            while atomic_load(ball, 0) != 2 * i + rank:  # type: ignore[call-arg]
                pass
            atomic_store(ball, 0, 2 * i + rank + 1)  # type: ignore[call-arg]

    for _ in range(2):  # compiled the first time
        ball = np.zeros(8, np.int64)
        other = threading.Thread(target=ping_pong, args=(ball, 1))
        other.start()
        start = time.perf_counter()
        ping_pong(ball, 0)
        other.join()
    return (time.perf_counter() - start) / (2 * n_times)


def main() -> None:
    args = parse_arguments()
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(args.threads)
    console = Console(highlight=False)
    checkpoint, n = random_checkpoint(), args.tokens
    n_weights = sum(
        w.numel() for name, w in checkpoint.model.items() if name != "lm_head.weight" and w.dim() > 1
    )
    n_bytes = {"float32": 4 * n_weights, "int8": n_weights * (1 + 4 / 64)}
    with tempfile.TemporaryDirectory() as name, console.status("preparing") as status:
        place = Path(name)
        from formats import gguf, huggingface
        from formats import llama2c as llama2c_format

        with contextlib.redirect_stdout(sys.stderr):
            huggingface.write(checkpoint, "the benchmark", place / "hf")
        # Neighbours in this list are measured within the same second, so compare those.
        runs: dict[str, tuple[str, int | None, Measure]] = {
            "Transformers": ("float32", 1, transformers(place / "hf", n)),
            "Nano, generate": ("float32", 1, nano_generate(checkpoint, n)),
        }
        for kind, size, program in (("float32", "float32", "run"), ("q8_0", "int8", "runq")):
            if importlib.util.find_spec("llama_cpp"):
                gguf.write(checkpoint, "the benchmark", place / f"{kind}.gguf", kind)
                runs[f"llama.cpp, {kind}"] = size, 1, llama_cpp(place / f"{kind}.gguf", n, args.threads)
            if args.llama2c and (args.llama2c / program).is_file():
                llama2c_format.write(checkpoint, "the benchmark", place / program, kind)
                measure = llama2c(args.llama2c / program, place / program, n, args.threads)
                runs[f"llama2.c, {program}"] = size, 1, measure
            name, is_int8 = "Nano int8" if size == "int8" else "Nano", size == "int8"
            runs[name] = size, 1, nano(checkpoint, n, int8=is_int8)
            for count in args.requests:
                runs[f"{name} x {count}"] = size, count, nano(checkpoint, n, count, int8=is_int8)
        for size in ("float32", "int8"):
            for who, compiled in (("PyTorch", False), ("Nano", True)):
                measure = prefill(checkpoint, size == "int8", compiled)
                runs[f"{who} prompt, {size}"] = size, None, measure
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        distances: list[float] = []
        steps: dict[str, list[float]] = {"float32": [], "int8": [], "multiplying": []}  # possible per second
        for number in range(1, args.rounds + 1):
            status.update(f"round {number} of {args.rounds}")
            for name, (_, _, measure) in runs.items():
                speeds[name].append(max(measure(), measure()))  # a pause slows the processor
            for kind, size in n_bytes.items():
                steps[kind].append(bandwidth(size) / size)
            steps["multiplying"].append(multiplications() / n_weights)
            if (seconds := core_to_core_seconds()) is not None:
                distances.append(seconds)
    table = Table("", "tokens/s", "x HF", "x Nano", "x int8", "of limit")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.title = f"{n_weights / 1e6:.1f} M weights, {args.threads} threads, {args.rounds} rounds"
    table.caption = f"commit {figures.commit()}; limit of one text: " + ", ".join(
        f"{kind} {statistics.median(steps[kind]):,.0f} tokens/s" for kind in n_bytes
    )
    table.caption += f"; of many: float32 {statistics.median(steps['multiplying']):,.0f}"
    if distances:
        table.caption += f"; from core to core {statistics.median(distances) * 1e9:,.0f} ns"

    def limit(kind: str, count: int) -> list[float]:
        """The limit in each round"""
        if count == 1:
            return steps[kind]
        return [min(count * a, b) for a, b in zip(steps[kind], steps["multiplying"], strict=True)]

    def ratio(name: str, others: list[float]) -> float:
        """The median of the ratios in each round, as both were measured within the same minute"""
        return statistics.median(a / b for a, b in zip(speeds[name], others, strict=True))

    for name, (kind, count, _) in runs.items():
        row = [name, figures.spread(speeds[name], ",.0f")]
        if count:
            row += (f"{ratio(name, speeds[peer]):.2f}" for peer in ("Transformers", "Nano", "Nano int8"))
        if count == 1 or count and kind == "float32":
            row.append(f"{ratio(name, limit(kind, count)):.0%}")
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    run(main)
