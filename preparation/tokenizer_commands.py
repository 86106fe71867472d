"""`python tokenizer.py train|stats`: learn a vocabulary from text files, or compare tokenizers on them."""

from __future__ import annotations

import argparse
import time

import numpy as np

from common.errors import UserError
from preparation import default_inputs, default_names, stages_with_files
from sources import ReadReport, texts_of
from tokenizer import N_SPECIAL, BPETokenizer, CharTokenizer, Tokenizer


def train_command(args: argparse.Namespace) -> None:
    if args.kind == "char" and args.vocab_size is not None:
        raise UserError("--vocab_size is for --kind bpe; char has one token for every character")
    report, names = ReadReport(), ", ".join(args.files)
    texts = texts_of(args.files, report)
    tokenizer: Tokenizer
    if args.kind == "char":
        tokenizer = CharTokenizer.train(texts)
        if tokenizer.vocab_size == N_SPECIAL:
            raise UserError(f"there is no text in {names}")
    else:
        tokenizer = BPETokenizer.train(texts, args.vocab_size or 32000)
    tokenizer.save(args.output)
    for sentence in report.summary(names):
        print(sentence)
    print(f"{args.output}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint[:12]}")


def measure(tokenizer: Tokenizer, texts: list[str], n_bytes: int) -> dict[str, str]:
    """{name of a measurement: its value} of a tokenizer on some texts, which have `n_bytes` in UTF-8."""
    tokenizer.encode("")  # the first call sets up the library
    start = time.perf_counter()
    ids, _ = tokenizer.encode_flat(texts)
    seconds = time.perf_counter() - start
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    frequent = [i for i in np.argsort(-counts, kind="stable")[:20].tolist() if counts[i]]
    return {
        "kind": tokenizer.kind,
        "vocabulary": f"{tokenizer.vocab_size:,}",
        "tokens": f"{len(ids):,}",
        "bytes per token": f"{n_bytes / max(1, len(ids)):.2f}",
        "tokens/s": f"{len(ids) / seconds:,.0f}",
        "MB/s": f"{n_bytes / seconds / 1e6:.1f}",
        "unknown": f"{counts[tokenizer.unknown_id] / max(1, len(ids)):.4%}",
        "most frequent": "  ".join(repr(tokenizer.decode([i])) for i in frequent),
    }


def stats_command(args: argparse.Namespace) -> None:
    first_stage = stages_with_files()[0]
    files = args.files or default_inputs(first_stage)[:1]
    if not files:
        raise UserError(f"there is no dataset/{default_names(first_stage)[0]}; name the files to measure on")
    report, names = ReadReport(), ", ".join(map(str, files))
    texts = list(texts_of(files, report, args.limit * 10**6))
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if not n_bytes:
        raise UserError(f"there is no text in {names}")
    for sentence in report.summary(names):
        print(sentence)
    tokenizers: dict[str, Tokenizer]
    if args.tokenizer:
        from formats import load_tokenizer

        tokenizers = {path: load_tokenizer(path) for path in args.tokenizer}
    else:
        tokenizers = {"char": CharTokenizer.train(texts), "bpe": BPETokenizer.train(texts, args.vocab_size)}

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = [measure(tokenizer, texts, n_bytes) for tokenizer in tokenizers.values()]
    table = Table(title=f"{n_bytes:,} bytes of {names}")
    table.add_column("")
    for name in tokenizers:
        table.add_column(Text(str(name)), justify="right", overflow="fold")
    for row in columns[0]:
        table.add_row(row, *(Text(column[row]) for column in columns))
    Console().print(table)


def main() -> None:
    default_file = f"dataset/{default_names(stages_with_files()[0])[0]}"
    parser = argparse.ArgumentParser(
        description="Train a tokenizer on text files, or measure how tokenizers encode them.",
        epilog="examples:\n"
        "  python tokenizer.py train --kind bpe --vocab_size 32000 corpus.txt -o tokenizer.json\n"
        f"  python tokenizer.py stats                              both kinds on {default_file}\n"
        "  python tokenizer.py stats book.txt --tokenizer dataset/prepared/tokenizer.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="train|stats")
    train = commands.add_parser("train", help="learn a vocabulary and save it")
    train.add_argument("files", nargs="+", metavar="FILE", help="text in UTF-8, or JSON lines")
    train.add_argument("--kind", choices=("char", "bpe"), default="char", help="default: char")
    train.add_argument("--vocab_size", type=int, help="tokens of bpe, special ones included (32000)")
    train.add_argument("-o", "--output", default="tokenizer.json", help="default: tokenizer.json")
    train.set_defaults(command=train_command)
    stats = commands.add_parser("stats", help="bytes per token, speed, share of unknown, frequent tokens")
    stats.add_argument("files", nargs="*", metavar="FILE", help=f"default: {default_file}")
    stats.add_argument("--tokenizer", nargs="+", metavar="FILE",
                       help="named as for data.py (default: train both kinds on this text)")  # fmt: skip
    stats.add_argument("--vocab_size", type=int, default=8192, help="tokens of the bpe trained here (8192)")
    stats.add_argument("--limit", type=int, default=20, help="megabytes of text to use at most (20)")
    stats.set_defaults(command=stats_command)
    args = parser.parse_args()
    args.command(args)
