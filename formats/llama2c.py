"""The two files that llama2.c runs: model.bin and tokenizer.bin, for one C file without a library.

All numbers are little-endian, int is int32. Two of the layouts of model.bin are written:

    version 0, float32, for run.c
        7 int       width, width of the MLP, layers, query heads, key heads, tokens, context;
                    the number of tokens is negative if a head follows that is not the embedding
        float32     embedding; norms before attention, queries, keys, values, output projections; norms before
                    the MLP, gate, down, up; last norm; cos and sin of the rotary positions; head.
                    What is of every layer is of all layers one after another.
    version 2, int8, for runq.c
        256 bytes   "24ka", int 2, the 7 int (tokens not negative), 1 byte: whether the head is the embedding,
                    int: numbers in a group; zeros
        float32     norms before attention, norms before the MLP, last norm
        matrices    embedding, queries, keys, values, output projections, gate, down, up, head; of each layer
                    its int8 and then the float32 scale of each group of them: number = int8 * scale

    tokenizer.bin
        int         bytes of the longest token; then for each: float32 score, int length, bytes

run.c has its own ideas of text. It begins with token 1 and a space, looks up character after character, takes
for one it does not find the tokens 3 + byte, then joins two neighbours again and again, as long as their
bytes together are a token, the one of the highest score first. It ends where token 1 is drawn. So tokens get
new numbers here, and further ones make its text ours:

- 0 is <|unknown|>, 1 begins a prompt as <|bos|> and ends an answer as <|eos|>: its row of the embedding is
  that of the one, its row of the head that of the other. Hence the head never is the embedding, even if they
  are one in the model.
- 3 + byte is the byte, or the character, or reads as <|unknown|>. The bytes of an unknown character join to
  one <|unknown|>.
- The space at the beginning joins with token 1 to <|bos|>, or with the mark behind it to this mark alone. A
  mark is typed as one character of the private use area: see MARKS.
- BPE's tokens have the score of their rank. run.c knows no words, so pairs may join across the end of one.
"""

import struct

from common.config import ANY, unsupported
from common.errors import UserError
from common.files import atomic_folder, atomic_write
from formats import check, check_free, families
from formats.families import family_of, in_pairs, to_weights
from tokenizer import N_SPECIAL, Tokenizer

NEVER = -1e10  # the score at which nothing joins
BYTES = 3  # the token of byte 0
LARGEST_GROUP, SMALLEST_GROUP = 64, 4
# What llama2.c has built in, and what it reads from the file.
IMPLEMENTED = {
    "architecture": ("nano",),
    "use_rope": (True,),
    "is_causal": (True,),
    "qk_norm": (False,),
    "bias": (False,),
    "rope_scaling": (None,),
    "rope_theta": (10000.0,),
    "norm_eps": (1e-5,),
    **dict.fromkeys(
        ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_hidden",
         "tie_embeddings", "dropout"),
        ANY,
    ),
}  # fmt: skip
MARKS = 0xE000  # a mark is typed as the character of this number plus its own

# ---- the tokenizer ---------------------------------------------------------------------------------


def vocabulary(tokenizer, n_rows):
    """[(bytes, score, row of the embedding, row of the head)] of each token of llama2.c's.

    tokenizer: whose model has n_rows rows. UserError if it has characters that stand for marks.
    """
    t = Tokenizer
    marks = [chr(MARKS + i).encode() for i in range(N_SPECIAL + 1)]
    words = tokenizer.token_bytes[N_SPECIAL:]
    if set(marks) & set(words):
        raise UserError(f"the tokenizer has characters from U+{MARKS:X} on, which are marks in llama2.c")
    unknown, more = b"<|unknown|>", marks[N_SPECIAL]  # a byte that continues an unknown character
    number = {word: N_SPECIAL + i for i, word in enumerate(words)}
    tokens = [
        (unknown, NEVER, t.unknown_id, t.unknown_id),
        (marks[t.bos_id], NEVER, t.bos_id, t.eos_id),
        (marks[t.eos_id], NEVER, t.eos_id, t.bos_id),
    ]
    for byte in range(256):
        word = bytes([byte])
        if (i := number.pop(word, None)) is not None:
            # C's texts end at a 0; this is how run.c writes one.
            tokens.append((word if byte else b"<0x00>", NEVER, i, i))
        else:
            tokens.append((more if 0x80 <= byte < 0xC0 else unknown, NEVER, t.unknown_id, t.padding_id))
    for rank, (word, i) in enumerate(number.items()):
        is_joined = tokenizer.kind == "bpe" and 0 not in word
        tokens.append((word.replace(b"\0", b"<0x00>"), float(-rank) if is_joined else NEVER, i, i))
    for i in (t.padding_id, t.instruct_id, t.response_id, t.system_id):
        tokens.append((marks[i], NEVER, i, i))
    tokens += [(unknown, NEVER, i, i) for i in range(tokenizer.vocab_size, n_rows)]
    # These are only read: none is said more often than <|padding|>, which no text holds.
    begin = marks[t.bos_id] + b" "
    tokens.append((begin, 3.0, t.bos_id, t.padding_id))
    tokens += [(begin + marks[i], 2.0, i, t.padding_id) for i in range(N_SPECIAL) if i != t.unknown_id]
    if tokenizer.kind == "char":
        tokens += [(unknown + more * n, 1.0, t.unknown_id, t.padding_id) for n in (1, 2, 3)]
        if b" " not in words:  # run.c cannot do without
            tokens.append((b" ", NEVER, t.unknown_id, t.padding_id))
    return tokens


def tokenizer_file(tokens):
    parts = [struct.pack("<i", max(len(word) for word, *_ in tokens))]
    parts += [struct.pack("<fi", score, len(word)) + word for word, score, *_ in tokens]
    return b"".join(parts)


# ---- the network -----------------------------------------------------------------------------------


def why_not(config):
    """Why llama2.c does not compute what a model of ours does, or None."""
    if reason := unsupported(config, IMPLEMENTED, "llama2.c"):
        return reason
    if config.head_dim * config.n_head != config.n_embd:
        return "llama2.c has only heads of n_embd / n_head numbers"
    return families.why_not(config)


def to_tensors(config, state, tokens):
    """{name: [tensor of each layer]} or [tensor] as llama2.c has them, all float32."""
    import torch

    weights = {name: tensor.float() for name, tensor in to_weights(family_of(config), config, state).items()}
    embedding = weights.pop("model.embed_tokens.weight")
    head = weights.pop("lm_head.weight", embedding)
    read, said = (torch.tensor(rows) for rows in list(zip(*tokens, strict=True))[2:])

    def layers(name, n_head=None):
        found = [weights.pop(f"model.layers.{layer}.{name}.weight") for layer in range(config.n_layer)]
        return [in_pairs(matrix, n_head, config.head_dim) for matrix in found] if n_head else found

    tensors = {
        "embedding": [embedding[read]],
        "attention norm": layers("input_layernorm"),
        "queries": layers("self_attn.q_proj", config.n_head),
        "keys": layers("self_attn.k_proj", config.n_kv_head),
        "values": layers("self_attn.v_proj"),
        "projection": layers("self_attn.o_proj"),
        "mlp norm": layers("post_attention_layernorm"),
        "gate": layers("mlp.gate_proj"),
        "down": layers("mlp.down_proj"),
        "up": layers("mlp.up_proj"),
        "norm": [weights.pop("model.norm.weight")],
        "head": [head[said]],
    }
    if weights:
        raise UserError(f"llama2.c has no place for {min(weights)}, a part of this model")
    return tensors


def header(c, n_tokens):
    return struct.pack("<7i", c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head, n_tokens, c.block_size)


def float_parts(c, tensors):
    """Version 0, piece by piece. c: the configuration."""
    from model import rotary_table

    head = tensors.pop("head")
    yield header(c, -len(head[0]))
    rotary = rotary_table(c.head_dim, c.block_size, c.rope_theta)
    for tensor in (*sum(tensors.values(), []), *rotary, *head):
        yield tensor.numpy().astype("<f4").tobytes()


def int8_parts(c, tensors, group):
    """Version 2, piece by piece. c: the configuration; group: numbers that share a scale."""
    norms = [tensors.pop(name) for name in ("attention norm", "mlp norm", "norm")]
    start = b"24ka" + struct.pack("<i", 2) + header(c, len(tensors["head"][0])) + struct.pack("<Bi", 0, group)
    yield start.ljust(256, b"\0")
    for tensor in sum(norms, []):
        yield tensor.numpy().astype("<f4").tobytes()
    for tensor in sum(tensors.values(), []):
        groups = tensor.reshape(-1, group)
        scales = groups.abs().amax(dim=1, keepdim=True) / 127
        # A group of zeros has scale 0, and any number will do.
        yield (groups / scales.clamp(min=1e-30)).round().clamp(-127, 127).numpy().astype("int8").tobytes()
        yield scales.numpy().astype("<f4").tobytes()


def group_of(config):
    """How many numbers share a scale in int8; every row of a matrix holds whole groups."""
    group = LARGEST_GROUP
    while config.n_embd % group or config.n_hidden % group:
        group //= 2
    if group < SMALLEST_GROUP:  # scales would not lie where C can read them
        raise UserError("n_embd and n_hidden must be multiples of 4 for int8; take --type float32")
    return group


# ---- the files -------------------------------------------------------------------------------------


def write_folder(checkpoint, name, folder, kind):
    """Write the model of a checkpoint. kind: float32 (version 0) or q8_0 (version 2)."""
    from common.config import display_path
    from engine.checkpoint import build

    model, tokenizer = build(checkpoint, name)
    config = model.config
    check("llama2c", config)
    tokens = vocabulary(tokenizer, config.vocab_size)
    tensors = to_tensors(config, checkpoint.model, tokens)
    if kind == "float32":
        program, parts = "run", float_parts(config, tensors)
    else:
        program, parts = "runq", int8_parts(config, tensors, group_of(config))
    check_free(folder)
    with atomic_folder(folder) as beside:
        with atomic_write(beside / "model.bin") as file:
            file.writelines(parts)
        with atomic_write(beside / "tokenizer.bin") as file:
            file.write(tokenizer_file(tokens))
    print(f"{display_path(folder)}: llama2.c's {program}, {model.n_params / 1e6:.2f} M parameters in {kind}")
    print(f"Run it there: {program} model.bin -t 0 -i {example(checkpoint.task)}")


def example(task):
    """A prompt, as a shell's word."""
    if task != "sft":
        return '"Once upon a time"'
    ask, answer = (
        "".join(f"\\{byte:o}" for byte in chr(MARKS + i).encode())
        for i in (Tokenizer.instruct_id, Tokenizer.response_id)
    )
    return f"\"$(printf '{ask}%s{answer}' 'Who are you?')\""
