"""Model files of other programs, one format per file.

`python export.py --format NAME` uses formats/NAME.py, which provides what the class `Format` below lists.
families.py is not a format: it says which class of Transformers computes the same as which model of Nano, and
all formats build on it.
"""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from common.errors import UserError

if TYPE_CHECKING:
    from config.schema import ArchitectureConfig
    from engine.checkpoint import Checkpoint
    from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent


class Format(Protocol):
    """What each format's module provides. It must not import torch at module level."""

    SUFFIX: str  # appended to the checkpoint's name to make the default output path
    NUMBER_TYPES: tuple[str, ...]  # choices of --type, the default first; empty: as in the checkpoint

    def unsupported_reason(self, config: ArchitectureConfig) -> str | None:
        """Why this format cannot hold a model with this configuration, as a sentence, or None if it can."""

    def write(self, checkpoint: Checkpoint, name: str, path: Path, number_type: str | None) -> None:
        """Write the checkpoint's model to `path`. `name` is the checkpoint's name in error messages."""


def names() -> list[str]:
    """The names of all formats, the default one first."""
    found = {path.stem for path in FOLDER.glob("[!_]*.py")} - {"families", "huggingface"}
    return ["huggingface", *sorted(found)]


def get(name: str) -> Format:
    """The module of a format."""
    return cast(Format, importlib.import_module(f"formats.{name}"))


def check_supported(name: str, config: ArchitectureConfig) -> None:
    """Raise UserError if a format cannot hold such a model: the reason, and a format that can."""
    if reason := get(name).unsupported_reason(config):
        able = (f"; --format {other} writes this model" for other in names()
                if not get(other).unsupported_reason(config))  # fmt: skip
        raise UserError(reason + next(able, ""))


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError if `path` exists."""
    from common.config import display_path

    if path.exists() or path.is_symlink():
        raise UserError(
            f"{display_path(path)} already exists; remove it, or choose another name with --output"
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a Nano tokenizer.json, a checkpoint, or a Transformers folder or its tokenizer.json.

    Raises UserError, naming the file, if it is missing or damaged, or of a kind that Nano does not support.
    """
    return load_tokenizer_and_rows(path, {})[0]


def load_tokenizer_and_rows(
    path: str | Path, hf_config: dict[str, Any]
) -> tuple[Tokenizer, list[int | None]]:
    """Like `load_tokenizer`, but also says which embedding rows of a foreign model the tokens have.

    hf_config: the content of the model's config.json, which names the ids of its special tokens.
    Returns (tokenizer, rows): token i of the tokenizer has row rows[i] in the model, or None.
    """
    import tokenizer as tokenizers

    path = Path(path)
    if path.is_dir():
        path /= "tokenizer.json"
    if path.suffix == ".pt" or zipfile.is_zipfile(path):
        from common.config import display_path
        from engine import checkpoint

        content = checkpoint.load(path).tokenizer
        try:
            tokenizer = tokenizers.from_dict(content)
        except UserError as error:
            raise UserError(f"{display_path(path)}: {error}") from None
    elif _is_hf_tokenizer(path, tokenizers.MAX_JSON_LENGTH):
        from formats.huggingface import from_hf_tokenizer

        return from_hf_tokenizer(path, hf_config)
    else:
        tokenizer = tokenizers.load(path)
    return tokenizer, list(range(tokenizer.vocab_size))


def _is_hf_tokenizer(path: Path, max_characters: int) -> bool:
    """Whether the file is a tokenizer.json of the `tokenizers` library, which Transformers uses."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.loads(file.read(max_characters + 1))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"model", "added_tokens"}
