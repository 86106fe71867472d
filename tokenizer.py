"""Text to token ids and back.

A language model reads and writes small integers: the ids of tokens. This file has two ways of cutting
text into tokens. They share one interface and differ in one idea:

- `CharTokenizer`: every Unicode character of the training text is a token. Nothing could be simpler. The
  vocabulary is small (a few thousand for Chinese), and a character it has never seen becomes <|unknown|>.
- `BPETokenizer`: byte-pair encoding. The 256 bytes are tokens, and so are the most frequent sequences of
  bytes (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; on bytes:
  Radford et al. 2019, GPT-2). A text has fewer tokens, the vocabulary is larger, and nothing is unknown.

Both start with the same seven special tokens, ids 0 to 6. `encode` never produces one of them, even if the
text spells one: what a user types is plain text. Only `render_chats` below and the preparation of
training data insert them. A tokenizer is saved as plain JSON and identified by its `fingerprint`, so that
ids made with one tokenizer are never read with another.

    python tokenizer.py train --kind bpe --vocab_size 32000 corpus.txt -o tokenizer.json
    python tokenizer.py stats corpus.txt
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from reprlib import repr as short_repr
from typing import Any, ClassVar

from common.errors import UserError, run  # first: it explains an import that fails

# isort: split
import numpy as np

from common import bpe
from common.bpe import byte_alphabet
from common.files import write_text

SPECIAL_TOKENS = ("<|padding|>", "<|unknown|>", "<|bos|>", "<|eos|>",
                  "<|instruct_mark|>", "<|response_mark|>", "<|system_mark|>")  # fmt: skip
N_SPECIAL = len(SPECIAL_TOKENS)
FORMAT = {"format": "nano-tokenizer", "version": 1}
CHAT_TEMPLATE = "nano"  # the name of the chat template below, which checkpoints remember
MAX_JSON_LENGTH = 1 << 25  # characters of a tokenizer's JSON; one with 200,000 merges has 10 million
BLOCK = 1 << 16  # characters processed at once: they fit in the CPU's cache


# ---- what both kinds share -------------------------------------------------------------------------


class Tokenizer(ABC):
    """Decoding, saving and everything else that the two kinds have in common.

    token_bytes   the UTF-8 bytes of each token (for BPE perhaps a part of a character), by id
    vocab_size    the number of tokens, special ones included
    dtype         of the ids: uint16, or uint32 if the vocabulary is larger than 65,536
    """

    kind: ClassVar[str]
    padding_id, unknown_id, bos_id, eos_id, instruct_id, response_id, system_id = range(N_SPECIAL)
    _max_composed = 1  # so many characters of a text may become one before it is cut into tokens

    def __init__(self, token_bytes: list[bytes]) -> None:
        self.token_bytes = [token.encode() for token in SPECIAL_TOKENS] + token_bytes
        self.vocab_size = len(self.token_bytes)
        # All tokens end to end in one array of bytes: decoding is then arithmetic on arrays.
        self._bytes = np.frombuffer(b"".join(self.token_bytes), np.uint8)
        self._lengths = np.array([len(token) for token in self.token_bytes])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`: [n] of self.dtype. A special token spelled in `text` is ordinary text."""
        return self.encode_flat([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text. Much faster than many calls of `encode`."""
        ids, lengths = self.encode_flat(texts)
        ends = np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    @abstractmethod
    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one array [n], and how many of them belong to each text: (ids, lengths)."""

    def pieces(self, text: str) -> Iterator[str]:
        """Cut a text so that the ids of its pieces, end to end, are the ids of the text."""
        for start in range(0, len(text), BLOCK):
            yield text[start : start + BLOCK]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """The text that `ids` stand for; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> bytes:
        """The UTF-8 bytes that `ids` stand for; a BPE token may be only a part of a character.

        Special tokens are spelled out, or left out with `skip_special`. ValueError if an id is out of range.
        """
        ids = np.asarray(ids, dtype=np.int64).ravel()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}, not {ids.min()}..{ids.max()}")
        if skip_special:
            ids = ids[ids >= N_SPECIAL]
        decoded = []
        for part in np.split(ids, range(BLOCK, len(ids), BLOCK)):
            lengths = self._lengths[part]
            ends = np.cumsum(lengths)
            indices = np.repeat(self._starts[part] - ends + lengths, lengths) + np.arange(lengths.sum())
            decoded.append(self._bytes[indices].tobytes())
        return b"".join(decoded)

    def min_tokens(self, text: str) -> int:
        """A lower bound on the number of tokens of a text, from its length alone."""
        return -(-len(text) // self._max_characters)

    @functools.cached_property
    def _max_characters(self) -> int:
        """The largest number of characters of a text that become one token."""
        is_first = (self._bytes & 0xC0 != 0x80).astype(np.int64)  # the first byte of each UTF-8 character
        return self._max_composed * int(np.add.reduceat(is_first, self._starts)[N_SPECIAL:].max(initial=1))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON: two tokenizers with the same one produce the same ids."""
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {**FORMAT, "kind": self.kind, "special_tokens": list(SPECIAL_TOKENS)}

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as JSON values; `from_dict` rebuilds it."""
        return {**self._content(), "fingerprint": self.fingerprint}

    def to_json(self) -> str:
        """The text that `save` writes."""
        return json.dumps(self.to_dict(), ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path`; the file is complete or not there at all."""
        write_text(path, self.to_json())


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise UserError(f"this is not a sound Nano tokenizer: {problem}")


# ---- one character, one token ----------------------------------------------------------------------


N_CODE_POINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)  # halves of UTF-16 pairs: code points that are not characters


def code_points(text: str) -> Iterator[np.ndarray]:
    """The code points of `text`, in arrays of at most BLOCK."""
    for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK]
        if block.isascii():
            yield np.frombuffer(block.encode("ascii"), np.uint8)  # the same numbers, four times as fast
        else:
            yield np.frombuffer(block.encode("utf-32-le", "surrogatepass"), "<u4")


class CharTokenizer(Tokenizer):
    """Each of `characters` is a token; sorted by code point, they have the ids from N_SPECIAL on.

    A table with one entry for each of the 1.1 million code points makes encoding a single numpy lookup.
    """

    kind = "char"

    def __init__(self, characters: str) -> None:
        super().__init__([character.encode() for character in characters])
        self.characters = characters
        self._table = np.full(N_CODE_POINTS, self.unknown_id, self.dtype)
        numbers = np.frombuffer(characters.encode("utf-32-le"), "<u4")
        self._table[numbers] = np.arange(N_SPECIAL, self.vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        """The tokenizer of all characters in `texts` (a few long texts are faster than many short ones)."""
        seen = np.zeros(N_CODE_POINTS, bool)
        for text in texts:
            for numbers in code_points(text):
                if numbers.dtype == np.uint8:  # in ASCII, dropping what is known first is eight times as fast
                    known = np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()
                    numbers = np.frombuffer(numbers.tobytes().translate(None, known), np.uint8)
                seen[numbers] = True
        seen[SURROGATES] = False
        return cls(np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le"))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        text = "".join(texts)
        ids = np.empty(len(text), self.dtype)
        start = 0
        for numbers in code_points(text):
            # Every code point is in the table; mode="clip" merely saves numpy from checking that.
            np.take(self._table, numbers, out=ids[start : start + len(numbers)], mode="clip")
            start += len(numbers)
        return ids, np.fromiter(map(len, texts), np.int64, len(texts))

    def _content(self) -> dict[str, Any]:
        return {**super()._content(), "characters": self.characters}

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> CharTokenizer:
        characters: Any = content.get("characters")
        _require(isinstance(characters, str), "its characters are missing")
        _require(all(a < b for a, b in itertools.pairwise(characters)), "its characters are out of order")
        _require(not re.search("[\ud800-\udfff]", characters), "it holds half a surrogate pair")
        return cls(characters)


# ---- byte-pair encoding ----------------------------------------------------------------------------


class BPETokenizer(Tokenizer):
    """The 256 bytes have the ids from N_SPECIAL on; each merge of two earlier tokens adds a new one.

    merges: pairs of tokens, spelled in the letters of `byte_alphabet`, in the order they were learned.
    rules: how text is cut into words first, for tokenizers trained elsewhere; see common/bpe.py.

    The `tokenizers` library learns and applies merges. Its ids are those here minus N_SPECIAL.
    """

    kind = "bpe"
    # BPE never merges across a line end, so a long text may be cut there and encoded in parallel.
    # (Single line breaks only: the library's pattern splits a run of white space before its last character.)
    _line_end = re.compile(r"(?<=\S\n)(?=\S)")

    def __init__(self, merges: list, **rules: Any) -> None:
        byte_of = {letter: byte for byte, letter in enumerate(byte_alphabet())}
        self.merges = merges
        self.rules = {key: value for key, value in rules.items() if value}
        merged = [left + right for left, right in merges]
        # A token that two different pairs produce keeps the id of the first: dicts keep insertion order.
        tokens = dict.fromkeys([*byte_of, *merged, *self.rules.get("words", ())])
        self._library_ids = {token: i for i, token in enumerate(tokens)}
        super().__init__([bytes(byte_of[letter] for letter in token) for token in tokens])
        if "normalizer" in self.rules:
            self._max_composed = 4  # NFC composes at most four characters (Unicode Standard Annex 15)

    @functools.cached_property
    def _library(self) -> bpe.LibraryTokenizer:
        return self.build_library(self._library_ids)

    def build_library(self, vocabulary: dict[str, int], **options: Any) -> bpe.LibraryTokenizer:
        """This tokenizer as one of the `tokenizers` library, with the ids of `vocabulary`."""
        rules = {key: value for key, value in self.rules.items() if key != "words"}
        merges = [(left, right) for left, right in self.merges]
        return bpe.build_library(vocabulary, merges, **rules, **options)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 32000) -> BPETokenizer:
        """Learn merges from `texts` until there are `vocab_size` tokens, special ones included.

        There are fewer if the texts have too few repeated pairs. UserError if vocab_size is below 263.
        """
        if vocab_size < (least := N_SPECIAL + 256):
            raise UserError(f"vocab_size={vocab_size} is too small: bytes and special tokens are {least}")
        return cls(bpe.learn_merges(texts, vocab_size - N_SPECIAL))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces, owners = [], []  # the texts in pieces, and which text each piece belongs to
        for owner, text in enumerate(texts):
            for piece in self.pieces(text):
                pieces.append(piece)
                owners.append(owner)
        ids = [np.array(piece_ids, np.int64) for piece_ids in bpe.encode(self._library, pieces)]
        lengths = np.zeros(len(texts), np.int64)
        np.add.at(lengths, owners, [len(piece_ids) for piece_ids in ids])
        flat = np.concatenate([np.empty(0, np.int64), *ids]) + N_SPECIAL
        return flat.astype(self.dtype), lengths

    def pieces(self, text: str) -> Iterator[str]:
        text, start = bpe.replace_surrogates(text), 0
        while (
            len(text) - start > BLOCK
            and "patterns" not in self.rules  # patterns from elsewhere may match across a line end
            and (match := self._line_end.search(text, start + BLOCK))
        ):
            yield text[start : match.start()]
            start = match.start()
        yield text[start:]

    def _content(self) -> dict[str, Any]:
        return {**super()._content(), "merges": self.merges, **self.rules}

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> BPETokenizer:
        fault = bpe.why_invalid(content)
        _require(fault is None, str(fault))
        return cls(content["merges"], **{key: content[key] for key in bpe.RULES if key in content})


# ---- loading ---------------------------------------------------------------------------------------


def from_dict(content: Any) -> CharTokenizer | BPETokenizer:
    """The tokenizer that `to_dict` described. UserError if `content` is damaged or something else."""
    _require(isinstance(content, dict) and content.get("format") == FORMAT["format"], "its format is unknown")
    version, kind = content.get("version"), content.get("kind")
    _require(version == FORMAT["version"], f"its version is {short_repr(version)}, not 1")
    _require(content.get("special_tokens") == list(SPECIAL_TOKENS), "its special tokens are not Nano's")
    _require(kind in ("char", "bpe"), f"its kind is {short_repr(kind)}, not char or bpe")
    tokenizer = (CharTokenizer if kind == "char" else BPETokenizer)._from_content(content)
    _require(content.get("fingerprint") == tokenizer.fingerprint, "its fingerprint does not match its tokens")
    return tokenizer


def load(path: str | os.PathLike[str]) -> CharTokenizer | BPETokenizer:
    """The tokenizer saved at `path`. UserError, naming the file, if it is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_JSON_LENGTH + 1)
        if len(text) > MAX_JSON_LENGTH:
            raise UserError("this is too large for a tokenizer")
        return from_dict(json.loads(text))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `python data.py` writes a tokenizer with the data") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a Nano tokenizer: it is not valid JSON") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---- the chat template -----------------------------------------------------------------------------


Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": ...}


def _check_each(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError("the messages must be a list of at least one")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message {number} needs a role: system, user or assistant, not {role!r}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {number} needs a content that is text")
        if role == "system" and number > 1:
            raise UserError(f"message {number} is from system, which may only speak first")


def check_messages(messages: list[Message]) -> None:
    """UserError unless `render_chats` can take `messages`: a list of {"role": ..., "content": str}.

    A system message may come first; then user and assistant alternate, and either may begin.
    """
    _check_each(messages)
    for number, (before, message) in enumerate(itertools.pairwise(messages), 2):
        if message["role"] == before["role"]:
            other = {"user": "assistant", "assistant": "user"}[message["role"]]
            raise UserError(f"message {number} is from {message['role']} where {other} should speak")


def merge_turns(messages: list[Message]) -> tuple[list[Message], int]:
    """Join consecutive messages of one role, with newlines, so that the roles alternate.

    Returns the new messages, and by how many they are fewer. UserError for what joining cannot mend: an
    unknown role, a content that is not text, a system message that is not the first.
    """
    _check_each(messages)
    merged = []
    for _, turn in itertools.groupby(messages, key=lambda message: message["role"]):
        first, *others = turn
        if others:
            first = {**first, "content": "\n".join(message["content"] for message in (first, *others))}
        merged.append(first)
    return merged, len(messages) - len(merged)


def render_chats(
    tokenizer: Tokenizer, conversations: Sequence[list[Message]], add_generation_prompt: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conversations in the template that fine-tuning teaches and inference uses: (ids, mask) of each.

        [<|system_mark|>text] <|instruct_mark|>text<|response_mark|>text<|eos|> ... (without the spaces)

    ids [n] of tokenizer.dtype; mask [n] uint8 is 1 where the loss counts: on what the assistant says and
    the <|eos|> after it. With `add_generation_prompt`, ids end with <|response_mark|>: the model's turn.
    """
    mark = dict(system=tokenizer.system_id, user=tokenizer.instruct_id, assistant=tokenizer.response_id)
    for messages in conversations:
        check_messages(messages)
    contents = iter(tokenizer.encode_batch([m["content"] for messages in conversations for m in messages]))
    chats = []
    for messages in conversations:
        parts: list[Any] = []
        is_learned: list[bool] = []  # of each part
        for message in messages:
            is_answer = message["role"] == "assistant"
            parts += [[mark[message["role"]]], next(contents), [tokenizer.eos_id] * is_answer]
            is_learned += [False, is_answer, is_answer]
        if add_generation_prompt:
            parts.append([tokenizer.response_id])
            is_learned.append(False)
        ids = np.concatenate(parts, dtype=tokenizer.dtype, casting="unsafe")
        mask = np.repeat(np.array(is_learned, np.uint8), [len(part) for part in parts])
        chats.append((ids, mask))
    return chats


def render_chat(
    tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The same for one conversation."""
    return render_chats(tokenizer, [messages], add_generation_prompt)[0]


if __name__ == "__main__":
    from preparation.tokenizer_commands import main

    run(main)
