"""Text to token ids and back.

A language model reads and writes small integers, the ids of tokens. This file holds the two
ways Nano has of cutting text into tokens. They share one interface and differ in one idea:

- `CharTokenizer`: every Unicode character of the corpus is a token. Nothing could be simpler,
  the vocabulary is small (a few thousand for Chinese), and a character it has never seen
  becomes <|unknown|>.
- `BPETokenizer`: the 256 bytes are tokens, and so are the most frequent sequences of bytes
  (byte-pair encoding; Sennrich et al. 2016, "Neural Machine Translation of Rare Words with
  Subword Units"; on bytes: Radford et al. 2019, GPT-2). Fewer tokens per text, a larger
  vocabulary, and nothing is ever unknown.

Both begin with the same seven special tokens, ids 0 to 6. They never come out of `encode`, even
from text that spells one: what a user types is text. Only `render_chats` below, and data.py, put
them between texts. A tokenizer is saved as plain JSON and known by its `fingerprint`, so that
ids made with one are never read with another.

    python tokenizer.py train --kind bpe --vocab_size 32000 corpus.txt -o tokenizer.json
    python tokenizer.py stats corpus.txt
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import time
from abc import ABC, abstractmethod
from pathlib import Path
from reprlib import repr as shown

from common.errors import UserError, run  # first: it explains an import that fails

# isort: split
import numpy as np

from common.files import write_text
from common.patterns import trouble as trouble_with
from sources import Found, Source
from sources.records import words_of

ROOT = Path(__file__).resolve().parent

SPECIAL_TOKENS = (
    "<|padding|>",
    "<|unknown|>",
    "<|bos|>",
    "<|eos|>",
    "<|instruct_mark|>",
    "<|response_mark|>",
    "<|system_mark|>",
)
N_SPECIAL = len(SPECIAL_TOKENS)
FORMAT = {"format": "nano-tokenizer", "version": 1}
CHAT_TEMPLATE = "nano"  # the name of the template below, for checkpoints
LARGEST = 1 << 25  # characters of its JSON; 200,000 merges have 10 million


# ---- what both kinds share -------------------------------------------------------------------------


class Tokenizer(ABC):
    """Ids, decoding, saving.

    words: the UTF-8, or part of it, that each id stands for; special tokens are written as their names.
    """

    kind = None
    _n_composed = 1  # characters of a text that may become one before it is cut into tokens
    padding_id, unknown_id, bos_id, eos_id, instruct_id, response_id, system_id = range(N_SPECIAL)

    def __init__(self, words):
        """words: of the ids from N_SPECIAL on"""
        self.words = [token.encode() for token in SPECIAL_TOKENS] + words
        self.vocab_size = len(self.words)
        # All words in one row of bytes, so that decoding is arithmetic on arrays.
        self._bytes = np.frombuffer(b"".join(self.words), np.uint8)
        self._lengths = np.array([len(word) for word in self.words])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text):
        """Ids of `text`, [n] of self.dtype. Special tokens written in `text` are text like any other."""
        return self.encode_flat([text])[0]

    def encode_batch(self, texts):
        """Ids of each of `texts`: a list of arrays. Much faster than one `encode` after another."""
        ids, lengths = self.encode_flat(texts)
        ends = np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def pieces(self, text):
        """Parts of a text whose ids, one after the other, are those of the text."""
        for start in range(0, len(text), BLOCK):
            yield text[start : start + BLOCK]

    @abstractmethod
    def encode_flat(self, texts):
        """Ids of all of a list of texts in one array, and how many belong to each: (ids [n], lengths)."""

    def decode_bytes(self, ids, skip_special=False):
        """The UTF-8 that ids (array or list) stand for; a BPE token may be a part of a character.

        Special tokens are written as their names, or left out. ValueError for an id out of range.
        """
        ids = np.asarray(ids, dtype=np.int64).ravel()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}, not {ids.min()}..{ids.max()}")
        if skip_special:
            ids = ids[ids >= N_SPECIAL]
        decoded = []
        for part in np.split(ids, range(1 << 16, len(ids), 1 << 16)):  # in pieces that stay in the cache
            lengths = self._lengths[part]
            ends = np.cumsum(lengths)
            places = np.repeat(self._starts[part] - ends + lengths, lengths) + np.arange(lengths.sum())
            decoded.append(self._bytes[places].tobytes())
        return b"".join(decoded)

    def decode(self, ids, skip_special=False):
        """The text that ids stand for; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def fewest(self, text):
        """A text has at least so many tokens: known from its length, without encoding it."""
        return -(-len(text) // self._longest)

    @functools.cached_property
    def _longest(self):
        """The most characters of a text that become one token."""
        begins = (self._bytes & 0xC0 != 0x80).astype(np.int64)  # of each character, one byte says that
        return self._n_composed * int(np.add.reduceat(begins, self._starts)[N_SPECIAL:].max(initial=1))

    def to_dict(self):
        """All of the tokenizer as plain JSON values: `from_dict` makes an equal one."""
        return {**self._content(), "fingerprint": self.fingerprint}

    def _content(self):
        return {**FORMAT, "kind": self.kind, "special_tokens": list(SPECIAL_TOKENS)}

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 (hex) of the canonical JSON: equal for tokenizers that give equal ids."""
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, path):
        """Write JSON to `path`; the file is there whole or not at all."""
        write_text(path, self.to_json())

    def to_json(self):
        """What `save` writes."""
        return json.dumps(self.to_dict(), ensure_ascii=False) + "\n"


# ---- one character, one token ----------------------------------------------------------------------


BLOCK = 1 << 16  # characters handled at once: what a processor's cache holds
N_CODE_POINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)  # halves of UTF-16 pairs: numbers that are no characters


def code_points(text):
    """The numbers of the characters of `text`, in arrays of at most BLOCK."""
    for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK]
        if block.isascii():
            yield np.frombuffer(block.encode("ascii"), np.uint8)  # the same numbers, four times as fast
        else:
            yield np.frombuffer(block.encode("utf-32-le", "surrogatepass"), "<u4")


class CharTokenizer(Tokenizer):
    """`characters`, in the order of their code points, have the ids N_SPECIAL, N_SPECIAL + 1, ...

    A table with one entry per code point, of which there are 1.1 million, makes encoding a
    single numpy lookup.
    """

    kind = "char"

    def __init__(self, characters):
        super().__init__([character.encode() for character in characters])
        self.characters = characters
        self._table = np.full(N_CODE_POINTS, self.unknown_id, self.dtype)
        numbers = np.frombuffer(characters.encode("utf-32-le"), "<u4")
        self._table[numbers] = np.arange(N_SPECIAL, self.vocab_size)

    @classmethod
    def train(cls, texts):
        """The tokenizer of all characters in an iterable of texts (long ones are handled fastest)."""
        seen = np.zeros(N_CODE_POINTS, bool)
        for text in texts:
            for numbers in code_points(text):
                if numbers.dtype == np.uint8:  # ASCII: to take out what is known is eight times as fast
                    known = np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()
                    numbers = np.frombuffer(numbers.tobytes().translate(None, known), np.uint8)
                seen[numbers] = True
        seen[SURROGATES] = False
        return cls(np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le"))

    def encode_flat(self, texts):
        text = "".join(texts)
        ids = np.empty(len(text), self.dtype)
        start = 0
        for numbers in code_points(text):
            # No number is out of the table's range: "clip" spares numpy a second look at them.
            np.take(self._table, numbers, out=ids[start : start + len(numbers)], mode="clip")
            start += len(numbers)
        return ids, np.fromiter(map(len, texts), np.int64, len(texts))

    def _content(self):
        return {**super()._content(), "characters": self.characters}

    @classmethod
    def _from_content(cls, d):
        characters = d.get("characters")
        _require(isinstance(characters, str), "its characters are missing")
        ordered = all(a < b for a, b in zip(characters, characters[1:], strict=False))
        _require(ordered, "its characters are out of order")
        _require(not re.search("[\ud800-\udfff]", characters), "it holds half a surrogate pair")
        return cls(characters)


# ---- byte pairs ------------------------------------------------------------------------------------


def byte_alphabet():
    """GPT-2's letters for the 256 bytes: printable bytes stand for themselves, others for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class BPETokenizer(Tokenizer):
    """The 256 bytes have the ids from N_SPECIAL on; each merge of two earlier tokens makes a new one.

    `merges`: pairs of tokens in the letters of `byte_alphabet`, the first learned first. Learning
    and applying them is the work of the `tokenizers` library, which knows nothing of our special
    tokens: its ids are ours minus N_SPECIAL.

    `rules`: how text is cut into the words within which bytes are merged, where that is not as in GPT-2.
    Tokenizers that others have trained bring their own:

        patterns        regular expressions, one cutting what the one before has left; what lies between
                        two matches is a word, too
        normalizer      "NFC": letters and accents become one character first
        ignore_merges   true: a word that is a token is never built of smaller ones
        words           tokens that no merge makes, with ignore_merges
    """

    kind = "bpe"
    smallest = N_SPECIAL + 256
    # Between two lines BPE never merges, so a long text may be cut there and handled in parallel.
    # (Single line breaks only: the library's rule takes a run of white space apart at its end.)
    _line_end = re.compile(r"(?<=\S\n)(?=\S)")

    def __init__(self, merges, **rules):
        letters = byte_alphabet()
        byte_of = {letter: byte for byte, letter in enumerate(letters)}
        self.rules = {key: value for key, value in rules.items() if value}
        made = [left + right for left, right in merges]
        # A token that two pairs can make keeps the id of the first: a dict, in order of insertion.
        tokens = dict.fromkeys([*letters, *made, *self.rules.get("words", ())])
        self._library_ids = {token: i for i, token in enumerate(tokens)}
        super().__init__([bytes(byte_of[letter] for letter in token) for token in tokens])
        self.merges = merges
        if "normalizer" in self.rules:
            self._n_composed = 4  # NFC makes one of no more (Unicode Standard Annex 15)

    @functools.cached_property
    def _library(self):
        return self.in_library(self._library_ids)

    def in_library(self, vocabulary, **options):
        """The BPE of the `tokenizers` library that cuts text as this one. vocabulary: {token: id there}."""
        rules = {key: value for key, value in self.rules.items() if key != "words"}
        return _bpe_library(vocabulary, [tuple(pair) for pair in self.merges], **rules, **options)

    @classmethod
    def train(cls, texts, vocab_size=32000):
        """Learn merges from an iterable of texts until there are `vocab_size` tokens, special ones included.

        A text too small to hold so many repeated pairs yields fewer. UserError below 263.
        """
        if vocab_size < cls.smallest:
            raise UserError(
                f"vocab_size={vocab_size} is too small for bpe: bytes and special tokens are {cls.smallest}"
            )
        from tokenizers import trainers

        library = _bpe_library()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - N_SPECIAL,
            min_frequency=2,
            initial_alphabet=byte_alphabet(),
            show_progress=False,
        )
        # The library learns slowly from endless words: letters without a break are broken for it.
        texts = (re.sub(r"[^\W\d_]{100}", "\\g<0>\n", _well_formed(text)) for text in texts)
        library.train_from_iterator(texts, trainer)
        merges = json.loads(library.to_str())["model"]["merges"]
        # Releases of the library before 0.20 write a pair as "left right".
        return cls([pair.split(" ") if isinstance(pair, str) else pair for pair in merges])

    def encode_flat(self, texts):
        pieces, owners = [], []
        for owner, text in enumerate(texts):
            for piece in self.pieces(text):
                pieces.append(piece)
                owners.append(owner)
        encode = getattr(self._library, "encode_batch_fast", self._library.encode_batch)
        try:
            encodings = encode(pieces)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # which the library derives from no other
                raise
            raise UserError("the tokenizer's patterns give up on this text: it runs on too long") from None
        pieces = [np.array(encoding.ids, np.int64) for encoding in encodings]
        ids = np.concatenate([np.empty(0, np.int64), *pieces]) + N_SPECIAL
        lengths = np.zeros(len(texts), np.int64)
        np.add.at(lengths, owners, [len(piece) for piece in pieces])
        return ids.astype(self.dtype), lengths

    def pieces(self, text):
        text, start = _well_formed(text), 0
        while (
            len(text) - start > BLOCK
            and "patterns" not in self.rules  # of which nobody knows what they do at the end of a line
            and (match := self._line_end.search(text, start + BLOCK))
        ):
            yield text[start : match.start()]
            start = match.start()
        yield text[start:]

    def _content(self):
        return {**super()._content(), "merges": self.merges, **self.rules}

    @classmethod
    def _from_content(cls, d):
        letters, merges, words = set(byte_alphabet()), d.get("merges"), d.get("words", [])
        _require(isinstance(merges, list), "its merges are missing")
        for pair in merges:
            _require(
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(token, str) for token in pair),
                "one of its merges is no pair of tokens",
            )
        made = {left + right for left, right in merges}
        known = all(token in letters or token in made for pair in merges for token in pair)
        _require(known, "one of its merges is no pair of known tokens")
        _require(
            isinstance(words, list)
            and all(isinstance(word, str) and word and letters.issuperset(word) for word in words),
            "its words are no list of words in the letters of bytes",
        )
        _require(len({*letters, *made, *words}) == len(letters | made) + len(words), "its words are not new")
        _require(type(d.get("ignore_merges", False)) is bool, "its ignore_merges is neither true nor false")
        _require(not words or d.get("ignore_merges"), "its words can never be used without ignore_merges")
        normalizer = d.get("normalizer")
        _require(normalizer in (None, "NFC"), f"its normalizer is {shown(normalizer)}, not NFC")
        patterns = d.get("patterns", [])
        _require(isinstance(patterns, list), "its patterns are no list")
        trouble = patterns and trouble_with(patterns)
        _require(not trouble, f"one of its patterns {trouble}")
        return cls(merges, **{key: d[key] for key in _RULES if key in d})


_RULES = ("patterns", "normalizer", "ignore_merges", "words")


def _bpe_library(vocabulary=None, merges=None, patterns=(), normalizer=None, **options):
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(vocabulary, merges, **options))
    if normalizer:
        library.normalizer = normalizers.NFC()
    # Without patterns of its own it has those of GPT-2, which the library knows by heart.
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes]) if cuts else to_bytes
    return library


def _well_formed(text):
    """`text` with lone surrogates, which UTF-8 has no bytes for, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- loading ---------------------------------------------------------------------------------------


def _require(condition, what):
    if not condition:
        raise UserError(f"this is not a sound Nano tokenizer: {what}")


def from_dict(d):
    """The tokenizer that `to_dict` described. UserError if anything in `d` is damaged or foreign."""
    _require(isinstance(d, dict) and d.get("format") == FORMAT["format"], "its format is unknown")
    _require(d.get("version") == FORMAT["version"], f"its version is {shown(d.get('version'))}, not 1")
    _require(d.get("special_tokens") == list(SPECIAL_TOKENS), "its special tokens are not Nano's")
    kinds = {"char": CharTokenizer, "bpe": BPETokenizer}
    _require(d.get("kind") in tuple(kinds), f"its kind is {shown(d.get('kind'))}, not char or bpe")
    tokenizer = kinds[d["kind"]]._from_content(d)
    _require(d.get("fingerprint") == tokenizer.fingerprint, "its fingerprint does not match its tokens")
    return tokenizer


def load(path):
    """The tokenizer saved at `path`. UserError, naming the file, if it is missing, damaged or foreign."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError("this is too large for a tokenizer")
        return from_dict(json.loads(text))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `python data.py` writes a tokenizer with the data") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a Nano tokenizer: it is no valid JSON") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---- conversations ---------------------------------------------------------------------------------


def check_messages(messages):
    """UserError unless `messages` is what `render_chats` takes: [{"role": ..., "content": str}, ...].

    A system message may come first; then user and assistant take turns, and either may begin.
    """
    _check_each(messages)
    for number, (before, message) in enumerate(itertools.pairwise(messages), 2):
        if message["role"] == before["role"]:
            other = {"user": "assistant", "assistant": "user"}[message["role"]]
            raise UserError(f"message {number} is from {message['role']} where {other} should speak")


def merge_turns(messages):
    """(messages that `check_messages` is content with, how many of them have become part of the one before).

    What one role says in several messages in a row becomes one message, its parts joined by a newline.
    UserError for what that does not mend: an unknown role, a content that is no text, a late system message.
    """
    _check_each(messages)
    merged = []
    for _, turn in itertools.groupby(messages, key=lambda message: message["role"]):
        first, *others = turn
        if others:
            first = {**first, "content": "\n".join(message["content"] for message in (first, *others))}
        merged.append(first)
    return merged, len(messages) - len(merged)


def _check_each(messages):
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


def render_chats(tokenizer, conversations, add_generation_prompt=False):
    """Conversations in the template that SFT trains on and inference speaks: a list of (ids, mask).

        [<|system_mark|>words] <|instruct_mark|>words<|response_mark|>words<|eos|> ... (no spaces between)

    ids [n] of tokenizer.dtype; mask [n] uint8 is 1 on what the assistant says, <|eos|> included:
    the tokens whose loss counts. `add_generation_prompt` ends with <|response_mark|>: the model's turn.
    """
    mark = {
        "system": tokenizer.system_id,
        "user": tokenizer.instruct_id,
        "assistant": tokenizer.response_id,
    }
    for messages in conversations:
        check_messages(messages)
    contents = iter(tokenizer.encode_batch([m["content"] for messages in conversations for m in messages]))
    chats = []
    for messages in conversations:
        parts, learned = [], []
        for message in messages:
            words = next(contents)
            speaks = message["role"] == "assistant"
            parts += [[mark[message["role"]]], words, [tokenizer.eos_id] * speaks]
            learned += [0, speaks, speaks]
        if add_generation_prompt:
            parts.append([tokenizer.response_id])
            learned.append(0)
        ids = np.concatenate(parts, dtype=tokenizer.dtype, casting="unsafe")
        mask = np.repeat(np.array(learned, np.uint8), [len(part) for part in parts])
        chats.append((ids, mask))
    return chats


def render_chat(tokenizer, messages, add_generation_prompt=False):
    """One conversation: see `render_chats`."""
    return render_chats(tokenizer, [messages], add_generation_prompt)[0]


# ---- the command line ------------------------------------------------------------------------------


def texts_of(paths, found=None, limit=None):
    """All texts of some files (see sources/), those of conversations, too; about `limit` bytes at most.

    found: a sources.Found, which notes what they are.
    """
    found = found or Found()
    for source in [Source(path, words_of) for path in paths]:
        for documents, _ in source.documents(found):
            for document in documents:
                for text in document if isinstance(document, list) else [document]:
                    yield text
                    if limit is not None and (limit := limit - len(text.encode("utf-8", "replace"))) <= 0:
                        return


def train_command(args):
    if args.kind == "char" and args.vocab_size is not None:
        raise UserError("--vocab_size is for --kind bpe; char has one token for every character")
    texts = texts_of(args.files, found := Found())
    if args.kind == "char":
        tokenizer = CharTokenizer.train(texts)
    else:
        tokenizer = BPETokenizer.train(texts, args.vocab_size or 32000)
    if args.kind == "char" and tokenizer.vocab_size == N_SPECIAL:
        raise UserError(f"there is no text in {', '.join(args.files)}")
    tokenizer.save(args.output)
    for sentence in found.told(", ".join(args.files)):
        print(sentence)
    print(f"{args.output}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint[:12]}")


def stats_command(args):
    files = args.files or [ROOT / "dataset" / "pretrain.txt"]
    texts = list(texts_of(files, found := Found(), args.limit * 10**6))
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if not n_bytes:
        raise UserError(f"there is no text in {', '.join(map(str, files))}")
    for sentence in found.told(", ".join(map(str, files))):
        print(sentence)
    if args.tokenizer:
        from formats import load_tokenizer

        tokenizers = {path: load_tokenizer(path) for path in args.tokenizer}
    else:
        tokenizers = {"char": CharTokenizer.train(texts), "bpe": BPETokenizer.train(texts, args.vocab_size)}

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = []
    for tokenizer in tokenizers.values():
        tokenizer.encode("")  # the first call prepares the library
        start = time.perf_counter()
        ids, _ = tokenizer.encode_flat(texts)
        seconds = time.perf_counter() - start
        counts = np.bincount(ids, minlength=tokenizer.vocab_size)
        frequent = [i for i in np.argsort(-counts, kind="stable")[:20].tolist() if counts[i]]
        columns.append(
            {
                "kind": tokenizer.kind,
                "vocabulary": f"{tokenizer.vocab_size:,}",
                "tokens": f"{len(ids):,}",
                "bytes per token": f"{n_bytes / max(1, len(ids)):.2f}",
                "tokens/s": f"{len(ids) / seconds:,.0f}",
                "MB/s": f"{n_bytes / seconds / 1e6:.1f}",
                "unknown": f"{counts[tokenizer.unknown_id] / max(1, len(ids)):.4%}",
                "most frequent": "  ".join(repr(tokenizer.decode([i])) for i in frequent),
            }
        )
    table = Table(title=f"{n_bytes:,} bytes of {', '.join(map(str, files))}")
    table.add_column("")
    for name in tokenizers:
        table.add_column(Text(str(name)), justify="right", overflow="fold")
    for row in columns[0]:
        table.add_row(row, *(Text(column[row]) for column in columns))
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(
        description="Train a tokenizer on text files, or measure what tokenizers make of them.",
        epilog="examples:\n"
        "  python tokenizer.py train --kind bpe --vocab_size 32000 corpus.txt -o tokenizer.json\n"
        "  python tokenizer.py stats                              both kinds on dataset/pretrain.txt\n"
        "  python tokenizer.py stats book.txt --tokenizer dataset/prepared/tokenizer.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="train|stats")
    train = commands.add_parser("train", help="learn a vocabulary and save it")
    train.add_argument("files", nargs="+", metavar="FILE", help="text in UTF-8, or JSON lines")
    train.add_argument("--kind", choices=("char", "bpe"), default="char", help="default: char")
    train.add_argument("--vocab_size", type=int, help="tokens of bpe, special ones included (32000)")
    train.add_argument("-o", "--output", default="tokenizer.json", help="default: tokenizer.json")
    train.set_defaults(command=train_command)
    stats = commands.add_parser("stats", help="bytes per token, speed, unknown rate, frequent tokens")
    stats.add_argument("files", nargs="*", metavar="FILE", help="default: dataset/pretrain.txt")
    stats.add_argument("--tokenizer", nargs="+", metavar="FILE",
                       help="named as for data.py (default: both kinds, made here)")  # fmt: skip
    stats.add_argument("--vocab_size", type=int, default=8192, help="tokens of the bpe trained here (8192)")
    stats.add_argument("--limit", type=int, default=20, help="megabytes of text to look at (20)")
    stats.set_defaults(command=stats_command)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    run(main)
