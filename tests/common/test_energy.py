"""Joules from made-up sensors: what is counted, what wraps around, and what is absent."""

import os
import time

import pytest

from common import energy
from common.energy import EnergyMeter


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():  # never half written, like the kernel's
        (folder / f"{name}.new").write_text(f"{value}\n")
        os.replace(folder / f"{name}.new", folder / name)
    return folder


def zone(sys, number, name, microjoules, size=262_143_328_850):
    files = dict(name=name, energy_uj=microjoules, max_energy_range_uj=size)
    return put(sys / "class" / "powercap" / f"intel-rapl:{number}", **files)


def rail(device, channel, label, millivolts, milliamperes):
    files = {f"in{channel}_label": label, f"in{channel}_input": millivolts}
    return put(device, name="ina3221", **files, **{f"curr{channel}_input": milliamperes})


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(energy, "INTERVAL", 3600)  # only the tests read
    return Clock()


def test_packages_and_their_memory_are_added_up(tmp_path):
    first = zone(tmp_path, "0", "package-0", 5_000_000)
    zone(tmp_path, "0:0", "core", 0)
    memory = zone(tmp_path, "0:1", "dram", 1_000_000)
    second = zone(tmp_path, "1", "package-1", 0)
    whole = zone(tmp_path, "2", "psys", 0)
    meter = EnergyMeter(sys=tmp_path)
    assert meter.sources == ["package-0", "dram-0", "package-1"] and meter.joules() == 0
    for folder, microjoules in ((first, 7_500_000), (memory, 1_250_000), (second, 4_000_000), (whole, 1e9)):
        put(folder, energy_uj=int(microjoules))
    assert meter.joules() == pytest.approx(2.5 + 0.25 + 4)
    assert meter.joules() == pytest.approx(6.75)  # no more has been used


def test_a_counter_that_wraps_around(tmp_path):
    package = zone(tmp_path, "0", "package-0", 999_000_000, size=1_000_000_000)
    meter = EnergyMeter(sys=tmp_path)
    put(package, energy_uj=2_000_000)
    assert meter.joules() == pytest.approx(1 + 2)
    put(package, energy_uj=1_000_000)
    assert meter.joules() == pytest.approx(3 + 999)


def test_a_machine_that_does_not_tell(tmp_path, capfd):
    assert EnergyMeter(sys=tmp_path).joules() is None
    assert EnergyMeter(sys=tmp_path).sources == []
    zone(tmp_path, "0", "package-0", "no number")
    assert EnergyMeter(sys=tmp_path).joules() is None
    assert capfd.readouterr() == ("", "")


def test_without_permission_it_is_absent(tmp_path, monkeypatch, capfd):
    package = zone(tmp_path, "0", "package-0", 5)
    read_text = type(package).read_text

    def refuse(path, *args):
        if path.name == "energy_uj":  # root may read every file, so chmod would not do
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args)

    monkeypatch.setattr(type(package), "read_text", refuse)
    meter = EnergyMeter(sys=tmp_path)
    assert meter.joules() is None and meter.sources == [] and capfd.readouterr() == ("", "")


def test_a_sensor_that_fails_later_makes_the_sum_unknown(tmp_path):
    zone(tmp_path, "0", "package-0", 0)
    second = zone(tmp_path, "1", "package-1", 0)
    meter = EnergyMeter(sys=tmp_path)
    os.unlink(second / "energy_uj")
    assert meter.joules() is None
    put(second, energy_uj=5)
    assert meter.joules() is None  # what it used in between is not known


@pytest.mark.parametrize(
    ("rails", "counted"),
    [
        ({"VDD_IN": 8.0, "VDD_CPU_GPU_CV": 3.0, "VDD_SOC": 1.0}, ["VDD_IN"]),
        ({"VDD_GPU_SOC": 5.0, "VDD_CPU_CV": 2.0, "VIN_SYS_5V0": 4.0, "VDDQ_VDD2_1V8AO": 1.0},
         ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]),
        ({"SOMETHING_NEW": 5.0}, []),
    ],
)  # fmt: skip
def test_a_jetson_in_hwmon(tmp_path, clock, rails, counted):
    put(tmp_path / "class" / "hwmon" / "hwmon0", name="thermal", in1_label="VDD_IN", in1_input=1)
    zone(tmp_path, "0", "dram", 5) if counted else None
    places = {}
    for i, (label, watts) in enumerate(rails.items()):
        device = tmp_path / "class" / "hwmon" / f"hwmon{1 + i // 3}"
        places[label] = rail(device, 1 + i % 3, label, 5000, int(200 * watts)), 1 + i % 3
    meter = EnergyMeter(sys=tmp_path, clock=clock)
    assert meter.sources == counted
    if not counted:
        assert meter.joules() is None
        return
    clock.now += 10
    expected = 10 * sum(rails[label] for label in counted)
    assert meter.joules() == pytest.approx(expected)
    device, channel = places[counted[0]]  # from now on, twice the power: the trapezoid is its mean
    put(device, **{f"curr{channel}_input": int(400 * rails[counted[0]])})
    clock.now += 2
    expected += 2 * (sum(rails[label] for label in counted) + rails[counted[0]] / 2)
    assert meter.joules() == pytest.approx(expected)


def test_an_older_jetson_in_iio(tmp_path, clock):
    device = tmp_path / "bus" / "i2c" / "drivers" / "ina3221x" / "6-0040" / "iio:device0"
    put(device, rail_name_0="POM_5V_IN", in_power0_input=4000, rail_name_1="POM_5V_GPU", in_power1_input=900)
    meter = EnergyMeter(sys=tmp_path, clock=clock)
    clock.now += 3
    assert meter.sources == ["POM_5V_IN"] and meter.joules() == pytest.approx(12)


def test_power_is_read_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "INTERVAL", 0.01)
    device = rail(tmp_path / "class" / "hwmon" / "hwmon1", 1, "VDD_IN", 5000, 0)
    meter = EnergyMeter(sys=tmp_path)
    put(device, curr1_input=2000)  # ten watts, but not when the meter is asked
    time.sleep(0.2)
    put(device, curr1_input=0)
    assert 1 < meter.joules() < 20
    meter.is_unknown = True  # ends the thread


class Nvml:
    """What the library of nvidia-smi does, for one GPU."""

    def __init__(self, millijoules):
        self.millijoules, self.milliwatts = millijoules, 250_000

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        return 0 if uuid == b"GPU-1234" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, device, value):
        value._obj.value = self.millijoules or 0
        return 3 if self.millijoules is None else 0  # not supported before Volta

    def nvmlDeviceGetPowerUsage(self, device, value):
        value._obj.value = self.milliwatts
        return 0


def test_a_gpu_with_a_counter(tmp_path, monkeypatch):
    nvml = Nvml(7_000_000)
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: nvml)
    package = zone(tmp_path, "0", "package-0", 0)
    meter = EnergyMeter(gpu="1234", sys=tmp_path)
    nvml.millijoules += 12_500
    put(package, energy_uj=1_000_000)
    assert meter.sources == ["package-0", "GPU"] and meter.joules() == pytest.approx(13.5)
    # Another process of the same machine counts its own GPU only; without one, nothing.
    assert EnergyMeter(cpu=False, gpu="1234", sys=tmp_path).sources == ["GPU"]
    assert EnergyMeter(cpu=False, sys=tmp_path).joules() == 0
    # Energy without that of the GPU would be misleading.
    unknown = EnergyMeter(gpu="5678", sys=tmp_path)
    assert unknown.sources == [] and unknown.joules() is None


def test_an_older_gpu_tells_its_power(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: Nvml(None))
    meter = EnergyMeter(gpu="GPU-1234", sys=tmp_path, clock=clock)
    clock.now += 4
    assert meter.sources == ["GPU"] and meter.joules() == pytest.approx(1000)


def test_no_library_for_gpus(tmp_path, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(energy.ctypes, "CDLL", missing)
    zone(tmp_path, "0", "package-0", 0)
    assert EnergyMeter(gpu="1234", sys=tmp_path).joules() is None


def test_a_run_logs_it_and_is_read_back(train, tmp_path, monkeypatch):
    from common.log_reader import parse_line

    zone(tmp_path, "0", "package-0", 0)
    monkeypatch.setattr(energy, "SYS", tmp_path)
    assert train("pretrain", max_steps=3).returncode == 0
    assert train.logged("Train", "Energy") == [(step, "0.000 kJ") for step in (1, 2, 3)]
    [log] = train.root.glob("train_*.log")
    header, line, *_ = log.read_text("utf-8").splitlines()
    assert parse_line(header)["energy_of"] == ["package-0"]
    assert parse_line(line.replace("0.000 kJ", "1.234 kJ"))["energy_joules"] == 1234
    monkeypatch.setattr(energy, "SYS", tmp_path / "nothing")
    assert train("pretrain", max_steps=3).returncode == 0
    newest = max(train.root.glob("train_*.log"))
    assert "Energy" not in newest.read_text("utf-8") and "energy_of" not in newest.read_text("utf-8")
