"""llama2.c: model.bin and tokenizer.bin, the two files that its single C file runs without any library.

All numbers are little-endian, int is int32. Two of the layouts of model.bin are written:

    version 0, float32, for run.c
        7 int       width, width of the MLP, layers, query heads, key heads, tokens, context length;
                    the number of tokens is negative if the output head is not the embedding
        float32     embedding; norms before attention, queries, keys, values, output projections; norms before
                    the MLP, gate, down, up; last norm; cos and sin of the rotary embedding; output head.
                    Each kind of tensor is stored for all layers before the next kind.
    version 2, int8, for runq.c
        256 bytes   "24ka", int 2, the 7 int (tokens not negative), 1 byte: whether the head is the embedding,
                    int: numbers in a group; zeros
        float32     norms before attention, norms before the MLP, last norm
        matrices    embedding, queries, keys, values, output projections, gate, down, up, head; of each layer
                    the int8 and then one float32 scale per group: number = int8 * scale

    tokenizer.bin
        int         length of the longest token in bytes; then for each: float32 score, int length, bytes

run.c tokenizes in its own way. A text begins with token 1 and a space. It looks up each character, and uses
the tokens 3 + byte for one it does not find. Then it merges neighbours as long as their concatenation is a
token, the one with the highest score first. Generation ends when token 1 is sampled. To make it produce the
same tokens as Nano, tokens get new ids here, and some are added:

- 0 is <|unknown|>. 1 is <|bos|> at the beginning of a prompt and <|eos|> at the end of an answer: its row in
  the embedding is that of <|bos|>, its row in the head that of <|eos|>. So embedding and head are always
  stored separately, even if the model ties them.
- 3 + byte is the byte itself if that is a token, otherwise it acts as <|unknown|>. The bytes of an unknown
  character merge into a single <|unknown|>.
- The space at the beginning merges with token 1 into <|bos|>, or with a special token behind it into that
  token alone. A special token is typed as one character of Unicode's private use area: see PRIVATE_USE.
- The score of a BPE token is its rank. run.c does not split text into words first, so it may merge across the
  end of a word.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import UserError
from common.files import atomic_folder, atomic_write
from config.validation import ANY, unsupported
from formats import check_supported, families, refuse_to_overwrite
from formats.families import Whitelist, find_family, to_hf_weights, to_interleaved
from tokenizer import N_SPECIAL, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from engine.checkpoint import Checkpoint

SUFFIX = "_llama2c"
NUMBER_TYPES = ("float32", "q8_0")
NEVER = -1e10  # the score of a token that no pair is merged into
LARGEST_GROUP, SMALLEST_GROUP = 64, 4  # numbers that share a scale in int8
# The keys and values of Nano's configuration that llama2.c implements.
IMPLEMENTED: Whitelist = {
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
PRIVATE_USE = 0xE000  # special token i is typed as the character U+E000 + i

# ---- the tokenizer ---------------------------------------------------------------------------------


class Token(NamedTuple):
    """One token of llama2.c, and which rows of Nano's matrices it has."""

    text: bytes
    score: float  # pairs with the highest score are merged first
    embedding_row: int
    head_row: int


def vocabulary(tokenizer: Tokenizer, n_rows: int) -> list[Token]:
    """The tokens of llama2.c for a model whose embedding has n_rows rows.

    Raises UserError if the tokenizer has characters that stand for special tokens here.
    """
    t = Tokenizer
    marks = [chr(PRIVATE_USE + i).encode() for i in range(N_SPECIAL + 1)]
    words = tokenizer.token_bytes[N_SPECIAL:]
    if set(marks) & set(words):
        raise UserError(
            f"the tokenizer has characters from U+{PRIVATE_USE:X} on, which are special tokens in llama2.c"
        )
    unknown, continuation = b"<|unknown|>", marks[N_SPECIAL]  # of the bytes of an unknown character
    ids = {word: N_SPECIAL + i for i, word in enumerate(words)}
    tokens = [
        Token(unknown, NEVER, t.unknown_id, t.unknown_id),
        Token(marks[t.bos_id], NEVER, t.bos_id, t.eos_id),
        Token(marks[t.eos_id], NEVER, t.eos_id, t.bos_id),
    ]
    for byte in range(256):
        word = bytes([byte])
        if (i := ids.pop(word, None)) is not None:
            # Strings in C end at a zero byte; this is how run.c writes one.
            tokens.append(Token(word if byte else b"<0x00>", NEVER, i, i))
        else:
            text = continuation if 0x80 <= byte < 0xC0 else unknown
            tokens.append(Token(text, NEVER, t.unknown_id, t.padding_id))
    for rank, (word, i) in enumerate(ids.items()):
        is_merged = tokenizer.kind == "bpe" and 0 not in word
        tokens.append(Token(word.replace(b"\0", b"<0x00>"), float(-rank) if is_merged else NEVER, i, i))
    for i in (t.padding_id, t.instruct_id, t.response_id, t.system_id):
        tokens.append(Token(marks[i], NEVER, i, i))
    tokens += [Token(unknown, NEVER, i, i) for i in range(tokenizer.vocab_size, n_rows)]
    # The rest only occur in prompts: they are as unlikely as <|padding|>, which no text contains.
    begin = marks[t.bos_id] + b" "
    tokens.append(Token(begin, 3.0, t.bos_id, t.padding_id))
    tokens += [Token(begin + marks[i], 2.0, i, t.padding_id) for i in range(N_SPECIAL) if i != t.unknown_id]
    if tokenizer.kind == "char":
        tokens += [Token(unknown + continuation * n, 1.0, t.unknown_id, t.padding_id) for n in (1, 2, 3)]
        if b" " not in words:  # run.c requires it
            tokens.append(Token(b" ", NEVER, t.unknown_id, t.padding_id))
    return tokens


def tokenizer_file(tokens: list[Token]) -> bytes:
    """The content of tokenizer.bin."""
    parts = [struct.pack("<i", max(len(token.text) for token in tokens))]
    parts += [struct.pack("<fi", token.score, len(token.text)) + token.text for token in tokens]
    return b"".join(parts)


# ---- the network -----------------------------------------------------------------------------------


def unsupported_reason(config: Any) -> str | None:
    """Why llama2.c does not compute the same as a model of Nano, or None if it does."""
    if reason := unsupported(config, IMPLEMENTED, "llama2.c"):
        return reason
    if config.head_dim * config.n_head != config.n_embd:
        return "llama2.c needs head_dim to be n_embd / n_head"
    return families.unsupported_reason(config)


def to_tensors(config: Any, state: dict[str, Tensor], tokens: list[Token]) -> dict[str, list[Tensor]]:
    """Convert a state dictionary to {name: [one tensor per layer, or a single one]}, all in float32."""
    family = find_family(config)
    assert family  # as the model is supported
    weights = {name: tensor.float() for name, tensor in to_hf_weights(family, config, state).items()}
    embedding = weights.pop("model.embed_tokens.weight")
    head = weights.pop("lm_head.weight", embedding)

    def layers(name: str, n_head: int | None = None) -> list[Tensor]:
        found = [weights.pop(f"model.layers.{layer}.{name}.weight") for layer in range(config.n_layer)]
        return [to_interleaved(matrix, n_head, config.head_dim) for matrix in found] if n_head else found

    tensors = {
        "embedding": [embedding[[token.embedding_row for token in tokens]]],
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
        "head": [head[[token.head_row for token in tokens]]],
    }
    if weights:
        raise UserError(f"llama2.c has no place for {min(weights)}, a part of this model")
    return tensors


def header(c: Any, n_tokens: int) -> bytes:
    """The 7 int of model.bin. c: the configuration."""
    return struct.pack("<7i", c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head, n_tokens, c.block_size)


def float32_chunks(c: Any, tensors: dict[str, list[Tensor]]) -> Iterator[bytes]:
    """Yield the content of model.bin, version 0. c: the configuration."""
    from model import rotary_table

    head = tensors.pop("head")
    yield header(c, -len(head[0]))
    rotary = rotary_table(c.head_dim, c.block_size, c.rope_theta)
    for tensor in (*sum(tensors.values(), []), *rotary, *head):
        yield tensor.numpy().astype("<f4").tobytes()


def int8_chunks(c: Any, tensors: dict[str, list[Tensor]], group_size: int) -> Iterator[bytes]:
    """Yield the content of model.bin, version 2. c: the configuration."""
    norms = [tensors.pop(name) for name in ("attention norm", "mlp norm", "norm")]
    start = (
        b"24ka"
        + struct.pack("<i", 2)
        + header(c, len(tensors["head"][0]))
        + struct.pack("<Bi", 0, group_size)
    )
    yield start.ljust(256, b"\0")
    for tensor in sum(norms, []):
        yield tensor.numpy().astype("<f4").tobytes()
    for tensor in sum(tensors.values(), []):
        groups = tensor.reshape(-1, group_size)
        scales = groups.abs().amax(dim=1, keepdim=True) / 127
        # The minimum avoids 0 / 0 in a group of zeros.
        yield (groups / scales.clamp(min=1e-30)).round().clamp(-127, 127).numpy().astype("int8").tobytes()
        yield scales.numpy().astype("<f4").tobytes()


def group_size_of(config: Any) -> int:
    """The largest group size that divides the rows of all matrices. Raises UserError if there is none."""
    group_size = LARGEST_GROUP
    while config.n_embd % group_size or config.n_hidden % group_size:
        group_size //= 2
    if group_size < SMALLEST_GROUP:  # the float32 scales would not be aligned to 4 bytes
        raise UserError("n_embd and n_hidden must be multiples of 4 for int8; use --type float32")
    return group_size


# ---- the files -------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, name: str, path: Path, number_type: str | None) -> None:
    """Write the checkpoint's model into a new folder; see `formats.Format`."""
    from common.config import display_path
    from engine.checkpoint import build

    model, tokenizer = build(checkpoint, name)
    config = model.config
    check_supported("llama2c", config)
    number_type = number_type or NUMBER_TYPES[0]
    tokens = vocabulary(tokenizer, config.vocab_size)
    tensors = to_tensors(config, checkpoint.model, tokens)
    if number_type == "float32":
        program, chunks = "run", float32_chunks(config, tensors)
    else:
        program, chunks = "runq", int8_chunks(config, tensors, group_size_of(config))
    refuse_to_overwrite(path)
    with atomic_folder(path) as folder:
        with atomic_write(folder / "model.bin") as file:
            file.writelines(chunks)
        with atomic_write(folder / "tokenizer.bin") as file:
            file.write(tokenizer_file(tokens))
    print(
        f"{display_path(path)}: for llama2.c's {program}, {model.n_params / 1e6:.2f} M parameters "
        f"in {number_type}"
    )
    print(
        f"In that folder: {program} model.bin -t 0 -i {example_prompt(checkpoint.chat_template is not None)}"
    )


def example_prompt(is_chat: bool) -> str:
    """A prompt, quoted for the shell."""
    if not is_chat:
        return '"Once upon a time"'
    question, answer = (
        "".join(f"\\{byte:o}" for byte in chr(PRIVATE_USE + i).encode())
        for i in (Tokenizer.instruct_id, Tokenizer.response_id)
    )
    return f"\"$(printf '{question}%s{answer}' 'Who are you?')\""
