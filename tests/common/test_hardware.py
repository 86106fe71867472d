"""What "auto" means on a table of made-up machines, and which settings are refused."""

import dataclasses
import functools
import json
import os

import pytest
from launching import RUN, together, with_prelude

from common import hardware
from common.errors import UserError
from common.hardware import (
    Gpu,
    Machine,
    attention_context,
    autocast_context,
    describe_compute,
    detect_machine,
    measure_dtype,
    measure_matmul_flops,
    resolve_compute,
    synchronize,
    with_dtype,
)
from config.schema import TrainConfig
from engine.checkpoint import load

GIB = 2**30
BUILT = tuple(f"sm_{c}" for c in (60, 61, 70, 72, 75, 80, 86, 87, 89, 90))


def cpu(name, *features, cores=8, memory=16 * GIB):
    return Machine(cpu=name, cores=cores, memory=memory, torch="2.7.0", cpu_features=features)


def cuda(name, major, minor, gib, **changes):
    gpu = Gpu(name, (major, minor), gib * GIB, shared="Jetson" in name)
    machine = Machine("Xeon", 8, 64 * GIB, "2.7.0+cu126", (), (gpu,), cuda_architectures=BUILT)
    return dataclasses.replace(machine, **changes)


P40 = cuda("Tesla P40", 6, 1, 24)
V100 = cuda("Tesla V100", 7, 0, 32)
A100 = cuda("NVIDIA A100", 8, 0, 80)
ORIN = cuda("Jetson Orin NX", 8, 7, 16)
OLD_MAC = dataclasses.replace(cpu("Apple M1, macOS 13"), has_mps=True)
MAC = dataclasses.replace(cpu("Apple M2"), has_mps=True, mps_bfloat16=True)
CONFIG = TrainConfig(dataset_path=[("a", "b")], decay_lr=False)
ZEN3 = cpu("AMD EPYC 7763")
AMX = cpu("Xeon 8480", "amx_bf16", "avx512_bf16")

MACHINES = [
    # machine, device, dtype ("auto": float32 or bfloat16 is measured), attention kernel, loss scaling
    (P40, "cuda", "float32", "math", False),
    (cuda("Tesla P100", 6, 0, 16), "cuda", "float32", "math", False),
    (cuda("GTX 1080 Ti", 6, 1, 11), "cuda", "float32", "math", False),
    (V100, "cuda", "float16", "mem_efficient", True),
    (cuda("Jetson Xavier", 7, 2, 32), "cuda", "float16", "mem_efficient", True),
    (cuda("Tesla T4", 7, 5, 16), "cuda", "float16", "mem_efficient", True),
    (cuda("RTX 2080 Ti", 7, 5, 11), "cuda", "float16", "mem_efficient", True),
    (A100, "cuda", "bfloat16", "flash", False),
    (cuda("RTX 3090", 8, 6, 24), "cuda", "bfloat16", "flash", False),
    (ORIN, "cuda", "bfloat16", "flash", False),
    (cuda("Jetson AGX Orin", 8, 7, 64), "cuda", "bfloat16", "flash", False),
    (cuda("RTX 4090", 8, 9, 24), "cuda", "bfloat16", "flash", False),
    (cuda("NVIDIA H100", 9, 0, 80), "cuda", "bfloat16", "flash", False),
    (
        cuda("Orin, torch without flash", 8, 7, 16, flash_built=False),
        "cuda",
        "bfloat16",
        "mem_efficient",
        False,
    ),
    (
        cuda("P40, torch without it", 6, 1, 24, cuda_architectures=("sm_75", "sm_80")),
        "cpu",
        "float32",
        "auto",
        False,
    ),
    (OLD_MAC, "mps", "float32", "math", False),
    (MAC, "mps", "auto", "math", False),
    (AMX, "cpu", "auto", "auto", False),
    (cpu("AMD EPYC 9654 (Zen 4)", "avx512_bf16"), "cpu", "auto", "auto", False),
    (cpu("Xeon 6148, AVX-512 without bf16"), "cpu", "float32", "auto", False),
    (ZEN3, "cpu", "float32", "auto", False),
    (cpu("Arm Neoverse V1", "bf16"), "cpu", "auto", "auto", False),
    (cpu("Raspberry Pi 5", cores=4, memory=None), "cpu", "float32", "auto", False),
]


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row[0].gpus[0].name if row[0].gpus else row[0].cpu)
def test_auto(row):
    machine, device, dtype, kernel, grad_scaling = row
    compute = resolve_compute(machine)
    assert compute.undecided is (dtype == "auto")
    dtype = "float32" if compute.undecided else dtype
    assert (compute.device, compute.dtype, compute.sdp_kernel) == (device, dtype, kernel)
    assert compute.grad_scaling is grad_scaling
    assert compute.autocast is (dtype != "float32")
    assert len(describe_compute(compute)) == 4
    for dtype in ("float32", "bfloat16") if compute.undecided else ():
        decided = with_dtype(compute, CONFIG, dtype, "measured")
        assert (decided.device, decided.dtype, decided.sdp_kernel) == (device, dtype, kernel)
        assert decided.autocast is (dtype != "float32") and not decided.undecided
        about, device_line, _, attention = describe_compute(compute)
        assert describe_compute(decided) == [about, device_line, f"dtype {dtype}: measured", attention]


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row[0].gpus[0].name if row[0].gpus else row[0].cpu)
def test_without_loss_scaling_there_is_no_float16(row):
    machine, _, dtype, _, grad_scaling = row
    compute = resolve_compute(machine, loss_scaling=False)
    dtype = "float32" if grad_scaling or compute.undecided else dtype
    assert compute.dtype == dtype and not compute.grad_scaling
    with pytest.raises(UserError, match="float16"):
        resolve_compute(machine, dtype="float16", loss_scaling=False)


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row[0].gpus[0].name if row[0].gpus else row[0].cpu)
def test_without_mixed_precision_the_weights_stay_float32(row):
    compute = resolve_compute(row[0], use_amp=False)
    assert compute.dtype == "float32" and not compute.undecided
    assert not compute.autocast and not compute.grad_scaling
    assert compute.sdp_kernel != "flash"  # on CUDA only in half precision


@pytest.mark.parametrize(
    ("machine", "settings", "says"),
    [
        (P40, {"dtype": "bfloat16"}, r"Tesla P40 has no bfloat16.*8\.0.*6\.1.*\"float32\""),
        (V100, {"dtype": "bfloat16"}, r"V100 has no bfloat16.*\"float16\""),
        (P40, {"sdp_kernel": "flash"}, r"Tesla P40 cannot run flash.*8\.0.*6\.1.*math"),
        (V100, {"sdp_kernel": "flash"}, "V100 cannot run flash"),
        (A100, {"sdp_kernel": "flash", "dtype": "float32"}, "flash attention needs dtype bfloat16"),
        (A100, {"sdp_kernel": "flash", "use_amp": False}, "flash attention needs dtype bfloat16"),
        (MACHINES[13][0], {"sdp_kernel": "flash"}, "built without flash"),
        (V100, {"dtype": "float16", "use_amp": False}, "float16 needs use_amp"),
        (A100, {"device": "cuda:1"}, r"cuda:1.*1 GPU.*cuda:0"),
        (A100, {"device": "mps"}, "no Apple GPU"),
        (MACHINES[14][0], {"device": "cuda"}, r"built without support for P40.*6\.1"),
        (ZEN3, {"device": "cuda"}, "no CUDA GPU"),
        (ZEN3, {"device": "cuda:2"}, "no CUDA GPU"),
        (MAC, {"device": "cuda"}, "no CUDA GPU"),
        (ZEN3, {"device": "mps"}, "no Apple GPU"),
        (ZEN3, {"dtype": "float16"}, "no float16 instructions"),
        (A100, {"device": "cpu", "dtype": "float16"}, "no float16 instructions"),
        (ZEN3, {"sdp_kernel": "mem_efficient"}, "does not exist"),
        (ZEN3, {"sdp_kernel": "flash", "dropout": 0.1}, "no dropout on a CPU"),
        (MAC, {"dtype": "float16"}, "loss scaling"),
        (OLD_MAC, {"dtype": "bfloat16"}, "torch 2.7.0 has no bfloat16 on this Apple GPU"),
        (MAC, {"sdp_kernel": "flash"}, "does not exist"),
        (MAC, {"sdp_kernel": "mem_efficient"}, "does not exist"),
    ],
)
def test_refused_by_hand(machine, settings, says):
    with pytest.raises(UserError, match=says):
        resolve_compute(machine, **settings)


@pytest.mark.parametrize(
    ("machine", "settings"),
    [
        (P40, {"dtype": "float16"}),
        (P40, {"sdp_kernel": "mem_efficient"}),
        (V100, {"dtype": "float32"}),
        (A100, {"dtype": "float16"}),
        (A100, {"sdp_kernel": "math"}),
        (A100, {"device": "cpu", "dtype": "bfloat16"}),
        (A100, {"device": "cuda:0", "dtype": "bfloat16"}),
        (MAC, {"device": "cpu"}),
        (MAC, {"dtype": "bfloat16", "sdp_kernel": "math"}),
        (MAC, {"dtype": "float32"}),
        (AMX, {"dtype": "float32"}),
        (AMX, {"dtype": "bfloat16"}),
        (ZEN3, {"sdp_kernel": "flash"}),
        (cpu("Xeon 6", "amx_bf16", "amx_fp16"), {"dtype": "float16"}),
    ],
)
def test_obeyed_by_hand(machine, settings):
    compute = resolve_compute(machine, **settings)
    assert settings == {key: getattr(compute, key) for key in settings} and not compute.undecided
    assert compute.grad_scaling is (compute.dtype == "float16")
    if "sdp_kernel" in settings:
        assert compute.kernels == (settings["sdp_kernel"],)


def test_auto_skips_a_gpu_that_torch_was_not_built_for():
    machine = dataclasses.replace(A100, gpus=P40.gpus + A100.gpus, cuda_architectures=("sm_80", "sm_90"))
    compute = resolve_compute(machine)
    assert (compute.device, compute.name) == ("cuda:1", "NVIDIA A100")


def test_code_for_a_gpu_may_be_of_an_older_minor_or_ptx():
    for built, device in [
        ("sm_60", "cuda"),
        ("compute_50", "cuda"),
        ("sm_50", "cpu"),
        ("sm_70", "cpu"),
        ("gfx90a", "cuda"),
    ]:
        assert resolve_compute(dataclasses.replace(P40, cuda_architectures=(built,))).device == device


def test_describe_tells_the_machine_and_each_reason():
    assert describe_compute(resolve_compute(P40)) == [
        "machine Tesla P40, 24 GiB, torch 2.7.0+cu126",
        "device cuda: the first CUDA GPU that torch can use",
        "dtype float32: compute capability 6.1 has no fast half precision",
        "attention math: the fastest for this device and dtype",
    ]
    assert "16 GiB shared with the CPU" in describe_compute(resolve_compute(ORIN))[0]
    assert "shared" not in describe_compute(resolve_compute(ORIN, device="cpu"))[0]


def test_this_machine():
    machine = detect_machine()
    assert machine.cpu and machine.cores >= 1 and machine.memory > 2**28
    json.dumps(dataclasses.asdict(resolve_compute(machine)))  # goes into the log's first line
    assert detect_machine("cpu").gpus == ()


@pytest.mark.parametrize(
    "told, cores",
    [
        ("100000 100000", 1),
        ("20000 100000", 1),
        ("290000 100000", 2),
        ("max 100000", None),
        ("", None),
        ("1 0", None),
    ],
)
def test_a_container_may_have_less(monkeypatch, tmp_path, told, cores):
    torch, before = pytest.importorskip("torch"), detect_machine()
    n_threads = torch.get_num_threads()
    (tmp_path / "cpu.max").write_text(told)
    (tmp_path / "memory.max").write_text("300000000" if cores else "-1" if told == "1 0" else "max")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    try:
        machine = detect_machine()
        assert machine.cores == min(before.cores, cores or before.cores)
        assert torch.get_num_threads() == min(n_threads, machine.cores)
        assert machine.memory == (300000000 if cores else before.memory)
    finally:
        torch.set_num_threads(n_threads)


def test_contexts():
    torch = pytest.importorskip("torch")
    q = torch.randn(1, 2, 8, 16)
    for kernel in ("auto", "flash", "math"):
        with attention_context(resolve_compute(ZEN3, sdp_kernel=kernel)):
            assert torch.backends.cuda.flash_sdp_enabled() is (kernel != "math")
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    for dtype in ("float32", "bfloat16"):
        with autocast_context(resolve_compute(AMX, dtype=dtype)):
            assert (q @ q.transpose(-1, -2)).dtype == getattr(torch, dtype)


def test_matmul_flops_are_plausible():
    assert 1e8 < measure_matmul_flops("cpu", "float32", seconds=0.2) < 1e14


def test_each_process_has_a_gpu_of_its_own(monkeypatch, as_before, capsys):
    machine = dataclasses.replace(A100, gpus=A100.gpus * 2)
    monkeypatch.setattr(hardware, "detect_machine", lambda device: machine)
    assert hardware.set_up_compute(CONFIG, local=(1, 2)).device == "cuda:1"
    assert "device cuda:1: each process on this machine has its own GPU\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="the last of the 2 GPUs here is cuda:1"):
        hardware.set_up_compute(CONFIG, local=(2, 3))
    by_hand = CONFIG.model_copy(update={"device": "cuda:1"})
    assert hardware.set_up_compute(by_hand, local=(0, 1)).device == "cuda:1"
    with pytest.raises(UserError, match='"cuda:1", but this machine runs 2 processes; set "cuda"'):
        hardware.set_up_compute(by_hand, local=(0, 2))
    machine = dataclasses.replace(machine, cuda_architectures=("sm_90",))  # torch can use neither
    assert hardware.set_up_compute(CONFIG, local=(1, 2)).device == "cpu"


@pytest.fixture
def as_before():
    """Restore the settings of torch and the environment variable after a test."""
    torch, name = pytest.importorskip("torch"), "CUBLAS_WORKSPACE_CONFIG"
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    n_threads = torch.get_num_threads()
    yield torch
    torch.set_num_threads(n_threads)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    os.environ.pop(name, None)


@pytest.mark.parametrize("workspace, then", [(None, ":4096:8"), (":16:8", ":16:8"), (":4096:2", ":4096:8")])
def test_what_a_gpu_adds_up_is_the_same_each_time(monkeypatch, as_before, workspace, then):
    if workspace:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    monkeypatch.setattr(hardware, "detect_machine", lambda device: A100)
    assert not as_before.are_deterministic_algorithms_enabled()
    hardware.set_up_compute(CONFIG.model_copy(update={"device": "cpu"}))
    assert not as_before.are_deterministic_algorithms_enabled()
    hardware.set_up_compute(CONFIG)
    assert as_before.are_deterministic_algorithms_enabled()
    assert not as_before.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == then


def test_a_clock_waits_for_the_gpu_that_it_times(monkeypatch):
    torch, waited = pytest.importorskip("torch"), []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for device in ("cuda:1", "cuda", "mps", "cpu"):
        synchronize(device)
    assert waited == ["cuda:1", "cuda", "mps"]


# ---- float32 or bfloat16, measured -------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """passes(float32=3, bfloat16=1): call `measure_dtype` with passes that take so many seconds, or raise.
    Returns its result, and the order in which it called them."""
    now, called = [0.0], []
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])

    def one_pass(dtype, seconds):
        called.append(dtype)
        if isinstance(seconds, Exception):
            raise seconds
        now[0] += next(seconds) if hasattr(seconds, "__next__") else seconds

    def measure(**times):
        found = measure_dtype({dtype: functools.partial(one_pass, dtype, t) for dtype, t in times.items()})
        return (*found, called)

    return measure


def test_bfloat16_is_for_where_it_is_clearly_faster(passes):
    dtype, why, _ = passes(float32=0.152, bfloat16=0.131)
    assert dtype == "bfloat16"
    assert why == "measured 131.0 ms per forward and backward pass, float32 152.0 ms"
    dtype, why, _ = passes(float32=0.131, bfloat16=0.152)
    assert dtype == "float32"
    assert why == "measured 131.0 ms per forward and backward pass, bfloat16 152.0 ms"
    dtype, why, _ = passes(float32=0.100, bfloat16=0.096)
    assert dtype == "float32" and "bfloat16 96.0 ms; a gain below 5% is not worth the rounding errors" in why


def test_the_passes_take_turns_and_the_first_ones_and_odd_ones_do_not_count(passes):
    times = iter([9.0, 0.1, 0.1, 7.0, *[0.1] * 99])
    dtype, why, called = passes(float32=times, bfloat16=0.2)
    assert dtype == "float32" and why.startswith("measured 100.0 ms")
    assert called == ["float32", "bfloat16"] * (len(called) // 2)


@pytest.mark.parametrize("seconds, rounds", [(0.01, 50), (0.4, 3), (20.0, 1)])
def test_it_takes_about_a_second_or_as_few_passes_as_tell(passes, seconds, rounds):
    *_, called = passes(float32=seconds, bfloat16=seconds)
    assert len(called) == pytest.approx(2 * (1 + rounds), abs=2)


def test_what_does_not_fit_in_memory_is_not_chosen(passes):
    full = RuntimeError("MPS backend out of memory (MPS allocated: 18.02 GB, max allowed: 18.13 GB)")
    assert passes(float32=full, bfloat16=1.0)[0] == "bfloat16"
    for wrong in ({"float32": 1.0, "bfloat16": full}, {"float32": RuntimeError("a bug"), "bfloat16": 1.0}):
        with pytest.raises(RuntimeError):
            passes(**wrong)


PRETEND = """
import dataclasses, time, torch, types
from common import hardware
from model import GPT

def pretend(slow, features=("avx512_bf16",)):
    # A machine with bfloat16 instructions, on which each pass in dtype `slow` seems to take 20 seconds more.
    machine, forward, late = hardware.detect_machine("cpu"), GPT.hidden, [0]
    hardware.detect_machine = lambda device: dataclasses.replace(machine, cpu_features=features)
    hardware.time = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    def slower(self, *args, **kwargs):
        dtype = "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"
        late[0] += 20 * (dtype == slow)
        return forward(self, *args, **kwargs)
    GPT.hidden = slower
"""


@pytest.fixture
def slow_in(monkeypatch):
    """slow_in(dtype): from now on this machine has bfloat16 instructions, and is slow in this dtype."""
    from model import GPT

    forward, names = GPT.hidden, {}
    for place, name in ((hardware, "detect_machine"), (hardware, "time"), (GPT, "hidden")):
        monkeypatch.setattr(place, name, getattr(place, name))  # so that it is restored after the test
    exec(PRETEND, names)

    def slow_in(dtype):
        GPT.hidden = forward
        names["pretend"](dtype)

    return slow_in


def dtype_line(output):
    return [line for line in output.splitlines() if line.startswith("dtype ")][-1]


def test_a_run_takes_what_is_faster_and_keeps_it(train, slow_in):
    slow_in("float32")
    done = train("pretrain", dtype="auto", max_steps=3)
    assert dtype_line(done.stdout).startswith("dtype bfloat16: measured "), done.stderr
    assert load(train.checkpoints()[3]).train_config["dtype"] == "bfloat16"
    slow_in("bfloat16")
    done = train("pretrain", "--resume", dtype="auto", max_steps=4)
    assert dtype_line(done.stdout) == "dtype bfloat16: as in this run so far"
    assert "changed since then: max_steps: 3 -> 4\n" in done.stderr
    done = train("pretrain", "--resume", dtype="float32", max_steps=5)
    assert dtype_line(done.stdout) == "dtype float32: set by hand"
    assert "dtype: bfloat16 -> float32" in done.stderr


def test_a_new_run_measures_anew(train, slow_in):
    slow_in("bfloat16")
    done = train("pretrain", dtype="auto", max_steps=3)
    assert dtype_line(done.stdout).startswith("dtype float32: measured "), done.stderr
    slow_in("float32")
    path = train.checkpoints()[3]
    data = train.root / "dataset" / "prepared"
    other = [[str(data / "pretrain_val.bin"), str(data / "pretrain_train.bin")]]
    done = train("pretrain", dtype="auto", max_steps=3, from_checkpoint=str(path), dataset_path=other)
    assert dtype_line(done.stdout).startswith("dtype bfloat16: measured "), done.stderr
    *_, log = sorted(train.root.glob("train_*.log"))
    assert json.loads(log.read_text("utf-8").partition("\n")[0][2:])["machine"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("architecture", ["nano", "deepseek_v3"])
def test_measuring_leaves_no_trace(train, slow_in, architecture):
    slow_in("bfloat16")
    shape = json.loads((train.root / "config" / "model_config.json").read_text())
    path, states = train.root / "model.json", []
    path.write_text(json.dumps(shape | {"architecture": architecture}))
    for dtype in ("float32", "auto"):
        done = train("pretrain", "-m", path, dtype=dtype, max_steps=3, dropout=0.1)
        assert done.returncode == 0, done.stderr
        states.append(load(train.checkpoints()[3]))
        train.checkpoints()[3].unlink()
    assert train.same(*states)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_is_compiled_is_measured_so(train, slow_in, monkeypatch, fails):
    import torch

    def compiler(model):
        def step(*args, **kwargs):
            if fails:
                raise RuntimeError("InvalidCxxCompiler: none found\nmore")
            calls.append(torch.is_autocast_enabled("cpu"))
            return model(*args, **kwargs)

        return step

    calls = []
    monkeypatch.setattr(torch, "compile", compiler)
    slow_in("bfloat16")
    done = train("pretrain", dtype="auto", compile=True, max_steps=3)
    if fails:
        assert done.stderr == (
            "error: torch.compile failed: InvalidCxxCompiler: none found; set compile to false\n"
        )  # fmt: skip
    else:
        assert dtype_line(done.stdout).startswith("dtype float32: measured "), done.stderr
        assert calls[:4] == [False, True] * 2 and calls[-3:] == [False] * 3
    assert done.stdout.count("Compiling the training step") == 2 - fails


def test_the_plan_tells_what_was_measured(train, slow_in, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    slow_in("float32")
    done = train("pretrain", "--plan", dtype="auto")
    assert "dtype bfloat16: measured " in done.stdout.partition("plan: pretrain")[2], done.stderr
    assert "GFLOP/s in bfloat16)" in done.stdout


@pytest.mark.parametrize(
    "script, features, says",
    [
        ("train_ddp.py", '("avx512_bf16",)', "dtype float32: measured "),
        pytest.param(
            "train_deepspeed.py", '("avx512_bf16",)', "dtype float32: measured ", marks=pytest.mark.slow
        ),
        ("train_ddp.py", "()", "dtype float32: the machines of this run differ"),
    ],
    ids=["DDP", "ZeRO", "different machines"],
)
def test_all_processes_take_the_same(tiny_project, script, features, says):
    strategy = "engine.parallel.DataParallel" if script == "train_ddp.py" else "engine.zero.Zero"
    module, _, name = strategy.rpartition(".")
    prelude = (
        PRETEND
        + f"""
import os
os.environ["DS_ACCELERATOR"] = "cpu"
rank = os.environ["RANK"]
pretend("bfloat16") if rank == "0" else pretend("float32", {features})
from {module} import {name} as Strategy
wrap = Strategy.wrap
def wrap_and_note(self, module, optimizer, config, compute):
    open(__file__ + ".dtype" + rank, "w").write(compute.dtype)
    return wrap(self, module, optimizer, config, compute)
Strategy.wrap = wrap_and_note
"""
    )
    script = with_prelude(tiny_project, prelude, script)
    output = together(tiny_project, script, "-t", "pretrain", **{**RUN, "dtype": "auto", "max_steps": 3})
    assert dtype_line(output).startswith(says)
    assert [(tiny_project.root / f"{script}.dtype{rank}").read_text() for rank in "01"] == ["float32"] * 2
