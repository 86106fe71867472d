"""Files of other programs: one format, one file."""

import contextlib
import json
import os
import tempfile
import zipfile
from pathlib import Path

import tokenizer as tokenizers
from engine.errors import UserError


def check_free(path):
    """UserError if something is at `path` already."""
    from engine.config import shown

    if path.exists() or path.is_symlink():
        raise UserError(f"{shown(path)} is there already; remove it, or name another with --output")


@contextlib.contextmanager
def whole(path):
    """Yields where to write a file or a folder that is to be at `path`: it is there whole or not at all.

    UserError if something is there already. Nothing is left of what an exception has interrupted.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=path.name, dir=path.parent) as beside:
        beside = Path(beside) / path.name
        yield beside
        for file in [beside] if beside.is_file() else beside.iterdir():
            with open(file, "rb+") as file:
                os.fsync(file.fileno())
        os.rename(beside, path)


def load_tokenizer(path):
    """The tokenizer of Nano's JSON, of a checkpoint, or of a folder of Transformers' or its tokenizer.json.

    UserError, naming the file, if it is missing or damaged, or holds no tokenizer that Nano knows.
    """
    return tokenizer_and_rows(path, {})[0]


def tokenizer_and_rows(path, config):
    """(tokenizer, rows): rows[i] is the number that its token i has in a model made with it, or None.

    config: the content of the model's config.json, which names the special tokens.
    """
    path = Path(path)
    if path.is_dir():
        path /= "tokenizer.json"
    if path.suffix == ".pt" or zipfile.is_zipfile(path):
        from engine import checkpoint
        from engine.config import shown

        found = checkpoint.load(path).tokenizer
        try:
            tokenizer = tokenizers.from_dict(found)
        except UserError as error:
            raise UserError(f"{shown(path)}: {error}") from None
    elif _is_of_library(path):
        from formats.huggingface import from_library

        return from_library(path, config)
    else:
        tokenizer = tokenizers.load(path)
    return tokenizer, list(range(tokenizer.vocab_size))


def _is_of_library(path):
    """Whether this is JSON of the `tokenizers` library, on which Transformers builds."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= {"model", "added_tokens"}
