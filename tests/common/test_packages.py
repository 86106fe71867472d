"""common/packages.py: a command names the packages it lacks, and says what to type."""

import sys

import pytest

from common.errors import UserError, run
from common.packages import require, requirements

BLOCK = "import os, sys\nsys.modules.update(dict.fromkeys(os.environ['BLOCKED'].split()))\n"
LOG = "2024-10-01 12:00:00 | Train | Epoch-Step: 0-10 | Loss: 3.214\n"


def test_each_package_has_its_requirement():
    found = requirements()
    assert found["safetensors"] == "safetensors>=0.4.3" and found["deepspeed"] == "deepspeed>=0.17"
    assert found["prometheus_client"] == "prometheus-client>=0.20" and found["tensorboard"]


def test_an_import_that_fails_says_what_to_type(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)

    def main():
        import charset_normalizer  # noqa: F401

    with pytest.raises(SystemExit) as exit:
        run(main)
    told = 'charset_normalizer is not installed: python -m pip install "charset-normalizer>=3.0"'
    assert exit.value.code == 2 and capsys.readouterr().err == f"error: {told}\n"


@pytest.mark.parametrize("name", ["engine.nowhere", "rich.nowhere", "nowhere"])
def test_an_import_that_fails_for_another_reason_is_a_bug(name):
    def main():
        __import__(name)

    with pytest.raises(ModuleNotFoundError):
        run(main)


def test_all_that_is_missing_is_named_at_once(monkeypatch):
    require("fastapi", "uvicorn")
    for module in ("fastapi", "uvicorn"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        require("pydantic", "fastapi", "uvicorn", otherwise=", or do without")
    packages = '"fastapi>=0.115" "uvicorn>=0.30"'
    told = f"fastapi, uvicorn are not installed: python -m pip install {packages}, or do without"
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("pycurl", ["dataset/download.py", "--list"]),
        ("deepspeed", ["train_deepspeed.py", "-t", "pretrain"]),
        ("tokenizers", ["tokenizer.py", "train", "plain.txt", "--kind", "bpe"]),
        ("matplotlib", ["plot_loss.py", "-n", "train_1.log"]),
        ("charset_normalizer", ["data.py", "--pretrain", "russian.txt", "--out", "prepared"]),
    ],
)
def test_a_command_names_what_it_lacks(missing, command, shared_project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK, "utf-8")
    (tmp_path / "plain.txt").write_text("text", "utf-8")
    (tmp_path / "russian.txt").write_text("Все счастливые семьи похожи друг на друга\n" * 9, "koi8-r")
    (tmp_path / "train_1.log").write_text(LOG, "utf-8")
    command = [tmp_path / word if (tmp_path / word).exists() else word for word in command]
    done = shared_project.run(*command, PYTHONPATH=str(tmp_path), BLOCKED=missing)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {missing} is not installed: python -m pip install ")
    assert f' "{requirements()[missing]}"' in done.stderr


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("numpy", ["data.py", "--help"]),
        ("numpy", ["tokenizer.py", "--help"]),
        ("pydantic", ["train.py", "-t", "pretrain"]),
        ("pydantic", ["problem.py", "sort"]),
    ],
)
def test_where_nothing_is_set_up_it_is_said_how_to(missing, command, project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK, "utf-8")
    environment = dict(PYTHONPATH=str(tmp_path), BLOCKED=missing)
    done = project.run(*command, **environment)
    told = f"error: {missing} is not installed: python -m pip install -r requirements.txt "
    assert done.returncode == 2 and done.stderr.startswith(told), done.stderr
    (project.root / ".venv").mkdir()  # it is set up, but another Python was started
    done = project.run(*command, **environment)
    assert done.returncode == 2 and done.stderr.endswith("are in .venv: use .venv/bin/python\n"), done.stderr
