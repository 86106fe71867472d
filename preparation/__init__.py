"""From text files to token files: what happens once, before training, when you run `python data.py`.

    split.py         which documents are held out for validation
    corpus.py        the two passes over the input: find the vocabulary and the mistakes, then write ids
    token_file.py    the format of a token file: writing it, and opening it with all checks
    display.py       the progress bar and the summary in the terminal
    data_command.py         `python data.py`
    tokenizer_commands.py   `python tokenizer.py train|stats`

It depends on sources/ and tokenizer.py; data.py reads what it has written.
"""

from __future__ import annotations

from pathlib import Path

from config.stages import STAGES, Stage

DATASET = Path(__file__).resolve().parent.parent / "dataset"


def stages_with_files() -> list[Stage]:
    """The stages of training that learn from token files."""
    return [stage for stage in STAGES.values() if stage.documents in ("text", "chats")]


def default_names(stage: Stage) -> list[str]:
    """What the input of a stage may be called in dataset/."""
    suffixes = (".jsonl",) if stage.documents == "chats" else (".txt", ".jsonl")
    return [stage.name + suffix for suffix in suffixes]


def default_inputs(stage: Stage) -> list[Path]:
    """Those of the default inputs that exist."""
    return [path for name in default_names(stage) if (path := DATASET / name).exists()]
