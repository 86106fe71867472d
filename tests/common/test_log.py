"""The two files of a run's log: the readable one keeps its form, the other one has the numbers."""

import json
import math
import re
from datetime import datetime, timezone

import pytest

import common.log
from common.log import RunLog
from common.metrics import FIELDS, field, name_of, to_json

HEADER = {"task": "pretrain", "train_config": {"max_steps": 100}, "run": "20260102_030405"}
TRAIN = {
    "curriculum": (0, 2560), "loss": 3.2140001234567, "lr": 4e-4, "grad_norm": 1.2340001,
    "mtp_loss": 2.71828182, "expert_load/3": 1.5, "step_seconds": 0.0519, "flops_per_second": 91.2e9,
    "tokens_per_second": 14200.4, "remaining_seconds": 200.0,
}  # fmt: skip
VAL = {"loss": 3.1, "best": 3.0, "loss/0": 2.5, "loss/1": 3.5, "accuracy": 0.98765, "bpb": 1.23456}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common.log, "ROOT", tmp_path)
    monkeypatch.setattr(common.log, "command", lambda: "python train.py -t pretrain")
    monkeypatch.setattr(common.log, "commit", lambda: "9ff64db")
    return tmp_path


def write(*events, first_step=0):
    with RunLog("x", HEADER, 100, first_step) as log:
        for kind, step, metrics in events:
            log.write(kind, 0, step, metrics)


def events(folder):
    lines = (folder / "train_x.metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_readable_lines(folder, capsys):
    write(("train", 10, TRAIN), ("val", 10, VAL), ("save", 10, {"path": "checkpoint/盘 x.pt"}))
    text = (folder / "train_x.log").read_text("utf-8")
    assert re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text).splitlines() == [
        '# {"format": "nano-log", "version": 1, "command": "python train.py -t pretrain", '
        '"commit": "9ff64db", "task": "pretrain", "train_config": {"max_steps": 100}, '
        '"run": "20260102_030405"}',
        "TIME | Train | Epoch-Step: 0-10 | Curriculum: 0-2560 | Loss: 3.214000 | LR: 4.00e-04 | "
        "Grad-Norm: 1.234 | mtp_loss: 2.718 | expert_load/3: 1.5 | Time: 52 ms | Speed: 91.20 GFLOP/s | "
        "Tokens/s: 14200 | Remaining: 3 min 20 s",
        "TIME | Val | Epoch-Step: 0-10 | Loss: 3.100000 | Best: 3.000000 | Loss/0: 2.500000 | "
        "Loss/1: 3.500000 | Accuracy: 98.77% | BPB: 1.2346",
        "TIME | Save | Epoch-Step: 0-10 | checkpoint/盘 x.pt",
    ]
    assert capsys.readouterr().out == text.partition("\n")[2]


def test_metrics_are_exact(folder):
    write(("train", 10, TRAIN), ("val", 10, VAL), ("save", 10, {"path": "checkpoint/盘 x.pt"}))
    start, *logged = events(folder)
    assert start["event"] == "start" and HEADER.items() <= start.items()
    for event in (start, *logged):
        age = datetime.now(timezone.utc) - datetime.fromisoformat(event.pop("time"))
        assert 0 <= age.total_seconds() < 60
    train = TRAIN | {"curriculum": [0, 2560]}
    assert logged == [
        {"event": "train", "epoch": 0, "step": 10, **train},
        {"event": "val", "epoch": 0, "step": 10, **VAL},
        {"event": "save", "epoch": 0, "step": 10, "path": "checkpoint/盘 x.pt"},
    ]
    assert list(logged[0])[3:] == list(TRAIN)


def test_what_json_cannot_hold_is_null(folder):
    write(("train", 1, {"loss": math.nan, "grad_norm": math.inf, "own": -math.inf}))
    assert events(folder)[1].items() >= {"loss": None, "grad_norm": None, "own": None}.items()
    assert " | Loss: nan | Grad-Norm: inf | own: -inf\n" in (folder / "train_x.log").read_text("utf-8")
    assert json.loads(to_json({"a": {"b": [math.nan, 1.5, "NaN"]}})) == {"a": {"b": [None, 1.5, "NaN"]}}


def test_a_metric_does_not_replace_the_head_of_its_event(folder):
    write(("train", 7, {"loss": 1.5, "step": 3.0, "event": 2.0, "time": 1.0}))
    event = events(folder)[1]
    assert (event["event"], event["step"], event["loss"]) == ("train", 7, 1.5) and "T" in event["time"]


def test_a_resumed_run_ends_half_a_line_and_appends(folder):
    write(("train", 10, TRAIN))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    write(("train", 10, TRAIN), first_step=9)
    lines = (folder / "train_x.metrics.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 4 and [json.loads(lines[i])["event"] for i in (0, 2, 3)] == [
        "start",
        "start",
        "train",
    ]
    with pytest.raises(ValueError):
        json.loads(lines[1])


def test_a_muted_process_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(common.log, "muted", True)
    write(("train", 10, TRAIN))
    assert not list(folder.iterdir())


def test_titles_lead_back_to_names():
    for event, fields in FIELDS.items():
        for name in (*fields, "own", "own/3", "loss/5", "lr/2"):
            assert name_of(event, field(event, name).title) == name
    assert field("val", "loss/5").title == "Loss/5" and field("train", "loss/5").title == "loss/5"
    assert field("another event", "reward").title == "reward"


def test_what_a_run_logs(train):
    settings = dict(log_interval=2, eval_interval=2, save_interval=2)
    assert train("pretrain", max_steps=4, **settings).returncode == 0
    assert train("pretrain", "--resume", max_steps=6, **settings).returncode == 0
    [path] = train.root.glob("train_*.metrics.jsonl")
    logged = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text("utf-8").splitlines()]
    kinds = ["train", "val", "save"]
    assert [event["event"] for event in logged] == ["start", *kinds, *kinds, "start", *kinds]
    starts = [event for event in logged if event["event"] == "start"]
    readable = path.with_name(path.name.replace(".metrics.jsonl", ".log")).read_text("utf-8")
    headers = [json.loads(line[2:]) for line in readable.splitlines() if line.startswith("# ")]
    assert [start | {"event": 0, "time": 0} for start in starts] == [
        h | {"event": 0, "time": 0} for h in headers
    ]
    assert {"task", "model_config", "machine", "n_params", "flops_per_token", "run"} <= starts[0].keys()
    assert [start["resumed_from_step"] for start in starts] == [0, 4]
    for kind in ("train", "val"):
        steps = [(event["step"], f"{event['loss']:.6f}") for event in logged if event["event"] == kind]
        assert steps == [(step, text) for step, text in train.logged(kind.capitalize(), "Loss")]
    losses = [event["loss"] for event in logged if event["event"] == "train"]
    assert any(loss != round(loss, 6) for loss in losses)
    train_event = next(event for event in logged if event["event"] == "train")
    train_event.pop("energy_joules", None)  # only some machines tell
    told = [name for name in FIELDS["train"] if name != "energy_joules"]
    assert list(train_event) == ["event", "time", "epoch", "step", *told]
    assert train_event["curriculum"] == [0, 4] and 0 < train_event["step_seconds"] < 60
    assert train_event["flops_per_second"] > 1e3 and train_event["remaining_seconds"] > 0
