"""With which command something was made."""

import shlex
import subprocess
import sys

from common import provenance


def test_the_command_can_be_typed_again(monkeypatch, tmp_path):
    typed = [str(provenance.ROOT / "train.py"), "-t", "pretrain", "--set", 'a="x y"', "文 件"]
    monkeypatch.setattr(sys, "argv", typed)
    monkeypatch.chdir(tmp_path)
    assert shlex.split(provenance.command()) == ["python", "train.py", *typed[1:]]
    monkeypatch.setattr(sys, "argv", ["train.py", "-t", "sft"])
    monkeypatch.chdir(provenance.ROOT)
    assert provenance.command() == "python train.py -t sft"


def test_the_commit_is_that_of_the_clone(monkeypatch, tmp_path):
    def git(*args):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    find = provenance.commit.__wrapped__
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert find() is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    assert find() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "file").write_text("22")
    assert find() == git("rev-parse", "--short", "HEAD") + "-dirty"
    lock = tmp_path / ".git" / "index.lock"
    lock.write_text("")  # of another process
    assert find() == git("rev-parse", "--short", "HEAD") + "-dirty" and lock.exists()
