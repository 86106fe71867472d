"""What is printed: scores, comparisons of models, and some of the answers."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from evaluation import statistics
from evaluation.runner import ExampleScore, Prepared, TaskResult
from tasks import Task


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if that is a terminal. Yields a function that is one more done."""
    columns = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        row = bar.add_task("", total=total)
        yield lambda: bar.advance(row)


def is_loss(metric: str) -> bool:
    """Whether a score is no share of right answers, and better when it is lower."""
    return "perplexity" in metric or metric.startswith("bits")


def format_score(metric: str, score: float, error: float | None = None) -> str:
    """For example "86.4 % ± 1.1" or "3.214 ± 0.020"."""
    digits, factor, unit = (3, 1, "") if is_loss(metric) else (1, 100, " %")
    text = f"{factor * score:.{digits}f}{unit}"
    return text if error is None else f"{text} ± {factor * error:.{digits}f}"


def print_scores(console: Console, results: Sequence[TaskResult]) -> None:
    """The scores of a model: a row for each task, and one for each kind of its examples."""
    took = [result.seconds for result in results if result.seconds is not None]
    table = Table(
        title="scores",
        caption="±: standard error · base: the score of knowing nothing"
        + f"\n{sum(took):.1f} s" * (len(took) == len(results)),
    )
    names = [result.name for result in results] + [f"  {kind}" for one in results for kind in one.by_kind()]
    table.add_column("task", overflow="fold", min_width=min(24, max(map(len, names))))
    table.add_column("metric")
    for name in ("score", "base", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        base = "" if result.base_rate is None else format_score(result.metric, result.base_rate)
        table.add_row(Text(result.name), result.metric, _score_of(result), base, count(result))
        if beside := result.beside():
            table.add_row("", beside.metric, _score_of(beside))
        for kind, part in result.by_kind().items():
            table.add_row(Text(f"  {kind}", style="dim"), "", _score_of(part), "", f"{part.n:,}", style="dim")
    console.print(table)


def _score_of(result: TaskResult) -> str:
    return format_score(result.metric, result.score, result.standard_error)


def count(result: TaskResult) -> str:
    """How many examples there were, and of how many if those were not all."""
    if result.n_all == math.inf:
        return f"{result.n:,} drawn"
    return f"{result.n:,}" + f" of {result.n_all:,}" * (result.n_all > result.n)


def spread(scores: Sequence[ExampleScore], number: int) -> list[ExampleScore]:
    """At most so many of the scores, spread over all kinds of examples."""
    by_kind, number = sorted(scores, key=lambda score: score.kind), min(number, len(scores))
    return [by_kind[k * len(by_kind) // number] for k in range(number)]


def print_samples(console: Console, prepared: Prepared, result: TaskResult, number: int) -> None:
    """A table of so many examples, spread over all kinds, with the model's answers."""
    if result.metric == "perplexity":  # nothing was answered
        return
    task = prepared.task
    table = Table("question", "the model's answer", "", title=f"some answers: {result.name}")
    for score in spread(result.scores, number):
        example = prepared.examples[score.number]
        answer, mark = Text(score.answer + " …" * score.is_cut), Text("✓", style="green")
        if score.value < 1:
            answer.append(f"\nnot: {example.answer.strip()}", style="dim")
            mark = Text("✗", style="red") if score.value == 0 else Text(format_score("", score.value))
        table.add_row(_question(task, prepared, score.number), answer, mark)
    console.print(table)


def _question(task: Task, prepared: Prepared, number: int) -> Text:
    """The last message before the answer, after those before it."""
    *before, question = (message["content"] for message in task.messages(prepared.examples[number]))
    return Text("".join(f"({text})\n" for text in before), style="dim").append(question, "not dim")


# ---- side by side ------------------------------------------------------------------------------------


def print_comparison(
    console: Console, names: Sequence[str], results: Sequence[Sequence[TaskResult]], seed: int
) -> None:
    """Models side by side. results[i][j]: of model i on task j; all models have the same examples."""
    letters = [chr(ord("a") + i) for i in range(len(names))]
    for letter, name in zip(letters, names, strict=True):
        console.print(Text(f"{letter}: {name}"))
    table = Table(
        "task",
        "metric",
        "model",
        title="side by side",
        caption="[ ]: 95 % confidence interval, from a paired bootstrap over the examples · "
        "level: it holds 0, so the difference may be chance",
    )
    for name in ("score", "95 %", "base", "n"):
        table.add_column(name, justify="right")
    table.add_column("")
    for of_task in zip(*results, strict=True):
        shown = [result.beside() or result if is_loss(result.metric) else result for result in of_task]
        for row in comparison_rows(letters, shown, seed):
            table.add_row(*row)
        table.add_section()
    console.print(table)


def comparison_rows(letters: Sequence[str], results: Sequence[TaskResult], seed: int) -> list[list[str]]:
    """The rows of one task: the models' scores, then the difference of every two."""
    metric = results[0].metric
    values, weights = (
        np.array([[getattr(score, key) for score in result.scores] for result in results]).T
        for key in ("value", "weight")
    )
    samples = statistics.bootstrap(values, weights, seed)
    rows = []
    for i, (letter, result) in enumerate(zip(letters, results, strict=True)):
        base = "" if result.base_rate is None else format_score(metric, result.base_rate)
        about = [base, count(result)] if i == 0 else ["", ""]
        start = [result.name, metric] if i == 0 else ["", ""]
        span = _interval(metric, statistics.interval(samples[:, i]))
        rows.append([*start, letter, format_score(metric, result.score), span, *about, ""])
    for i, j in itertools.combinations(range(len(letters)), 2):
        low, high = statistics.interval(samples[:, j] - samples[:, i])
        difference = results[j].score - results[i].score
        verdict = "level"
        if low > 0 or high < 0:
            better = j if (low > 0) != is_loss(metric) else i
            verdict = f"{letters[better]} is better"
        text = format_score(metric, difference)
        text = text if text.startswith("-") else f"+{text}"
        rows.append(
            ["", "", f"{letters[j]} - {letters[i]}", text, _interval(metric, (low, high)), "", "", verdict]
        )
    return rows


def _interval(metric: str, ends: tuple[float, float]) -> str:
    return "[" + ", ".join(format_score(metric, end).removesuffix(" %") for end in ends) + "]"
