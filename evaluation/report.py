"""One page about a model: what it learned from, on which machine, at what cost, and how well it does.

`evaluate.py --report` writes it twice, as report.html, one file with everything in it, and as report.md with
the charts beside it. All numbers come from what training and evaluation have recorded: checkpoints, logs,
token files and checkpoint/evaluation/. What nobody recorded is called "not recorded".

A page is a list of `Section`s, which `to_html` and `to_markdown` write down. All texts in them may come from
strangers' checkpoints, or from a model that has read anything, so both escape them.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import provenance
from common.config import read_json, resolve_path
from common.errors import UserError
from common.files import AtomicFiles
from common.log_reader import Log, Run, merge_runs
from common.metrics import METRICS_SUFFIX, duration
from evaluation.tables import count, format_score, spread

if TYPE_CHECKING:
    from decoding.text_generator import LoadedModel
    from evaluation.results import Evaluation

UNKNOWN = "not recorded"
N_DIALOGUES = 12
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
    while origin := stages[0].config.get("from_checkpoint"):
        first = stages[0]
        if not isinstance(origin, str) or origin == "auto":
            notes.append(
                f"Which checkpoint {first.title} started from is {UNKNOWN}: an earlier version of Nano began "
                "it."
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


@dataclass
class Text:
    text: str


@dataclass
class Facts:
    """A few large numbers."""

    facts: list[tuple[str, str]]


@dataclass
class Table:
    """The first cell of each row is its heading. is_text: its cells are sentences, not numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    is_text: bool = False
    is_folded: bool = False


@dataclass
class Chart:
    name: str
    caption: str
    alt: str
    svg: bytes

    @property
    def data(self) -> str:
        return base64.b64encode(self.svg).decode()


@dataclass
class Commands:
    lines: list[str]


Block = Text | Facts | Table | Chart | Commands


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


def write(
    folder: Path, stages: Sequence[TrainedStage], evaluations: Sequence[Sequence[Evaluation]],
    notes: Sequence[str],
) -> tuple[Path, Path]:  # fmt: skip
    """Write the page into a folder. Returns the paths of report.html and report.md.

    evaluations[i]: of the i-th of the stages that have a model. notes: sentences about what is missing.
    """
    title = f"{stages[-1].title}, step {stages[-1].step:,}"
    sections = page(stages, evaluations, notes)
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    contents = {chart.name: chart.svg for chart in charts}
    contents |= {"report.md": to_markdown(title, sections).encode()}
    contents |= {"report.html": to_html(title, sections).encode()}
    with AtomicFiles() as files:
        for name, content in contents.items():
            files.open(folder / name).write(content)
    return folder / "report.html", folder / "report.md"


def page(
    stages: Sequence[TrainedStage], evaluations: Sequence[Sequence[Evaluation]], notes: Sequence[str]
) -> list[Section]:
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
        Section("Summary", [Facts(facts(stages)), *map(Text, notes)]),
        Section("Scores", scores(loaded, evaluations)),
        Section("Questions and answers", dialogues(loaded, evaluations)),
        Section("Training", [costs(names, stages)]),
        Section("Loss", charts(stages)),
        Section("Model", [
            by_stage("size", names, {key: [read(s) for s in stages] for key, read in model.items()}),
            by_stage("shape", names, _keys(shapes)),
        ]),
        Section("Data and tokenizer", [
            by_stage("tokenizer", names, tokenizers(stages)), data(names, stages),
        ]),
        Section("Machine", [
            by_stage("machine", names, {key: [read(s) for s in stages] for key, read in machine.items()})
        ]),
        Section("Commands", commands(stages)),
        Section("Settings", [by_stage("all keys of the runs", names, _keys(settings), is_folded=True)]),
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


def by_stage(
    caption: str, names: Sequence[str], rows: dict[str, list[Any]], is_folded: bool = False
) -> Table:
    """A column for each stage; a single one if all stages have the same values."""
    cells = [[shown(value) for value in values] for values in rows.values()]
    columns, n = list(names), len(names)
    if all(len(set(row)) == 1 for row in cells):
        columns, n = ["all stages" if n > 1 else names[0]], 1
    table = [[key, *row[:n]] for key, row in zip(rows, cells, strict=True)]
    return Table(caption, ["", *columns], table, is_folded=is_folded)


def _keys(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """{key: its value in each configuration}; a key of others is "-", null is JSON's."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return {key: ["null" if config.get(key, "") is None else config.get(key, "-") if config else None
                  for config in configs] for key in keys}  # fmt: skip


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
    "training FLOPs": "{:.3e}".format,
    "time in training steps": duration,
    "time in all": duration,
    "energy": lambda joules: f"{joules / 3600:.4g} Wh",
}


def total(values: Sequence[float | None], unit: Callable[[float], str]) -> str:
    """The sum, and whether some of its parts are unknown."""
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    return "more than " * (len(known) < len(values)) + unit(sum(known))


def costs(names: Sequence[str], stages: Sequence[TrainedStage]) -> Table:
    def origin(stage: TrainedStage) -> str:
        value = stage.config.get("from_checkpoint", UNKNOWN)
        return {"": "a new model", "auto": UNKNOWN}.get(value, str(value))

    def loss(points: list[tuple[int, float]], which: Callable[..., tuple[int, float]]) -> str:
        if not points:
            return UNKNOWN
        step, value = which(points, key=lambda point: (point[1], point[0]))
        return f"{value:.4f} (step {step:,})"

    rows = [
        ["run", *(stage.run_name for stage in stages)],
        ["started from", *map(origin, stages)],
        ["step of the checkpoint", *(f"{stage.step:,}" for stage in stages)],
    ]
    sums = [""] * len(rows)
    for name, values in totals(stages).items():
        unit = UNITS[name]
        rows.append([name, *(UNKNOWN if value is None else unit(value) for value in values)])
        sums.append(total(values, unit))
    vals = [stage.run.val if stage.run else [] for stage in stages]
    rows += [
        ["energy of", *(", ".join(map(str, stage.header("energy_of") or [UNKNOWN])) for stage in stages)],
        ["validation loss, last", *(loss(points[-1:], min) for points in vals)],
        ["validation loss, lowest", *(loss(points, min) for points in vals)],
    ]
    columns = ["", *names]
    if len(stages) > 1:
        columns.append("sum")
        rows = [[*row, end] for row, end in zip(rows, [*sums, "", "", ""], strict=True)]
    return Table(
        "Tokens are all that were read, with padding. Time in all includes validation and saving, and steps "
        "that were trained again after an interruption.", columns, rows,
    )  # fmt: skip


def facts(stages: Sequence[TrainedStage]) -> list[tuple[str, str]]:
    values, last = totals(stages), stages[-1]
    found = [("parameters", f"{last.loaded.model.n_params:,}")] if last.loaded else []
    found.append(("stages", " → ".join(column_names(stages))))
    found += [
        (name, total(values[name], UNITS[name])) for name in ("tokens", "training FLOPs", "time in all")
    ]
    if total(values["energy"], str) != UNKNOWN:
        found.append(("energy", total(values["energy"], UNITS["energy"])))
    return found


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
        "kind": [t and type(t).__name__.removesuffix("Tokenizer") for t in known],
        "tokens in the vocabulary": [t and t.vocab_size for t in known],
        "fingerprint": [t and t.fingerprint for t in known],
    }


def data(names: Sequence[str], stages: Sequence[TrainedStage]) -> Table:
    """A row for each file, as the checkpoint records it; bytes and unknown tokens if it is still the same."""
    rows = []
    for name, stage in zip(names, stages, strict=True):
        pairs = [_pair(part) for part in stage.config.get("dataset_path") or []]
        recorded = stage.loaded.checkpoint.data if stage.loaded else {}
        for i, kind in enumerate(("train", "validation")):
            paths, files = [pair[i] for pair in pairs], recorded.get(kind, [])
            if len(files) == 1 < len(paths):  # a mixture is one whole
                paths = [" + ".join(paths)]
            for number, path in enumerate(paths):
                file = files[number] if number < len(files) else {}
                rows.append([path, f"{name}, {kind}", file.get("size", UNKNOWN), *_details(path, file)])
    return Table(
        f"A token file that has changed since has no bytes here. How the text was prepared is {UNKNOWN}.",
        ["file or task", "for", "size", "bytes a token", "unknown tokens"], rows,
    )  # fmt: skip


def _pair(part: Any) -> tuple[str, str]:
    """[what is trained on, what is validated with] of a part of dataset_path."""
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
        Text(f"Written on {when}, with commit {provenance.commit() or UNKNOWN} of Nano."),
    ]


# ---- scores ------------------------------------------------------------------------------------------


def scores(names: Sequence[str], evaluations: Sequence[Sequence[Evaluation]]) -> list[Block]:
    rows = []
    for results in zip(*([evaluation.result for evaluation in own] for own in evaluations), strict=True):
        besides = [result.beside() for result in results]
        for row in (results, besides):
            known = [result for result in row if result]
            if not known:
                continue
            first = known[0]
            base = "-" if first.base_rate is None else format_score(first.metric, first.base_rate)
            values = [format_score(r.metric, r.score, r.standard_error) for r in known]
            rows.append([first.name, *values, base, first.metric, count(first)])
    if not rows:
        return [Text("The model has no scores: none of the tasks fits it.")]
    return [
        Table(
            "±: standard error. Base rate: the score of knowing nothing. All stages were asked the same "
            "questions.", ["task", *names, "base rate", "metric", "examples"], rows,
        ),
        Text("How the models are asked, and what a metric means: doc/evaluation.md of Nano."),
    ]  # fmt: skip


def dialogues(names: Sequence[str], evaluations: Sequence[Sequence[Evaluation]]) -> list[Block]:
    """The same questions to all stages, spread over the tasks and the kinds of their examples."""
    answered = [own for own in zip(*evaluations, strict=True) if own[0].result.metric != "perplexity"]
    rows = []
    for own in answered:
        prepared, scored = own[-1].prepared, [evaluation.scores for evaluation in own]
        for score in spread(scored[-1], max(2, N_DIALOGUES // len(answered))):
            example = prepared.examples[score.number]
            question = "\n".join(message["content"] for message in prepared.task.messages(example))
            answers = [f"{_mark(s.value)} {_cut(s.answer)}{' …' * s.is_cut}"
                       for s in (of_stage[score.number] for of_stage in scored)]  # fmt: skip
            rows.append([_cut(question), *answers, _cut(example.answer)])
    if not rows:
        return [Text("Nothing was asked that is answered in words.")]
    caption = "Greedy answers. ✓ right, ✗ wrong, … cut off because it became too long."
    return [Table(caption, ["question", *names, "right answer"], rows, is_text=True)]


def _mark(value: float) -> str:
    return {0.0: "✗", 1.0: "✓"}.get(value, format_score("", value))


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


# ---- HTML and Markdown -------------------------------------------------------------------------------


def clean(text: object) -> str:
    """The text without control characters and other invisible ones, except for line ends."""
    return "".join(c if c.isprintable() or c in "\n\u3000\xa0" else "\ufffd" for c in str(text))


def to_html(title: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, finalize=lambda value: clean(value) if type(value) is str else value,
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    named = [(s.title, [(type(block).__name__, block) for block in s.blocks]) for s in sections]
    return str(environment.from_string(template).render(title=title, sections=named))


def escaped(text: str) -> str:
    """The text for Markdown, where it means nothing but itself, in one line."""
    text = re.sub(r"([\\`*_<>\[\]|#&~$!])", r"\\\1", clean(text))
    return text.replace("\n", "<br>")


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {escaped(title)}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            lines += [*_block_lines(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def _block_lines(block: Block) -> Iterable[str]:
    if isinstance(block, Text):
        yield escaped(block.text)
    elif isinstance(block, Facts):
        yield from (f"- {escaped(name)}: **{escaped(value)}**" for name, value in block.facts)
    elif isinstance(block, Chart):
        yield f"![{escaped(block.alt)}]({block.name})"
    elif isinstance(block, Commands):
        text = clean("\n".join(block.lines))
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield from (f"{fence}sh", text, fence)
    else:
        right = "---" if block.is_text else "---:"
        rows = [block.columns, ["---", *[right] * (len(block.columns) - 1)], *block.rows]
        for number, row in enumerate(rows):
            yield f"| {' | '.join(row if number == 1 else map(escaped, row))} |"
        yield from ("", escaped(block.caption))
