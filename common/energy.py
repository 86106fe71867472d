"""How much energy the machine uses, where it tells: an `EnergyMeter`.

- Intel and AMD processors count the energy of each package, and of its memory, in /sys/class/powercap (RAPL;
  the kernel's Documentation/power/powercap). Since 2020 most systems let only root read these counters.
- NVIDIA GPUs count it since Volta; older ones tell their power (NVML, the library behind nvidia-smi).
- Jetson boards have INA3221 sensors for the power of each rail: in hwmon since JetPack 5, in iio before.

Power is read twice a second and added up (trapezoids). What other programs use is included: the sensors are
those of a package, a GPU or a board.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SYS = Path("/sys")
INTERVAL = 0.5  # seconds between two readings of a power
UNREADABLE = (OSError, ValueError)  # no permission, the driver is gone, not a number


class Counter:
    """Adds up a counter of joules, which starts again at 0 after `size` joules; None: it never does."""

    def __init__(self, name: str, read: Callable[[], float], size: float | None = None) -> None:
        self.name, self.read, self.size = name, read, size
        self.total, self.last = 0.0, read()

    def update(self) -> None:
        now = self.read()
        used = now - self.last
        if used < 0:
            if self.size is None:
                raise ValueError(f"{self.name} ran backwards")
            used += self.size
        self.total, self.last = self.total + used, now


class Power:
    """Adds up the energy of a power in watts."""

    def __init__(self, name: str, read: Callable[[], float], clock: Callable[[], float]) -> None:
        self.name, self.read, self.clock = name, read, clock
        self.total, self.last, self.time = 0.0, read(), clock()

    def update(self) -> None:
        now, time = self.read(), self.clock()
        self.total += (self.last + now) / 2 * (time - self.time)
        self.last, self.time = now, time


class EnergyMeter:
    """The joules that the machine has used since the meter was made.

    cpu: whether to count the processors or, on a Jetson, the board. gpu: the UUID of an NVIDIA GPU to count,
    or None. sources: what is counted. Without permission for the processors, the GPU is counted alone; the
    processors are not counted without the GPU.
    """

    def __init__(
        self, cpu: bool = True, gpu: str | None = None, sys: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.sensors: list[Counter | Power] = []
        self.lock = threading.Lock()
        sys = sys or SYS
        rails = jetson_rails(sys)
        with contextlib.suppress(*UNREADABLE):
            if cpu:
                powers = [Power(name, read, clock) for name, read in rails.items()]
                self.sensors += powers or [*rapl_counters(sys)]
        if gpu and not rails:
            try:
                self.sensors.append(nvidia_sensor(gpu, clock))
            except UNREADABLE:
                self.sensors = []
        self.sources = [sensor.name for sensor in self.sensors]
        self.is_unknown = bool(cpu or gpu) and not self.sensors
        if any(isinstance(sensor, Power) for sensor in self.sensors):
            threading.Thread(target=self._watch, daemon=True).start()

    @classmethod
    def of(cls, device: str) -> EnergyMeter:
        """For a process that computes on this device. Of several on a machine, the first counts the CPU."""
        gpu = None
        if device.startswith("cuda"):
            import torch

            gpu = str(getattr(torch.cuda.get_device_properties(device), "uuid", "unknown"))
        return cls(os.environ.get("LOCAL_RANK", "0") == "0", gpu)

    def _watch(self) -> None:
        while not self.is_unknown:
            time.sleep(INTERVAL)
            self._update()

    def _update(self) -> None:
        with self.lock:
            try:
                for sensor in self.sensors:
                    sensor.update()
            except UNREADABLE:  # the sum of the others would be too little
                self.is_unknown = True

    def joules(self) -> float | None:
        """None if the machine does not tell, or does not any more."""
        self._update()
        return None if self.is_unknown else sum(sensor.total for sensor in self.sensors)


def _number(path: Path) -> float:
    return float(path.read_text("ascii"))


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except UNREADABLE:
        return ""


def rapl_counters(sys: Path) -> Iterator[Counter]:
    """A counter for each package, and for memory that is not part of it. Raises OSError without permission.

    Not "psys", the whole board, which contains the packages, nor their parts "core" and "uncore".
    """
    for zone in sorted((sys / "class" / "powercap").glob("intel-rapl:*")):
        name = _text(zone / "name")
        if not re.fullmatch("package-[0-9]+|dram", name):
            continue
        number = zone.name.split(":")[1]
        size = _number(zone / "max_energy_range_uj") / 1e6

        read = functools.partial(lambda path: _number(path) / 1e6, zone / "energy_uj")
        yield Counter(name if name != "dram" else f"dram-{number}", read, size)


# Of Jetson boards, the rails whose powers add up to all that is measured: TX1 and TX2; Orin Nano and NX,
# Xavier NX, TX2 NX; Nano; AGX Xavier; AGX Orin, where VIN_SYS_5V0 also feeds the fourth rail. From NVIDIA's
# developer guides; energymon has collected them up to AGX Xavier (its jetson/JetsonPowerRails.md).
BOARDS = (
    ("VDD_IN", "VDD_MUX"), ("VDD_IN",), ("POM_5V_IN",), ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
)  # fmt: skip


def jetson_rails(sys: Path) -> dict[str, Callable[[], float]]:
    """{name: function that reads its watts} of the rails that add up to the board; none if it is unknown."""
    rails: dict[str, Callable[[], float]] = {}
    for label in sorted((sys / "class" / "hwmon").glob("hwmon*/in[123]_label")):
        if _text(label.with_name("name")) == "ina3221":
            number = label.name[2]
            paths = [label.with_name(f"{kind}{number}_input") for kind in ("in", "curr")]  # mV and mA
            rails[_text(label)] = functools.partial(lambda v, a: _number(v) * _number(a) / 1e6, *paths)
    for label in sorted((sys / "bus" / "i2c" / "drivers" / "ina3221x").glob("*/iio:device*/rail_name_*")):
        path = label.with_name(f"in_power{label.name[-1]}_input")  # mW
        rails[_text(label)] = functools.partial(lambda path: _number(path) / 1e3, path)
    board = next((board for board in BOARDS if rails.keys() >= {*board}), ())
    return {name: rails[name] for name in board}


def nvidia_sensor(uuid: str, clock: Callable[[], float]) -> Counter | Power:
    """The GPU of this UUID, with or without "GPU-". Raises OSError if NVML is missing or does not tell."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        nvml = ctypes.CDLL("nvml.dll")  # Windows

    def call(name: str, *arguments: object) -> None:
        try:
            code = getattr(nvml, name)(*arguments)
        except AttributeError:
            raise OSError(f"NVML has no {name}") from None
        if code:
            raise OSError(f"{name} returned {code}")

    call("nvmlInit_v2")
    device = ctypes.c_void_p()
    full = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    call("nvmlDeviceGetHandleByUUID", full.encode(), ctypes.byref(device))

    def millijoules() -> float:
        value = ctypes.c_ulonglong()
        call("nvmlDeviceGetTotalEnergyConsumption", device, ctypes.byref(value))
        return value.value / 1e3

    def milliwatts() -> float:
        value = ctypes.c_uint()
        call("nvmlDeviceGetPowerUsage", device, ctypes.byref(value))
        return value.value / 1e3

    with contextlib.suppress(OSError):
        return Counter("GPU", millijoules)
    return Power("GPU", milliwatts, clock)
