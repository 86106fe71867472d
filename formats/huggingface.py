"""A folder in the layout of Hugging Face Transformers, which most other programs can read.

It holds the weights (safetensors), the shape of the network, the tokenizer and the chat template.
`AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` load a model that
continues tokenizer(text), and answers tokenizer.apply_chat_template(messages), just as Nano does. Writing and
reading a folder does not need Transformers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.files import atomic_folder, write_text
from common.patterns import why_unsafe
from config.stages import STAGES
from formats import check_supported, families, load_tokenizer_and_rows, refuse_to_overwrite
from formats.families import (
    find_family,
    from_hf_config,
    from_hf_weights,
    to_hf_config,
    to_hf_weights,
    unknown_keys,
)

if TYPE_CHECKING:
    import tokenizers
    from torch import Tensor

    from engine.checkpoint import Checkpoint
    from tokenizer import Tokenizer

SUFFIX = ""
NUMBER_TYPES = ()  # numbers stay as they are in the checkpoint
unsupported_reason = families.unsupported_reason

# ---- the tokenizer ---------------------------------------------------------------------------------

MAX_CHARACTERS = 1 << 26  # of a tokenizer.json; those of released models have 10 to 40 million

# The same text as SFT trains on: see tokenizer.render_chats.
CHAT_TEMPLATE = """\
{%- set mark = {
    "system": "<|system_mark|>", "user": "<|instruct_mark|>", "assistant": "<|response_mark|>"
} -%}
{%- for message in messages -%}
{{- mark[message["role"]] + message["content"] + ("<|eos|>" if message["role"] == "assistant" else "") -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- mark["assistant"] -}}{%- endif -%}
"""


def to_hf_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Convert a tokenizer to one of the `tokenizers` library; its to_str() is a tokenizer.json.

    Both kinds become BPE, characters without any merges. A text begins with <|bos|>, like the prompt of a
    completion.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    from tokenizer import N_SPECIAL, SPECIAL_TOKENS, BPETokenizer, byte_alphabet

    if isinstance(tokenizer, BPETokenizer):
        letters = byte_alphabet()
        words = ["".join(letters[byte] for byte in word) for word in tokenizer.token_bytes[N_SPECIAL:]]
    else:
        words = [word.decode() for word in tokenizer.token_bytes[N_SPECIAL:]]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    if len(vocabulary) < tokenizer.vocab_size:
        raise UserError("one of the tokenizer's learned tokens is spelled like one of its special tokens")
    if isinstance(tokenizer, BPETokenizer):
        converted = tokenizer.build_library(vocabulary, unk_token="<|unknown|>")
        converted.decoder = decoders.ByteLevel()
    else:
        converted = Tokenizer(models.BPE(vocabulary, [], unk_token="<|unknown|>"))
        converted.decoder = decoders.Fuse()
    converted.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    converted.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.bos_id)]
    )
    return converted


def from_hf_tokenizer(path: Path, hf_config: dict[str, Any]) -> tuple[Tokenizer, list[int | None]]:
    """Read a tokenizer.json; see `formats.load_tokenizer_and_rows`.

    Raises UserError if it is damaged, or does not split text in a way that a tokenizer of Nano can.
    """
    from tokenizers import Tokenizer

    from common.config import display_path
    from tokenizer import N_SPECIAL, SPECIAL_TOKENS, from_dict

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise ValueError("it is too large")
        patterns = list(patterns_in(json.loads(text)))  # checked before the library compiles them
        if reason := patterns and why_unsafe(patterns):
            raise ValueError(f"one of its patterns {reason}")
        original = Tokenizer.from_str(text)
        # The library does not expose merges and patterns other than as JSON.
        content = json.loads(original.to_str())
    except MemoryError:
        raise
    except BaseException as error:  # the library raises plain Exceptions, or a PanicException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = str(error).partition("\n")[0][:300]
        raise UserError(f"{display_path(path)} could not be read ({why})") from None
    tokenizer, ids, converted_ids = to_nano_tokenizer(content), original.get_vocab(), {}
    if tokenizer:
        try:
            tokenizer = from_dict(tokenizer.to_dict())
        except UserError as error:
            raise UserError(f"{display_path(path)}: {error}") from None
        converted_ids = to_hf_tokenizer(tokenizer).get_vocab()
    words = sorted(converted_ids, key=converted_ids.__getitem__)[N_SPECIAL:]
    if not tokenizer or not words or not ids.keys() >= set(words):
        raise UserError(f"{display_path(path)} splits text in a way that Nano does not support")
    eos = hf_config.get("eos_token_id")
    special_ids = {
        "<|padding|>": hf_config.get("pad_token_id"),
        "<|unknown|>": ids.get(content["model"]["unk_token"]),
        "<|bos|>": hf_config.get("bos_token_id"),
        "<|eos|>": eos[0] if isinstance(eos, list) and eos else eos,
    }
    rows = [ids.get(token, special_ids.get(token)) for token in SPECIAL_TOKENS]
    special_rows = [row if type(row) is int and row >= 0 else None for row in rows]
    return tokenizer, special_rows + [ids[word] for word in words]


def patterns_in(value: Any) -> Iterator[str]:
    """Yield all regular expressions in the content of a tokenizer.json."""
    if isinstance(value, dict):
        yield from [value["Regex"]] if "Regex" in value else []
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from patterns_in(item)


# GPT-2's pattern of words (Radford et al. 2019), which is built into the library.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def to_nano_tokenizer(content: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of Nano that is equivalent to the content of a tokenizer.json, or None.

    There is one if each character is a token, or for byte-level BPE (Llama 3, Qwen, DeepSeek, ...).
    """
    from tokenizer import BPETokenizer, CharTokenizer, byte_alphabet

    model, decoder = content["model"], (content["decoder"] or {}).get("type")
    normalizer = flatten(content["normalizer"], "normalizers")
    *splits, last = flatten(content["pre_tokenizer"], "pretokenizers") or [{"type": None}]
    options = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    if model.get("type") != "BPE" or any(model.get(key) for key in options):
        return None
    special = {token["content"] for token in content["added_tokens"]}
    if (last["type"], decoder, normalizer, model["merges"]) == (None, "Fuse", [], []):
        characters = sorted(model["vocab"].keys() - special)
        return CharTokenizer("".join(characters)) if all(len(c) == 1 for c in characters) else None
    patterns = [split_pattern(split) for split in splits]
    if (last["type"], decoder) != ("ByteLevel", "ByteLevel") or last["add_prefix_space"] or None in patterns:
        return None
    if normalizer not in ([], [{"type": "NFC"}]):
        return None
    if patterns and last["use_regex"]:
        patterns.append(GPT2_WORDS)
    elif not patterns and not last["use_regex"]:
        patterns = [r"[\s\S]+"]  # the whole text is one word
    words = []
    if model["ignore_merges"]:
        merged = {*byte_alphabet(), *(left + right for left, right in model["merges"])}
        words = sorted(model["vocab"].keys() - merged - special, key=model["vocab"].get)
    with contextlib.suppress(KeyError):  # raised for letters that do not stand for bytes
        return BPETokenizer(
            model["merges"], patterns=patterns, normalizer=normalizer and "NFC", words=words,
            ignore_merges=model["ignore_merges"],
        )  # fmt: skip
    return None


def flatten(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a nested sequence. key: "normalizers" or
    "pretokenizers"."""
    if part is None:
        return []
    return [step for one in part[key] for step in flatten(one, key)] if part["type"] == "Sequence" else [part]


def split_pattern(step: dict[str, Any]) -> str | None:
    """The regular expression whose matches a step of a pre-tokenizer turns into words, or None."""
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    return None


def reorder_rows(matrix: Tensor, rows: list[int | None]) -> Tensor:
    """Select rows of a matrix [V, C]: one per token of Nano; where it is None, the mean of all rows."""
    import torch

    mean = matrix.float().mean(0).to(matrix.dtype)
    return torch.stack([mean if row is None else matrix[row] for row in rows])


# ---- folders ---------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, name: str, path: Path, number_type: str | None = None) -> None:
    """Write the checkpoint's model into a new folder; see `formats.Format`."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from common.config import display_path
    from engine.checkpoint import build
    from tokenizer import SPECIAL_TOKENS

    model, tokenizer = build(checkpoint, name)
    check_supported("huggingface", model.config)
    family = find_family(model.config)
    assert family  # as the model is supported
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.padding_id}
    # As in inference.py, every special token but <|unknown|> ends an answer.
    stop_ids = [i for i in range(len(SPECIAL_TOKENS)) if i != tokenizer.unknown_id]
    dtype = str(checkpoint.model["wte.weight"].dtype).removeprefix("torch.")
    config = to_hf_config(family, model.config) | ids | {"eos_token_id": tokenizer.eos_id, "dtype": dtype}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|padding|>",
        "unk_token": "<|unknown|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "additional_special_tokens": ["<|instruct_mark|>", "<|response_mark|>", "<|system_mark|>"],
        "model_max_length": model.config.block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    texts = {
        "config.json": as_json(config),
        "generation_config.json": as_json(ids | {"eos_token_id": stop_ids}),
        "tokenizer.json": to_hf_tokenizer(tokenizer).to_str(pretty=True),
        "tokenizer_config.json": as_json(tokenizer_config),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    weights = to_hf_weights(family, model.config, checkpoint.model)
    refuse_to_overwrite(path)
    with atomic_folder(path) as folder:
        for file, text in texts.items():
            write_text(folder / file, text)
        try:
            # The library refuses views of a larger tensor, so copy them.
            dense = torch.contiguous_format
            weights = {key: tensor.clone(memory_format=dense) for key, tensor in weights.items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt", "stage": checkpoint.stage})
        except SafetensorError as error:
            raise UserError(f"{display_path(path)} could not be written ({error})") from None
        # The library makes its file readable for the owner only.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
    print(f"{display_path(path)}: {family.class_name}, {model.n_params / 1e6:.2f} M parameters")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def open_weights(folder: Path) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Open the .safetensors files of a folder, one or several.

    Returns ({name: function that reads the tensor}, metadata).
    """
    from safetensors import SafetensorError, safe_open

    from common.config import display_path, read_json

    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        # Only plain file names: a path could lead out of the folder.
        if not isinstance(weight_map, dict) or not all(Path(str(p)).name == p for p in weight_map.values()):
            raise UserError(f"{display_path(index)}: its weight_map contains something other than file names")
        files = sorted(set(weight_map.values()))
    else:
        files = ["model.safetensors"]
    readers: dict[str, Callable[[], Tensor]] = {}
    metadata: dict[str, str] = {}
    for path in (folder / file for file in files):
        if not path.is_file():
            raise UserError(f"there is no {display_path(path)}; only weights in .safetensors are read")
        try:
            file = safe_open(path, "pt")
        except SafetensorError as error:
            raise UserError(f"{display_path(path)} is damaged, or not a safetensors file ({error})") from None
        readers |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}
        metadata |= file.metadata() or {}
    return readers, metadata


def read_folder(folder: Path, stage: str | None, tokenizer_path: Path | None) -> None:
    """Write a checkpoint with a folder's model. `task` and `tokenizer_path` override what the folder says."""
    from common.config import display_path, read_json
    from tokenizer import SPECIAL_TOKENS

    source = folder / "config.json"
    hf_config = read_json(source)
    family, config = from_hf_config(hf_config, display_path(source))
    if keys := unknown_keys(family, hf_config):
        print(f"{display_path(source)}: Nano does not know {', '.join(keys)}, and ignores that.")
    if tokenizer_path is not None:
        tokenizer, rows = load_tokenizer_and_rows(tokenizer_path, hf_config)
    else:
        try:
            tokenizer, rows = from_hf_tokenizer(folder / "tokenizer.json", hf_config)
        except UserError as error:
            advice = "if the model was trained with another tokenizer, name that with --tokenizer"
            raise UserError(f"{error}; {advice}") from None
    if (n_tokens := 1 + max(row for row in rows if row is not None)) > config.vocab_size:
        raise UserError(f"the tokenizer has {n_tokens:,} tokens, but the model only {config.vocab_size:,}")
    from engine.checkpoint import Checkpoint
    from engine.runs import Run

    readers, metadata = open_weights(folder)
    if getattr(config, "num_nextn_predict_layers", 0):
        if not any(name.startswith(f"model.layers.{config.n_layer}.") for name in readers):
            # Transformers does not save this module, but keeps the key.
            config = config.model_copy(update={"num_nextn_predict_layers": 0})
    try:
        state = from_hf_weights(family, config, readers)
    except UserError as error:
        raise UserError(f"{display_path(folder)}: {error}") from None
    if rows != list(range(len(rows))):
        config = config.model_copy(update={"vocab_size": len(rows)})
        state["wte.weight"] = reorder_rows(state["wte.weight"], rows)
        tied = config.tie_embeddings
        state["lm_head.weight"] = state["wte.weight"] if tied else reorder_rows(state["lm_head.weight"], rows)
        new = [token for token, row in zip(SPECIAL_TOKENS, rows, strict=False) if row is None]
        print(f"Tokens were renumbered to Nano's ids; new to the model: {', '.join(new) or 'none'}.")
    if stage is None:
        stage = metadata.get("stage", metadata.get("task"))  # "task": written by earlier versions
        stage = stage if stage in STAGES else next(iter(STAGES))
    template = STAGES[stage].chat_template
    with Run() as run:
        checkpoint = Checkpoint(
            stage,
            run.name,
            0,
            config.model_dump(),
            {},
            tokenizer.to_dict(),
            state,
            {},
            chat_template=template,
        )
        path = display_path(checkpoint.save())
    print(f"{path}: {config.architecture}, from a {family.class_name}")
    print(f"Talk to it: python inference.py {'-i ' if template else ''}-m {path}")
