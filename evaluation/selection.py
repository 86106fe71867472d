"""What --tasks means: the tasks to run. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

import tasks
from common.config import resolve_path
from common.errors import UserError
from tasks import Metric, Task
from tasks.problems import Problem

FILE = ".jsonl"


def split_specs(texts: Sequence[str]) -> list[str]:
    """["arithmetic:digits=3,steps=true,my.jsonl"] -> ["arithmetic:digits=3,steps=true", "my.jsonl"]"""
    specs: list[str] = []
    for text in texts:
        if text.endswith(FILE) and resolve_path(text).exists():  # its name may hold a comma
            specs.append(text)
            continue
        for part in filter(None, (part.strip() for part in text.split(","))):
            is_option = re.fullmatch(r"\w+=.*(?<!\.jsonl)", part) and specs and ":" in specs[-1]
            specs[-1:] = [f"{specs[-1]},{part}"] if is_option else [*specs[-1:], part]
    if texts and not specs:
        raise UserError("--tasks names no task")
    return list(dict.fromkeys(specs))


def is_own(spec: str) -> bool:
    """Whether a task comes with Nano or is a file; others are public benchmarks (evaluation/public.py)."""
    return spec.endswith(FILE) or spec.partition(":")[0] in tasks.names() or ":" in spec


def find_task(spec: str, metric: Metric | None = None) -> Task:
    """The task of a name with options, or of a file of questions; `metric` instead of its own.

    Raises UserError if there is no such task, or the metric does not fit.
    """
    if spec.endswith(FILE):
        from tasks.questions import Questions

        return Questions(resolve_path(spec), metric)
    task = tasks.parse(spec)
    if metric not in (None, task.metric):
        # A likelihood can be computed for any answer, but a score of its own knows nothing of the metric.
        if type(task).score is not Task.score and metric not in ("choice", "perplexity"):
            raise UserError(f"{spec} scores its answers itself: --metric {metric} does not fit")
        task.metric = metric
    return task


def own_tasks() -> list[Task]:
    """What is run without --tasks: all tasks that come with Nano, except for toy problems."""
    toys = tasks.names(Problem)
    return [tasks.make(name, {}) for name in tasks.names() if name not in toys]
