"""The one room that asks the machine what it can do, and turns every "auto" into an answer.

    machine = detect()                          # asks torch and the operating system, once
    compute = choose(machine, device="auto", dtype="auto", sdp_kernel="auto", use_amp=True)
    if compute.undecided:                        # only the model itself can tell which dtype is faster
        compute = with_dtype(compute, config, *measured_dtype(passes))
    print("\\n".join(describe(compute)))          # what was chosen, and why
    with attention_context(compute), autocast_context(compute):
        ...                                     # forward pass

`choose` is a pure function of what `detect` found, so machines can be pretended in tests.
What a person sets by hand is obeyed, or refused with the reason.
"""

import contextlib
import ctypes
import os
import platform
import re
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError, is_out_of_memory

BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is Arm's name
FP16 = ("amx_fp16", "avx512_fp16")
KERNELS = ("flash", "mem_efficient", "math")  # each one works wherever the ones before it do
GAIN = 0.05  # of the time of a pass: what bfloat16 must save to be worth its rounding
CONTAINER = Path("/sys/fs/cgroup")  # where Linux tells what a container may use (control groups, version 2)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. `memory` in bytes; `shared`: it is the board's only memory (Jetson)."""

    name: str
    capability: tuple[int, int]
    memory: int
    shared: bool = False


@dataclass(frozen=True)
class Machine:
    """What there is to compute with. `memory` in bytes, None if unknown; `cores` this process may use."""

    cpu: str
    cores: int
    memory: int | None
    torch: str
    cpu_features: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    has_mps: bool = False
    mps_bfloat16: bool = False  # whether its products may be in bfloat16
    cuda_architectures: tuple[str, ...] = ()  # what torch was built for ("sm_80"); empty: unknown
    flash_built: bool = True


@dataclass(frozen=True)
class ComputeConfig:
    """Every "auto" resolved.

    `undecided`: `dtype` is float32 until `measured_dtype` has held it against bfloat16.
    `autocast`: float32 weights, products in `dtype`; otherwise the weights are in `dtype` too.
    `grad_scaling`: float16 gradients underflow unless the loss is scaled (Micikevicius et al. 2018).
    `kernels`: the attention kernels torch may use; empty: torch picks. `memory`: the device's, in bytes.
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
    def device_type(self):
        return self.device.split(":")[0]

    @property
    def custom_kernels(self):
        """Whether to train with common/kernels.py's attention and loss."""
        return self.device == "cpu" and self.dtype == "float32" and self.sdp_kernel == "auto"


def detect(device="auto"):
    """Ask this machine -> Machine. GPUs are left alone when `device` is "cpu".

    Torch gets no more threads than there are cores: in a container that may use two of 64, it would start 64.
    """
    import torch

    cores = _cores()
    torch.set_num_threads(min(torch.get_num_threads(), cores))
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name, features = _linux_cpu()
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


def choose(
    machine, device="auto", dtype="auto", sdp_kernel="auto", use_amp=True, dropout=0.0, loss_scaling=True
):
    """Resolve every "auto" for `machine` -> ComputeConfig. UserError if what was set by hand cannot be.

    loss_scaling: whether the training loop has what float16 needs.
    """
    device, gpu, why_device = _choose_device(machine, device)
    dtype, why_dtype = _choose_dtype(machine, device, gpu, dtype, use_amp, loss_scaling)
    undecided, dtype = dtype == "auto", "float32" if dtype == "auto" else dtype
    kernel, kernels, why_kernel = _choose_kernel(machine, device, gpu, dtype, sdp_kernel, dropout)
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
            f"device {device}: {why_device}",
            f"dtype {'auto' if undecided else dtype}: {why_dtype}",
            f"attention {why_kernel}",
        ),
    )


def prepare(config, place=None, loss_scaling=True):
    """The `ComputeConfig` of a training run. Prints it, and sets this process up for it.

    place: (i, n) if this is process i of n on this machine: each has a GPU, or a share of the cores.
    loss_scaling: see `choose`.
    """
    import torch

    settings = config.dtype, config.sdp_kernel, config.use_amp, config.dropout, loss_scaling
    machine = detect(config.device)
    compute = choose(machine, config.device, *settings)
    if place and compute.device_type == "cuda" and config.device in ("auto", "cuda"):
        compute = choose(machine, f"cuda:{place[0]}", *settings)
        why = f"device {compute.device}: each process on this machine has its own"
        compute = replace(compute, reasons=(why, *compute.reasons[1:]))
    elif place and compute.device_type == "cuda" and place[1] > 1:
        raise UserError(f'device is "{config.device}" for {place[1]} processes; with "cuda" each has its own')
    if place and compute.device_type == "cpu":
        torch.set_num_threads(max(1, machine.cores // place[1]))
    if compute.device_type == "cuda":
        repeat_exactly()
    keep_freed_memory()
    for line in describe(compute):
        print(line)
    return compute


def describe(compute):
    """Four plain lines for the start of a run: the machine, then each compute and its reason."""
    shared = any(gpu.shared and gpu.name == compute.name for gpu in compute.machine.gpus)
    memory = f", {compute.memory / 2**30:.0f} GiB{' shared with the CPU' * shared}" if compute.memory else ""
    return [f"machine {compute.name}{memory}, torch {compute.machine.torch}", *compute.reasons]


def _choose_device(machine, device):
    """-> (device, its Gpu or None, why)."""
    if device == "auto":
        for i, gpu in enumerate(machine.gpus):
            if _torch_supports(machine, gpu):
                return f"cuda:{i}" if i else "cuda", gpu, "the first CUDA GPU that torch can use"
        if machine.has_mps:
            return "mps", None, "the Apple GPU"
        if machine.gpus:
            return "cpu", None, _unsupported(machine, machine.gpus[0])
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
            f"or install a torch build with CUDA and see whether nvidia-smi lists the GPU"
        )
    if index >= count:
        raise UserError(f'device is "{device}", but the last of the {count} GPUs here is cuda:{count - 1}')
    if not _torch_supports(machine, machine.gpus[index]):
        raise UserError(f'device is "{device}", but {_unsupported(machine, machine.gpus[index])}')
    return device, machine.gpus[index], "set by hand"


def _choose_dtype(machine, device, gpu, dtype, use_amp, loss_scaling):
    """-> (dtype, or "auto" where only measuring can tell, and why)."""
    if dtype == "float16" and not use_amp:
        raise UserError("float16 needs use_amp: weights kept in float16 lose their small updates")
    if dtype == "float16" and not loss_scaling:
        raise UserError('float16 needs loss scaling, which is not done under DeepSpeed; set dtype to "auto"')
    if gpu:
        why = f"compute capability {_dot(gpu)}"
        if gpu.capability >= (8, 0):
            best = "bfloat16"
        elif gpu.capability >= (7, 0):
            best, why = "float16", why + " has float16 matrix units, but no bfloat16"
            if not loss_scaling:
                best, why = "float32", why + ", and loss scaling is not done under DeepSpeed"
        else:
            best, why = "float32", why + " has no fast half precision"
        if dtype == "bfloat16" and best != "bfloat16":
            raise UserError(
                f'{gpu.name} has no bfloat16: {_needs_ampere(gpu)}; set dtype to "{best}" or "auto"'
            )
    elif device == "mps":
        best, why = "float32", f"torch {machine.torch} has no bfloat16 on this Apple GPU"
        if dtype == "float16":
            raise UserError(
                'float16 needs loss scaling, which torch lacks on Apple GPUs; set dtype to "auto"'
            )
        if machine.mps_bfloat16:
            best, why = "auto", "an Apple GPU may be faster in bfloat16, which is measured"
        elif dtype == "bfloat16":
            raise UserError(f'{why}: it takes torch 2.6 and macOS 14; set dtype to "float32" or "auto"')
    else:
        has_bf16 = any(name in machine.cpu_features for name in BF16)
        best, why = "float32", "this CPU has no bfloat16 instructions"
        if has_bf16:
            best, why = "auto", "this CPU has bfloat16 instructions, and what they gain is measured"
        elif dtype == "bfloat16":
            return dtype, f"set by hand, though {why} and float32 would be faster"
        if dtype == "float16" and not any(name in machine.cpu_features for name in FP16):
            raise UserError('this CPU has no float16 instructions; set dtype to "auto" or "float32"')
    if dtype != "auto":
        return dtype, "set by hand"
    if not use_amp and best != "float32":
        return "float32", "use_amp is false, and weights in half precision lose their small updates"
    return best, why


def _choose_kernel(machine, device, gpu, dtype, kernel, dropout):
    """-> (name, the kernels torch may use, why)."""
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
    # Flash takes no attention mask and not every head size: what it refuses falls to the next one.
    return best, KERNELS[KERNELS.index(best) :], f"{best}: the fastest for this device and dtype"


def with_dtype(compute, config, dtype, why):
    """The same with this dtype, and `why` as the reason."""
    decided = choose(
        compute.machine, compute.device, dtype, config.sdp_kernel, config.use_amp, config.dropout
    )
    return replace(decided, reasons=(compute.reasons[0], f"dtype {dtype}: {why}", decided.reasons[2]))


def measured_dtype(passes, seconds=1.0):
    """(dtype, why): float32, the more exact, unless bfloat16 is clearly faster; measured for about `seconds`.

    passes: {"float32": f, "bfloat16": g}, functions that do the same forward and backward pass, each in its
    precision. They take turns, because the speed of a machine drifts, and the medians count.
    """
    for dtype, one_pass in passes.items():
        try:
            one_pass()  # the first pass also loads libraries
        except (MemoryError, RuntimeError) as error:
            if dtype != "float32" or not is_out_of_memory(error):
                raise
            return "bfloat16", "for float32, memory does not suffice"
    times, start = {dtype: [] for dtype in passes}, time.perf_counter()
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
    best, other = ("bfloat16", "float32") if gain >= GAIN else ("float32", "bfloat16")
    took = {dtype: f"{1000 * median:.1f} ms" for dtype, median in medians.items()}
    why = f"measured {took[best]} a forward and backward pass, {other} {took[other]}"
    return best, why + f"; it would have to gain {GAIN:.0%}, being less exact" * (0 < gain < GAIN)


def attention_context(compute):
    """A context in which scaled_dot_product_attention uses only `compute.kernels`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"flash": SDPBackend.FLASH_ATTENTION, "mem_efficient": SDPBackend.EFFICIENT_ATTENTION}
    names["math"] = SDPBackend.MATH
    return sdpa_kernel([names[k] for k in compute.kernels]) if compute.kernels else contextlib.nullcontext()


def autocast_context(compute):
    """A context for the forward pass: products in `compute.dtype` where mixed precision is on."""
    import torch

    if not compute.autocast:
        return contextlib.nullcontext()
    return torch.autocast(compute.device_type, getattr(torch, compute.dtype))


@contextlib.contextmanager
def forward_context(compute):
    """Both of the above: what a forward pass runs in."""
    with attention_context(compute), autocast_context(compute):
        yield


def repeat_exactly():
    """Let CUDA add up in the same order each time: a run that is resumed then goes on bit for bit.

    Otherwise the backward passes of its attention kernels, and compiled ones of embeddings, add what comes
    first, first (https://docs.pytorch.org/docs/stable/notes/randomness.html). An operation that knows no
    other way is refused by name: there is none in models/ (tests/models/test_models.py). To be called before
    the first product, when cuBLAS reads the variable: the size and number of its workspaces.
    """
    import torch

    if os.environ.get(name := "CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ[name] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which takes time, and is for finding bugs


def keep_freed_memory():
    """Let the C library keep what tensors free, for the next ones, instead of returning it to the system.

    On a CPU each large tensor otherwise begins as fresh pages, which the system must first zero:
    a tenth to a third of a training step (doc/speed.md). Linux with glibc; elsewhere it does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Parameter numbers of mallopt(3): no mmap for large blocks, never trim, grow in large steps.
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
            libc.mallopt(parameter, value)


def return_freed_memory():
    """The opposite, once: what is free goes back to the system. Takes some milliseconds."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def synchronize(device):
    """Wait until a GPU has done all it was told: only then does a clock tell how long that took."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def measure_matmul_flops(device, dtype, seconds=1.0):
    """The most FLOP/s that square matrix products reach here, in about `seconds`: the 100 % of MFU.

    An N x N by N x N product counts 2 N^3. Sizes double until the time is used; the fastest counts.
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
        out = a @ a  # the first product also loads the library
        synchronize(device)
        until = time.perf_counter() + (seconds - used) / 3
        while (begin := time.perf_counter()) < until:
            for _ in range(repeats):
                torch.mm(a, a, out=out)
            synchronize(device)
            best = max(best, repeats * flops / (time.perf_counter() - begin))
    return best


def _torch_supports(machine, gpu):
    """Whether this torch holds code for the GPU: its own, of an older minor, or PTX to compile."""
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in machine.cuda_architectures]
    found = [(m[1], (int(m[2]), int(m[3]))) for m in found if m]
    return not found or any(
        has <= gpu.capability and (kind == "compute" or has[0] == gpu.capability[0]) for kind, has in found
    )


def _unsupported(machine, gpu):
    return (
        f"torch {machine.torch} was built without support for {gpu.name} (compute capability {_dot(gpu)}); "
        f"install a build that has it"
    )


def _needs_ampere(gpu):
    return f"that needs compute capability 8.0, this has {_dot(gpu)}"


def _dot(gpu):
    return ".".join(map(str, gpu.capability))


def _mps_has_bfloat16():
    """Asks for a product in bfloat16: old versions of torch and macOS make one in float32, or none."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autocast("mps", torch.bfloat16):
                a = torch.ones(8, 8, device="mps")
                return (a @ a).dtype == torch.bfloat16
        except (RuntimeError, TypeError):
            return False


def _linux_cpu():
    """-> (name or "", instruction set extensions), as the Linux kernel tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return "", set()
    facts = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name", ""), set((facts.get("flags") or facts.get("features", "")).split())


def _cores():
    """How many this process may use: the machine's, or as many as its container has time for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        granted, period = map(int, (CONTAINER / "cpu.max").read_text().split())
        cores = min(cores, max(1, granted // period))
    return cores


def _memory():
    """Bytes this process may use: the machine's, or its container's if that is less. None: unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):
        granted = int((CONTAINER / "memory.max").read_text())
        total = min(total, granted) if granted > 0 else total
    return total
