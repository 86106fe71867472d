"""Files of other programs: one format, one file.

What --format calls it, and where it is. Each has a function `why_not`: of a configuration of ours it says why
this format cannot hold such a model, or None.
"""

import importlib
import json
import zipfile
from pathlib import Path

import tokenizer as tokenizers
from common.errors import UserError

FORMATS = {"huggingface": "families", "gguf": "gguf_file", "llama2c": "llama2c"}


def why_not(name, config):
    return importlib.import_module(f"formats.{FORMATS[name]}").why_not(config)


def check(name, config):
    """UserError if a format cannot hold a model of this configuration: the reason, and which one can."""
    if reason := why_not(name, config):
        can = (f"; --format {other} writes this model" for other in FORMATS if not why_not(other, config))
        raise UserError(reason + next(can, ""))


def check_free(path):
    """UserError if something is at `path` already."""
    from common.config import display_path

    if path.exists() or path.is_symlink():
        raise UserError(f"{display_path(path)} is there already; remove it, or name another with --output")


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
        from common.config import display_path
        from engine import checkpoint

        found = checkpoint.load(path).tokenizer
        try:
            tokenizer = tokenizers.from_dict(found)
        except UserError as error:
            raise UserError(f"{display_path(path)}: {error}") from None
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
            found = json.loads(file.read(tokenizers.MAX_JSON_LENGTH + 1))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= {"model", "added_tokens"}
