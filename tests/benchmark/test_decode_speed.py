"""benchmark/decode_speed.py and int8_loss.py: their tables, small, and what they refuse."""

import importlib.util
import re

import pytest
from test_benchmarks import benchmark, printed_by

from benchmark import decode_speed, int8_loss
from data import TokenFile

SMALL = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_hidden": 24, "vocab_size": 40}


def test_everyone_takes_a_turn(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(decode_speed, "SHAPE", decode_speed.SHAPE | SMALL)
    monkeypatch.setattr(decode_speed, "bandwidth", lambda n_bytes: 1e9)
    monkeypatch.setenv("COLUMNS", "200")
    table = printed_by(decode_speed, "--rounds", 2, "--tokens", 4, "--threads", 1, "--requests", 3, 16)
    rows = re.findall(r"│ (\w[\w ,.]*?) +│ +([\d,]+)(?: \(([\d,]+)–([\d,]+)\))? │ +([\d.]+) │", table)
    names = {"Transformers", "Nano", "Nano int8", "Nano x 3", "Nano int8 x 16"}
    assert names <= {row[0] for row in rows}
    for _, *speeds, _ in rows:
        median, least, most = (int((speed or speeds[0]).replace(",", "")) for speed in speeds)
        assert 0 < least <= median <= most
    assert {row[0]: row[-1] for row in rows}["Transformers"] == "1.00" and "commit " in table


def test_what_eight_bits_cost(train):
    assert train("pretrain", max_steps=4).returncode == 0
    (path,) = train.checkpoints().values()
    (data,) = train.root.glob("**/pretrain_val.bin")
    printed = printed_by(int8_loss, "-m", path, "--data", data)
    found = re.findall(r"loss ([\d.]+)", printed)
    assert f"{len(TokenFile(data).tokens) - 1:,} tokens" in printed
    exact, *rounded = map(float, found)
    assert rounded == pytest.approx([exact] * len(rounded), abs=0.05) and exact not in rounded
    assert len(rounded) == 1 + bool(importlib.util.find_spec("numba"))
    assert rounded[-1] == pytest.approx(rounded[0], abs=1e-3)


def test_bad_arguments_are_named(tmp_path):
    process = benchmark("decode_speed.py", "--llama2c", tmp_path)
    assert process.returncode == 2 and "`make run runq` makes it" in process.stderr
    process = benchmark("decode_speed.py", "--tokens", 1)
    assert process.returncode == 2 and "--tokens between 2 and 200" in process.stderr
