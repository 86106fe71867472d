"""What "auto" means, held against a table of pretended machines; and what is refused by hand."""

import dataclasses
import json

import pytest

from engine import hardware
from engine.errors import UserError
from engine.hardware import (
    Gpu,
    Machine,
    attention_context,
    autocast_context,
    choose,
    describe,
    detect,
    measure_matmul_flops,
)

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
MAC = dataclasses.replace(cpu("Apple M2"), has_mps=True)
ZEN3 = cpu("AMD EPYC 7763")
AMX = cpu("Xeon 8480", "amx_bf16", "avx512_bf16")

MACHINES = [
    # machine, device, dtype, attention kernel, loss scaling
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
    (MAC, "mps", "float32", "math", False),
    (AMX, "cpu", "bfloat16", "auto", False),
    (cpu("AMD EPYC 9654 (Zen 4)", "avx512_bf16"), "cpu", "bfloat16", "auto", False),
    (cpu("Xeon 6148, AVX-512 without bf16"), "cpu", "float32", "auto", False),
    (ZEN3, "cpu", "float32", "auto", False),
    (cpu("Arm Neoverse V1", "bf16"), "cpu", "bfloat16", "auto", False),
    (cpu("Raspberry Pi 5", cores=4, memory=None), "cpu", "float32", "auto", False),
]


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row[0].gpus[0].name if row[0].gpus else row[0].cpu)
def test_auto(row):
    machine, device, dtype, kernel, grad_scaling = row
    choice = choose(machine)
    assert (choice.device, choice.dtype, choice.sdp_kernel) == (device, dtype, kernel)
    assert choice.grad_scaling is grad_scaling
    assert choice.autocast is (dtype != "float32")
    assert len(describe(choice)) == 4


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row[0].gpus[0].name if row[0].gpus else row[0].cpu)
def test_without_loss_scaling_there_is_no_float16(row):
    machine, _, dtype, _, grad_scaling = row
    choice = choose(machine, loss_scaling=False)
    assert choice.dtype == ("float32" if grad_scaling else dtype) and not choice.grad_scaling
    with pytest.raises(UserError, match="float16"):
        choose(machine, dtype="float16", loss_scaling=False)


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row[0].gpus[0].name if row[0].gpus else row[0].cpu)
def test_without_mixed_precision_the_weights_stay_float32(row):
    choice = choose(row[0], use_amp=False)
    assert choice.dtype == "float32" and not choice.autocast and not choice.grad_scaling
    assert choice.sdp_kernel != "flash"  # which CUDA has in half precision only


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
        (MAC, {"sdp_kernel": "flash"}, "does not exist"),
        (MAC, {"sdp_kernel": "mem_efficient"}, "does not exist"),
    ],
)
def test_refused_by_hand(machine, settings, says):
    with pytest.raises(UserError, match=says):
        choose(machine, **settings)


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
        (ZEN3, {"sdp_kernel": "flash"}),
        (cpu("Xeon 6", "amx_bf16", "amx_fp16"), {"dtype": "float16"}),
    ],
)
def test_obeyed_by_hand(machine, settings):
    choice = choose(machine, **settings)
    assert settings == {key: getattr(choice, key) for key in settings}
    assert choice.grad_scaling is (choice.dtype == "float16")
    if "sdp_kernel" in settings:
        assert choice.kernels == (settings["sdp_kernel"],)


def test_auto_skips_a_gpu_that_torch_was_not_built_for():
    machine = dataclasses.replace(A100, gpus=P40.gpus + A100.gpus, cuda_architectures=("sm_80", "sm_90"))
    choice = choose(machine)
    assert (choice.device, choice.name) == ("cuda:1", "NVIDIA A100")


def test_code_for_a_gpu_may_be_of_an_older_minor_or_ptx():
    for built, device in [
        ("sm_60", "cuda"),
        ("compute_50", "cuda"),
        ("sm_50", "cpu"),
        ("sm_70", "cpu"),
        ("gfx90a", "cuda"),
    ]:
        assert choose(dataclasses.replace(P40, cuda_architectures=(built,))).device == device


def test_describe_tells_the_machine_and_each_reason():
    assert describe(choose(P40)) == [
        "machine Tesla P40, 24 GiB, torch 2.7.0+cu126",
        "device cuda: the first CUDA GPU that torch can use",
        "dtype float32: compute capability 6.1 has no fast half precision",
        "attention math: the fastest for this device and dtype",
    ]
    assert "16 GiB shared with the CPU" in describe(choose(ORIN))[0]
    assert "shared" not in describe(choose(ORIN, device="cpu"))[0]


def test_this_machine():
    machine = detect()
    assert machine.cpu and machine.cores >= 1 and machine.memory > 2**28
    json.dumps(dataclasses.asdict(choose(machine)))  # goes into the log's first line
    assert detect("cpu").gpus == ()


@pytest.mark.parametrize(
    "told, cores",
    [("100000 100000", 1), ("20000 100000", 1), ("290000 100000", 2), ("max 100000", None), ("", None)],
)
def test_a_container_may_have_less(monkeypatch, tmp_path, told, cores):
    torch, before = pytest.importorskip("torch"), detect()
    n_threads = torch.get_num_threads()
    (tmp_path / "cpu.max").write_text(told)
    (tmp_path / "memory.max").write_text("300000000" if cores else "max")
    monkeypatch.setattr(hardware, "CONTAINER", tmp_path)
    try:
        machine = detect()
        assert machine.cores == min(before.cores, cores or before.cores)
        assert torch.get_num_threads() == min(n_threads, machine.cores)
        assert machine.memory == (300000000 if cores else before.memory)
    finally:
        torch.set_num_threads(n_threads)


def test_contexts():
    torch = pytest.importorskip("torch")
    q = torch.randn(1, 2, 8, 16)
    for kernel in ("auto", "flash", "math"):
        with attention_context(choose(ZEN3, sdp_kernel=kernel)):
            assert torch.backends.cuda.flash_sdp_enabled() is (kernel != "math")
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    for machine, dtype in [(ZEN3, torch.float32), (AMX, torch.bfloat16)]:
        with autocast_context(choose(machine)):
            assert (q @ q.transpose(-1, -2)).dtype == dtype


def test_matmul_flops_are_plausible():
    assert 1e8 < measure_matmul_flops("cpu", "float32", seconds=0.2) < 1e14
