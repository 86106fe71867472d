"""Public benchmarks: tasks of lm-evaluation-harness (evaluation/harness.py), and CORE (evaluation/core.py).

Their results are kept as those of Nano's own tasks (evaluation/results.py), in one file for each name, which
is written when all of it is scored: a header, a line for each example and metric, and at the end a line with
all scores.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import display_path
from common.errors import UserError
from common.packages import require
from evaluation.results import FORMAT, VERSION, ResultFile, digest, file_digest, to_line, total
from evaluation.runner import ExampleScore, TaskResult

if TYPE_CHECKING:
    from decoding.text_generator import LoadedModel

CORE = "core"
ABOUT = ("name", "metric", "base_rate", "n_all", "seconds", "notes")  # of a TaskResult, in the last line


@dataclass
class Options:
    """How public benchmarks are run.

    limit               examples of each task, the first ones; None for all
    include_path        a folder with task files in the format of the harness
    core_data           the folder with the data of CORE
    run_generated_code  allow tasks that run code that the model has written
    """

    limit: int | None = None
    include_path: Path | None = None
    core_data: Path = Path("eval_bundle")
    run_generated_code: bool = False


def check(names: Sequence[str], options: Options) -> None:
    """Raise UserError if a package or a folder is missing. Does not import torch."""
    if CORE in names:
        require("yaml")
        from evaluation import core

        core.read_tasks(options.core_data)
    if of_harness := [name for name in names if name != CORE]:
        require("lm_eval", otherwise=f"; {' and '.join(of_harness)} would be a task of lm-evaluation-harness")
    if options.include_path and not options.include_path.is_dir():
        raise UserError(f"there is no folder {display_path(options.include_path)}")


def run(
    loaded: LoadedModel,
    names: Sequence[str],
    options: Options,
    *,
    chat: bool,
    quantize: str | None = None,
    resume: bool = False,
    on_each: Callable[[], object] = lambda: None,
) -> list[TaskResult]:
    """Run benchmarks on a loaded model, and keep the results. resume: take those that are finished from disk.

    CORE is for models that continue texts, so it knows no chat. on_each is called as each request ends.
    """
    results: dict[str, list[TaskResult]] = {}
    files = {}
    for name in names:
        files[name] = ResultFile(loaded, quantize, _identity(name, options, chat and name != CORE))
        if resume and (found := read(files[name])):
            results[name] = found

    def keep(name: str, of_name: list[TaskResult]) -> None:
        results[name] = of_name
        with files[name].locked(), files[name].writing(_lines(of_name)) as file:
            file.write(to_line({"results": [{**total(one), **_about(one)} for one in of_name]}), sync=True)

    if CORE in names and CORE not in results:
        from evaluation import core

        keep(CORE, core.run(loaded.model, loaded.tokenizer, options.core_data, options.limit, on_each))
    if missing := [name for name in names if name not in results]:
        from evaluation import harness

        found_now = harness.run(
            loaded.model, loaded.tokenizer, missing, chat=chat, limit=options.limit, on_each=on_each,
            include_path=options.include_path, run_generated_code=options.run_generated_code,
        )  # fmt: skip
        for name, of_name in found_now.items():
            keep(name, of_name)
    return [result for name in names for result in results[name]]


# ---- on disk -----------------------------------------------------------------------------------------


def _identity(name: str, options: Options, chat: bool) -> dict[str, Any]:
    """What the scores depend on besides the model, the files of the user included."""
    folder = options.core_data if name == CORE else options.include_path
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return {
        "task": name,
        "style": "chat" if chat else "text",
        "limit": options.limit,
        "files": digest([file_digest(path) for path in files if path.suffix != ".pyc"]),
        "harness": None if name == CORE else importlib.metadata.version("lm_eval"),
    }


def _lines(results: Sequence[TaskResult]) -> Iterator[dict[str, Any]]:
    for result in results:
        for one in result.scores:
            yield {"task": result.name, "metric": result.metric, **one._asdict()}


def _about(result: TaskResult) -> dict[str, Any]:
    return {key: getattr(result, key) for key in ABOUT}


def read(file: ResultFile) -> list[TaskResult]:
    """The results in a file; none if it is missing, damaged, or of another evaluation."""
    try:
        header, *lines, last = map(json.loads, file.path.read_bytes().splitlines())
        if [header["format"], header["version"], header["identity"]] != [FORMAT, VERSION, file.identity]:
            return []
        scores: dict[tuple[str, str], list[ExampleScore]] = {}
        for line in lines:
            key = line.pop("task"), line.pop("metric")
            scores.setdefault(key, []).append(ExampleScore(**line))
        return [
            TaskResult(scores=scores[one["name"], one["metric"]], **{key: one[key] for key in ABOUT})
            for one in last["results"]
        ]
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return []
