"""What this machine can do, and which device, dtype and attention kernel "auto" stands for.

    machine = detect_machine()                          # asks torch and the operating system, once
    compute = resolve_compute(machine, device="auto", dtype="auto", sdp_kernel="auto", use_amp=True)
    if compute.undecided:                       # which dtype is faster must be measured with the model
        compute = with_dtype(compute, config, *measure_dtype(passes))
    print("\\n".join(describe_compute(compute)))         # what was chosen, and why
    with attention_context(compute), autocast_context(compute):
        ...                                     # forward pass

`resolve_compute` is a pure function of what `detect_machine` found, so tests can use made-up machines.
What the user set by hand is obeyed, or refused with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, is_out_of_memory
from config.schema import TrainConfig

BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is Arm's name
FP16 = ("amx_fp16", "avx512_fp16")
KERNELS = ("flash", "mem_efficient", "math")  # each one works wherever the ones before it do
MIN_GAIN = 0.05  # share of the time that bfloat16 must save to be worth its rounding errors
CGROUP = Path("/sys/fs/cgroup")  # holds the limits of a Linux container (control groups, version 2)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. memory: in bytes. shared: CPU and GPU use the same memory (Jetson)."""

    name: str
    capability: tuple[int, int]
    memory: int
    shared: bool = False


@dataclass(frozen=True)
class Machine:
    """What there is to compute with.

    cores: how many this process may use. memory: of the CPU, in bytes; None if unknown.
    mps_bfloat16: whether the Apple GPU multiplies in bfloat16.
    cuda_architectures: what torch was compiled for ("sm_80"); empty if unknown.
    """

    cpu: str
    cores: int
    memory: int | None
    torch: str
    cpu_features: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    has_mps: bool = False
    mps_bfloat16: bool = False
    cuda_architectures: tuple[str, ...] = ()
    flash_built: bool = True


@dataclass(frozen=True)
class ComputeConfig:
    """How to compute: every "auto" resolved.

    undecided: dtype is float32 for now, until `measure_dtype` has compared it with bfloat16.
    autocast: mixed precision, with float32 weights and products in dtype; else the weights are in dtype, too.
    grad_scaling: float16 gradients underflow unless the loss is scaled (Micikevicius et al. 2018).
    kernels: the attention kernels that torch may use; empty: torch picks.
    name, memory: of the device; memory in bytes. reasons: one line each for device, dtype and attention.
    """

    machine: Machine
    device: str
    dtype: str
    undecided: bool
    sdp_kernel: str
    autocast: bool
    grad_scaling: bool
    kernels: tuple[str, ...]
    name: str
    memory: int | None
    reasons: tuple[str, ...]

    @property
    def device_type(self) -> str:
        """The device without its number: cpu, cuda or mps."""
        return self.device.split(":")[0]

    @property
    def custom_kernels(self) -> bool:
        """Whether to train with the attention and the loss of common/kernels.py."""
        return self.device == "cpu" and self.dtype == "float32" and self.sdp_kernel == "auto"


# ---- what the machine has ----------------------------------------------------------------------------------


def detect_machine(device: str = "auto") -> Machine:
    """Find out what this machine has. With device "cpu", GPUs are not touched.

    Also limits torch to as many threads as there are cores: in a container that may use two cores of 64,
    it would start 64 threads.
    """
    import torch

    cores = _cores()
    torch.set_num_threads(min(torch.get_num_threads(), cores))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    name, features = _read_cpuinfo()
    gpus = []
    for i in range(torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        shared = bool(getattr(gpu, "is_integrated", False))
        gpus.append(Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory, shared))
    flash_built = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    has_mps = device != "cpu" and torch.backends.mps.is_available()
    return Machine(
        cpu=name or capabilities.get("cpu_name") or platform.machine(),
        cores=cores,
        memory=_memory(),
        torch=str(torch.__version__),
        cpu_features=tuple(f for f in BF16 + FP16 if f in features or capabilities.get(f)),
        gpus=tuple(gpus),
        has_mps=has_mps,
        mps_bfloat16=has_mps and _mps_has_bfloat16(),
        cuda_architectures=tuple(torch.cuda.get_arch_list()) if gpus else (),
        flash_built=not gpus or flash_built(),
    )


def _read_cpuinfo() -> tuple[str, set[str]]:
    """Returns (name or "", instruction set extensions) of the CPU, as Linux reports them.

    By hand, because older versions of torch lack torch.cpu.get_capabilities, and py-cpuinfo takes seconds.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return "", set()
    info = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return info.get("model name", ""), set((info.get("flags") or info.get("features", "")).split())


def _cores() -> int:
    """How many cores this process may use; in a container, no more than its quota of CPU time.

    By hand, because neither psutil nor os.process_cpu_count (Python 3.13) knows the limits of containers.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def _memory() -> int | None:
    """How many bytes this process may use: the machine's, or its container's if that is less; None: unknown.

    By hand, because psutil finds the same number, and small boards can do without it.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        total = min(total, limit) if limit > 0 else total
    return total


def _mps_has_bfloat16() -> bool:
    """Try a bfloat16 product: old versions of torch and macOS compute it in float32 or refuse it."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autocast("mps", torch.bfloat16):
                a = torch.ones(8, 8, device="mps")
                return (a @ a).dtype == torch.bfloat16
        except (RuntimeError, TypeError):
            return False


# ---- what to use -------------------------------------------------------------------------------------------


def set_up_compute(
    config: TrainConfig, local: tuple[int, int] | None = None, loss_scaling: bool = True
) -> ComputeConfig:
    """Resolve and print the `ComputeConfig` of a training run, and set torch up for it.

    local: (local rank, local world size) of a launched process, which gets its own GPU or share of the cores.
    loss_scaling: see `resolve_compute`.
    """
    import torch

    settings = config.dtype, config.sdp_kernel, config.use_amp, config.dropout, loss_scaling
    machine = detect_machine(config.device)
    compute = resolve_compute(machine, config.device, *settings)
    if local and compute.device_type == "cuda" and config.device in ("auto", "cuda"):
        compute = resolve_compute(machine, f"cuda:{local[0]}", *settings)
        reason = f"device {compute.device}: each process on this machine has its own GPU"
        compute = replace(compute, reasons=(reason, *compute.reasons[1:]))
    elif local and compute.device_type == "cuda" and local[1] > 1:
        raise UserError(
            f'device is "{config.device}", but this machine runs {local[1]} processes; '
            'set "cuda" to give each its own GPU'
        )
    if local and compute.device_type == "cpu":
        torch.set_num_threads(max(1, machine.cores // local[1]))
    if compute.device_type == "cuda":
        make_deterministic()
    keep_freed_memory()
    for line in describe_compute(compute):
        print(line)
    return compute


def resolve_compute(
    machine: Machine,
    device: str = "auto",
    dtype: str = "auto",
    sdp_kernel: str = "auto",
    use_amp: bool = True,
    dropout: float = 0.0,
    loss_scaling: bool = True,
) -> ComputeConfig:
    """Resolve every "auto" for `machine`. Raises UserError if it cannot do what was set by hand.

    loss_scaling: whether the training loop scales the loss, which float16 needs.
    """
    device, gpu, device_reason = _choose_device(machine, device)
    dtype, dtype_reason = _choose_dtype(machine, device, gpu, dtype, use_amp, loss_scaling)
    undecided, dtype = dtype == "auto", "float32" if dtype == "auto" else dtype
    kernel, kernels, kernel_reason = _choose_kernel(machine, device, gpu, dtype, sdp_kernel, dropout)
    return ComputeConfig(
        machine=machine,
        device=device,
        dtype=dtype,
        undecided=undecided,
        sdp_kernel=kernel,
        autocast=use_amp and dtype != "float32",
        grad_scaling=dtype == "float16",
        kernels=kernels,
        name=gpu.name if gpu else f"{machine.cpu}, {machine.cores} cores",
        memory=gpu.memory if gpu else machine.memory,
        reasons=(
            f"device {device}: {device_reason}",
            f"dtype {'auto' if undecided else dtype}: {dtype_reason}",
            f"attention {kernel_reason}",
        ),
    )


def describe_compute(compute: ComputeConfig) -> list[str]:
    """Four lines for the start of a run: the machine, then what was chosen and why."""
    shared = any(gpu.shared and gpu.name == compute.name for gpu in compute.machine.gpus)
    memory = f", {compute.memory / 2**30:.0f} GiB{' shared with the CPU' * shared}" if compute.memory else ""
    return [f"machine {compute.name}{memory}, torch {compute.machine.torch}", *compute.reasons]


def _choose_device(machine: Machine, device: str) -> tuple[str, Gpu | None, str]:
    """Returns (device, its Gpu or None, reason)."""
    if device == "auto":
        for i, gpu in enumerate(machine.gpus):
            if _torch_supports(machine, gpu):
                return f"cuda:{i}" if i else "cuda", gpu, "the first CUDA GPU that torch can use"
        if machine.has_mps:
            return "mps", None, "the Apple GPU"
        if machine.gpus:
            return "cpu", None, _not_supported(machine, machine.gpus[0])
        return "cpu", None, "torch finds no GPU here"
    if device == "mps" and not machine.has_mps:
        raise UserError('device is "mps", but torch finds no Apple GPU here; set "auto" or "cpu"')
    if device in ("cpu", "mps"):
        return device, None, "set by hand"
    if not re.fullmatch("cuda(:[0-9]{1,3})?", device):
        raise UserError(f'device is "{device[:20]}"; it must be auto, cpu, mps, cuda or cuda:N')
    index, count = int(device.partition(":")[2] or 0), len(machine.gpus)
    if not count:
        raise UserError(
            f'device is "{device}", but torch {machine.torch} finds no CUDA GPU here; set "auto" or "cpu", '
            f"or install a torch build with CUDA and check that nvidia-smi lists the GPU"
        )
    if index >= count:
        raise UserError(f'device is "{device}", but the last of the {count} GPUs here is cuda:{count - 1}')
    if not _torch_supports(machine, machine.gpus[index]):
        raise UserError(f'device is "{device}", but {_not_supported(machine, machine.gpus[index])}')
    return device, machine.gpus[index], "set by hand"


def _choose_dtype(
    machine: Machine, device: str, gpu: Gpu | None, dtype: str, use_amp: bool, loss_scaling: bool
) -> tuple[str, str]:
    """Returns (dtype, reason). The dtype is "auto" if only a measurement can tell."""
    if dtype == "float16" and not use_amp:
        raise UserError("float16 needs use_amp: float16 weights are too coarse for small updates")
    if dtype == "float16" and not loss_scaling:
        raise UserError(
            'float16 needs loss scaling, which is not available with DeepSpeed; set dtype to "auto"'
        )
    if gpu:
        reason = f"compute capability {_version(gpu)}"
        if gpu.capability >= (8, 0):
            best = "bfloat16"
        elif gpu.capability >= (7, 0):
            best, reason = "float16", reason + " has float16 matrix units, but no bfloat16"
            if not loss_scaling:
                best, reason = "float32", reason + ", and loss scaling is not available with DeepSpeed"
        else:
            best, reason = "float32", reason + " has no fast half precision"
        if dtype == "bfloat16" and best != "bfloat16":
            raise UserError(
                f'{gpu.name} has no bfloat16: {_needs_ampere(gpu)}; set dtype to "{best}" or "auto"'
            )
    elif device == "mps":
        best, reason = "float32", f"torch {machine.torch} has no bfloat16 on this Apple GPU"
        if dtype == "float16":
            raise UserError(
                'float16 needs loss scaling, which torch lacks on Apple GPUs; set dtype to "auto"'
            )
        if machine.mps_bfloat16:
            best, reason = "auto", "bfloat16 may be faster on this Apple GPU, and will be measured"
        elif dtype == "bfloat16":
            raise UserError(f'{reason}: it needs torch 2.6 and macOS 14; set dtype to "float32" or "auto"')
    else:
        has_bf16 = any(name in machine.cpu_features for name in BF16)
        best, reason = "float32", "this CPU has no bfloat16 instructions"
        if has_bf16:
            best, reason = "auto", "this CPU has bfloat16 instructions, whose speed will be measured"
        elif dtype == "bfloat16":
            return dtype, f"set by hand, although {reason} and float32 would be faster"
        if dtype == "float16" and not any(name in machine.cpu_features for name in FP16):
            raise UserError('this CPU has no float16 instructions; set dtype to "auto" or "float32"')
    if dtype != "auto":
        return dtype, "set by hand"
    if not use_amp and best != "float32":
        return "float32", "use_amp is false, and half-precision weights are too coarse for small updates"
    return best, reason


def _choose_kernel(
    machine: Machine, device: str, gpu: Gpu | None, dtype: str, kernel: str, dropout: float
) -> tuple[str, tuple[str, ...], str]:
    """Returns (name, the kernels torch may use, reason)."""
    refusal = None
    if gpu:
        if gpu.capability < (8, 0):
            refusal = f"{gpu.name} cannot run flash attention: {_needs_ampere(gpu)}"
        elif dtype == "float32":
            refusal = "flash attention needs dtype bfloat16 or float16, not float32"
        elif not machine.flash_built:
            refusal = f"torch {machine.torch} was built without flash attention"
        best = "math" if gpu.capability < (7, 0) else "mem_efficient" if refusal else "flash"
        refusal = refusal if kernel == "flash" else None
    else:
        best = "math" if device == "mps" else "auto"
        if kernel == "mem_efficient" or (kernel == "flash" and device == "mps"):
            refusal = f'attention kernel "{kernel}" does not exist for device "{device}"'
        elif kernel == "flash" and dropout:
            refusal = "flash attention has no dropout on a CPU"
    if refusal:
        raise UserError(f'{refusal}; set sdp_kernel to "auto" or "math"')
    if kernel != "auto":
        return kernel, (kernel,), f"{kernel}: set by hand"
    if best == "auto":
        return best, (), "auto: torch picks among its CPU kernels"
    # Flash supports neither masks nor every head size; torch then falls back to the next kernel in the list.
    return best, KERNELS[KERNELS.index(best) :], f"{best}: the fastest for this device and dtype"


def _torch_supports(machine: Machine, gpu: Gpu) -> bool:
    """Whether torch was built with code that runs on the GPU: for its version, an older minor one, or PTX."""
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in machine.cuda_architectures]
    built = [(m[1], (int(m[2]), int(m[3]))) for m in matches if m]
    return not built or any(
        version <= gpu.capability and (kind == "compute" or version[0] == gpu.capability[0])
        for kind, version in built
    )


def _not_supported(machine: Machine, gpu: Gpu) -> str:
    return (
        f"torch {machine.torch} was built without support for {gpu.name} "
        f"(compute capability {_version(gpu)}); install a build that has it"
    )


def _needs_ampere(gpu: Gpu) -> str:
    return f"that needs compute capability 8.0, and this GPU has {_version(gpu)}"


def _version(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability))


# ---- float32 or bfloat16, measured -------------------------------------------------------------------------


def measure_dtype(passes: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> tuple[str, str]:
    """Measure for about `seconds` whether bfloat16 is clearly faster than float32, which is more exact.

    passes: {"float32": f, "bfloat16": g}, functions that run the same forward and backward pass in one dtype
    each. They take turns, because the speed of a machine drifts, and their medians are compared.
    Returns (dtype, reason).
    """
    for dtype, one_pass in passes.items():
        try:
            one_pass()  # not timed: the first pass also loads libraries
        except (MemoryError, RuntimeError) as error:
            if dtype != "float32" or not is_out_of_memory(error):
                raise
            return "bfloat16", "float32 does not fit in memory"
    times: dict[str, list[float]] = {dtype: [] for dtype in passes}
    start = time.perf_counter()
    while (
        (elapsed := time.perf_counter() - start) < seconds
        or len(times["bfloat16"]) < (3 if elapsed < 10 * seconds else 1)
    ):  # fmt: skip
        for dtype, one_pass in passes.items():
            begin = time.perf_counter()
            one_pass()
            times[dtype].append(time.perf_counter() - begin)
    medians = {dtype: statistics.median(taken) for dtype, taken in times.items()}
    gain = 1 - medians["bfloat16"] / medians["float32"]
    best, other = ("bfloat16", "float32") if gain >= MIN_GAIN else ("float32", "bfloat16")
    took = {dtype: f"{1000 * median:.1f} ms" for dtype, median in medians.items()}
    reason = f"measured {took[best]} per forward and backward pass, {other} {took[other]}"
    if 0 < gain < MIN_GAIN:
        reason += f"; a gain below {MIN_GAIN:.0%} is not worth the rounding errors"
    return best, reason


def with_dtype(compute: ComputeConfig, config: TrainConfig, dtype: str, reason: str) -> ComputeConfig:
    """The same `ComputeConfig` with this dtype, for this reason."""
    decided = resolve_compute(
        compute.machine, compute.device, dtype, config.sdp_kernel, config.use_amp, config.dropout
    )
    return replace(decided, reasons=(compute.reasons[0], f"dtype {dtype}: {reason}", decided.reasons[2]))


# ---- settings of torch and of the C library ----------------------------------------------------------------


def attention_context(compute: ComputeConfig) -> AbstractContextManager[Any]:
    """A context in which scaled_dot_product_attention uses only `compute.kernels`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    allowed = [backends[kernel] for kernel in compute.kernels]
    return sdpa_kernel(allowed) if allowed else contextlib.nullcontext()


def autocast_context(compute: ComputeConfig) -> AbstractContextManager[Any]:
    """A context for the forward pass: with mixed precision, matrix products are in `compute.dtype`."""
    import torch

    if not compute.autocast:
        return contextlib.nullcontext()
    return torch.autocast(compute.device_type, getattr(torch, compute.dtype))


@contextlib.contextmanager
def forward_context(compute: ComputeConfig) -> Iterator[None]:
    """Both of the above."""
    with attention_context(compute), autocast_context(compute):
        yield


def make_deterministic() -> None:
    """Make CUDA add numbers in the same order every time, so that a resumed run continues bit for bit.

    By default the backward passes of attention kernels and of compiled embeddings do not
    (https://docs.pytorch.org/docs/stable/notes/randomness.html). An operation without a deterministic version
    now raises an error; models/ uses none (tests/models/test_models.py). Call this before the first matrix
    product, because that is when cuBLAS reads its environment variable.
    """
    import torch

    # The size and number of cuBLAS's workspaces. Only these two settings are deterministic.
    if os.environ.get(name := "CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ[name] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Filling new tensors with NaN takes time and is only meant for finding bugs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set dynamically


def keep_freed_memory() -> None:
    """Make the C library reuse freed memory instead of returning it to the operating system.

    Otherwise every large tensor on a CPU gets fresh pages, which the system has to zero first: a tenth to a
    third of a training step (doc/speed.md). Does nothing except on Linux with glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # mallopt(3): M_MMAP_MAX, no mmap for large blocks; M_TRIM_THRESHOLD, never; M_TOP_PAD, 64 MiB.
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
            libc.mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return freed memory to the operating system, once. Takes a few milliseconds."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work. Without this, a clock only measures how long it took to ask."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def measure_matmul_flops(device: str, dtype: str, seconds: float = 1.0) -> float:
    """Measure in about `seconds` the highest FLOP/s of square matrix products: the 100 % of MFU.

    The product of two N x N matrices counts as 2 N^3. N doubles until the time is used up; the best counts.
    """
    import torch

    kind = torch.device(device).type
    best, start = 0.0, time.perf_counter()
    for size in (256, 512, 1024, 2048, 4096, 8192):
        flops, repeats = 2 * size**3, 20 if kind == "cuda" else 1
        used = time.perf_counter() - start
        if size > 1024 and used + 2 * repeats * flops / best > seconds:
            break
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        out = a @ a  # not timed: the first product also loads the library
        synchronize(device)
        until = time.perf_counter() + (seconds - used) / 3
        while (begin := time.perf_counter()) < until:
            for _ in range(repeats):
                torch.mm(a, a, out=out)
            synchronize(device)
            best = max(best, repeats * flops / (time.perf_counter() - begin))
    return best
