"""All works on a device whose tensors are not the CPU's: nothing is left there, and nothing made there."""

import json
import shutil
from pathlib import Path

import pytest
from launching import largest_difference, losses, settings_of
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)
PRETENDED = Path(__file__).parent / "pretended_gpu.py"
RUN = dict(dtype="float32", device="auto", dropout=0.1, gradient_accumulation_steps=2, eval_interval=3)


def on_it(project, script, *args, **settings):
    shutil.copy(PRETENDED, project.root)
    done = project.run(PRETENDED.name, project.root / script, *args, *settings_of(settings))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_left_on_the_host_is_found(tiny_project):
    source = tiny_project.root / "model.py"
    text, buffer = source.read_text("utf-8"), 'self.register_buffer("rotary_cos", cos, persistent=False)'
    assert buffer in text
    source.write_text(text.replace(buffer, "self.rotary_cos = cos"), "utf-8")
    with pytest.raises(AssertionError, match="found tensors on two devices, gpu and cpu"):
        on_it(tiny_project, "train.py", "-t", "pretrain", **RUN)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "muon"},
        pytest.param({"architecture": "nanochat"}, marks=pytest.mark.slow),
        pytest.param({"architecture": "deepseek_v3", "optimizer": "muon"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(settings.values()),
)
def test_training_is_all_on_the_device(tiny_project, train, settings):
    settings = RUN | settings
    assert train("pretrain", **settings).returncode == 0
    on_it(tiny_project, "train.py", "-t", "pretrain", **settings)
    for kind in ("Train", "Val"):
        assert largest_difference(losses(train, kind), losses(tiny_project, kind)) < 1e-4
    [log] = tiny_project.root.glob("train_*.log")
    assert json.loads(log.read_text("utf-8").partition("\n")[0][2:])["machine"]["device"] == "gpu"


@pytest.mark.slow
def test_a_resumed_run_fine_tuning_and_talking_are_all_on_the_device(tiny_project):
    on_it(tiny_project, "train.py", "-t", "pretrain", **RUN)
    again = on_it(tiny_project, "train.py", "-t", "pretrain", "--resume", max_steps=8, **RUN)
    assert "2 steps in this session" in again
    on_it(tiny_project, "train.py", "-t", "sft", **RUN)
    assert "speed, measured" in on_it(tiny_project, "train.py", "-t", "pretrain", "--plan", **RUN)
    ask = ("inference.py", "-i", "--prompt", "1 + 1?", "-l", 24, "-s", 1)
    assert on_it(tiny_project, *ask, "-k", 9, "-p", 0.9) and on_it(tiny_project, *ask, "-q", "int8")
    assert "accuracy" in on_it(tiny_project, "problem.py", "sort", "--steps", 3)
