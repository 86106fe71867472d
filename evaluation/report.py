"""One page about a model: what it learned from, on which machine, at what cost, and how well it does.

`evaluate.py --report` writes it twice, as report.html, one file with everything in it, and as report.md with
the charts beside it. All numbers come from what training and evaluation have recorded: checkpoints, logs,
token files and checkpoint/evaluation/. What nobody recorded is called "not recorded".
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import provenance
from common.config import read_json, resolve_path
from common.errors import UserError
from common.files import AtomicFiles
from common.log_reader import Log, Points, Run, merge_runs
from common.metrics import METRICS_SUFFIX, duration
from evaluation.page import Block, Chart, Commands, Facts, Section, Table, Text, to_html, to_markdown
from evaluation.tables import count, format_score, spread

if TYPE_CHECKING:
    from decoding.text_generator import LoadedModel
    from evaluation.results import Evaluation
    from evaluation.runner import TaskResult

UNKNOWN = "not recorded"
N_DIALOGUES = 12
ANSWER_ROOM = 32  # tokens that a wrong answer may be longer than the right one
LONGEST = 400  # characters of a question or an answer


# ---- where a model comes from ------------------------------------------------------------------------


@dataclass
class TrainedStage:
    """A stage of a model's training: the checkpoint that it ended with, and its run.

    loaded  the model; None if the checkpoint is gone
    log     the log of the run; None if there is none
    run     what is in it
    """

    name: str
    run_name: str
    step: int
    loaded: LoadedModel | None
    log: Log | None = None
    run: Run | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration, as the checkpoint or else the log records it. May be empty."""
        return self.loaded.checkpoint.train_config if self.loaded else self.header("train_config") or {}

    @property
    def origin(self) -> str | None:
        """The checkpoint that it started from; "" for a new model, None if that is unknown."""
        value = self.config.get("from_checkpoint")
        return value if isinstance(value, str) and value != "auto" else None

    def header(self, *keys: str) -> Any:
        """What the log's header says under these nested keys, or None."""
        value: Any = self.run.header if self.run else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def title(self) -> str:
        return f"{self.name} {self.run_name}"


def lineage(model: str, load: Callable[[str], LoadedModel]) -> tuple[list[TrainedStage], list[str]]:
    """The stages of a model's training, the first one first, and sentences about what is missing.

    model: a file, "newest" or "best". load: loads a model. Which checkpoint a run started from is recorded
    in its configuration, and never guessed.
    """
    stages = [_stage(load(model))]
    notes: list[str] = []
    while (origin := stages[0].origin) != "":
        first = stages[0]
        if origin is None:
            notes.append(
                f"What {first.title} started from is {UNKNOWN}: an earlier version of Nano began it, or "
                "another program."
            )
            break
        path = resolve_path(origin)
        if any(stage.loaded and stage.loaded.path == path for stage in stages):
            break
        named = re.fullmatch(r"([a-z]+)_([0-9]{8}_[0-9]{6})_step_([0-9]{1,15})\.pt", path.name)
        try:
            stages.insert(0, _stage(load(str(path))))
        except UserError as error:
            notes.append(f"{first.title} started from {origin}, which cannot be scored: {error}.")
            if not named:
                break
            stages.insert(0, _with_log(TrainedStage(named[1], named[2], int(named[3]), None)))
        if len(stages) > 20:  # a file from a stranger may say anything
            break
    for stage in stages:
        if not stage.run:
            notes.append(f"There is no log of {stage.title} with training steps: its costs are {UNKNOWN}.")
        elif max((step for step, _ in stage.run.train), default=0) > stage.step:
            notes.append(
                f"{stage.title} went on after step {stage.step:,}; its costs are those of all of it."
            )
    return stages, notes


def _stage(loaded: LoadedModel) -> TrainedStage:
    state = loaded.checkpoint
    return _with_log(TrainedStage(state.stage, state.run, state.step, loaded))


def _with_log(stage: TrainedStage) -> TrainedStage:
    """The stage with its log, if there is one in its place."""
    from engine import checkpoint

    folder = checkpoint.FOLDER.parent
    paths = [folder / f"train_{stage.run_name}{suffix}" for suffix in (".log", METRICS_SUFFIX)]
    if path := next((path for path in paths if path.is_file()), None):
        log = Log(path)
        log.read()
        runs = [run for run in merge_runs([log]) if run.key == (stage.name, stage.run_name)]
        stage.log, stage.run = (log, runs[-1]) if runs else (None, None)
    return stage


# ---- the page ----------------------------------------------------------------------------------------


def write(
    folder: Path, stages: Sequence[TrainedStage], evaluations: Sequence[Sequence[Evaluation]],
    benchmarks: Sequence[Sequence[TaskResult]], notes: Sequence[str],
) -> tuple[Path, Path]:  # fmt: skip
    """Write the page into a folder. Returns the paths of report.html and report.md.

    evaluations[i], benchmarks[i]: of the i-th of the stages that have a model. notes: sentences about what is
    missing.
    """
    title = f"{stages[-1].title}, step {stages[-1].step:,}"
    sections = page(stages, evaluations, benchmarks, notes)
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    contents = {chart.name: chart.svg for chart in charts}
    contents |= {"report.md": to_markdown(title, sections).encode()}
    contents |= {"report.html": to_html(title, sections).encode()}
    with AtomicFiles() as files:
        for name, content in contents.items():
            files.open(folder / name).write(content)
    return folder / "report.html", folder / "report.md"


def page(
    stages: Sequence[TrainedStage], evaluations: Sequence[Sequence[Evaluation]],
    benchmarks: Sequence[Sequence[TaskResult]], notes: Sequence[str],
) -> list[Section]:  # fmt: skip
    names = column_names(stages)
    loaded = [name for name, stage in zip(names, stages, strict=True) if stage.loaded]
    machine = {
        "machine": lambda s: s.header("machine", "name"),
        "device": lambda s: s.header("machine", "device"),
        "number format": lambda s: s.header("machine", "dtype"),
        "attention": lambda s: s.header("machine", "sdp_kernel"),
        "PyTorch": lambda s: s.header("machine", "torch"),
        "commit of Nano": lambda s: s.header("commit"),
    }
    model = {
        "parameters": lambda s: s.loaded.model.n_params if s.loaded else s.header("n_params"),
        "FLOPs per token, training": lambda s: s.header("flops_per_token"),
    }
    shapes = [
        s.loaded.checkpoint.model_config if s.loaded else s.header("model_config") or {} for s in stages
    ]
    settings = [stage.config for stage in stages]
    return [
        Section("Summary", [
            Text(f"The stages of its training: {' → '.join(names)}."),
            Facts(facts(stages)), *(Text(note, True) for note in notes),
        ]),
        Section("Scores", scores(loaded, [
            [*(evaluation.result for evaluation in own), *public]
            for own, public in zip(evaluations, benchmarks, strict=True)
        ])),
        Section("Questions and answers", dialogues(loaded, evaluations)),
        Section("Training", [costs(names, stages)]),
        Section("Loss", charts(stages)),
        Section("Model", [
            by_stage("model", names, {key: [read(s) for s in stages] for key, read in model.items()}
                     | _keys(shapes)),
        ]),
        Section("Data and tokenizer", [
            by_stage("tokenizer", names, tokenizers(stages)), data(names, stages),
        ]),
        Section("Machine", [
            by_stage("machine", names, {key: [read(s) for s in stages] for key, read in machine.items()})
        ]),
        Section("Commands", commands(stages)),
        Section("Settings", [by_stage("all keys of the configurations", names, _keys(settings), True)]),
    ]  # fmt: skip


def column_names(stages: Sequence[TrainedStage]) -> list[str]:
    """The stages' names, numbered where there are several of one name."""
    names = [stage.name for stage in stages]
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name
            for i, name in enumerate(names)]  # fmt: skip


def shown(value: Any) -> str:
    """A value of a record, for a cell."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def by_stage(name: str, names: Sequence[str], rows: dict[str, list[Any]], is_folded: bool = False) -> Table:
    """A column for each stage; a single one if all stages have the same values."""
    cells = [[shown(value) for value in values] for values in rows.values()]
    columns, n = list(names), len(names)
    if all(len(set(row)) == 1 for row in cells):
        columns, n = ["all stages" if n > 1 else names[0]], 1
    table = [[key, *row[:n]] for key, row in zip(rows, cells, strict=True)]
    return Table(name, ["", *columns], table, is_text=True, is_folded=is_folded)


def _keys(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """{key: its value in each configuration, as JSON}; "-" if that one has no such key."""

    def read(config: dict[str, Any], key: str) -> str | None:
        value = config.get(key, "-")
        return (value if value and isinstance(value, str) else json.dumps(value)) if config else None

    keys = dict.fromkeys(key for config in configs for key in config)
    return {key: [read(config, key) for config in configs] for key in keys}


# ---- costs -------------------------------------------------------------------------------------------


def totals(stages: Sequence[TrainedStage]) -> dict[str, list[float | None]]:
    """What each stage cost, as far as its log tells."""
    read: dict[str, Callable[[Run], float | None]] = {
        "steps": lambda run: run.train[-1][0] - run.since,
        "tokens": lambda run: run.total("tokens_per_second"),
        "training FLOPs": lambda run: run.total("flops_per_second"),
        "time in training steps": lambda run: run.total(),
        "time in all": lambda run: run.seconds + run.span or None,
        "energy": lambda run: run.energy,
    }
    return {name: [of(s.run) if s.run else None for s in stages] for name, of in read.items()}


UNITS: dict[str, Callable[[float], str]] = {
    "steps": "{:,.0f}".format,
    "tokens": "{:,.0f}".format,
    "training FLOPs": lambda flops: f"{flops:.3e}".replace("e+", "e"),
    "time in training steps": duration,
    "time in all": duration,
    "energy": lambda joules: f"{joules / 3600:.4g} Wh",
}


def total(stages: Sequence[TrainedStage], name: str) -> str:
    """The sum of a cost over all stages, and whether some of its parts are unknown."""
    values = totals(stages)[name] + ([] if stages[0].origin == "" else [None])
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    return "more than " * (len(known) < len(values)) + UNITS[name](sum(known))


def costs(names: Sequence[str], stages: Sequence[TrainedStage]) -> Table:
    first = {"": "a new model", None: UNKNOWN}.get(stages[0].origin) or Path(str(stages[0].origin)).stem
    before = [f"{name}, step {stage.step:,}" for name, stage in zip(names[:-1], stages[:-1], strict=True)]

    def lowest(points: Points) -> str:
        if not points:
            return UNKNOWN
        step, value = min(points, key=lambda point: point[1])
        return f"{value:.4f} (step {step:,})"

    def curves(name: str) -> list[Points]:
        return [stage.run.curves[name] if stage.run else [] for stage in stages]

    rows = [
        ["run", *(stage.run_name for stage in stages)],
        ["started from", first, *before],
        ["step of the checkpoint", *(f"{stage.step:,}" for stage in stages)],
    ]
    sums = [""] * len(rows)
    for name, values in totals(stages).items():
        unit = UNITS[name]
        rows.append([name, *(UNKNOWN if value is None else unit(value) for value in values)])
        sums.append(total(stages, name))
    if any(sensors := [stage.header("energy_of") for stage in stages]):
        rows.append(["energy of", *(", ".join(map(str, of)) if isinstance(of, list) else UNKNOWN
                                    for of in sensors)])  # fmt: skip
    rows += [
        ["validation loss, last", *(lowest(points[-1:]) for points in curves("val/loss"))],
        ["validation loss, lowest", *map(lowest, curves("val/loss"))],
        ["bits per byte, last", *(lowest(points[-1:]) for points in curves("val/bpb"))],
    ]
    columns = ["", *names]
    if len(stages) > 1:
        columns.append("sum")
        rows = [[*row, end] for row, end in itertools.zip_longest(rows, sums, fillvalue="")]
    note = (
        "Tokens: all that were read, with padding. Time in all: with validation and saving, and with steps "
        "that were trained again after an interruption."
    )
    return Table("training", columns, rows, note)


def facts(stages: Sequence[TrainedStage]) -> list[tuple[str, str]]:
    last = stages[-1]
    found = [("parameters", f"{last.loaded.model.n_params:,}")] if last.loaded else []
    found += [(name, total(stages, name)) for name in ("tokens", "training FLOPs", "time in all", "energy")]
    return [(name, value) for name, value in found if value != UNKNOWN]


def charts(stages: Sequence[TrainedStage]) -> list[Block]:
    import plot_loss

    drawn = [(name, stage) for name, stage in zip(column_names(stages), stages, strict=True) if stage.run]
    if drawn:
        plot_loss.prepare_matplotlib()
    blocks: list[Block] = []
    for name, stage in drawn:
        assert stage.log and stage.run
        (first, before), (last, after) = stage.run.train[0], stage.run.train[-1]
        alt = f"Chart of {name}, steps {first:,} to {last:,}: loss from {before:.3f} to {after:.3f}"
        if stage.run.val:
            alt += f"; validation loss in the end {stage.run.val[-1][1]:.3f}"
        svg = plot_loss.picture([stage.log], "svg")
        blocks.append(Chart(f"{name.replace(' ', '_')}.svg", f"{stage.title}", alt + ".", svg))
    return blocks or [Text(f"The loss is {UNKNOWN}.")]


# ---- model, data, commands ---------------------------------------------------------------------------


def tokenizers(stages: Sequence[TrainedStage]) -> dict[str, list[Any]]:
    known = [stage.loaded.tokenizer if stage.loaded else None for stage in stages]
    return {
        "kind": [t and {"char": "characters", "bpe": "byte-level BPE"}.get(t.kind, t.kind) for t in known],
        "tokens in the vocabulary": [t and t.vocab_size for t in known],
        "fingerprint": [t and t.fingerprint[:16] for t in known],
    }


def data(names: Sequence[str], stages: Sequence[TrainedStage]) -> Table:
    """A row for each file, as the checkpoint records it; bytes and unknown tokens if it is still the same."""
    rows = []
    for name, stage in zip(names, stages, strict=True):
        parts = stage.config.get("dataset_path")
        pairs = [_pair(part) for part in parts] if isinstance(parts, list) else []
        recorded = stage.loaded.checkpoint.data if stage.loaded else {}
        for i, kind in enumerate(("train", "validation")):
            paths, files = [pair[i] for pair in pairs], recorded.get(kind, [])
            if len(files) == 1 < len(paths):  # a mixture is one whole
                paths = [" + ".join(paths)]
            for number, path in enumerate(paths):
                file = files[number] if number < len(files) else {}
                rows.append([path, f"{name}, {kind}", file.get("size", UNKNOWN), *_details(path, file)])
    columns = ["file or task", "for", "size", "bytes a token", "unknown tokens"]
    note = (
        "Bytes of UTF-8 text and unknown tokens are those of the token file, if it is still there and has "
        "not changed since. The commands that prepared it are not recorded."
    )
    return Table("data", columns, rows, note, is_text=True)


def _pair(part: Any) -> tuple[str, str]:
    """(what is trained on, what is validated with) of a part of dataset_path."""
    value = part.get("path") or part.get("task") if isinstance(part, dict) else part
    pair = [value, value] if isinstance(value, str) else value
    return (str(pair[0]), str(pair[1])) if isinstance(pair, list) and len(pair) == 2 else (UNKNOWN, UNKNOWN)


def _details(path: str, file: dict[str, str]) -> list[str]:
    from preparation.token_file import fingerprint_of

    try:
        meta = read_json(resolve_path(path).with_suffix(".json"))
    except (UserError, OSError, ValueError):
        return [UNKNOWN, UNKNOWN]
    meta.pop("checksum", None)
    if fingerprint_of(meta) != file.get("fingerprint"):
        return [UNKNOWN, UNKNOWN]
    return [f"{meta['n_bytes'] / meta['n_tokens']:.3f}", f"{meta['n_unknown']:,}"]


def commands(stages: Sequence[TrainedStage]) -> list[Block]:
    lines = []
    for stage in stages:
        lines.append(f"# {stage.title}")
        typed = stage.run.commands if stage.run else []
        lines += typed or [f"# {UNKNOWN}"]
        n_more = len(stage.run.starts) - len(typed) if stage.run else 0
        lines += [f"# and {n_more} more starts, whose commands are {UNKNOWN}"] * (n_more > 0 < len(typed))
    when = time.strftime("%Y-%m-%d %H:%M")
    return [
        Commands([*lines, "# this page", provenance.command()]),
        Text(f"Written on {when}. Commit of Nano: {provenance.commit() or UNKNOWN}."),
    ]


# ---- scores ------------------------------------------------------------------------------------------


def scores(names: Sequence[str], results: Sequence[Sequence[TaskResult]]) -> list[Block]:
    """A row for each task and metric. results[i]: of the i-th stage."""
    found: dict[tuple[str, str], dict[int, TaskResult]] = {}
    for number, own in enumerate(results):
        for result in filter(None, itertools.chain.from_iterable((one, one.beside()) for one in own)):
            found.setdefault((result.name, result.metric), {})[number] = result
    rows = []
    for (task, metric), stages in found.items():
        first = next(iter(stages.values()))
        base = "-" if first.base_rate is None else format_score(metric, first.base_rate)
        values = [format_score(metric, one.score, one.standard_error) if (one := stages.get(i)) else "-"
                  for i in range(len(names))]  # fmt: skip
        rows.append([task, *values, base, metric, count(first)])
    if not rows:
        return [Text("There are no scores: none of the tasks fits the model.")]
    note = (
        "±: standard error. Base rate: the score of knowing nothing. All stages were asked the same "
        "questions. What a metric means: doc/evaluation.md of Nano."
    )
    return [Table("scores", ["task", *names, "base rate", "metric", "examples"], rows, note)]


def dialogues(names: Sequence[str], evaluations: Sequence[Sequence[Evaluation]]) -> list[Block]:
    """The same questions to all stages, spread over the tasks and the kinds of their examples.

    A wrong answer says more when it is not cut off where its score is certain, so they are written anew.
    """
    answered = [own for own in zip(*evaluations, strict=True) if own[0].result.metric != "perplexity"]
    rows = []
    for own in answered:
        prepared = own[-1].prepared
        chosen = spread(own[-1].scores, max(2, N_DIALOGUES // len(answered)))
        numbers = [score.number for score in chosen]
        for number, *answers in zip(numbers, *(_at_length(one, numbers) for one in own), strict=True):
            example = prepared.examples[number]
            question = "\n".join(message["content"] for message in prepared.task.messages(example))
            marks = [_mark(evaluation.scores[number].value) for evaluation in own]
            texts = [f"{mark} {answer}" for mark, answer in zip(marks, answers, strict=True)]
            rows.append([_cut(question), *texts, _cut(example.answer)])
    if not rows:
        return [Text("Nothing was asked that is answered in words.")]
    note = "Greedy answers: ✓ right, ✗ wrong, … and so on."
    return [Table("questions and answers", ["question", *names, "right answer"], rows, note, is_text=True)]


def _at_length(evaluation: Evaluation, numbers: Sequence[int]) -> list[str]:
    """A model's answers to these examples."""
    from evaluation.runner import score

    prepared = evaluation.prepared
    scores = [evaluation.scores[number] for number in numbers]
    if prepared.task.metric != "choice" and prepared.style != "toy":
        n_tokens = [prepared.max_tokens[number] + ANSWER_ROOM for number in numbers]
        part = replace(
            prepared,
            examples=[prepared.examples[number] for number in numbers],
            prompts=[prepared.prompts[number] for number in numbers],
            max_tokens=n_tokens,
        )
        scores = list(score(evaluation.model, part))
    return [_cut(one.answer) + " …" * one.is_cut for one in scores]


def _mark(value: float) -> str:
    return {0.0: "✗", 1.0: "✓"}.get(value, format_score("", value))


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
