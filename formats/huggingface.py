"""A folder in the layout of Hugging Face, which most other programs read.

It holds the weights (safetensors), the shape of the network, the tokenizer and the chat template. On
Transformers' side `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)`
give a model that continues tokenizer(text), and answers tokenizer.apply_chat_template(messages), as ours
does. Transformers itself is not needed here.
"""

import contextlib
import functools
import json
import shutil
from pathlib import Path

from common.errors import UserError
from common.files import atomic_folder, write_text
from common.patterns import why_unsafe
from formats import check, check_free, tokenizer_and_rows
from formats.families import family_of, from_config, from_weights, to_config, to_weights, unread

# ---- the tokenizer ---------------------------------------------------------------------------------

LARGEST = 1 << 26  # characters of a tokenizer.json; those of released models have 10 to 40 million

# What SFT trains on: see tokenizer.render_chats.
CHAT_TEMPLATE = """\
{%- set mark = {
    "system": "<|system_mark|>", "user": "<|instruct_mark|>", "assistant": "<|response_mark|>"
} -%}
{%- for message in messages -%}
{{- mark[message["role"]] + message["content"] + ("<|eos|>" if message["role"] == "assistant" else "") -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- mark["assistant"] -}}{%- endif -%}
"""


def to_library(tokenizer):
    """A tokenizer of ours as the `tokenizers` library's: its to_str() is a tokenizer.json.

    Both kinds are BPE there: characters are never merged. A text begins with <|bos|>, as completions do.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    from tokenizer import N_SPECIAL, SPECIAL_TOKENS, byte_alphabet

    words = tokenizer.token_bytes[N_SPECIAL:]
    if tokenizer.kind == "char":
        words = [word.decode() for word in words]
    else:
        letters = byte_alphabet()
        words = ["".join(letters[byte] for byte in word) for word in words]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    if len(vocabulary) < tokenizer.vocab_size:
        raise UserError("the tokenizer has learned a word that is spelled like one of its special tokens")
    if tokenizer.kind == "char":
        library = Tokenizer(models.BPE(vocabulary, [], unk_token="<|unknown|>"))
        library.decoder = decoders.Fuse()
    else:
        library = tokenizer.build_library(vocabulary, unk_token="<|unknown|>")
        library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    library.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.bos_id)]
    )
    return library


def from_library(path, config):
    """`formats.tokenizer_and_rows` of a tokenizer.json. UserError if it is of no kind of ours."""
    from tokenizers import Tokenizer

    from common.config import display_path
    from tokenizer import N_SPECIAL, SPECIAL_TOKENS, from_dict

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError("it is too large")
        patterns = list(patterns_in(json.loads(text)))  # before the library makes something of them
        if reason := patterns and why_unsafe(patterns):
            raise ValueError(f"one of its patterns {reason}")
        library = Tokenizer.from_str(text)
        found = json.loads(library.to_str())
    except MemoryError:
        raise
    except BaseException as error:  # the library knows no kind of its own, but one that is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = str(error).partition("\n")[0][:300]
        raise UserError(f"{display_path(path)} could not be read ({why})") from None
    tokenizer, numbers, ours = of_our_kind(found), library.get_vocab(), {}
    if tokenizer:
        try:
            tokenizer = from_dict(tokenizer.to_dict())
        except UserError as error:
            raise UserError(f"{display_path(path)}: {error}") from None
        ours = to_library(tokenizer).get_vocab()
    words = sorted(ours, key=ours.get)[N_SPECIAL:]
    if not words or not numbers.keys() >= set(words):
        raise UserError(f"{display_path(path)} cuts text in a way that Nano does not know")
    eos = config.get("eos_token_id")
    roles = {
        "<|padding|>": config.get("pad_token_id"),
        "<|unknown|>": numbers.get(found["model"]["unk_token"]),
        "<|bos|>": config.get("bos_token_id"),
        "<|eos|>": eos[0] if isinstance(eos, list) and eos else eos,
    }
    rows = [numbers.get(token, roles.get(token)) for token in SPECIAL_TOKENS]
    rows = [row if type(row) is int and row >= 0 else None for row in rows]
    return tokenizer, rows + [numbers[word] for word in words]


def patterns_in(value):
    """All regular expressions in the content of a tokenizer.json."""
    if isinstance(value, dict):
        yield from [value["Regex"]] if "Regex" in value else []
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from patterns_in(item)


# What GPT-2 takes for a word (Radford et al. 2019), as the library has it built in.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def of_our_kind(found):
    """The tokenizer of ours that cuts text as this content of a tokenizer.json does, or None.

    Either one character is one token, or it is byte-level BPE, as those of Llama 3, Qwen and DeepSeek are.
    """
    from tokenizer import BPETokenizer, CharTokenizer, byte_alphabet

    model, decoder = found["model"], (found["decoder"] or {}).get("type")
    normalizer = steps(found["normalizer"], "normalizers")
    *cuts, last = steps(found["pre_tokenizer"], "pretokenizers") or [{"type": None}]
    options = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    if model.get("type") != "BPE" or any(model.get(key) for key in options):
        return None
    special = {token["content"] for token in found["added_tokens"]}
    if (last["type"], decoder, normalizer, model["merges"]) == (None, "Fuse", [], []):
        characters = sorted(model["vocab"].keys() - special)
        return CharTokenizer("".join(characters)) if all(len(c) == 1 for c in characters) else None
    patterns = [pattern_of(cut) for cut in cuts]
    if (last["type"], decoder) != ("ByteLevel", "ByteLevel") or last["add_prefix_space"] or None in patterns:
        return None
    if normalizer not in ([], [{"type": "NFC"}]):
        return None
    if patterns and last["use_regex"]:
        patterns.append(GPT2_WORDS)
    elif not patterns and not last["use_regex"]:
        patterns = [r"[\s\S]+"]  # no cut at all
    words = []
    if model["ignore_merges"]:
        made = {*byte_alphabet(), *(left + right for left, right in model["merges"])}
        words = sorted(model["vocab"].keys() - made - special, key=model["vocab"].get)
    with contextlib.suppress(KeyError):  # for letters that do not stand for bytes
        return BPETokenizer(
            model["merges"], patterns=patterns, normalizer=normalizer and "NFC", words=words,
            ignore_merges=model["ignore_merges"],
        )  # fmt: skip


def steps(part, name):
    """The steps of a normalizer or pre-tokenizer, which is one, or a sequence of some, or None."""
    if part is None:
        return []
    return [step for one in part[name] for step in steps(one, name)] if part["type"] == "Sequence" else [part]


def pattern_of(cut):
    """The regular expression whose matches a step of a pre-tokenizer makes words of their own, or None."""
    if cut["type"] == "Digits":
        return r"\p{N}" if cut["individual_digits"] else r"\p{N}+"
    if cut["type"] == "Split" and cut["behavior"] == "Isolated" and not cut["invert"]:
        return cut["pattern"].get("Regex")
    return None


def renumbered(matrix, rows):
    """matrix [V, C] with its rows in the order of our tokens; a token that has none gets their mean."""
    import torch

    mean = matrix.float().mean(0).to(matrix.dtype)
    return torch.stack([mean if row is None else matrix[row] for row in rows])


# ---- folders ---------------------------------------------------------------------------------------


def write_folder(checkpoint, name, folder):
    """Write the model of a checkpoint. The folder is there whole or not at all."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from common.config import display_path
    from engine.checkpoint import build
    from tokenizer import SPECIAL_TOKENS

    model, tokenizer = build(checkpoint, name)
    check("huggingface", model.config)
    family = family_of(model.config)
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.padding_id}
    # Any mark ends what the model says, as in inference.py; <|unknown|> is a part of it.
    stops = [i for i in range(len(SPECIAL_TOKENS)) if i != tokenizer.unknown_id]
    config = (
        to_config(family, model.config)
        | ids
        | {
            "eos_token_id": tokenizer.eos_id,
            "dtype": str(checkpoint.model["wte.weight"].dtype).removeprefix("torch."),
        }
    )
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
        "generation_config.json": as_json(ids | {"eos_token_id": stops}),
        "tokenizer.json": to_library(tokenizer).to_str(pretty=True),
        "tokenizer_config.json": as_json(tokenizer_config),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    weights = to_weights(family, model.config, checkpoint.model)
    check_free(folder)
    with atomic_folder(folder) as beside:
        for file, text in texts.items():
            write_text(beside / file, text)
        try:
            # Copies, as a part of a matrix cannot be stored without the whole of it.
            dense = torch.contiguous_format
            weights = {their: tensor.clone(memory_format=dense) for their, tensor in weights.items()}
            save_file(weights, beside / "model.safetensors", {"format": "pt", "task": checkpoint.task})
        except SafetensorError as error:
            raise UserError(f"{display_path(folder)} could not be written ({error})") from None
        # The library gives its file to its owner alone.
        shutil.copymode(beside / "config.json", beside / "model.safetensors")
    print(f"{display_path(folder)}: {family.class_name}, {model.n_params / 1e6:.2f} M parameters")


def as_json(value):
    return json.dumps(value, indent=2) + "\n"


def open_weights(folder):
    """({name: a function that reads the tensor}, metadata) of a folder's .safetensors, one or several."""
    from safetensors import SafetensorError, safe_open

    from common.config import display_path, read_json

    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        # Names of files in this folder, not paths that lead out of it.
        if not isinstance(places, dict) or not all(Path(str(p)).name == p for p in places.values()):
            raise UserError(
                f"{display_path(index)}: its weight_map names no file of the folder for some tensor"
            )
        files = sorted(set(places.values()))
    else:
        files = ["model.safetensors"]
    read, metadata = {}, {}
    for path in (folder / file for file in files):
        if not path.is_file():
            raise UserError(f"there is no {display_path(path)}; only weights in .safetensors are read")
        try:
            file = safe_open(path, "pt")
        except SafetensorError as error:
            raise UserError(f"{display_path(path)} is damaged, or no safetensors file ({error})") from None
        read |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}
        metadata |= file.metadata() or {}
    return read, metadata


def read_folder(folder, task, tokenizer_path):
    """Write the checkpoint of a folder's model. `task`, `tokenizer_path`: instead of what the folder says."""
    from common.config import display_path, read_json
    from tokenizer import SPECIAL_TOKENS

    source = folder / "config.json"
    found = read_json(source)
    family, config = from_config(found, display_path(source))
    if keys := unread(family, found):
        print(f"{display_path(source)}: Nano does not know {', '.join(keys)}, and leaves that out.")
    if tokenizer_path is not None:
        tokenizer, rows = tokenizer_and_rows(tokenizer_path, found)
    else:
        try:
            tokenizer, rows = from_library(folder / "tokenizer.json", found)
        except UserError as error:
            advice = "--tokenizer reads the model with another tokenizer, if it was trained with that"
            raise UserError(f"{error}; {advice}") from None
    if (n_tokens := 1 + max(row for row in rows if row is not None)) > config.vocab_size:
        raise UserError(f"the tokenizer has {n_tokens:,} tokens, and the model only {config.vocab_size:,}")
    from engine.checkpoint import Checkpoint
    from engine.runs import Run

    read, metadata = open_weights(folder)
    if getattr(config, "num_nextn_predict_layers", 0):
        if not any(name.startswith(f"model.layers.{config.n_layer}.") for name in read):
            # Transformers leaves the module out when it saves, and the key as it is.
            config = config.model_copy(update={"num_nextn_predict_layers": 0})
    try:
        state = from_weights(family, config, read)
    except UserError as error:
        raise UserError(f"{display_path(folder)}: {error}") from None
    if rows != list(range(len(rows))):
        config = config.model_copy(update={"vocab_size": len(rows)})
        state["wte.weight"] = renumbered(state["wte.weight"], rows)
        tied = config.tie_embeddings
        state["lm_head.weight"] = state["wte.weight"] if tied else renumbered(state["lm_head.weight"], rows)
        new = [token for token, row in zip(SPECIAL_TOKENS, rows, strict=False) if row is None]
        print(f"Its tokens have Nano's numbers now; new to it are {', '.join(new) or 'none'}.")
    if task is None:
        task = "sft" if metadata.get("task") == "sft" else "pretrain"
    with Run() as run:
        made = Checkpoint(task, run.name, 0, config.model_dump(), {}, tokenizer.to_dict(), state, {})
        path = display_path(made.save())
    print(f"{path}: {config.architecture}, of a {family.class_name}")
    print(f"Talk with it: python inference.py {'-i ' if task == 'sft' else ''}-m {path}")
