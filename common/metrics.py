"""The numbers that a run logs, and how the readable log shows them.

An event of a run is a JSON object, one a line of train_<run>.metrics.jsonl:

    {"event": "train", "time": "2026-01-02T03:04:05.678+00:00", "epoch": 0, "step": 10, "loss": 3.21415, ...}

Numbers have their full precision and SI units: seconds, FLOP/s, and shares from 0 to 1 instead of percent.
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


class Field(NamedTuple):
    """How the readable log shows a metric: its title, and the text for its value times `scale`."""

    title: str
    text: Callable[[Any], str] = "{:.4g}".format
    scale: float = 1


FIELDS: dict[str, dict[str, Field]] = {
    "train": {
        "curriculum": Field("Curriculum", "{0[0]}-{0[1]}".format),  # which training file, sequence in it
        "loss": Field("Loss", "{:.6f}".format),  # nats per token
        "lr": Field("LR", "{:.2e}".format),
        "grad_norm": Field("Grad-Norm", "{:.3f}".format),
        "step_seconds": Field("Time", "{:.0f} ms".format, 1e3),
        "flops_per_second": Field("Speed", "{:.2f} GFLOP/s".format, 1e-9),
        "tokens_per_second": Field("Tokens/s", "{:.0f}".format),
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
    texts = {}
    for name, value in metrics.items():
        title, text, scale = field(event, name)
        if isinstance(value, str):
            texts[title] = value
        else:
            texts[title] = text(scale * value) if isinstance(value, int | float) else text(value)
    return texts


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
