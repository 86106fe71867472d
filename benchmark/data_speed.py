"""How fast text becomes tokens, and tokens become batches.

    python benchmark/data_speed.py             # 0.1 GB of each kind of text, about a minute
    python benchmark/data_speed.py --gb 2      # writes up to 7 GB to the temporary folder

The text is generated: Chinese (3,000 characters) and English (3,000 words), drawn with Zipf's frequencies, as
one long document, as documents of 2,000 characters, and as tiny ones of 100. Each measurement is the best
of `--repeat`. Preparing runs `data.py` as a user does: two passes over the file, output to disk. MB are 10^6
bytes of UTF-8. Linux only, because the peak memory of a process is read from /proc.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from common.errors import run  # noqa: E402
from tokenizer import BPETokenizer, CharTokenizer, Tokenizer  # noqa: E402

if TYPE_CHECKING:
    from rich.table import Table

# Runs a script as `python SCRIPT ...` does, then prints its CPU seconds and its peak memory in kB. (The peak
# that wait4 reports for a child includes the moment before exec, when its memory was a copy of its parent's.)
MEASURED = """
import re, runpy, sys, time
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(time.process_time(), re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""

LAYOUTS = {"one document": 0, "documents of 2,000": 2000, "documents of 100": 100}


def random_text(language: str, n_characters: int, random: np.random.Generator) -> str:
    """Random characters or words, some of them punctuation, with frequencies as 1 / rank (Zipf's law)."""
    chance = 1 / np.arange(1, 3001)
    drawn = random.choice(3000, n_characters, p=chance / chance.sum())
    if language == "Chinese":
        return (drawn + 0x4E00).astype("<u4").tobytes().decode("utf-32-le").replace("一", "，")
    lexicon = ["".join(map(chr, random.integers(97, 123, length))) for length in random.integers(2, 9, 3000)]
    return " ".join([lexicon[i] for i in drawn[: n_characters // 5]])[:n_characters]


def write_text(path: Path, language: str, layout: str, n_bytes: float) -> None:
    text = random_text(language, 1 << 20, np.random.default_rng(0))
    size = LAYOUTS[layout]
    if size:
        parts = [f"<|bos|>{text[i : i + size]}<|eos|>\n" for i in range(0, len(text), size)]
    else:
        parts = [text[i : i + 60] + "\n" for i in range(0, len(text), 60)]
    block = "".join(parts).encode()
    with open(path, "wb") as file:
        for _ in range(max(1, round(n_bytes / len(block)))):
            file.write(block)


def best(function: Callable[[], object], repeat: int) -> float:
    """The least seconds that one of some calls takes."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def encoding_table(repeat: int) -> Table:
    from rich.table import Table

    table = Table(title="tokenizer.py: encode from UTF-8, decode to str; one core (bpe: all)")
    for name in (
        "text",
        "tokenizer",
        "bytes/token",
        "train MB/s",
        "decode UTF-8 + encode MB/s",
        "decode MB/s",
    ):
        table.add_column(name, justify="right")
    for language in ("Chinese", "English"):
        for kind, n_characters in ((CharTokenizer, 10_000_000), (BPETokenizer, 1_000_000)):
            text = random_text(language, n_characters, np.random.default_rng(0))
            data = text.encode()
            start = time.perf_counter()
            tokenizer: Tokenizer
            is_char = kind is CharTokenizer
            tokenizer = CharTokenizer.train([text]) if is_char else BPETokenizer.train([text], 8192)
            training = time.perf_counter() - start
            ids = tokenizer.encode(text)
            encoding = best(lambda: tokenizer.encode(data.decode()), repeat)  # noqa: B023
            decoding = best(lambda: tokenizer.decode(ids), repeat)  # noqa: B023
            speeds = (f"{len(data) / seconds / 1e6:,.1f}" for seconds in (training, encoding, decoding))
            table.add_row(language, tokenizer.kind, f"{len(data) / len(ids):.2f}", *speeds)
    return table


def prepare_table(folder: Path, n_bytes: float, repeat: int) -> Table:
    from rich.table import Table

    table = Table(title="data.py: file to token files")
    for name in ("text", "layout", "MB", "seconds", "MB/s", "MB per CPU second", "peak memory MB"):
        table.add_column(name, justify="right")
    source, out = folder / "text.txt", folder / "out"
    for language in ("Chinese", "English"):
        for layout in LAYOUTS:
            write_text(source, language, layout, n_bytes)
            megabytes = source.stat().st_size / 1e6
            wall, cpu, memory = [], [], []
            for _ in range(repeat):
                command = [
                    sys.executable,
                    "-c",
                    MEASURED,
                    "data.py",
                    "--pretrain",
                    str(source),
                    "--out",
                    str(out),
                ]
                start = time.perf_counter()
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                wall.append(time.perf_counter() - start)
                *_, seconds, kilobytes = done.stdout.split()
                cpu.append(float(seconds))
                memory.append(float(kilobytes) / 1e3)
            numbers = (megabytes, min(wall), megabytes / min(wall), megabytes / min(cpu), max(memory))
            table.add_row(language, layout, *(f"{number:,.1f}" for number in numbers))
    return table


def loader_table(folder: Path, repeat: int) -> Table:
    from rich.table import Table

    from data import TokenBatches, TokenFile

    file, other = (TokenFile(folder / "out" / f"pretrain_{name}.bin") for name in ("train", "val"))
    table = Table(title=f"TokenBatches: {len(file.tokens):,} tokens")
    for name in ("batch", "milliseconds per batch", "million tokens/s", "ms as a mixture 3:1"):
        table.add_column(name, justify="right")
    for batch_size, block_size in ((16, 256), (32, 256), (64, 512), (256, 1024)):
        sources = [
            TokenBatches([file, other], block_size, batch_size, weights=weights) for weights in ((), (3, 1))
        ]
        # In turns, so that whatever else the machine does slows down both.
        times = [[best(lambda: [s(i) for i in range(100)], 1) / 100 for s in sources] for _ in range(repeat)]  # noqa: B023
        plain, mixed = map(min, zip(*times, strict=True))
        speed = f"{batch_size * block_size / plain / 1e6:,.0f}"
        table.add_row(f"{batch_size} x {block_size}", f"{plain * 1e3:.3f}", speed, f"{mixed * 1e3:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=0.1, help="size of each generated file (0.1)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the best counts (3)")
    args = parser.parse_args()

    from rich.console import Console

    console = Console()
    console.print(encoding_table(args.repeat))
    with tempfile.TemporaryDirectory() as folder:
        console.print(prepare_table(Path(folder), args.gb * 1e9, args.repeat))
        console.print(loader_table(Path(folder), args.repeat))


if __name__ == "__main__":
    run(main)
