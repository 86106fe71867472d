"""A run in each tracker, offline, read back with the tracker's own reader or its own messages."""

import contextlib
import importlib.util
import json
import os
import sqlite3
import struct
import sys

import pytest

from common import trackers
from common.log_reader import Log
from common.metrics import field

TASK, PROMPT = "arithmetic:digits=1", "1 + 1"
KEYS = dict(
    save_interval=2, eval_interval=2, eval_tasks=[TASK], eval_tasks_interval=3, eval_tasks_examples=9,
    sample_prompts=[PROMPT], lr_decay_iters=8,
)  # fmt: skip
EXPECTED = {"Train/Loss": {*range(1, 9)}, "Val/Loss": {2, 4, 6, 8}, f"Task/{TASK}": {3, 6, 8}}


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Nobody is logged in, and nothing may come from the real home."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SWANLAB_", "TRACKIO_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # so that it is put back after the test
    return tmp_path


def train_killed_and_resumed(train, tracker):
    """Six steps; then "killed" after the checkpoint of step 4, and resumed up to step 8. Returns the log."""
    done = train("pretrain", tracker=tracker, max_steps=6, **KEYS)
    assert done.returncode == 0, done.stderr
    train.checkpoints()[6].unlink()
    again = train("pretrain", "--resume", tracker=tracker, max_steps=8, **KEYS)
    assert again.returncode == 0 and "at step 4" in again.stderr
    [path] = train.root.glob("train_*.log")
    (log := Log(path)).read()
    return log.run, done


def check(run, starts):
    """starts: for each process, {name: {step: number or text}}. All that the log has is there, and right.

    Steps 5 and 6 were trained twice, with equal results.
    """
    found = {}
    for values in starts:
        for name, points in values.items():
            before = found.setdefault(name, {})
            twice = before.keys() & points.keys()
            assert all(before[step] == points[step] for step in twice if "Loss" in name or "Task" in name)
            before |= points
    for name, steps in EXPECTED.items():
        assert {*found[name]} == steps, name
    for curve, points in filter(all, run.curves.items()):
        event, _, metric = curve.partition("/")
        if event in ("train", "val") and metric != "remaining_seconds":
            shown = field(event, metric)
            values = found[f"{event.capitalize()}/{shown.title}"]
            wanted = {step: pytest.approx(shown.scale * value, rel=1e-6) for step, value in points}
            if metric in ("loss", "lr", "grad_norm"):
                assert values == wanted, curve
    assert found[f"Task/{TASK}"] == dict(run.curves[f"task/score/{TASK}"])
    assert {*found[f"Sample/{PROMPT}"]} == {3, 6, 8}
    assert all(isinstance(text, str) for text in found[f"Sample/{PROMPT}"].values())
    assert not any("Remaining" in name for name in found)


@needs("tensorboard")
def test_tensorboard(train, home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = train_killed_and_resumed(train, "tensorboard")
    events = EventAccumulator(str(train.root / "runs" / f"train_{run.header['run']}")).Reload()
    tags = events.Tags()
    found = {name: {e.step: e.value for e in events.Scalars(name)} for name in tags["scalars"]}
    for name in tags["scalars"]:
        assert len(found[name]) == len(events.Scalars(name))  # what was trained twice is there once
    clean = {f"Task/{TASK}": next(name for name in found if name.startswith("Task/"))}
    found = {**found, **{name: found[other] for name, other in clean.items()}}
    [text] = [name for name in tags["tensors"] if name.startswith("Sample/")]
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(text)}
    check(run, [{**found, f"Sample/{PROMPT}": texts}])


@needs("trackio")
@pytest.mark.slow
def test_trackio(train, home, monkeypatch):
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.sqlite_storage, trackio.utils, trackio):
        monkeypatch.setattr(module, "TRACKIO_DIR", home / "trackio", raising=False)
    run, done = train_killed_and_resumed(train, "trackio")
    assert "Trackio" not in done.stdout
    found = {}
    with contextlib.closing(sqlite3.connect(home / "trackio" / "nano.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        [(name, config)] = database.execute("SELECT run_name, config FROM configs").fetchall()
    assert {row[0] for row in rows} == {name} == {run.header["run"]}
    assert json.loads(config)["train_config"]["batch_size"] == 4
    for _, step, metrics in rows:
        for key, value in json.loads(metrics).items():
            assert step not in found.setdefault(key, {})  # what was trained twice is there once
            found[key][step] = value
    check(run, [found])


def records(path):
    """The messages in a file of Weights & Biases: LevelDB's log format after a header of seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@needs("wandb")
@pytest.mark.slow
def test_wandb(train, home):
    from wandb.proto import wandb_internal_pb2

    run, done = train_killed_and_resumed(train, "wandb")
    assert "tracker wandb: no login was found (`wandb login`), so nothing is sent" in done.stderr
    starts = []
    for path in sorted(train.root.glob("wandb/offline-run-*/*.wandb")):
        found = {}
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                assert record.run.run_id == record.run.display_name == run.header["run"]
                assert record.run.project == "nano" and record.run.resumed is False
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                         for item in record.history.item}  # fmt: skip
                step = items.get("_step", record.history.step.num)
                for name, value in items.items():
                    if not name.startswith("_"):
                        found.setdefault(name, {})[step] = value
        assert config["train_config"]["batch_size"] == 4 and config["task"] == "pretrain"
        starts.append(found)
    assert len(starts) == 2 and min(starts[1]["Train/Loss"]) == 5
    check(run, starts)
    assert not trackers.WandB.has_login()
    (home / "netrc").write_text(f"machine api.wandb.ai\n login user\n password {'0' * 40}\n")
    assert trackers.WandB.has_login()


@needs("swanlab")
@pytest.mark.slow
def test_swanlab(train, home):
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    run, done = train_killed_and_resumed(train, "swanlab")
    assert "tracker swanlab: no login was found (`swanlab login`), so nothing is sent" in done.stderr
    starts = []
    for path in sorted(train.root.glob("swanlog/run-*/*.swanlab")):
        (reader := DataStoreReader()).open(path)
        found = {}
        for record in map(Record.FromString, reader):
            if record.HasField("start"):
                assert record.start.id == record.start.name == run.header["run"]
                assert record.start.project == "nano"
            if record.HasField("scalar"):
                found.setdefault(record.scalar.key, {})[record.scalar.step] = record.scalar.value.number
            if record.HasField("media"):
                [item] = record.media.value.items
                text = (path.parent / "media" / "text" / item.filename).read_text("utf-8")
                found.setdefault(record.media.key, {})[record.media.step] = text
        starts.append(found)
        config = yaml.safe_load((path.parent / "files" / "config.yaml").read_text("utf-8"))
        assert config["train_config"]["value"]["batch_size"] == 4 and config["task"]["value"] == "pretrain"
    assert len(starts) == 2 and min(starts[1]["Train/Loss"]) == 5
    check(run, starts)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio", "swanlab"])
def test_a_package_that_is_missing_is_named(train, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    done = train("pretrain", tracker=tracker)
    assert done.returncode == 2 and f"{tracker} is not installed: python -m pip install" in done.stderr
    assert 'or set the key "tracker" to null' in done.stderr and not list(train.root.glob("train_*.log"))


@needs("swanlab")
@pytest.mark.slow
def test_without_a_login_where_one_is_needed(train, home, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "online")
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    done = train("pretrain", tracker="swanlab")
    assert done.returncode == 2 and "the tracker swanlab does not start (" in done.stderr
    assert done.stderr.endswith('set the key "tracker" to null or run with SWANLAB_MODE=offline\n')
    assert not list(train.root.glob("train_*.log"))
