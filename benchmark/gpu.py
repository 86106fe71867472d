"""Nano on a GPU: do the tests pass, how fast is training compared with nanoGPT, and how fast is generation?

    git clone https://github.com/karpathy/nanoGPT
    python benchmark/gpu.py --nanogpt nanoGPT --out gpu.json     # on a machine with a CUDA GPU: 8 minutes
    python benchmark/gpu.py --minutes 3 --only machine "GPT-2 124M, Nano"
    python benchmark/gpu.py --dry-run      # anywhere: a rehearsal on the CPU, whose figures mean nothing

The most important parts run first, each in its own process. A part that crashes or hangs costs at most twice
the time that it should take; the other parts get the rest. The output file, and tables in Markdown next to
it, are rewritten after every measurement, so the results survive if this script is killed.

Training measures the training loop's own step on random tokens: copying batches to the GPU, forward and
backward passes, clipping, optimizer. FLOPs are counted as in train_speed.py. Shares are of the fastest matrix
product measured here, and of the peak in the manufacturer's data sheet. Generation is compared with the speed
at which weights could be read, which is the speed of copying memory. The tests are tests/test_gpu.py.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import figures  # noqa: E402
from benchmark.train_speed import check_nanogpt  # noqa: E402
from common.errors import UserError, run  # noqa: E402

# Peak TFLOP/s of dense products with float32 accumulation: (half precision, float32 without tensor cores).
# From NVIDIA's data sheets and, for GeForce cards, the white papers of Ampere, Ada and Blackwell: twice as
# much in half precision as in float32. All Jetson Orins are named "Orin", so their peak is unknown.
PEAKS = {
    "H200 NVL": (835, 60), "H200": (989, 67), "H100 PCIe": (756, 51), "H100 NVL": (835, 60),
    "H100": (989, 67), "A100": (312, 19.5), "L40S": (362, 91.6), "L40": (181, 90.5), "L4": (121, 30.3),
    "A10": (125, 31.2), "RTX 6000 Ada": (364, 91.1), "RTX A6000": (155, 38.7), "T4": (65, 8.1),
    "V100-PCIE": (112, 14), "V100": (125, 15.7), "P100-PCIE": (18.7, 9.3), "P100": (21.2, 10.6),
    "P40": (None, 11.8), "RTX 3060": (25.5, 12.7), "RTX 3060 Ti": (32.4, 16.2), "RTX 3070": (40.6, 20.3),
    "RTX 3080": (59.5, 29.8), "RTX 3090": (71, 35.6), "RTX 4060": (30.2, 15.1), "RTX 4060 Ti": (44.1, 22.1),
    "RTX 4070": (58.3, 29.1), "RTX 4070 Ti": (80.2, 40.1), "RTX 4080": (97.5, 48.7), "RTX 4090": (165, 82.6),
    "RTX 5070": (61.7, 30.9), "RTX 5070 Ti": (87.9, 43.9), "RTX 5080": (113, 56.3), "RTX 5090": (210, 105),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A model and its batch: `sequences` per step, and at most `micro_batch` of them in a forward pass."""

    shape: dict
    micro_batch: int
    sequences: int


GPT2 = Workload({"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768}, 16, 32)
PRESET = ROOT / "config" / "rtx"  # with a vocabulary of 8,192, as README.md makes one
SMALL = Workload({"block_size": 64, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 64}, 2, 4)
TEXTS = (1, 16, 256)  # generated at the same time
MINUTES = 8


@dataclass(frozen=True)
class Setting:
    """The settings of a part. until: when it will be killed, as a time of time.monotonic()."""

    dry_run: bool
    nanogpt: Path | None
    until: float

    @property
    def device(self):
        return "cpu" if self.dry_run else "cuda"

    @property
    def left(self):
        return self.until - time.monotonic()


# ---- the parts: each calls tell(**record) for every measurement --------------------------------------------


def measure_machine(setting, tell):
    import torch

    from common import hardware

    if not (setting.dry_run or torch.cuda.is_available()):
        raise UserError("torch finds no CUDA GPU here; --dry-run rehearses on the CPU")
    compute = hardware.resolve_compute(hardware.detect_machine(setting.device), setting.device)
    tell(
        card=compute.name, memory=compute.memory, driver=driver(), torch=compute.machine.torch,
        cuda=torch.version.cuda, commit=figures.commit(), time=time.strftime("%Y-%m-%d %H:%M"),
        chosen=compute.reasons,
    )  # fmt: skip
    for dtype in dict.fromkeys((compute.dtype, "float32")):
        seconds = 0.2 if setting.dry_run else 2.0
        flops = hardware.measure_matmul_flops(setting.device, dtype, seconds)
        tell(dtype=dtype, flops=flops, peak=peak(compute.name, dtype))
    tell(copied=copy_bandwidth(setting))


def driver():
    """The version of NVIDIA's driver; None if nvidia-smi is missing (on a Jetson) or does not know it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def peak(card, dtype):
    """The card's peak FLOP/s in this dtype; None if unknown."""
    for name, (half, single) in PEAKS.items():
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|D|Laptop)\b)", card):  # other cards
            tera = single if dtype == "float32" else half
            return tera and tera * 1e12
    return None


def copy_bandwidth(setting):
    """Bytes per second that a copy within the device's memory reads and writes."""
    import torch

    from common.hardware import synchronize

    size = 1 << (24 if setting.dry_run else 29)
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        synchronize(setting.device)
        best = max(best, 10 * 2 * size / (time.perf_counter() - start))
    return best


def run_tests(setting, tell, which):
    try:
        import pytest
    except ImportError:
        raise UserError("pytest is missing: python -m pip install -r requirements-dev.txt") from None

    class Reporter:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed" and report.when == "setup":
                why = report.longrepr[2] if report.skipped else report.longreprtext[-5000:]
                name = report.nodeid.partition("::")[2]
                tell(test=name, outcome=report.outcome, seconds=report.duration, why=why)

    if setting.dry_run:
        os.environ["GPU_TESTS_ON"] = "cpu"
    code = pytest.main(["-q", "-m", which, "-p", "no:cacheprovider", "tests/test_gpu.py"], [Reporter()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise UserError(f"pytest ended with {code!r}")


def train_nano(setting, tell, workload, compiled=False, deterministic=True):
    """Train with Nano. deterministic: use deterministic algorithms, as train.py does on a GPU."""
    import torch

    import models
    import objectives
    from benchmark.train_speed import TRAINING
    from common import hardware
    from config.schema import LAST_STEP
    from config.stages import STAGES
    from engine.parallel import SingleProcess
    from engine.runs import StartPoint
    from engine.setup import TrainSetup, on_device
    from train import device_batches, initial_state, train_step

    workload, micro_batch = sized(setting, workload)
    config = TRAINING.model_copy(update={
        "device": setting.device, "compile": compiled, "batch_size": micro_batch,
        "gradient_accumulation_steps": workload.sequences // micro_batch,
    })  # fmt: skip
    compute = hardware.set_up_compute(config)
    if not deterministic:
        torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    model = models.build(models.check_config(workload.shape, "the benchmark").resolved(None))
    source, parallel = RandomBatches(workload), SingleProcess()
    began = time.perf_counter()
    stage, objective = STAGES["pretrain"], objectives.find("lm")
    setup = TrainSetup(stage, config, compute, StartPoint(), model, None, objective, source, [source])
    setup = on_device(setup, parallel)
    state = initial_state(setup, parallel)
    told = functools.partial(tell, dtype=setup.compute.dtype, micro_batch=micro_batch)
    with contextlib.closing(device_batches(setup, parallel, 0, LAST_STEP)) as batches:
        time_steps(
            setting, told, workload, model,
            lambda: train_step(state, setup, parallel, next(batches)).loss, began,
        )  # fmt: skip


def train_nanogpt(setting, tell, workload, compiled=True):
    """Train as nanoGPT's train.py does, in the precision that Nano would choose."""
    import torch

    from benchmark.train_speed import TRAINING, load_nanogpt
    from common import hardware

    workload, micro_batch = sized(setting, workload)
    compute = hardware.resolve_compute(hardware.detect_machine(setting.device), setting.device)
    dtype, is_gpu = getattr(torch, compute.dtype), not setting.dry_run
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    module = load_nanogpt(setting.nanogpt)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    shape = {name: workload.shape[name] for name in names}
    model = raw = module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=False)).to(setting.device)
    betas = (TRAINING.beta1, TRAINING.beta2)
    optimizer = model.configure_optimizers(
        TRAINING.weight_decay, TRAINING.learning_rate, betas, compute.device_type
    )
    scaler = torch.amp.GradScaler(compute.device_type, enabled=compute.grad_scaling)
    model = torch.compile(model) if compiled else model
    batches, steps, passes = RandomBatches(workload), iter(range(1 << 40)), workload.sequences // micro_batch

    def on_device(array):
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(setting.device, non_blocking=True) if is_gpu else tensor

    def one_step():
        batch = batches(next(steps))
        x, y = batch["x"], batch["y"]
        for first in range(0, workload.sequences, micro_batch):
            rows = slice(first, first + micro_batch)
            with hardware.autocast_context(compute):
                _, loss = model(on_device(x[rows]), on_device(y[rows]))
            scaler.scale(loss / passes).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    model.train()
    told = functools.partial(tell, dtype=str(dtype).removeprefix("torch."), micro_batch=micro_batch)
    time_steps(setting, told, workload, raw, one_step, time.perf_counter())


class RandomBatches:
    """A data.BatchSource that repeats eight batches of random tokens."""

    def __init__(self, workload):
        import numpy as np

        size = (8, workload.sequences, workload.shape["block_size"])
        self.x, self.y = np.random.default_rng(0).integers(workload.shape["vocab_size"], size=(2, *size))
        self.mask = np.ones(size[1:], np.float32)
        self.batch_size, self.sequences_per_epoch = size[1], 8 * size[1]
        self.fingerprints, self.size, self.loss_weight = [], self.sequences_per_epoch, self.x.size
        self.description, self.text_size = "random tokens", None

    def __call__(self, first):
        number = first // self.batch_size % 8
        return {"x": self.x[number], "y": self.y[number], "mask": self.mask}

    def position(self, first):
        return 0, 0, first

    def notes(self, n_sequences):
        return []


def sized(setting, workload):
    """(the workload, in tiny sizes for a dry run; sequences per forward pass that fit into this GPU)"""
    import torch

    if setting.dry_run:
        shape = workload.shape | SMALL.shape
        if "n_kv_head" in shape:
            shape["n_kv_head"] = 1
        return Workload(shape, SMALL.micro_batch, SMALL.sequences), SMALL.micro_batch
    # With 124 M parameters, a sequence of 1,024 tokens takes about 1.5 GiB, and weights, gradients and
    # optimizer state take 3. The estimate is the same for all parts, so that all have the same batch.
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    fits = max(1, int((0.8 * gib - 3) / 1.5))
    return workload, min(workload.micro_batch, 1 << int(math.log2(fits)))


def time_steps(setting, tell, workload, model, one_step, began):
    """Time steps in at most ten blocks of half a second or more; calls `tell` after each block.

    one_step() -> a loss. began: when building the model began, as a time of time.perf_counter().
    """
    import torch

    import models
    from benchmark.train_speed import flops_per_token
    from common.hardware import synchronize

    def timed(n):
        synchronize(setting.device)
        start = time.perf_counter()
        for _ in range(n):
            loss = one_step()
        synchronize(setting.device)
        return (time.perf_counter() - start) / n, float(loss)

    _, first_loss = timed(1)  # compiles, allocates memory, selects algorithms
    first_step = time.perf_counter() - began
    if not setting.dry_run:
        torch.cuda.reset_peak_memory_stats()
    timed(1)
    enough, most = (0.05, 2) if setting.dry_run else (0.5, 10)
    n_steps = max(1, round(enough / timed(1)[0]))
    tokens = workload.sequences * workload.shape["block_size"]
    shape = models.check_config(workload.shape, "the benchmark")
    flops, blocks = tokens * flops_per_token(model, shape), []
    while len(blocks) < most and (not blocks or setting.left > 2 * n_steps * blocks[-1] + 1):
        seconds, loss = timed(n_steps)
        blocks.append(seconds)
        tell(
            seconds=blocks, tokens=tokens, flops=flops, first_step=first_step, losses=[first_loss, loss],
            parameters=sum(p.numel() for p in model.parameters()),
            memory=None if setting.dry_run else torch.cuda.max_memory_allocated(),
        )  # fmt: skip


def generate_texts(setting, tell, shape):
    """Generate as inference.py and serve.py do, greedily, in float32."""
    import torch

    import models
    from common import hardware
    from common.errors import is_out_of_memory
    from decoding.engine import BatchedDecoder, Request

    shape = shape | SMALL.shape | {"n_kv_head": 1} if setting.dry_run else shape
    compute = hardware.resolve_compute(
        hardware.detect_machine(setting.device), setting.device, dtype="float32"
    )
    torch.manual_seed(0)
    model = models.build(models.check_config(shape, "the benchmark").resolved(None)).eval().to(compute.device)
    n_bytes, speed = 4 * model.costs(shape["block_size"], training=False).weights, copy_bandwidth(setting)
    seconds = 0.2 if setting.dry_run else 3.0
    for n in TEXTS[:2] if setting.dry_run else TEXTS:
        record = dict(texts=n, parameters=model.n_params, limit=n * speed / n_bytes)
        try:
            with hardware.attention_context(compute):
                decoder, n_steps = BatchedDecoder(model, n), 0
                for i in range(n):
                    prompt = range(1, 9 + i % 8)
                    decoder.add(Request(prompt, shape["block_size"] - len(prompt), temperature=0))
                for _ in range(4):  # the first one reads the prompts
                    decoder.step()
                start = time.perf_counter()
                while len(decoder.running) == n and time.perf_counter() - start < seconds:
                    decoder.step()  # waits for the tokens
                    n_steps += 1
                tell(**record, tokens_per_second=n * n_steps / (time.perf_counter() - start))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tell(**record, tokens_per_second=None)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark. seconds: how long it should take; it is killed after twice that time."""

    name: str
    seconds: float
    measure: Any
    needs_nanogpt: bool = False


def parts():
    from benchmark.decode_speed import SHAPE

    shape = json.loads((PRESET / "model_config.json").read_text("utf-8"))
    config = json.loads((PRESET / "config_pretrain.json").read_text("utf-8"))
    shape = {key: value for key, value in shape.items() if key != "$schema"} | {"vocab_size": 8192}
    batch_size = config["batch_size"]
    preset = Workload(shape, batch_size, batch_size * config["gradient_accumulation_steps"])
    ours, theirs = train_nano, train_nanogpt
    of = functools.partial
    return [
        Part("machine", 15, measure_machine),
        Part("tests", 90, of(run_tests, which="gpu and not slow")),
        Part("GPT-2 124M, Nano", 20, of(ours, workload=GPT2)),
        Part("GPT-2 124M, nanoGPT compiled", 60, of(theirs, workload=GPT2), True),
        Part("GPT-2 124M, Nano compiled", 60, of(ours, workload=GPT2, compiled=True)),
        Part("GPT-2 124M, nanoGPT", 20, of(theirs, workload=GPT2, compiled=False), True),
        Part("writing, 12.9M", 20, of(generate_texts, shape=SHAPE)),
        Part("writing, 124M", 25, of(generate_texts, shape=GPT2.shape | {"block_size": 256})),
        Part("GPT-2 124M, Nano, sums in any order", 20, of(ours, workload=GPT2, deterministic=False)),
        Part("config/rtx, Nano compiled", 60, of(ours, workload=preset, compiled=True)),
        Part("config/rtx, nanoGPT compiled", 60, of(theirs, workload=preset), True),
        Part("config/rtx, Nano", 20, of(ours, workload=preset)),
        Part("long tests", 100, of(run_tests, which="gpu and slow")),
        Part("GPT-2 124M, Nano compiled, sums in any order", 60,
             of(ours, workload=GPT2, compiled=True, deterministic=False)),
    ]  # fmt: skip


def do_part(args):
    """Run a part, in its own process. Its records go to stdout, everything else that is printed to stderr."""
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if args.dry_run:
        # The usual backend runs a C++ compiler for a minute or more; this one does everything before that.
        import torch

        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    [part] = [part for part in parts() if part.name == args.part]
    setting = Setting(args.dry_run, args.nanogpt, time.monotonic() + args.seconds)
    part.measure(setting, lambda **record: print(json.dumps(record), file=records, flush=True))


# ---- running them ------------------------------------------------------------------------------------------


def run_limited(command, seconds, take):
    """Run a command for at most `seconds`. take(record) is called with each line of JSON that it prints.

    Returns ("done" or why it failed, the end of its standard error).
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), end(process)))
        timer.start()
        try:
            for line in process.stdout:
                with contextlib.suppress(ValueError):  # killed in the middle of a line
                    take(json.loads(line))
            process.wait()
        finally:
            timer.cancel()
            end(process)
        errors.seek(0)
        said = errors.read().strip()[-5000:]
        if late.is_set():
            return f"stopped after {seconds:.0f} s", said
        if process.returncode:
            return f"failed: {said.rpartition(chr(10))[2].removeprefix('error: ')}", said
        return "done", ""


def end(process):
    """Kill a process and all of its descendants, whatever their group or session."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


class Report:
    """All measurements: {"parts": {name: {"state": ..., "seconds": ..., "records": [...]}}, ...}"""

    def __init__(self, path, **settings):
        self.path, self.all = path, {**settings, "parts": {}}

    def save(self):
        """Write both files, each completely or not at all."""
        for path, text in (
            (self.path, json.dumps(self.all, indent=1, ensure_ascii=False) + "\n"),
            (self.path.with_suffix(".md"), "\n".join(as_markdown(*table) for table in tables(self.all))),
        ):
            beside = path.with_name(path.name + ".part")
            beside.write_text(text, "utf-8")
            os.replace(beside, path)

    def begin(self, name):
        self.all["parts"][name] = {"state": "running", "seconds": 0.0, "records": []}
        self.save()

    def take(self, name, record):
        records = self.all["parts"][name]["records"]
        if "seconds" in record and "tokens" in record:  # includes the blocks of the record before
            records.clear()
        records.append(record)
        self.save()

    def finish(self, name, state, said="", seconds=0.0):
        part = self.all["parts"].setdefault(name, {"records": []})
        part.update(state=state, seconds=round(seconds, 1), said=said)
        self.save()


def measure_all(args, report):
    until = time.monotonic() + 60 * args.minutes
    for part in parts():
        if args.only and part.name not in args.only:
            continue
        start = time.monotonic()
        # With more time in all, each part may take longer: a slow card needs it.
        seconds = min(until - start, 2 * part.seconds * max(1, args.minutes / MINUTES))
        if part.needs_nanogpt and not args.nanogpt:
            report.finish(part.name, "left out: --nanogpt names no clone of nanoGPT")
            continue
        if seconds < 5:
            report.finish(part.name, "left out: there was no time left")
            continue
        print(f"{part.name}: {seconds:.0f} s at most", flush=True)
        command = [sys.executable, __file__, "--part", part.name, "--seconds", str(seconds)]
        command += ["--dry-run"] * args.dry_run
        command += ["--nanogpt", str(args.nanogpt.resolve())] if args.nanogpt else []
        report.begin(part.name)
        try:
            state, said = run_limited(command, seconds, functools.partial(report.take, part.name))
        except KeyboardInterrupt:
            report.finish(part.name, "stopped from outside", "", time.monotonic() - start)
            raise
        report.finish(part.name, state, said, time.monotonic() - start)
        print(f"  {state}, {time.monotonic() - start:.0f} s", flush=True)
        if part.measure is measure_machine and state.startswith("failed"):
            raise UserError(state.removeprefix("failed: "))


# ---- the report --------------------------------------------------------------------------------------------


def tables(report):
    """[(title, columns, rows)] of the measurements so far; all cells are text."""
    records = {name: part["records"] for name, part in report["parts"].items()}
    machine = {key: value for record in records.get("machine", []) for key, value in record.items()}
    products = {r["dtype"]: r for r in records.get("machine", []) if "dtype" in r}
    found = []
    if "card" in machine:
        title = f"{machine['card']}, {machine['memory'] / 2**30:.0f} GiB"
        title += f", driver {machine['driver']}" * bool(machine["driver"])
        title += f", torch {machine['torch']}, commit {machine['commit']}, {machine['time']}"
        title += "; a rehearsal on the CPU: no figure means anything" * report["dry_run"]
        rows = [
            (f"matrix product, {dtype}", f"{r['flops'] / 1e12:.3g} TFLOP/s",
             f"{r['flops'] / r['peak']:.0%} of {r['peak'] / 1e12:g}" if r["peak"] else "")
            for dtype, r in products.items()
        ]  # fmt: skip
        if "copied" in machine:
            rows.append(("memory, copied", f"{machine['copied'] / 1e9:,.0f} GB/s", ""))
        found.append((title, ("", "measured", "of what the maker promises"), rows))
    each = [(name, record) for name, some in records.items() for record in some]
    if rows := [training_row(name, record, products) for name, record in each if "first_step" in record]:
        columns = ("", "tokens/s", "of product", "of promise", "memory", "first step")
        found.append(("training", columns, rows))
    if rows := [writing_row(name, record) for name, record in each if "texts" in record]:
        columns = ("", "texts at once", "tokens/s", "limit", "of limit")
        found.append(("writing, in float32; the limit is memory's", columns, rows))
    if tests := [record for _, record in each if "test" in record]:
        counts = {outcome: sum(test["outcome"] == outcome for test in tests)
                  for outcome in ("passed", "failed", "skipped")}  # fmt: skip
        rows = []
        for test in tests:
            if test["outcome"] != "passed":
                raised = re.findall(r"^E +(.*)", test["why"], re.MULTILINE) or [test["why"]]
                rows.append((test["test"], test["outcome"], raised[0]))
        title = "tests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        found.append((title, ("", "", "why"), rows))
    if rows := [(name, part["state"]) for name, part in report["parts"].items() if part["state"] != "done"]:
        found.append(("not done", ("part", "why"), rows))
    return found


def training_row(name, record, products):
    product = products.get(record["dtype"])
    flops = record["flops"] / statistics.median(record["seconds"])
    return (
        name,
        figures.spread([record["tokens"] / seconds for seconds in record["seconds"]], ",.0f"),
        f"{flops / product['flops']:.0%}" if product else "",
        f"{flops / product['peak']:.0%}" if product and product["peak"] else "",
        f"{record['memory'] / 2**30:.1f} GiB" if record["memory"] else "",
        f"{record['first_step']:.0f} s",
    )


def writing_row(name, record):
    speed, limit = record["tokens_per_second"], record["limit"]
    told = (f"{speed:,.0f}", f"{limit:,.0f}", f"{speed / limit:.0%}") if speed else ("no memory", "", "")
    return (name.removeprefix("writing, "), str(record["texts"]), *told)


def as_markdown(title, columns, rows):
    lines = [f"{title}:", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def show(report):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for title, columns, rows in tables(report):
        table = Table(title=title)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # [in brackets] is no markup
        console.print(table)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nanogpt", type=Path, metavar="DIR", help="a clone of nanoGPT (without it: left out)")
    add("--minutes", type=float, default=MINUTES, help=f"in all ({MINUTES})")
    add("--out", type=Path, default=Path("gpu.json"), metavar="FILE", help="where the figures go (gpu.json)")
    add("--only", nargs="+", metavar="PART", help="these parts alone, by their names in the report")
    add("--dry-run", action="store_true", help="a rehearsal on the CPU")
    add("--part", help=argparse.SUPPRESS)
    add("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nanogpt:
        check_nanogpt(args.nanogpt)
    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes must be above 0, not {args.minutes:g}")
    names = [part.name for part in parts()]
    for name in args.only or ():
        if name not in names:
            raise UserError(f"--only: there is no part {name!r}; there are {', '.join(map(repr, names))}")
    if args.out.suffix == ".md":
        raise UserError(f"--out {args.out} would be overwritten by the table beside it; name it .json")
    return args


def main():
    args = parse_arguments()
    if args.part:
        return do_part(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = Report(args.out, dry_run=args.dry_run, minutes=args.minutes)
    try:
        measure_all(args, report)
    finally:
        show(report.all)
    print(f"figures: {args.out}; the same as Markdown: {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    run(main)
