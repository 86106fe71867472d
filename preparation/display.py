"""What `python data.py` shows in the terminal: progress, the files written, and what was left out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from preparation.corpus import prepare


def prepare_and_show(
    inputs: dict[str, list[Path]], out: Path, notices: list[str], tokenizer_path: str | None, **options: Any
) -> None:
    """`prepare(inputs, out, **options)`, with its progress and its results in the terminal.

    notices: sentences to begin with; tokenizer_path: where `options["tokenizer"]` comes from, if there is one
    """
    console = Console()
    for sentence in notices:
        console.print(sentence, style="yellow")
    columns = (TextColumn("{task.description:>8}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def progress(title: str, n_bytes: int) -> Callable[[int], None]:
            if not console.is_terminal:
                print(f"{title} {n_bytes / 1e6:,.1f} MB of text", flush=True)
            task = bar.add_task(title, total=n_bytes)
            return lambda n_read: bar.advance(task, n_read)

        metas, tokenizer, corpora = prepare(inputs, out, progress=progress, **options)
    seconds = time.perf_counter() - start

    table = Table(title=f"{out}: {tokenizer.kind} tokenizer, vocabulary {tokenizer.vocab_size:,}")
    table.add_column("file")
    for name in ("documents", "tokens", "bytes of text", "unknown"):
        table.add_column(name, justify="right")
    for name, meta in metas.items():
        counts = (meta[key] for key in ("n_documents", "n_tokens", "n_bytes", "n_unknown"))
        table.add_row(f"{name}.bin", *(f"{count:,}" for count in counts))
    console.print(table)

    n_bytes = sum(meta["n_bytes"] for meta in metas.values())
    console.print(f"{n_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s", highlight=False)
    if n_unknown := sum(meta["n_unknown"] for meta in metas.values()):
        console.print(f"{n_unknown:,} characters are not in {tokenizer_path}: <|unknown|>", style="yellow")
    if options["kind"] == "bpe" and tokenizer.vocab_size < options["vocab_size"]:
        console.print(f"the text has only enough repetitions for {tokenizer.vocab_size:,} tokens")
    for corpus in corpora:
        for sentence in corpus.report.summary(corpus.name):
            print(sentence)
        for sentence in corpus.report.left_out_summary(corpus.stage.name, corpus.n_bytes):
            print(sentence, file=sys.stderr)
