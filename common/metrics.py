"""The numbers that a run logs, and how the readable log shows them.

An event of a run is a JSON object, one a line of train_<run>.metrics.jsonl:

    {"event": "train", "time": "2026-01-02T03:04:05.678+00:00", "epoch": 0, "step": 10, "loss": 3.21415, ...}

Numbers have their full precision and SI units: seconds, joules, and shares from 0 to 1 instead of percent.
JSON has neither NaN nor infinity, so both are written as null. The readable log, train_<run>.log, shows the
same numbers rounded, under the titles of the table below.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

METRICS_SUFFIX = ".metrics.jsonl"

Metric = float | str | tuple[int, int]


def duration(seconds: float) -> str:
    """Seconds in words: '52 s', '3 min 20 s', '2 h 05 min', '3 d 4 h'."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 1:
        return f"{seconds} s"
    if hours < 1:
        return f"{minutes} min {seconds % 60:02d} s"
    return f"{hours} h {minutes % 60:02d} min" if days < 1 else f"{days} d {hours % 24} h"


def plain(value: float | str) -> str:
    """A number with four digits, or a text as it is."""
    return value if isinstance(value, str) else f"{value:.4g}"


def quoted(text: str) -> str:
    """The text in quotation marks, on one line, without control characters."""
    line = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class Field(NamedTuple):
    """How the readable log shows a metric: its title, and the text for its value times `scale`."""

    title: str
    text: Callable[[Any], str] = plain
    scale: float = 1

    def show(self, value: Metric) -> str:
        return self.text(self.scale * value if isinstance(value, int | float) else value)


FIELDS: dict[str, dict[str, Field]] = {
    "train": {
        "curriculum": Field("Curriculum", "{0[0]}-{0[1]}".format),  # which training file, sequence in it
        "loss": Field("Loss", "{:.6f}".format),  # nats per token
        "lr": Field("LR", "{:.2e}".format),
        "grad_norm": Field("Grad-Norm", "{:.3f}".format),
        "step_seconds": Field("Time", "{:.0f} ms".format, 1e3),
        "flops_per_second": Field("Speed", "{:.2f} GFLOP/s".format, 1e-9),
        "tokens_per_second": Field("Tokens/s", "{:.0f}".format),
        "energy_joules": Field("Energy", "{:.3f} kJ".format, 1e-3),  # since this process began to train
        "remaining_seconds": Field("Remaining", duration),
    },
    "val": {
        "loss": Field("Loss", "{:.6f}".format),
        "loss/": Field("Loss/", "{:.6f}".format),  # "loss/0": of the first of several validation files
        "best": Field("Best", "{:.6f}".format),
        "accuracy": Field("Accuracy", "{:.2f}%".format, 100),
        "bpb": Field("BPB", "{:.4f}".format),  # bits per byte of text
    },
    "save": {"path": Field("")},
    "task": {
        "task": Field(""),  # as in the key eval_tasks
        "score": Field("Score", "{:.2f}%".format, 100),
        "perplexity": Field("Perplexity"),
        "bits_per_byte": Field("BPB", "{:.4f}".format),
        "standard_error": Field("Error", "{:.2f}%".format, 100),  # of the score
        "base_rate": Field("Base", "{:.2f}%".format, 100),  # the score of a model that knows nothing
        "metric": Field("Metric"),
        "n": Field("Examples", "{:.0f}".format),
        "seconds": Field("Time", duration),
    },
    "sample": {"prompt": Field("", quoted), "text": Field("Text", quoted)},
}


def field(event: str, name: str) -> Field:
    """How to show a metric of this event. One that is not in the table goes by its own name."""
    fields, (base, slash, part) = FIELDS.get(event, {}), name.partition("/")
    if name in fields:
        return fields[name]
    parts = fields.get(base + slash)
    return parts._replace(title=parts.title + part) if parts else Field(name)


def readable(event: str, metrics: Mapping[str, Metric]) -> dict[str, str]:
    """{title: text} of each metric, in the same order."""
    fields = {name: field(event, name) for name in metrics}
    return {shown.title: shown.show(metrics[name]) for name, shown in fields.items()}


def tracked(event: str, metrics: Mapping[str, Metric]) -> dict[str, float | str]:
    """{name: number or text} of an event for a tracker (common/trackers.py)."""
    if event == "task":
        return {f"Task/{metrics['task']}": value for name in ("score", "perplexity")
                if isinstance(value := metrics.get(name), int | float)}  # fmt: skip
    if event == "sample":
        return {f"Sample/{str(metrics['prompt'])[:60]}": str(metrics["text"])}
    fields = {name: field(event, name) for name in metrics if name != "remaining_seconds"}
    return {f"{event.capitalize()}/{shown.title}": shown.scale * value for name, shown in fields.items()
            if isinstance(value := metrics[name], int | float)}  # fmt: skip


def to_json(record: Mapping[str, Any]) -> str:
    """The record as one line of JSON, with null for NaN and infinity."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
        return json.dumps(finite, ensure_ascii=False)


TITLES = {event: {shown.title: name for name, shown in fields.items()} for event, fields in FIELDS.items()}


def name_of(event: str, title: str) -> str:
    """The name of the metric that the readable log shows under this title: the inverse of `field`."""
    names, (base, slash, part) = TITLES[event], title.partition("/")
    if title in names:
        return names[title]
    return names[base + slash] + part if base + slash in names else title
