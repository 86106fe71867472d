"""CORE: the 22 tasks of DataComp-LM, and the mean of their centred accuracies.

(Li et al. 2024, "DataComp-LM: In search of the next generation of training sets for language models", section
3.5.) Centred means that guessing is 0 and all right is 1: (accuracy - baseline) / (1 - baseline). The data is
the bundle that nanochat uses, and so is the way of asking (nanochat/core_eval.py), so that numbers compare:

    core.yaml           the tasks: file, kind, number of examples in the prompt, what stands before an answer
    eval_data/          a .jsonl file for each
    eval_meta_data.csv  what guessing scores, in per cent

- multiple_choice: the choice of lowest mean loss per token, from where the tokens of the choices differ.
- schema: the context after which the continuation, all tokens with which the texts end alike, has the lowest
  mean loss.
- language_modeling: whether each token of the continuation is the likeliest.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import display_path
from common.errors import UserError
from evaluation.runner import ExampleScore, TaskResult
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from model import GPT

FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def run(
    model: GPT,
    tokenizer: Tokenizer,
    folder: Path,
    limit: int | None = None,
    on_each: Callable[[], object] = lambda: None,
) -> list[TaskResult]:
    """Run all tasks of a bundle: a result for each, and "core", whose kinds are the centred accuracies.

    limit: examples of each task. on_each is called as each example ends. Raises UserError for a bundle that
    is incomplete or damaged.
    """
    tasks, baselines = read_tasks(folder), read_baselines(folder)
    for task in tasks:  # before anything is computed
        if task["label"] not in baselines:
            raise UserError(f"{display_path(folder / 'eval_meta_data.csv')} has no row for {task['label']}")
    data = [read_data(folder, task, limit) for task in tasks]
    results: list[TaskResult] = []
    centred: list[ExampleScore] = []
    for task, items in zip(tasks, data, strict=True):
        start, baseline, label = time.perf_counter(), baselines[task["label"]], task["label"]
        are_right, n_cut = run_task(model, tokenizer, task, items, on_each)
        scores = [ExampleScore(number, label, float(right)) for number, right in enumerate(are_right)]
        notes = [f"{label}: {n_cut:,} texts are longer than the context: their beginning is left out"]
        results.append(
            TaskResult(f"core/{label}", "acc", baseline, scores, seconds=time.perf_counter() - start,
                       notes=notes * bool(n_cut))
        )  # fmt: skip
        # Weighted so that each task counts the same.
        for right in are_right:
            value = (right - baseline) / (1 - baseline) / len(items)
            centred.append(ExampleScore(len(centred), label, value, 1 / len(items)))
    seconds = sum(result.seconds or 0 for result in results)
    return [*results, TaskResult("core", "centred acc", 0.0, centred, seconds=seconds)]


def run_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: dict[str, Any],
    items: list[dict[str, Any]],
    on_each: Callable[[], object] = lambda: None,
) -> tuple[list[bool], int]:
    """Returns (whether each item is answered right, how many texts were too long for the context)."""
    from decoding.likelihood import log_likelihoods

    kind, context = task["icl_task_type"], model.config.block_size
    requests: list[tuple[list[int], list[int]]] = []
    owners: list[tuple[int, int]] = []  # the item and the text of each request
    n_texts, n_cut = [], 0
    for number, item in enumerate(items):
        texts = texts_of(task, item, examples_for(task, items, number))
        rows = [[tokenizer.bos_id, *ids.tolist()] for ids in tokenizer.encode_batch(texts)]
        pairs = pairs_of(kind, rows)
        n_texts.append(len(pairs))
        for place, (before, after) in enumerate(pairs):
            n_over = max(0, len(before) + len(after) - context)
            n_cut += n_over > 0
            if n_over >= len(before) > 0:
                raise UserError(
                    f"{task['label']}, example {number + 1:,}: the {len(after):,} tokens of its continuation "
                    f"are too many for a context of {context:,}"
                )
            if before and after:
                requests.append((before[n_over:], after))
                owners.append((number, place))
    losses = [[math.nan] * n for n in n_texts]  # the mean loss of no token
    are_greedy = [False] * len(items)
    found = log_likelihoods(model, requests)
    for (number, place), one in zip(owners, found, strict=True):
        losses[number][place] = -one.logprob / one.n_tokens
        are_greedy[number] = one.is_greedy
    are_right = []
    for number, item in enumerate(items):
        chosen = min(range(n_texts[number]), key=losses[number].__getitem__)
        are_right.append(are_greedy[number] if kind == "language_modeling" else chosen == item["gold"])
        on_each()
    return are_right, n_cut


def examples_for(task: dict[str, Any], items: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The solved examples in the prompt of an item: others of the same task, drawn with nanochat's seeds."""
    others = [other for other in range(len(items)) if other != number]
    return [items[other] for other in random.Random(1234 + number).sample(others, task["num_fewshot"][0])]


def texts_of(task: dict[str, Any], item: dict[str, Any], examples: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of an item: one for each choice or context or, in language modelling, without and with the
    continuation."""
    kind, delimiter = task["icl_task_type"], task.get("continuation_delimiter", " ")

    def solved(one: dict[str, Any]) -> str:
        if kind == "multiple_choice":
            return one["query"] + delimiter + one["choices"][one["gold"]]
        context = one["context_options"][one["gold"]] if kind == "schema" else one["context"].strip()
        return context + delimiter + one["continuation"]

    before = "".join(solved(one) + "\n\n" for one in examples)
    if kind == "multiple_choice":
        return [before + item["query"] + delimiter + choice for choice in item["choices"]]
    if kind == "schema":
        return [before + context + delimiter + item["continuation"] for context in item["context_options"]]
    asked = before + item["context"].strip() + delimiter
    # White space at its end would become a part of the first token of the continuation.
    return [asked.strip(), asked + item["continuation"]]


def pairs_of(kind: str, rows: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each of the tokenized texts of an item."""
    if kind == "multiple_choice":
        starts = [n_alike(rows)] * len(rows)
    elif kind == "schema":
        n_same = n_alike([row[::-1] for row in rows])
        starts = [len(row) - n_same for row in rows]
    else:
        starts = [n_alike(rows)]  # all of the text without the continuation, unless tokens go across its end
        rows = rows[1:]
    return [(row[:start], row[start:]) for start, row in zip(starts, rows, strict=True)]


def n_alike(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    columns = zip(*rows, strict=False)  # up to the end of the shortest
    return sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))


# ---- the bundle --------------------------------------------------------------------------------------


def read_tasks(folder: Path) -> list[dict[str, Any]]:
    import yaml

    path = folder / "core.yaml"
    try:
        tasks = yaml.safe_load(path.read_text("utf-8"))["icl_tasks"]
        for task in tasks:
            if task["icl_task_type"] not in FIELDS:
                raise UserError(f"{display_path(path)}: {task['label']} is of an unknown kind")
            if not (type(task["num_fewshot"][0]) is int and isinstance(task["dataset_uri"], str)):
                raise TypeError
        return tasks
    except FileNotFoundError:
        raise UserError(
            f"there is no {display_path(path)}; --core_data names the folder eval_bundle of nanochat"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError):
        raise UserError(f"{display_path(path)} is not the list of CORE's tasks, or is damaged") from None


def read_baselines(folder: Path) -> dict[str, float]:
    """What guessing scores in each task, from 0 to 1."""
    path = folder / "eval_meta_data.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in csv.DictReader(file)}
    except FileNotFoundError:
        raise UserError(f"there is no {display_path(path)}") from None
    except (ValueError, TypeError, KeyError, csv.Error):
        raise UserError(f"{display_path(path)} is damaged") from None


def read_data(folder: Path, task: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """The items of a task in nanochat's order, at most `limit` of them."""
    path = folder / "eval_data" / task["dataset_uri"]
    items = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        raise UserError(f"{display_path(path)} is missing or damaged") from None
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            if missing := [key for key in FIELDS[task["icl_task_type"]] if key not in item]:
                raise UserError(f"{display_path(path)}, line {number}: {missing[0]} is missing")
        except (ValueError, TypeError):
            raise UserError(f"{display_path(path)}, line {number}, is not a JSON object") from None
        items.append(item)
    random.Random(1337).shuffle(items)
    items = items[:limit]
    if len(items) <= (n := task["num_fewshot"][0]):
        raise UserError(
            f"{task['label']}: {len(items)} examples are too few for {n} in each prompt, and one to ask"
        )
    return items
