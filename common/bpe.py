"""Byte-level BPE, computed by the `tokenizers` library, and the rules that other tokenizers add to it.

Before BPE merges bytes, a text is cut into words, and no token crosses the end of a word. Tokenizers that
others have trained cut in their own way. Their rules, each of which may be absent:

    patterns        regular expressions, applied one after another; each match, and what lies between two
                    matches, becomes a word. Without patterns, words are cut as in GPT-2.
    normalizer      "NFC": a letter and its accents are composed into one character first
    ignore_merges   true: a word that is a token itself is never built from smaller ones
    words           tokens that no merge produces; they are found through ignore_merges
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.patterns import why_unsafe

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

RULES = ("patterns", "normalizer", "ignore_merges", "words")


def byte_alphabet() -> list[str]:
    """GPT-2's letters for the 256 bytes: a printable byte is its own letter, the rest are U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def build_library(
    vocabulary: dict[str, int] | None = None,
    merges: list[tuple[str, str]] | None = None,
    patterns: Iterable[str] = (),
    normalizer: str | None = None,
    **options: Any,
) -> LibraryTokenizer:
    """A tokenizer of the `tokenizers` library: byte-level BPE with these rules.

    Args:
        vocabulary, merges: in the letters of `byte_alphabet`; both None for one that is to be trained.
        options: further arguments of the library's BPE model, such as ignore_merges and unk_token.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    library = Tokenizer(models.BPE(vocabulary, merges, **options))
    if normalizer:
        library.normalizer = normalizers.NFC()
    # ByteLevel has GPT-2's pattern built in.
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes]) if cuts else to_bytes
    return library


def learn_merges(texts: Iterable[str], n_tokens: int) -> list[list[str]]:
    """Learn merges until there are `n_tokens` tokens (the bytes included), or no pair occurs twice.

    Returns pairs of tokens in the letters of `byte_alphabet`, in the order in which they were learned.
    """
    from tokenizers import trainers

    library = build_library()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens, min_frequency=2, initial_alphabet=byte_alphabet(), show_progress=False
    )
    # The library learns slowly from very long words, so runs of letters are broken after every hundred.
    texts = (re.sub(r"[^\W\d_]{100}", "\\g<0>\n", replace_surrogates(text)) for text in texts)
    library.train_from_iterator(texts, trainer)
    merges = json.loads(library.to_str())["model"]["merges"]
    # The library before version 0.20 writes a pair as "left right".
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def encode(library: LibraryTokenizer, texts: list[str]) -> Iterator[list[int]]:
    """The library's ids of each text; it uses all cores. UserError if a pattern takes too many steps."""
    encode_batch = getattr(library, "encode_batch_fast", library.encode_batch)
    try:
        encodings = encode_batch(texts)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library's, a direct child of BaseException
            raise
        raise UserError("the tokenizer's patterns give up on this text: it takes too many steps") from None
    return (encoding.ids for encoding in encodings)


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD in place of lone surrogates, which UTF-8 cannot represent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def why_invalid(content: dict[str, Any]) -> str | None:
    """What is wrong with the merges and rules in a tokenizer's JSON, as a clause; None if they are sound."""
    letters, merges, words = set(byte_alphabet()), content.get("merges"), content.get("words", [])
    if not isinstance(merges, list):
        return "its merges are missing"
    for pair in merges:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(token, str) for token in pair)):
            return "one of its merges is not a pair of tokens"
    merged = {left + right for left, right in merges}
    if not all(token in letters or token in merged for pair in merges for token in pair):
        return "one of its merges is not a pair of known tokens"
    if not isinstance(words, list) or not all(
        isinstance(word, str) and word and letters.issuperset(word) for word in words
    ):
        return "its words are not a list of words in the letters of bytes"
    if len({*letters, *merged, *words}) < len(letters | merged) + len(words):
        return "some of its words are tokens already"
    if type(content.get("ignore_merges", False)) is not bool:
        return "its ignore_merges is neither true nor false"
    if words and not content.get("ignore_merges"):
        return "its words can never be used without ignore_merges"
    if (normalizer := content.get("normalizer")) not in (None, "NFC"):
        return f"its normalizer is {reprlib.repr(normalizer)}, not NFC"
    if not isinstance(patterns := content.get("patterns", []), list):
        return "its patterns are not a list"
    if patterns and (why := why_unsafe(patterns)):
        return f"one of its patterns {why}"
    return None
