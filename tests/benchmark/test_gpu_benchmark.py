"""benchmark/gpu.py: its parts, small and on the CPU; who gets what time; what is there when it is killed."""

import functools
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from test_benchmarks import ROOT, benchmark

from benchmark import gpu

SCRIPT = ROOT / "benchmark" / "gpu.py"


# ---- the parts ---------------------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path):
    """told(part): the records of a part's function in a dry run; nanoGPT's clone is a folder of this test."""
    (tmp_path / "train.py").touch()
    (tmp_path / "model.py").write_text(NANOGPT, "utf-8")
    setting = gpu.Setting(True, tmp_path, time.monotonic() + 60)

    def told(measure, *args, **kwargs):
        records = []
        measure(setting, lambda **record: records.append(json.loads(json.dumps(record))), *args, **kwargs)
        return records

    return told


NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def forward(self, x, y):
        logits = self.lm_head(self.wte(x))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_the_machine(told):
    first, *products, last = told(gpu.measure_machine)
    assert first["card"] and first["memory"] > 2**28 and first["torch"] and len(first["chosen"]) == 3
    assert [product["dtype"] for product in products] == ["float32"] and products[0]["flops"] > 1e8
    assert last["copied"] > 1e8


@pytest.mark.parametrize("who", [gpu.train_nano, functools.partial(gpu.train_nanogpt, compiled=False)])
def test_training(told, who):
    *_, record = told(who, gpu.GPT2)
    assert len(record["seconds"]) == 2 and min(record["seconds"]) > 0
    assert record["tokens"] == gpu.SMALL.sequences * gpu.SMALL.shape["block_size"]
    assert record["micro_batch"] == gpu.SMALL.micro_batch and record["first_step"] > 0
    # Untrained, it knows nothing of 256 tokens; trained on random ones, no more.
    assert record["losses"] == pytest.approx([5.55, 5.55], abs=0.3)
    n_weights = record["flops"] / record["tokens"] / 6
    assert n_weights >= gpu.SMALL.shape["vocab_size"] * gpu.SMALL.shape["n_embd"]


def test_writing(told, monkeypatch):
    monkeypatch.setattr(gpu, "TEXTS", (1, 3))
    records = told(gpu.generate_texts, gpu.GPT2.shape)
    assert [record["texts"] for record in records] == [1, 3]
    assert records[1]["limit"] == pytest.approx(3 * records[0]["limit"])
    assert all(record["tokens_per_second"] > 0 for record in records)


def test_all_parts_have_models_that_can_be_built():
    import torch

    import models

    for part in gpu.parts():
        keywords = getattr(part.measure, "keywords", {})
        shape = keywords.get("shape") or getattr(keywords.get("workload"), "shape", None)
        with torch.device("meta"):
            model = models.build(models.check_config(shape, part.name).resolved(None)) if shape else None
        if model and "124" in part.name:
            assert 120e6 < model.n_params < 126e6


def test_how_much_is_computed_at_once_follows_from_the_memory(monkeypatch):
    import torch

    for gib, fits in ((80, 16), (24, 8), (16, 4), (12, 4), (8, 2), (4, 1)):
        properties = SimpleNamespace(total_memory=gib << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i, it=properties: it)
        workload, micro_batch = gpu.sized(gpu.Setting(False, None, 0.0), gpu.GPT2)
        assert (workload, micro_batch) == (gpu.GPT2, fits) and workload.sequences % micro_batch == 0


def test_what_makers_promise():
    promised = {
        ("NVIDIA H100 80GB HBM3", "bfloat16"): 989, ("NVIDIA H100 PCIe", "float32"): 51,
        ("NVIDIA A100-SXM4-80GB", "bfloat16"): 312, ("Tesla T4", "float16"): 65,
        ("NVIDIA L40S", "bfloat16"): 362, ("NVIDIA H200 NVL", "bfloat16"): 835,
        ("NVIDIA GeForce RTX 3060", "bfloat16"): 25.5, ("NVIDIA GeForce RTX 3060 Ti", "bfloat16"): 32.4,
    }  # fmt: skip
    for (card, dtype), tera in promised.items():
        assert gpu.peak(card, dtype) == tera * 1e12
    for card in ("NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 3080 Ti", "Orin", "AMD EPYC"):
        assert gpu.peak(card, "bfloat16") is None
    assert gpu.peak("Tesla P40", "bfloat16") is None and gpu.peak("Tesla P40", "float32") == 11.8e12


# ---- running them ------------------------------------------------------------------------------------------


def run_python(code, seconds=30):
    records = []
    ended = gpu.run_limited([sys.executable, "-c", code], seconds, records.append)
    return *ended, records


def test_a_part_tells_while_it_runs_and_says_why_it_fails():
    state, said, records = run_python("print('{\"a\": 1}'); print('{\"b\"')")
    assert (state, said, records) == ("done", "", [{"a": 1}])
    code = "import sys; print('{\"a\": 1}', flush=True); sys.exit('warning\\nerror: no CUDA GPU here')"
    state, said, records = run_python(code)
    assert (state, records) == ("failed: no CUDA GPU here", [{"a": 1}]) and said.startswith("warning")


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    mark = tmp_path / "alive"
    code = f"import time\nwhile True:\n    open({str(mark)!r}, 'a').write('.'); time.sleep(0.05)"
    start = "import subprocess, sys, time; print('{}', flush=True)\n"
    start += f"subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True); time.sleep(600)"
    state, _, records = run_python(start, 3)
    assert (state, records) == ("stopped after 3 s", [{}])
    size = mark.stat().st_size
    time.sleep(0.3)
    assert mark.stat().st_size == size > 0


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured({part: seconds it takes}, minutes): the parts' states, and the limits that they were given."""
    now, limits = [0.0], {}
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def measured(takes, minutes, **arguments):
        names = iter(takes)

        def run_limited(command, seconds, take):
            name = command[command.index("--part") + 1]
            limits[name] = seconds
            now[0] += min(seconds, takes[name])
            take({"test": name, "outcome": "passed", "why": ""})
            return ("done", "") if takes[name] < seconds else ("stopped", "the end")

        parts = [gpu.Part(name, 10, None, name == "peer") for name in names]
        monkeypatch.setattr(gpu, "parts", lambda: parts)
        monkeypatch.setattr(gpu, "run_limited", run_limited)
        report = gpu.Report(tmp_path / "out.json", dry_run=True)
        arguments = {"minutes": minutes, "only": None, "nanogpt": None, "dry_run": True} | arguments
        gpu.measure_all(SimpleNamespace(**arguments), report)
        assert json.loads((tmp_path / "out.json").read_text("utf-8")) == report.all
        return {name: part["state"] for name, part in report.all["parts"].items()}, limits

    return measured


def test_what_hangs_costs_twice_its_time_and_the_rest_is_for_the_others(measured):
    states, limits = measured({"quick": 1, "hangs": 999, "peer": 1, "next": 17, "last": 999, "late": 1}, 1)
    assert limits == {"quick": 20, "hangs": 20, "next": 20, "last": pytest.approx(60 - 1 - 20 - 17, abs=2)}
    assert states == {
        "quick": "done", "hangs": "stopped", "peer": "left out: --nanogpt names no clone of nanoGPT",
        "next": "done", "last": "stopped", "late": "left out: there was no time left",
    }  # fmt: skip


def test_more_time_is_more_for_every_part_and_some_may_be_chosen(measured, tmp_path):
    states, limits = measured({"a": 1, "b": 1, "c": 1}, 16, only=["c", "a"])
    assert states == {"a": "done", "c": "done"} and limits == {"a": 40, "c": 40}


def test_what_was_done_is_there_when_it_is_killed(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), "--only", "machine", "tests"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("tests: "):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    report = json.loads(out.read_text("utf-8"))
    assert report["parts"]["machine"]["state"] == "done", report
    assert report["parts"]["tests"]["state"] == "stopped from outside"
    assert "matrix product, float32" in printed
    assert "| matrix product, float32 |" in out.with_suffix(".md").read_text("utf-8")


# ---- the report --------------------------------------------------------------------------------------------

REPORT = {
    "dry_run": False,
    "parts": {
        "machine": {"state": "done", "records": [
            {"card": "NVIDIA H100", "memory": 80 << 30, "driver": "580.1", "torch": "2.11", "commit": "abc",
             "time": "now"},
            {"dtype": "bfloat16", "flops": 700e12, "peak": 989e12},
            {"dtype": "float32", "flops": 40e12, "peak": None},
            {"copied": 3e12},
        ]},
        "tests": {"state": "stopped after 5 s", "records": [
            {"test": "test_a[x|y]", "outcome": "failed", "why": "def ...\nE   assert 1 < 0\nE   more"},
            {"test": "test_b", "outcome": "passed", "why": ""},
            {"test": "test_c", "outcome": "skipped", "why": "no"},
        ]},
        "GPT-2 124M, Nano": {"state": "done", "records": [
            {"dtype": "bfloat16", "seconds": [0.1, 0.08, 0.125], "tokens": 20000, "flops": 35e12,
             "first_step": 3.2, "memory": 10 << 30, "micro_batch": 16},
        ]},
        "writing, 124M": {"state": "done", "records": [
            {"texts": 1, "limit": 4000.0, "tokens_per_second": 1000.0},
            {"texts": 256, "limit": 9e5, "tokens_per_second": None},
        ]},
    },
}  # fmt: skip


def test_the_report_has_all_that_is_known():
    found = {title.partition(",")[0].partition(":")[0]: rows for title, _, rows in gpu.tables(REPORT)}
    assert found == {
        "NVIDIA H100": [
            ("matrix product, bfloat16", "700 TFLOP/s", "71% of 989"),
            ("matrix product, float32", "40 TFLOP/s", ""),
            ("memory, copied", "3,000 GB/s", ""),
        ],
        "training": [
            ("GPT-2 124M, Nano", "200,000 (160,000–250,000)", "50%", "35%", "10.0 GiB", "3 s"),
        ],
        "writing": [("124M", "1", "1,000", "4,000", "25%"), ("124M", "256", "no memory", "", "")],
        "tests": [("test_a[x|y]", "failed", "assert 1 < 0"), ("test_c", "skipped", "no")],
        "not done": [("tests", "stopped after 5 s")],
    }  # fmt: skip
    title, *_ = gpu.tables(REPORT)[0]
    assert title == "NVIDIA H100, 80 GiB, driver 580.1, torch 2.11, commit abc, now"
    text = "\n".join(gpu.as_markdown(*table) for table in gpu.tables(REPORT))
    assert "tests: 1 passed, 1 failed, 1 skipped:" in text
    assert "| test_a[x\\|y] | failed | assert 1 < 0 |" in text
    assert gpu.tables({"dry_run": False, "parts": {}}) == []


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--minutes", 0], "--minutes must be above 0"),
        (["--only", "machines"], "no part 'machines'; there are 'machine', 'tests', "),
        (["--out", "x.md"], "name it .json"),
        (["--nanogpt", "/nowhere"], "/nowhere holds no model.py"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    process = benchmark("gpu.py", *arguments)
    assert process.returncode == 2 and says in process.stderr and process.stderr.count("\n") == 1


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    process = benchmark("gpu.py", "--out", tmp_path / "gpu.json")
    assert process.returncode == 2 and "--dry-run rehearses on the CPU" in process.stderr


@pytest.mark.slow
def test_a_rehearsal_of_all(tmp_path):
    command = [sys.executable, SCRIPT, "--dry-run", "--minutes", 40, "--out", tmp_path / "gpu.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=2500)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]
    for part in gpu.parts():
        state = parts[part.name]["state"]
        assert state == "done" or part.needs_nanogpt and state.startswith("left out"), parts[part.name]
    assert not [r for part in parts.values() for r in part["records"] if r.get("outcome") == "failed"]
