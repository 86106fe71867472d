"""Hand a model on to Transformers, or take one from there.

A folder in the layout of Hugging Face is what most other programs read: the weights, the shape of the
network, the tokenizer and the chat template.

    python export.py -m checkpoint/x.pt                     write checkpoint/x/, such a folder
    python export.py -o handed_on                           the newest model, into a folder of this name
    python export.py --read folder                          make a checkpoint of a folder
    python export.py --read folder -t sft                   ... of a model that has learned to answer
    python export.py --read folder --tokenizer dataset/prepared/tokenizer.json

The networks are the same on both sides; names, and what is stored as one matrix, differ. So every
family below is one table, which is read in both directions. Transformers itself is not needed. On its
side, `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` give a
model that continues tokenizer(text), and answers tokenizer.apply_chat_template(messages), as ours does.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError, run

# ---- the command line ------------------------------------------------------------------------------


def parse_arguments():
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples.rpartition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="FILE", help="checkpoint to write as a folder (default: the newest)")
    add("-o", "--output", metavar="FOLDER", help="where to (default: beside the checkpoint, by its name)")
    add("--read", metavar="FOLDER", help="the other way: write a checkpoint of this folder's model")
    add("-t", "--task", choices=("pretrain", "sft"),
        help="what the model that is read was trained for (as its folder says, else pretrain)")  # fmt: skip
    add("--tokenizer", metavar="JSON", help="a tokenizer of Nano's, instead of the folder's own")
    args = parser.parse_args()
    if args.read is None and (args.task or args.tokenizer):
        raise UserError("--task and --tokenizer are for --read; a checkpoint knows both")
    if args.read is not None and (args.model or args.output):
        raise UserError("--read makes a checkpoint in checkpoint/: it takes neither --model nor --output")
    return args


# ---- the families ----------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What one tensor of ours is on the other side: their names, and how to get there and back."""

    names: list
    split: Callable = lambda tensor: [tensor]
    join: Callable = lambda parts: parts[0]


def stacked(prefix, **rows):
    """Several matrices, of so many rows each, that lie in one of ours."""
    return Parts([prefix + name for name in rows], lambda tensor: tensor.split(list(rows.values())), joined)


def joined(parts, dim=0):
    import torch

    return torch.cat(parts, dim)


def interleaved(name, n_head, size):
    """The last `size` rows of each head are turned in pairs, which are rows 0 1, 2 3, ... there; here all
    first ones come before all second ones."""

    def reordered(tensor, shape):
        heads = tensor.unflatten(0, (n_head, -1))
        still, turned = heads.split((heads.shape[1] - size, size), dim=1)
        turned = turned.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
        return joined((still, turned), dim=1).flatten(0, 1)

    return Parts([name], lambda ours: [reordered(ours, (2, -1))], lambda parts: reordered(parts[0], (-1, 2)))


def experts(n_experts, *names):
    """Matrices of all experts, transposed, those of `names` side by side: [E, in, len(names) * out]."""

    def split(tensor):
        return [part.mT for matrix in tensor for part in matrix.chunk(len(names), dim=1)]

    def join(parts):
        import torch

        rows = torch.stack(parts).unflatten(0, (n_experts, len(names)))  # [E, names, out, in]
        return rows.flatten(1, 2).mT

    prefix = "model.layers.N.mlp.experts."
    return Parts([f"{prefix}{e}.{name}.weight" for e in range(n_experts) for name in names], split, join)


@dataclass(frozen=True)
class Family:
    """One architecture of ours and the class of Transformers that computes the same.

    weights(config): {module or tensor of ours: their name, or Parts}; N is the number of the layer.
    keys: {their key: ours}. ours, theirs: what the family fixes in our configuration, and in theirs.
    needs: {what their class cannot do without: function of our configuration that tells if it is there}.
    """

    architecture: str
    class_name: str
    model_type: str
    weights: Callable
    keys: dict
    ours: dict = field(default_factory=dict)
    theirs: dict = field(default_factory=dict)
    needs: dict = field(default_factory=dict)
    yarn: dict = field(default_factory=dict)  # what their rope_scaling says beyond ours


# What all families have.
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_hidden",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
}
WEIGHTS = {
    "wte": "model.embed_tokens",
    "blocks.N.attn_norm": "model.layers.N.input_layernorm",
    "blocks.N.attn.proj": "model.layers.N.self_attn.o_proj",
    "blocks.N.mlp_norm": "model.layers.N.post_attention_layernorm",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
HEADS = {"num_key_value_heads": "n_kv_head", "head_dim": "head_dim"}
# What their keys mean when a config.json leaves them out; None: what it means to leave ours out.
DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "q_lora_rank": None,
    "num_nextn_predict_layers": None,
    "bias_update_speed": None,
    "aux_loss_alpha": None,
    "mtp_loss_weight": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def qkv(c):
    queries, keys = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    return stacked("model.layers.N.self_attn.", q_proj=queries, k_proj=keys, v_proj=keys)


def nano_weights(c):
    return WEIGHTS | {
        "blocks.N.attn.qkv": qkv(c),
        "blocks.N.attn.q_norm": "model.layers.N.self_attn.q_norm",
        "blocks.N.attn.k_norm": "model.layers.N.self_attn.k_norm",
        "blocks.N.mlp.gate_up": stacked("model.layers.N.mlp.", gate_proj=c.n_hidden, up_proj=c.n_hidden),
        "blocks.N.mlp.down": "model.layers.N.mlp.down_proj",
    }


def nanochat_weights(c):
    return WEIGHTS | {
        "blocks.N.attn.qkv": qkv(c),
        "blocks.N.mlp.up": "model.layers.N.mlp.fc1",
        "blocks.N.mlp.down": "model.layers.N.mlp.fc2",
    }


def deepseek_v3_weights(c):
    attention, mlp, mtp = (f"model.layers.{part}." for part in ("N.self_attn", "N.mlp", c.n_layer))
    n_shared = c.n_shared_experts * c.moe_intermediate_size
    rope = c.qk_rope_head_dim
    return WEIGHTS | {
        "blocks.N.attn.q": interleaved(attention + "q_proj", c.n_head, rope),
        "blocks.N.attn.q_a": attention + "q_a_proj",
        "blocks.N.attn.q_norm": attention + "q_a_layernorm",
        "blocks.N.attn.q_b": interleaved(attention + "q_b_proj", c.n_head, rope),
        "blocks.N.attn.kv_a": interleaved(attention + "kv_a_proj_with_mqa", 1, rope),
        "blocks.N.attn.kv_norm": attention + "kv_a_layernorm",
        "blocks.N.attn.kv_b": attention + "kv_b_proj",
        "blocks.N.mlp.gate_up": stacked(mlp, gate_proj=c.n_hidden, up_proj=c.n_hidden),
        "blocks.N.mlp.down": mlp + "down_proj",
        "blocks.N.mlp.gate": mlp + "gate",
        "blocks.N.mlp.experts.gate_up": experts(c.n_routed_experts, "gate_proj", "up_proj"),
        "blocks.N.mlp.experts.down": experts(c.n_routed_experts, "down_proj"),
        "blocks.N.mlp.shared.gate_up": stacked(mlp + "shared_experts.", gate_proj=n_shared, up_proj=n_shared),
        "blocks.N.mlp.shared.down": mlp + "shared_experts.down_proj",
        # The module of multi-token prediction is the layer behind the last one.
        "mtp.enorm": mtp + "enorm",
        "mtp.hnorm": mtp + "hnorm",
        "mtp.eh_proj": mtp + "eh_proj",
        "mtp.norm": mtp + "shared_head.norm",
    }


FAMILIES = (
    Family(
        "nano", "Qwen3ForCausalLM", "qwen3", nano_weights,
        KEYS | HEADS | {"tie_word_embeddings": "tie_embeddings"},
        ours={"qk_norm": True, "use_rope": True, "is_causal": True, "bias": False},
        theirs={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    ),
    Family(
        "nano", "LlamaForCausalLM", "llama", nano_weights,
        KEYS | HEADS
        | {"tie_word_embeddings": "tie_embeddings", "attention_bias": "bias", "mlp_bias": "bias"},
        ours={"qk_norm": False, "use_rope": True, "is_causal": True},
        theirs={"hidden_act": "silu"},
        needs={"an n_embd that n_head divides": lambda c: c.n_embd % c.n_head == 0},
    ),
    Family(
        "nanochat", "NanoChatForCausalLM", "nanochat", nanochat_weights,
        KEYS | HEADS,
        theirs={
            "hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False,
            "final_logit_softcapping": 15.0,
        },
    ),
    Family(
        "deepseek_v3", "DeepseekV3ForCausalLM", "deepseek_v3", deepseek_v3_weights,
        KEYS | {"num_key_value_heads": "n_head", "tie_word_embeddings": "tie_embeddings"}
        | {key: key for key in (
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
            "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob",
            "num_nextn_predict_layers", "bias_update_speed", "aux_loss_alpha", "mtp_loss_weight",
        )},
        theirs={
            "hidden_act": "silu", "attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1,
            "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        },
        needs={
            "a shared expert": lambda c: c.n_shared_experts,
            "groups of two experts or more": lambda c: c.n_routed_experts >= 2 * c.n_group,
        },
        yarn={"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
)  # fmt: skip


# ---- the configuration -----------------------------------------------------------------------------


def family_of(config):
    """The Family that computes what a model of ours does. UserError, with the reason, if there is none."""
    families = [family for family in FAMILIES if family.architecture == config.architecture]
    if not families:
        known = sorted({family.architecture for family in FAMILIES})
        raise UserError(f"{config.architecture} cannot be written for Transformers; {', '.join(known)} can")

    def differing(family):
        return [key for key, value in family.ours.items() if getattr(config, key) != value]

    family = min(families, key=lambda family: len(differing(family)))
    for key in differing(family):
        found, needed = (json.dumps(value) for value in (getattr(config, key), family.ours[key]))
        raise UserError(f"{key} is {found} in this model, and a {family.class_name} has only {needed}")
    for what, is_there in family.needs.items():
        if not is_there(config):
            raise UserError(f"a {family.class_name} needs {what}, and this model has none")
    return family


def to_config(family, config):
    """What config.json says of the shape of a model of ours."""
    scaling = config.rope_scaling and config.rope_scaling.model_dump()
    if scaling and scaling["rope_type"] == "yarn":
        scaling |= family.yarn
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for theirs, ours in family.keys.items()},
        **family.theirs,
        # New releases of Transformers read these two as well as old ones.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def from_config(found, source):
    """(Family, configuration of ours) of the content of a config.json; `source`: its name, for errors."""
    from engine.config import check_model

    name = found.get("model_type")
    families = [family for family in FAMILIES if family.model_type == name]
    if not families:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise UserError(f"{source}: its model_type is {json.dumps(name)}; Nano reads {known}")
    family = families[0]
    for key, value in family.theirs.items():
        if found.get(key, value) != value:
            raise UserError(f"{source}: {key} is {json.dumps(found[key])}; Nano has only {json.dumps(value)}")
    values = {"architecture": family.architecture, **family.ours}
    for theirs, ours in family.keys.items():
        if theirs not in found and theirs not in DEFAULTS:
            raise UserError(f"{source}: {theirs} is missing")
        value = found.get(theirs, DEFAULTS.get(theirs))
        if value is not None and values.setdefault(ours, value) != value:
            raise UserError(f"{source}: {theirs} differs from what else is {ours} in Nano, and is one there")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: its rope_parameters are no JSON object")
    rope = {"rope_type" if key == "type" else key: rope[key] for key in rope if rope[key] is not None}
    values["rope_theta"] = rope.pop("rope_theta", found.get("rope_theta", 10000.0))
    share = rope.pop("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is {json.dumps(share)}; Nano has only 1.0")
    if rope.get("rope_type") == "yarn":
        for key, value in family.yarn.items():
            if rope.pop(key, None) != value:
                raise UserError(f"{source}: {key} of YaRN must be {json.dumps(value)}")
    values["rope_scaling"] = None if rope in ({}, {"rope_type": "default"}) else rope
    config = check_model(values, f"{source}, in Nano's names")
    return family, config.resolved(config.vocab_size)


# ---- the weights -----------------------------------------------------------------------------------


def counterparts(family, config, names):
    """Yield (name, Parts) of tensors of ours; the names within the Parts are whole."""
    table = family.weights(config)
    for name in names:
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        place = name.replace("mtp.block.", f"blocks.{config.n_layer}.")
        number = re.match(r"blocks\.(\d+)|", place)[1]
        place = re.sub(r"^blocks\.\d+", "blocks.N", place)
        module, _, kind = place.rpartition(".")
        found, suffix = (table[place], "") if place in table else (table[module], "." + kind)
        parts = found if isinstance(found, Parts) else Parts([found])
        theirs = [their.replace(".N.", f".{number}.") + suffix for their in parts.names]
        yield name, parts._replace(names=theirs)


def to_weights(family, config, state):
    """{name: tensor} as Transformers has them, of a state dictionary of ours."""
    weights = {}
    for name, parts in counterparts(family, config, state):
        weights.update(zip(parts.names, parts.split(state[name]), strict=True))
    return weights


def from_weights(family, config, read):
    """A state dictionary of ours. read: {name: a function that gives the tensor}, all that there is.

    UserError for a tensor that is missing, too much, or of another shape or kind than the configuration says.
    """
    import torch

    import models

    with torch.device("meta"):
        shapes = models.build(config).state_dict()
    expected = to_weights(family, config, shapes)
    if missing := expected.keys() - read.keys():
        raise UserError(f"the weights lack {min(missing)}, which config.json asks for")
    if surplus := [name for name in read if name not in expected and not needless(name, config)]:
        raise UserError(f"the weights hold {min(surplus)}, for which config.json leaves no place")

    def tensor(name):
        found, shape = read[name](), expected[name].shape
        if found.shape != shape:
            raise UserError(f"{name} is {list(found.shape)}, and {list(shape)} by config.json")
        if found.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{name} is {found.dtype}; float32, bfloat16 or float16 are read")
        return found

    state = {
        name: parts.join([tensor(their) for their in parts.names]).contiguous()
        for name, parts in counterparts(family, config, shapes)
    }
    if config.tie_embeddings:
        state["lm_head.weight"] = state["wte.weight"]
    return state


def needless(name, config):
    """Whether it follows from the rest, or stands there twice."""
    return bool(
        name.endswith("rotary_emb.inv_freq")
        or (name == "lm_head.weight" and config.tie_embeddings)
        or re.fullmatch(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight", name)
    )


# ---- the tokenizer ---------------------------------------------------------------------------------

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

    words = [tokenizer.decode_bytes([i]) for i in range(N_SPECIAL, tokenizer.vocab_size)]
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
        library = tokenizer.library(vocabulary, unk_token="<|unknown|>")
        library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    library.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.bos_id)]
    )
    return library


def from_library(path, config):
    """(tokenizer of ours, rows) of a tokenizer.json: rows[i] is the number there of our token i, or None.

    config: the content of config.json, which names the special tokens. UserError if it is of no kind of ours.
    """
    from tokenizers import Tokenizer

    from engine.config import shown
    from tokenizer import N_SPECIAL, SPECIAL_TOKENS

    try:
        library = Tokenizer.from_file(str(path))
        found = json.loads(library.to_str())
    except Exception as error:  # the library knows no other kind
        raise UserError(f"{shown(path)} could not be read ({error})") from None
    tokenizer, numbers = of_our_kind(found), library.get_vocab()
    ours = to_library(tokenizer).get_vocab() if tokenizer else {}
    words = sorted(ours, key=ours.get)[N_SPECIAL:]
    if not words or not numbers.keys() >= set(words):
        raise UserError(
            f"{shown(path)} cuts text in a way that Nano does not know; --tokenizer reads the model with "
            "another tokenizer, if it was trained with that"
        )
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

    from engine.checkpoint import build
    from engine.config import shown
    from tokenizer import SPECIAL_TOKENS

    if folder.exists():
        raise UserError(f"{shown(folder)} is there already; remove it, or name another folder with --output")
    model, tokenizer = build(checkpoint, name)
    family = family_of(model.config)
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.padding_id}
    # Any mark ends what the model says, as in inference.py; <|unknown|> is a part of it.
    stops = [i for i in range(len(SPECIAL_TOKENS)) if i != tokenizer.unknown_id]
    config = to_config(family, model.config) | ids | {
        "eos_token_id": tokenizer.eos_id,
        "dtype": str(checkpoint.model["wte.weight"].dtype).removeprefix("torch."),
    }
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name, dir=folder.parent) as beside:
        beside = Path(beside) / folder.name
        beside.mkdir()
        for file, text in texts.items():
            (beside / file).write_text(text, encoding="utf-8")
        try:
            # Copies, as a part of a matrix cannot be stored without the whole of it.
            dense = torch.contiguous_format
            weights = {their: tensor.clone(memory_format=dense) for their, tensor in weights.items()}
            save_file(weights, beside / "model.safetensors", {"format": "pt", "task": checkpoint.task})
        except SafetensorError as error:
            raise UserError(f"{shown(folder)} could not be written ({error})") from None
        # The library gives its file to its owner alone.
        shutil.copymode(beside / "config.json", beside / "model.safetensors")
        for path in beside.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        os.rename(beside, folder)
    print(f"{shown(folder)}: {family.class_name}, {model.n_params / 1e6:.2f} M parameters")


def as_json(value):
    return json.dumps(value, indent=2) + "\n"


def open_weights(folder):
    """({name: a function that reads the tensor}, metadata) of a folder's .safetensors, one or several."""
    from safetensors import SafetensorError, safe_open

    from engine.config import read_json, shown

    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        # Names of files in this folder, not paths that lead out of it.
        if not isinstance(places, dict) or not all(Path(str(p)).name == p for p in places.values()):
            raise UserError(f"{shown(index)}: its weight_map names no file of the folder for some tensor")
        files = sorted(set(places.values()))
    else:
        files = ["model.safetensors"]
    read, metadata = {}, {}
    for path in (folder / file for file in files):
        if not path.is_file():
            raise UserError(f"there is no {shown(path)}; only weights in .safetensors are read")
        try:
            file = safe_open(path, "pt")
        except SafetensorError as error:
            raise UserError(f"{shown(path)} is damaged, or no safetensors file ({error})") from None
        read |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}
        metadata |= file.metadata() or {}
    return read, metadata


def read_folder(folder, task, tokenizer_path):
    """Write the checkpoint of a folder's model. `task`, `tokenizer_path`: instead of what the folder says."""
    import tokenizer as tokenizers
    from engine.config import read_json, shown

    source = folder / "config.json"
    found = read_json(source)
    family, config = from_config(found, shown(source))
    if tokenizer_path is None:
        tokenizer, rows = from_library(folder / "tokenizer.json", found)
    else:
        tokenizer = tokenizers.load(tokenizer_path)
        rows = list(range(tokenizer.vocab_size))
    if (n_tokens := 1 + max(row for row in rows if row is not None)) > config.vocab_size:
        raise UserError(f"the tokenizer has {n_tokens:,} tokens, and the model only {config.vocab_size:,}")
    from engine.checkpoint import Checkpoint

    read, metadata = open_weights(folder)
    if getattr(config, "num_nextn_predict_layers", 0):
        if not any(name.startswith(f"model.layers.{config.n_layer}.") for name in read):
            # Transformers leaves the module out when it saves, and the key as it is.
            config = config.model_copy(update={"num_nextn_predict_layers": 0})
    try:
        state = from_weights(family, config, read)
    except UserError as error:
        raise UserError(f"{shown(folder)}: {error}") from None
    if rows != list(range(len(rows))):
        config = config.model_copy(update={"vocab_size": len(rows)})
        state["wte.weight"] = renumbered(state["wte.weight"], rows)
        tied = config.tie_embeddings
        state["lm_head.weight"] = state["wte.weight"] if tied else renumbered(state["lm_head.weight"], rows)
        new = [token for token, row in zip(tokenizers.SPECIAL_TOKENS, rows, strict=False) if row is None]
        print(f"Its tokens have Nano's numbers now; new to it are {', '.join(new) or 'none'}.")
    if task is None:
        task = "sft" if metadata.get("task") == "sft" else "pretrain"
    now = time.strftime("%Y%m%d_%H%M%S")
    made = Checkpoint(task, now, 0, config.model_dump(), {}, tokenizer.to_dict(), state, optimizer={})
    while made.path.exists():
        time.sleep(0.1)
        made.run = time.strftime("%Y%m%d_%H%M%S")
    path = shown(made.save())
    print(f"{path}: {config.architecture}, of a {family.class_name}")
    print(f"Talk with it: python inference.py {'-i ' if task == 'sft' else ''}-m {path}")


def main():
    args = parse_arguments()
    from engine.config import find, shown

    for path in (args.model, args.tokenizer):
        if path is not None and not find(path).is_file():
            raise UserError(f"there is no file {shown(find(path))}")
    if args.read is not None:
        if not find(args.read).is_dir():
            raise UserError(f"there is no folder {shown(find(args.read))}")
        read_folder(find(args.read), args.task, args.tokenizer and find(args.tokenizer))
        return
    from inference import load_checkpoint

    checkpoint, name = load_checkpoint(args.model, instruct=False)
    path = find(args.model) if args.model else checkpoint.path
    write_folder(checkpoint, name, Path(args.output).expanduser() if args.output else path.with_suffix(""))


if __name__ == "__main__":
    run(main)
