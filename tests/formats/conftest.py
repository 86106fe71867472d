"""The command line of export.py, in a folder of its own."""

import sys
from types import SimpleNamespace

import pytest

import engine.checkpoint
import export
from engine.errors import run


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command("--read", folder): export.py's command line, in a folder that holds only what a test makes."""
    monkeypatch.setattr(engine.checkpoint, "FOLDER", tmp_path / "检查 point")
    monkeypatch.chdir(tmp_path)

    def command(*args, main=export.main):
        returncode = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["export.py", *map(str, args)])
            try:
                run(main)
            except SystemExit as exit:
                returncode = exit.code
        output = capsys.readouterr()
        return SimpleNamespace(returncode=returncode, stdout=output.out, stderr=output.err)

    return command
