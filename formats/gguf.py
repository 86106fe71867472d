"""GGUF: the single file that llama.cpp and programs based on it (Ollama, LM Studio, ...) open.

It holds the shape of the network, the tokenizer, the chat template and the weights, in float32, float16 or
q8_0 (int8 in groups of 32, each with a float16 scale). The `gguf` package knows the layout of the file; this
module decides its content:

- The network is that of its counterpart in Transformers (families.py): llama and qwen3 for nano, deepseek2
  for deepseek_v3.
- Both kinds of tokenizer become byte-level BPE. A character is assembled from its bytes, last byte first, by
  merges that no other character can take part in. Of an unknown character the first byte is left over: that
  byte is a token with the embedding of <|unknown|>. Continuation bytes are not tokens and are dropped. So
  every unknown character becomes one token, as in Nano.
- A chat model (SFT) gets a chat template, which defines how prompts begin. Other models have none, and their
  prompts begin with <|bos|>.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.errors import UserError
from common.files import atomic_write
from config.validation import ANY, unsupported
from formats import check_supported, families, refuse_to_overwrite
from formats.families import ROPE_SCALING, Family, Whitelist, find_family, to_hf_weights, to_interleaved

if TYPE_CHECKING:
    from io import BufferedWriter

    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from torch import Tensor

    from config.schema import ArchitectureConfig
    from engine.checkpoint import Checkpoint
    from tokenizer import BPETokenizer, CharTokenizer, Tokenizer

SUFFIX = ".gguf"
NUMBER_TYPES = ("float32", "float16", "q8_0")
ARCHITECTURES = {  # class of Transformers that computes the same: llama.cpp's name
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "DeepseekV3ForCausalLM": "deepseek2",
}
SHARED_KEYS = (
    "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_hidden", "norm_eps", "rope_theta",
    "tie_embeddings", "dropout",
)  # fmt: skip
NANO: Whitelist = {
    "architecture": ("nano",),
    "use_rope": (True,),
    "is_causal": (True,),
    **dict.fromkeys((*SHARED_KEYS, "n_kv_head", "head_dim"), ANY),
    **ROPE_SCALING,
}
# The keys and values of Nano's configuration that this file can express, by llama.cpp's architecture.
IMPLEMENTED: dict[str, Whitelist] = {
    "llama": NANO | {"qk_norm": (False,), "bias": ANY},
    "qwen3": NANO | {"qk_norm": (True,), "bias": (False,), "rope_scaling.rope_type": ("yarn",)},
    "deepseek2": {
        "architecture": ("deepseek_v3",),
        **dict.fromkeys(SHARED_KEYS, ANY),
        **dict.fromkeys(
            ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
             "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
             "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob",
             # These only matter in training; the module they train is left out.
             "num_nextn_predict_layers", "bias_update_speed", "aux_loss_alpha", "mtp_loss_weight"),
            ANY,
        ),
        **ROPE_SCALING,
        "rope_scaling.rope_type": ("yarn",),
        "norm_eps": (1e-6,),  # llama.cpp uses one value for all norms; that of the latents is fixed
    },
}  # fmt: skip
GROUP_SIZE = 32  # numbers that share a scale in q8_0

# ---- the tokenizer ---------------------------------------------------------------------------------

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# {(patterns that split text into words, whether a word that is a token is never merged): llama.cpp's name}
PRE_TOKENIZERS = {
    ((), False): "gpt-2",
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_WORDS.replace("NUMBER", r"\p{N}{1,3}"),), True): "llama-bpe",
    ((_WORDS.replace("NUMBER", r"\p{N}{1,3}"),), False): "smaug-bpe",
    ((_WORDS.replace("NUMBER", r"\p{N}"),), False): "qwen2",
    (_DEEPSEEK, False): "deepseek-v3",
}


def pre_tokenizer_name(tokenizer: BPETokenizer) -> str:
    """llama.cpp's name for the way in which a tokenizer splits text. Raises UserError if it has none."""
    patterns = tuple(p.replace(r"\u3040", "\u3040") for p in tokenizer.rules.get("patterns", ()))
    name = PRE_TOKENIZERS.get((patterns, bool(tokenizer.rules.get("ignore_merges"))))
    if name is None:
        raise UserError(
            "llama.cpp cannot split text the way this tokenizer does; --format huggingface writes this model"
        )
    return name


def characters_as_bpe(tokenizer: CharTokenizer) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Byte-level BPE with one token per character.

    Returns (characters, first bytes of unknown characters, merges), all in the letters of `byte_alphabet`.
    """
    from tokenizer import byte_alphabet

    letters = byte_alphabet()
    words: list[str] = []
    merges: dict[tuple[str, str], None] = {}  # in order, without duplicates
    for character in tokenizer.characters:
        word = [letters[byte] for byte in character.encode()]
        words.append("".join(word))
        if len(word) == 4:  # merged in any order, because other characters need some of these pairs, too
            _, b, c, d = word
            merges |= dict.fromkeys([(b, c), (c, d), (b + c, d)])
        for i in range(len(word) - 2, -1, -1):
            merges[word[i], "".join(word[i + 1 :])] = None
    firsts = [letters[byte] for byte in (*range(0x80), *range(0xC2, 0xF5))]
    known = set(words)
    return words, [letter for letter in firsts if letter not in known], list(merges)


def vocabulary(tokenizer: Tokenizer, n_rows: int) -> tuple[list[str], list[TokenType], list[str], str]:
    """The tokens of a model whose embedding has n_rows rows.

    Returns (tokens, their types, merges, name of the pre-tokenizer). Tokens from n_rows on are the first
    bytes of unknown characters.
    """
    from gguf import TokenType

    from tokenizer import SPECIAL_TOKENS, BPETokenizer, CharTokenizer, byte_alphabet

    letters = byte_alphabet()
    if isinstance(tokenizer, CharTokenizer):
        words, unknown, merges = characters_as_bpe(tokenizer)
        pre_tokenizer = "qwen2"  # any would do: no merge reaches from one character to the next
    else:
        assert isinstance(tokenizer, BPETokenizer)
        words = [
            "".join(letters[byte] for byte in word) for word in tokenizer.token_bytes[len(SPECIAL_TOKENS) :]
        ]
        unknown, merges, pre_tokenizer = [], tokenizer.merges, pre_tokenizer_name(tokenizer)
    unused = [f"<|unused_{i}|>" for i in range(tokenizer.vocab_size, n_rows)]
    tokens = [*SPECIAL_TOKENS, *words, *unused, *unknown]
    if len(set(tokens)) < len(tokens):
        raise UserError("one of the tokenizer's learned tokens is spelled like one of its special tokens")
    types = [TokenType.CONTROL] * len(SPECIAL_TOKENS) + [TokenType.NORMAL] * len(words)
    types += [TokenType.UNUSED] * (len(tokens) - len(types))
    types[tokenizer.unknown_id] = TokenType.UNKNOWN
    # llama.cpp needs at least one merge: take two bytes that no UTF-8 text contains.
    merges = merges or [(letters[0xC0], letters[0xC1])]
    return tokens, types, [" ".join(pair) for pair in merges], pre_tokenizer


def write_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, n_rows: int, is_chat: bool) -> int:
    """Write the tokenizer's keys; returns how many embedding rows are needed beyond n_rows."""
    from formats.huggingface import CHAT_TEMPLATE

    tokens, types, merges, pre_tokenizer = vocabulary(tokenizer, n_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_unk_token_id(tokenizer.unknown_id)
    writer.add_pad_token_id(tokenizer.padding_id)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(not is_chat)
    writer.add_add_space_prefix(False)
    # Every special token but <|unknown|> ends an answer. llama.cpp stops at these six kinds of tokens.
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.instruct_id)
    writer.add_eom_token_id(tokenizer.bos_id)
    for kind, i in (
        ("pad", tokenizer.padding_id), ("rep", tokenizer.system_id), ("sep", tokenizer.response_id)
    ):  # fmt: skip
        writer.add_uint32(f"tokenizer.ggml.fim_{kind}_token_id", i)
    if n_rows < len(tokens):
        # Newer releases of llama.cpp read this list of tokens that are never sampled.
        writer.add_array("tokenizer.ggml.suppress_tokens", list(range(n_rows, len(tokens))))
    if is_chat:
        writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens) - n_rows


# ---- the network -----------------------------------------------------------------------------------


def gguf_architecture(config: ArchitectureConfig) -> str | None:
    """llama.cpp's name for the architecture of a model, or None."""
    family = find_family(config)
    return ARCHITECTURES.get(family.class_name) if family else None


def unsupported_reason(config: Any) -> str | None:
    """Why llama.cpp does not compute the same as a model of Nano, or None if it does."""
    architecture = gguf_architecture(config)
    if architecture is None:
        return f"llama.cpp does not know {config.architecture}"
    if reason := unsupported(config, IMPLEMENTED[architecture], f"llama.cpp's {architecture}"):
        return reason
    if architecture == "deepseek2" and not config.q_lora_rank:
        return "llama.cpp supports deepseek_v3 only with a q_lora_rank"
    if architecture == "deepseek2" and config.n_layer in (26, 27):
        return "llama.cpp supports deepseek_v3 with 26 or 27 layers only without a q_lora_rank"
    return families.unsupported_reason(config)


def write_hyperparameters(writer: GGUFWriter, c: Any, n_tokens: int) -> None:
    """Write the keys that describe the network. c: its configuration."""
    import gguf

    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(n_tokens)
    if c.architecture == "nano":
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
    else:
        # Multi-query attention on the latent: kv_b is folded into the query and the output.
        writer.add_head_count_kv(1)
        writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
        writer.add_value_length(c.kv_lora_rank)
        writer.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
        writer.add_value_length_mla(c.v_head_dim)
        writer.add_rope_dimension_count(c.qk_rope_head_dim)
        writer.add_q_lora_rank(c.q_lora_rank)
        writer.add_kv_lora_rank(c.kv_lora_rank)
        writer.add_leading_dense_block_count(c.first_k_dense_replace)
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
        writer.add_expert_count(c.n_routed_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_shared_count(c.n_shared_experts)
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)
        writer.add_expert_weights_scale(c.routed_scaling_factor)
        writer.add_expert_weights_norm(c.norm_topk_prob)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    scaling = c.rope_scaling
    if scaling and scaling.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        if c.architecture != "nano":
            writer.add_rope_scaling_yarn_log_mul(0.1)


def to_tensors(family: Family, config: Any, state: dict[str, Tensor], n_more: int) -> dict[str, Tensor]:
    """Convert a state dictionary to {name: tensor} of llama.cpp; the vocabulary grows by n_more tokens.

    As input, these tokens have the embedding of <|unknown|>. As output, they are as unlikely as <|padding|>,
    which no text contains.
    """
    import gguf
    import torch

    from model import scale_frequencies
    from tokenizer import Tokenizer

    weights = to_hf_weights(family, config, state)
    if n_more:
        embedding = weights["model.embed_tokens.weight"]
        head = weights.get("lm_head.weight", embedding)
        for module, matrix, row in (
            ("model.embed_tokens", embedding, Tokenizer.unknown_id), ("lm_head", head, Tokenizer.padding_id)
        ):  # fmt: skip
            weights[f"{module}.weight"] = torch.cat((matrix, matrix[row].expand(n_more, -1)))
    architecture = ARCHITECTURES[family.class_name]
    by_name = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[architecture], config.n_layer)
    tensors: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for hf_name, tensor in weights.items():
        module, _, kind = hf_name.replace("correction_bias", "correction.bias").rpartition(".")
        if module.startswith(f"model.layers.{config.n_layer}."):
            continue  # the multi-token prediction module, which generation does not need
        before, is_expert, rest = module.partition(".experts.")
        if is_expert:
            module = f"{before}.experts.{rest.partition('.')[2]}"
            experts.setdefault(f"{names.get_name(module)}.{kind}", []).append(tensor)
            continue
        if not (name := names.get_name(module)):
            raise UserError(f"llama.cpp has no place for {hf_name}, a part of this model")
        if architecture == "llama" and module.endswith((".q_proj", ".k_proj")):
            n_head = config.n_head if module.endswith(".q_proj") else config.n_kv_head
            tensor = to_interleaved(tensor, n_head, config.head_dim)
        if module.endswith(".kv_b_proj"):  # [n_head * (key + value), rank]
            keys, values = tensor.unflatten(0, (config.n_head, -1)).split(
                (config.qk_nope_head_dim, config.v_head_dim), dim=1
            )
            tensors[name.replace("kv_b", "k_b") + ".weight"] = keys.mT
            tensors[name.replace("kv_b", "v_b") + ".weight"] = values
            continue
        tensors[f"{name}.{kind}"] = tensor
    tensors |= {name: torch.stack(matrices) for name, matrices in experts.items()}
    scaling = config.rope_scaling
    if scaling and scaling.rope_type == "llama3":
        # The factor by which each rotary frequency is lowered.
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        tensors["rope_freqs.weight"] = frequencies / scale_frequencies(
            frequencies, config.rope_theta, scaling
        )
    return tensors


def encode_tensor(name: str, tensor: Tensor, number_type: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Convert a tensor to the given number type, or to the closest one that llama.cpp can read for it.

    Returns (array, GGUF's name of the type).
    """
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import quantize

    array = tensor.float().contiguous().numpy()
    # Vectors and the experts' routers are small, and precision matters there.
    if number_type == "float32" or array.ndim == 1 or "ffn_gate_inp" in name:
        return array, Type.F32
    if number_type == "q8_0" and array.shape[-1] % GROUP_SIZE == 0:
        return quantize(array, Type.Q8_0), Type.Q8_0
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{name} has values too large for float16; use --type float32")
    return half, Type.F16


# ---- the file --------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, name: str, path: Path, number_type: str | None) -> None:
    """Write the checkpoint's model to `path`; see `formats.Format`."""
    import gguf
    from gguf.gguf_writer import WriterState

    from common.config import display_path
    from engine.checkpoint import build
    from tokenizer import BPETokenizer

    model, tokenizer = build(checkpoint, name)
    config = model.config
    check_supported("gguf", config)
    family, architecture = find_family(config), gguf_architecture(config)
    assert family and architecture  # as the model is supported
    number_type = number_type or NUMBER_TYPES[0]
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    refuse_to_overwrite(path)
    with atomic_write(path) as file:
        writer, arrays = gguf.GGUFWriter(None, architecture), []
        writer.add_name(f"Nano {checkpoint.stage}")
        writer.add_file_type(gguf.LlamaFileType[types[number_type]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        n_more = write_tokenizer(writer, tokenizer, config.vocab_size, checkpoint.chat_template is not None)
        write_hyperparameters(writer, config, config.vocab_size + n_more)
        n_float16 = 0
        for tensor_name, tensor in to_tensors(family, config, checkpoint.model, n_more).items():
            array, dtype = encode_tensor(tensor_name, tensor, number_type)
            n_float16 += number_type == "q8_0" and dtype == gguf.GGMLQuantizationType.F16
            writer.add_tensor_info(tensor_name, array.shape, array.dtype, array.nbytes, raw_dtype=dtype)
            arrays.append(array)
        # Not the library's own write methods: numpy's `tofile` would hide the reason of a failed write.
        output = cast("BufferedWriter", file)  # a PendingFile has the two methods the library uses
        writer.fout, writer.state = [output], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays:
            writer.write_padding(output, file.tell())
            file.write(array.data)
        writer.write_padding(output, file.tell())
    print(f"{display_path(path)}: {architecture}, {model.n_params / 1e6:.2f} M parameters in {number_type}")
    if n_float16:
        print(f"{n_float16} matrices are in float16: their rows are not a multiple of {GROUP_SIZE} long")
    if isinstance(tokenizer, BPETokenizer) and tokenizer.rules.get("normalizer"):
        print("llama.cpp does not normalise text to NFC: letters with separate accents get other tokens")
