"""What a stage is made of: the guide's objective and stage, with all that there is."""

import re
from pathlib import Path

import pytest
import torch
from lm_pass import lm_pass

import objectives
from config.schema import ModelConfig
from config.stages import STAGES
from engine.checkpoint import load
from model import GPT

ROOT = Path(__file__).resolve().parents[2]


def test_every_stage_has_an_objective_and_a_configuration():
    for name, stage in STAGES.items():
        assert stage.name == name and (ROOT / "config" / f"config_{name}.json").is_file()
        assert isinstance(objectives.find(stage.objective), objectives.Objective)
        assert set(stage.follows) <= set(STAGES) - {name}


def test_the_guides_stage_trains_resumes_is_charted_and_talks(tiny_project):
    """One objective, one JSON file, one row: no other file is touched."""
    root, guide = tiny_project.root, (ROOT / "doc" / "extending.md").read_text("utf-8")
    [code] = re.findall(r"`objectives/smooth.py`:\n\n```python\n(.*?)```", guide, re.DOTALL)
    [row] = re.findall(r"```python\n(Stage\(.*?\))\n```", guide)
    assert len(code.splitlines()) <= 15
    before = {path: path.read_bytes() for path in root.rglob("*.*") if "__pycache__" not in path.parts}
    (root / "objectives" / "smooth.py").write_text(code, "utf-8")
    (root / "config" / "config_smooth.json").write_bytes((root / "config" / "config_sft.json").read_bytes())
    table, last = (root / "config" / "stages.py").read_text("utf-8"), "    )\n}"
    assert table.count(last) == 1
    (root / "config" / "stages.py").write_text(table.replace(last, f"        {row},\n{last}"), "utf-8")

    def succeed(*args):
        done = tiny_project.run(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "smooth" in succeed("train.py", "--help")
    succeed("train.py", "-t", "pretrain", "--set", "max_steps=2", "--set", "lr_decay_iters=6")
    settings = ("--set", "lr_decay_iters=6", "--set", "dropout=0.1")
    succeed("train.py", "-t", "smooth", *settings)
    succeed("train.py", "-t", "smooth", *settings, "--set", "max_steps=3")
    succeed("train.py", "-t", "smooth", *settings, "--resume")
    one, two = (load(path) for path in sorted((root / "checkpoint").glob("smooth_*_step_6.pt")))
    assert tiny_project.same(one, two) and (one.stage, one.chat_template) == ("smooth", "nano")
    certainty = [float(value) for _, value in tiny_project.logged("Train", "certainty")]
    assert len(certainty) == 12 and all(0 < value < 1 for value in certainty)
    log = sorted(root.glob("train_*.log"))[-1]
    succeed("plot_loss.py", "-n", log, "-o", root / "chart.png")
    assert (root / "chart.png").stat().st_size > 10_000
    succeed("inference.py", "-i", "--prompt", "1 + 1?", "-l", 12)  # the newest that has learned to answer
    about = tiny_project.run("inference.py", "--eval", root / "dataset" / "prepared" / "nothing.jsonl")
    assert about.returncode == 2
    for path, content in before.items():
        assert path.name == "stages.py" or path.read_bytes() == content, path


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_a_sum_over_the_words_that_count(training):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8).resolved(20)).train(training)
    tokens, targets = torch.randint(20, (2, 3, 8))
    mask = (torch.arange(8) % 3 == 0).float().expand(3, 8)
    logits, loss, metrics = lm_pass(model, tokens, targets, mask, divisor=1)
    chances = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert loss.item() == pytest.approx(-(chances * mask).sum().item(), rel=1e-5) and metrics == {}
    batch = {"x": tokens, "y": targets, "mask": mask}
    assert objectives.find("lm").weight(batch) == mask.sum()
    assert objectives.find("lm").weight({key: tensor.numpy() for key, tensor in batch.items()}) == mask.sum()


def test_answers_are_right_where_the_likeliest_tokens_are():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8).resolved(20)).eval()
    tokens = torch.randint(20, (4, 8))
    targets, mask = model(tokens).argmax(-1), torch.ones(4, 8)
    targets[0, 3] += 1  # one wrong token makes the row wrong
    targets[1, 3] += 1
    mask[1, 3] = 0  # unless it does not count
    batch = {"x": tokens, "y": targets % 20, "mask": mask}
    loss, metrics = objectives.find("answers").loss(model, batch)
    assert metrics["accuracy"].item() == 0.75
    assert loss.item() == pytest.approx(lm_pass(model, tokens, targets % 20, mask, divisor=1)[1].item())
    assert objectives.find("answers").loss(model.train(), batch)[1] == {}
