"""GGUF, the one file that llama.cpp and the programs around it (Ollama, LM Studio, ...) open.

It holds the shape of the network, the tokenizer, the chat template and the weights, in float32, float16 or
q8_0 (int8 in groups of 32, with a float16 scale each). The `gguf` package knows how these lie in the file;
here is told what they are:

- What a model of ours is there follows from its counterpart in Transformers (families.py): llama and qwen3
  of nano, deepseek2 of deepseek_v3.
- Both kinds of tokenizers are byte-level BPE there. A character is put together of its bytes, from the last
  one to the first, by merges that no other character can take part in. Where a character is unknown its
  first byte stays alone, and that byte is a token with the vector of <|unknown|>; bytes that continue a
  character are no tokens and vanish. So every unknown character is one token, as it is in ours.
- A model that has learned to answer has a chat template, and its prompts begin as that says. Any other one
  has none, and its prompts begin with <|bos|>.
"""

from common.config import ANY, unsupported
from common.errors import UserError
from common.files import atomic_write
from formats import check, check_free, families
from formats.families import ROPE_SCALING, family_of, in_pairs, to_weights

ARCHITECTURES = {  # by the class of Transformers that computes the same
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "DeepseekV3ForCausalLM": "deepseek2",
}
SIZES = (
    "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_hidden", "norm_eps", "rope_theta",
    "tie_embeddings", "dropout",
)  # fmt: skip
NANO = {
    "architecture": ("nano",),
    "use_rope": (True,),
    "is_causal": (True,),
    **dict.fromkeys((*SIZES, "n_kv_head", "head_dim"), ANY),
    **ROPE_SCALING,
}
# What of our configuration the writer below tells llama.cpp, by its architectures.
IMPLEMENTED = {
    "llama": NANO | {"qk_norm": (False,), "bias": ANY},
    "qwen3": NANO | {"qk_norm": (True,), "bias": (False,), "rope_scaling.rope_type": ("yarn",)},
    "deepseek2": {
        "architecture": ("deepseek_v3",),
        **dict.fromkeys(SIZES, ANY),
        **dict.fromkeys(
            ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
             "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
             "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob",
             # These are for training, and what they train is left out.
             "num_nextn_predict_layers", "bias_update_speed", "aux_loss_alpha", "mtp_loss_weight"),
            ANY,
        ),
        **ROPE_SCALING,
        "rope_scaling.rope_type": ("yarn",),
        "norm_eps": (1e-6,),  # as the norms of the latents have
    },
}  # fmt: skip
GROUP = 32  # numbers that share a scale in q8_0

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
# How text is cut into words, and whether a word that is a token is left whole: llama.cpp's name for it.
CUTS = {
    ((), False): "gpt-2",
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_WORDS.replace("NUMBER", r"\p{N}{1,3}"),), True): "llama-bpe",
    ((_WORDS.replace("NUMBER", r"\p{N}{1,3}"),), False): "smaug-bpe",
    ((_WORDS.replace("NUMBER", r"\p{N}"),), False): "qwen2",
    (_DEEPSEEK, False): "deepseek-v3",
}


def cut_of(tokenizer):
    """llama.cpp's name for the way in which a BPE of ours cuts text. UserError if it has none."""
    patterns = tuple(p.replace(r"\u3040", "\u3040") for p in tokenizer.rules.get("patterns", ()))
    cut = CUTS.get((patterns, bool(tokenizer.rules.get("ignore_merges"))))
    if cut is None:
        raise UserError(
            "the tokenizer cuts text in a way that llama.cpp has no name for; --format huggingface keeps it"
        )
    return cut


def characters_as_bpe(tokenizer):
    """(words, first bytes of unknown characters, merges) of a CharTokenizer, in the letters of bytes."""
    from tokenizer import byte_alphabet

    letters = byte_alphabet()
    words, merges = [], {}
    for character in tokenizer.characters:
        word = [letters[byte] for byte in character.encode()]
        words.append("".join(word))
        if len(word) == 4:  # in whatever order, as other characters need these pairs, too
            _, b, c, d = word
            merges |= dict.fromkeys([(b, c), (c, d), (b + c, d)])
        for i in range(len(word) - 2, -1, -1):
            merges[word[i], "".join(word[i + 1 :])] = None
    firsts = [letters[byte] for byte in (*range(0x80), *range(0xC2, 0xF5))]
    known = set(words)
    return words, [letter for letter in firsts if letter not in known], list(merges)


def vocabulary(tokenizer, n_rows):
    """(tokens, types, merges, cut) of a tokenizer whose model has n_rows rows.

    Tokens from n_rows on are the first bytes of unknown characters.
    """
    from gguf import TokenType

    from tokenizer import SPECIAL_TOKENS, byte_alphabet

    letters = byte_alphabet()
    if tokenizer.kind == "char":
        words, unknown, merges = characters_as_bpe(tokenizer)
        cut = "qwen2"  # any one: no merge reaches from one character to the next
    else:
        words = tokenizer.token_bytes[len(SPECIAL_TOKENS) :]
        words = ["".join(letters[byte] for byte in word) for word in words]
        unknown, merges, cut = [], tokenizer.merges, cut_of(tokenizer)
    unused = [f"<|unused_{i}|>" for i in range(tokenizer.vocab_size, n_rows)]
    tokens = [*SPECIAL_TOKENS, *words, *unused, *unknown]
    if len(set(tokens)) < len(tokens):
        raise UserError("the tokenizer has learned a word that is spelled like one of its special tokens")
    types = [TokenType.CONTROL] * len(SPECIAL_TOKENS) + [TokenType.NORMAL] * len(words)
    types += [TokenType.UNUSED] * (len(tokens) - len(types))
    types[tokenizer.unknown_id] = TokenType.UNKNOWN
    # llama.cpp wants at least one: two bytes that no text has.
    merges = merges or [(letters[0xC0], letters[0xC1])]
    return tokens, types, [" ".join(pair) for pair in merges], cut


def write_tokenizer(writer, tokenizer, n_rows, task):
    """Returns how many rows the model needs beyond n_rows."""
    from formats.huggingface import CHAT_TEMPLATE

    tokens, types, merges, cut = vocabulary(tokenizer, n_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_unk_token_id(tokenizer.unknown_id)
    writer.add_pad_token_id(tokenizer.padding_id)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(task != "sft")
    writer.add_add_space_prefix(False)
    # Any mark ends what the model says. llama.cpp stops at tokens of these six kinds, whatever their names.
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.instruct_id)
    writer.add_eom_token_id(tokenizer.bos_id)
    for kind, i in (
        ("pad", tokenizer.padding_id), ("rep", tokenizer.system_id), ("sep", tokenizer.response_id)
    ):  # fmt: skip
        writer.add_uint32(f"tokenizer.ggml.fim_{kind}_token_id", i)
    if n_rows < len(tokens):
        # For releases of llama.cpp that can be told what never to say.
        writer.add_array("tokenizer.ggml.suppress_tokens", list(range(n_rows, len(tokens))))
    if task == "sft":
        writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens) - n_rows


# ---- the network -----------------------------------------------------------------------------------


def architecture_of(config):
    """llama.cpp's name for what a model of ours is, or None."""
    family = family_of(config)
    return family and ARCHITECTURES.get(family.class_name)


def why_not(config):
    """Why llama.cpp does not compute what a model of ours does, or None."""
    architecture = architecture_of(config)
    if architecture is None:
        return f"llama.cpp does not know {config.architecture}"
    if reason := unsupported(config, IMPLEMENTED[architecture], f"llama.cpp's {architecture}"):
        return reason
    if architecture == "deepseek2" and not config.q_lora_rank:
        return "llama.cpp has deepseek_v3 only with a q_lora_rank"
    if architecture == "deepseek2" and config.n_layer in (26, 27):
        return "llama.cpp has deepseek_v3 of 26 or 27 layers only without a q_lora_rank"
    return families.why_not(config)


def write_shape(writer, c, n_tokens):
    """The keys that say what network this is. c: its configuration."""
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
        # All heads share one key and value, of which each makes its own: kv_b is a part of query and output.
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


def to_tensors(family, config, state, n_more):
    """{name: tensor} as llama.cpp has them; the vocabulary grows by n_more tokens.

    These are read as <|unknown|> is, and said as rarely as <|padding|>, which no text holds.
    """
    import gguf
    import torch

    from model import stretched
    from tokenizer import Tokenizer

    weights = to_weights(family, config, state)
    if n_more:
        embedding = weights["model.embed_tokens.weight"]
        head = weights.get("lm_head.weight", embedding)
        for name, matrix, row in (
            ("model.embed_tokens", embedding, Tokenizer.unknown_id), ("lm_head", head, Tokenizer.padding_id)
        ):  # fmt: skip
            weights[f"{name}.weight"] = torch.cat((matrix, matrix[row].expand(n_more, -1)))
    architecture = ARCHITECTURES[family.class_name]
    by_name = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[architecture], config.n_layer)
    tensors, experts = {}, {}
    for theirs, tensor in weights.items():
        module, _, kind = theirs.replace("correction_bias", "correction.bias").rpartition(".")
        if module.startswith(f"model.layers.{config.n_layer}."):
            continue  # the module of multi-token prediction: nothing is said with it
        before, is_expert, rest = module.partition(".experts.")
        if is_expert:
            module = f"{before}.experts.{rest.partition('.')[2]}"
            experts.setdefault(f"{names.get_name(module)}.{kind}", []).append(tensor)
            continue
        name = names.get_name(module)
        if not name:
            raise UserError(f"llama.cpp has no place for {theirs}, a part of this model")
        if architecture == "llama" and module.endswith((".q_proj", ".k_proj")):
            n_head = config.n_head if module.endswith(".q_proj") else config.n_kv_head
            tensor = in_pairs(tensor, n_head, config.head_dim)
        if module.endswith(".kv_b_proj"):  # [heads of key and value, rank]
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
        # By how much each pair of rows turns slower than without scaling.
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        tensors["rope_freqs.weight"] = frequencies / stretched(frequencies, config.rope_theta, scaling)
    return tensors


def stored(name, tensor, kind):
    """(array, type) of a tensor in the kind of numbers asked for, as near to it as llama.cpp reads."""
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import quantize

    array = tensor.float().contiguous().numpy()
    # Vectors are added or multiplied as they are, and routers decide; both are small.
    if kind == "float32" or array.ndim == 1 or "ffn_gate_inp" in name:
        return array, Type.F32
    if kind == "q8_0" and array.shape[-1] % GROUP == 0:
        return quantize(array, Type.Q8_0), Type.Q8_0
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{name} holds numbers beyond float16's; take --type float32")
    return half, Type.F16


# ---- the file --------------------------------------------------------------------------------------


def write(checkpoint, name, path, kind):
    """Write the model of a checkpoint to `path`. kind: float32, float16 or q8_0."""
    import gguf
    from gguf.gguf_writer import WriterState

    from common.config import display_path
    from engine.checkpoint import build

    model, tokenizer = build(checkpoint, name)
    config = model.config
    check("gguf", config)
    family, architecture = family_of(config), architecture_of(config)
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    check_free(path)
    with atomic_write(path) as file:
        writer, arrays = gguf.GGUFWriter(None, architecture), []
        writer.add_name(f"Nano {checkpoint.task}")
        writer.add_file_type(gguf.LlamaFileType[types[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        n_more = write_tokenizer(writer, tokenizer, config.vocab_size, checkpoint.task)
        write_shape(writer, config, config.vocab_size + n_more)
        odd = 0
        for tensor_name, tensor in to_tensors(family, config, checkpoint.model, n_more).items():
            array, dtype = stored(tensor_name, tensor, kind)
            odd += kind == "q8_0" and dtype == gguf.GGMLQuantizationType.F16
            writer.add_tensor_info(tensor_name, array.shape, array.dtype, array.nbytes, raw_dtype=dtype)
            arrays.append(array)
        # The library would have the numbers written past Python, which then could not tell why that failed.
        writer.fout, writer.state = [file], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays:
            writer.write_padding(file, file.tell())
            file.write(array)
        writer.write_padding(file, file.tell())
    print(f"{display_path(path)}: {architecture}, {model.n_params / 1e6:.2f} M parameters in {kind}")
    if odd:
        print(f"{odd} matrices are in float16: {GROUP} does not divide the length of their rows")
    if tokenizer.kind == "bpe" and tokenizer.rules.get("normalizer"):
        print("llama.cpp does not join letters and accents (NFC): texts with them apart are cut otherwise")
