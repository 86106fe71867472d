"""benchmark/speculative.py: what it counts, and what it says of a model that cannot draft."""

import functools
import re

import pytest
from test_benchmarks import benchmark, printed_by

from benchmark import speculative

TEXT = "".join(f"{n} and {n + 1} are {2 * n + 1}. " for n in range(600))


SMALL = {"block_size": 64, "n_layer": 1, "n_embd": 32, "first_k_dense_replace": 0, "n_routed_experts": 8,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}  # fmt: skip


def drafted(text, run):
    """run(*arguments) -> what is printed, of two short texts."""
    text.write_text(TEXT, "utf-8")
    printed = run("--text", text, "--steps", 1, "--prompts", 2, "--length", 8)
    assert "2 texts of 8 tokens" in printed
    one, two = re.findall(r"│ (?:one at a time|drafted) +│ +(\d+) +│ +([\d.]+) +│", printed)
    assert one[1] == "1.00" and int(two[0]) > 0


def test_a_model_that_is_trained_drafts(tmp_path, monkeypatch):
    monkeypatch.setattr(speculative, "SHAPE", speculative.SHAPE | SMALL)
    drafted(tmp_path / "text.txt", functools.partial(printed_by, speculative))


@pytest.mark.slow
def test_a_model_of_the_usual_size_drafts(tmp_path):
    drafted(tmp_path / "text.txt", lambda *arguments: benchmark("speculative.py", *arguments).stdout)


def test_passes_and_drafts_are_counted(monkeypatch):
    monkeypatch.setattr(speculative, "SHAPE", speculative.SHAPE | SMALL)
    model, _ = speculative.train(TEXT, 1)
    seconds, n_drafts, n_accepted = speculative.measure(model, [[1, 2, 3], [4, 5, 6]], 12)
    assert all(value > 0 for value in seconds.values())
    assert 0 <= n_accepted <= n_drafts <= 2 * 10
    # A drafter that always knows what the network will say: it says the same, whatever it has read.
    model.lm_head.weight.requires_grad_(False).zero_()
    _, n_drafts, n_accepted = speculative.measure(model, [[1, 2, 3]], 13)
    assert (n_drafts, n_accepted) == (6, 6)


def test_bad_input_is_named(tmp_path, monkeypatch):
    process = benchmark("speculative.py", "--text", tmp_path / "none.txt")
    assert process.returncode == 2 and "no such file or directory (" in process.stderr
    process = benchmark("speculative.py", "--text", __file__, "--length", 1)
    assert process.returncode == 2 and "--length 2 or more" in process.stderr
