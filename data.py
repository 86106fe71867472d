"""Batches of training data; and, as a script, text files to the token files they are read from.

`python data.py` prepares once. It writes all documents end to end as token ids, in dataset/prepared/:

    tokenizer.json      what the ids mean
    pretrain_train.bin  the documents, <|bos|>text<|eos|> each; beside it .starts (where each document starts)
                        and .json (what this is)
    pretrain_val.*      the same for the documents that are held out for validation
    sft_train.*, sft_val.*  conversations, with a .mask as well: 1 where the loss counts

How that is done is in preparation/. This file is about reading, which happens at every step of training. It
rests on one idea: the data are one endless row of sequences, epoch after epoch, and the batch that begins
with sequence number N is a pure function of (data, seed, N). There is no iterator. The state of training is a
single number, how many sequences it has consumed, so a run that was killed continues with exactly the batch
it would have seen, on one machine or on four, with the same batch size or another. A data loader usually
keeps the shuffled order of an epoch in memory; here it is a formula (common/permutation.py), and so is the
order in which the parts of a mixture take turns (`Mixture`).

    files = [TokenFile("dataset/prepared/pretrain_train.bin")]
    batches = TokenBatches(files, block_size=256, batch_size=16, seed=1337)
    batch = batches(consumed)  # batch["x"], ["y"] and ["mask"] are [16, 256]; consumed += 16
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol

from common.errors import UserError, run  # first: it explains an import that fails

# isort: split
import numpy as np

from common.config import display_path
from common.permutation import random_keys, shuffled
from preparation.token_file import TokenFile
from tokenizer import Tokenizer

# ---- what a batch is, and where batches come from --------------------------------------------------


# Arrays whose first dimension is the rows. A language model learns from "x" and "y" [B, T] int64 and "mask"
# [B, T] float32: predict y from x; the loss counts where the mask is 1.
Batch = dict[str, np.ndarray]


class BatchSource(Protocol):
    """What training and validation read from: token files, a toy problem, or anything with these members.

    A source is called with the number of a sequence and returns the batch of `batch_size` sequences that
    begins with it. Sequences are numbered across epochs, and a batch depends only on the data, the seed and
    this number.
    """

    @property
    def batch_size(self) -> int:
        """Rows of a batch; for training, of the global batch, whatever the number of devices."""

    @property
    def sequences_per_epoch(self) -> float:
        """How many sequences there are until they repeat; infinite if they are made up as needed."""

    @property
    def size(self) -> float:
        """How much of the data it stands for: the number of its sequences, or its weight in a mixture."""

    @property
    def loss_weight(self) -> float:
        """How much its loss counts among several: about the tokens that count in `size` sequences."""

    @property
    def text_size(self) -> tuple[int, int] | None:
        """(tokens, bytes) of its text, for the loss in bits per byte; None: it has no text."""

    @property
    def description(self) -> str:
        """How much data there is, in a few words."""

    def notes(self, n_sequences: float) -> list[str]:
        """Sentences that a user must read before a run of so many sequences, such as how much is left out."""

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        """What a checkpoint remembers of the data: {"fingerprint", "size" (in words)} of each file."""

    def __call__(self, first: int) -> Batch:
        """The batch of the sequences from number `first` on."""

    def position(self, first: int) -> tuple[int, int, int]:
        """Where this sequence is: (epoch, index of the file in the curriculum, number in that file).

        A mixture counts as one file.
        """


# ---- what batches are made of ----------------------------------------------------------------------


Row = tuple[np.ndarray, np.ndarray | int]  # ids [n + 1], and which of the last n count: a mask [n], or 1


class Part(Protocol):
    """A list of sequences to learn from: those of a file of text, of a file of chats, or of a task.

    name             the path of the file, or the task as dataset_path calls it
    n_sequences      how many there are; infinite if they are drawn as needed
    n_tokens         how many tokens a pass through all of them predicts
    tokens_counted   about how many tokens of one sequence count in the loss
    text_size        (tokens, bytes) of its text, for the loss in bits per byte; None: it has no text
    fingerprint      identifies the content
    size             how much it is, in words
    n_truncated      conversations that are longer than block_size and lose their end
    n_left_out       those that are left out, as nothing that counts would be left
    notes            further sentences that a user must read
    """

    name: str
    n_sequences: float
    n_tokens: float
    tokens_counted: float
    text_size: tuple[int, int] | None
    fingerprint: str
    size: str
    n_truncated: int
    n_left_out: int
    notes: list[str]

    def rows(self, numbers: np.ndarray, keys: np.ndarray) -> Iterator[Row]:
        """The sequences of these numbers [n]. What else is random in them follows from the keys [9]."""


class FilePart:
    """The sequences of a token file: blocks of a stream of documents, or conversations.

    The stream is treated as a ring, and each pass starts cutting it at another position, so the blocks differ
    from pass to pass; every token but one is predicted once in a pass. If a conversation is longer than a
    block, its end is cut off; if nothing that counts is left then, it is left out.
    """

    def __init__(self, file: TokenFile, block_size: int) -> None:
        self.file, self.block_size, self.name, meta = file, block_size, display_path(file.path), file.meta
        self.kept: np.ndarray | None = None  # the conversations that count
        self.n_truncated = self.n_left_out = 0
        self.n_tokens: float = len(file.tokens) - 1
        self.n_sequences: float = -(-self.n_tokens // block_size)
        if file.documents == "chats":
            self.kept = np.flatnonzero(file.min_block_sizes <= block_size)
            if not len(self.kept):
                raise UserError(_why_nothing_counts(file, block_size))
            lengths = np.diff(file.starts)[self.kept] - 1
            self.n_sequences, self.n_tokens = len(self.kept), int(np.minimum(lengths, block_size).sum())
            self.n_truncated = int((lengths > block_size).sum())
            self.n_left_out = len(file.starts) - 1 - len(self.kept)
        # What will be cut off counts here, too: for the weights of validation files that is near enough.
        self.tokens_counted: float = meta["n_loss_tokens"] / self.n_sequences
        self.text_size: tuple[int, int] | None = (meta["n_tokens"], meta["n_bytes"])
        self.size = f"{meta['n_documents']:,} documents, {meta['n_tokens']:,} tokens"
        self.fingerprint, self.notes = file.fingerprint, list[str]()

    def rows(self, numbers: np.ndarray, keys: np.ndarray) -> Iterator[Row]:
        tokens, size, mask = self.file.tokens, self.block_size, self.file.mask
        if self.kept is not None and mask is not None:
            for number in self.kept[numbers].tolist():
                start, end = self.file.starts[number : number + 2].tolist()
                end = min(end, start + size + 1)
                yield tokens[start:end], mask[start + 1 : end]
            return
        n, offset = len(tokens), int(keys[8]) % len(tokens)
        for number in numbers.tolist():
            length = min(size + 1, n - number * size)
            start = (offset + number * size) % n
            ids = tokens[start : start + length]
            if len(ids) < length:  # past the end of the ring
                ids = np.concatenate([ids, tokens[: length - len(ids)]])
            yield ids, 1


def _why_nothing_counts(file: TokenFile, block_size: int) -> str:
    least = int(file.min_block_sizes.min())
    if least > len(file.tokens):
        return f"{file.path}: no token in it counts, so nothing can be learned from it"
    return (
        f"{file.path}: block_size={block_size} cuts every conversation before its answer; "
        f"the first answer needs a model whose block_size is {least} or more"
    )


# ---- in which order --------------------------------------------------------------------------------

ENDLESS = 1 << 53  # stands for an infinite number of sequences, and is exact as a float


class Curriculum:
    """The parts one after another; a pass through each of them is an epoch. counts: their sequences."""

    def __init__(self, counts: Sequence[float]) -> None:
        self.bounds = np.cumsum([0, *counts])
        self.n_sequences: float = int(self.bounds[-1])

    def locate(self, first: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the n sequences from `first` on are: (pass through the part, part, number in the pass)."""
        passes, within = np.divmod(first + np.arange(n), self.n_sequences)
        parts = np.searchsorted(self.bounds, within, side="right") - 1
        return passes, parts, within - self.bounds[parts]

    def position(self, first: int) -> tuple[int, int, int]:
        """See BatchSource."""
        epoch, part, number = (int(array[0]) for array in self.locate(first, 1))
        return epoch, part, number


class Mixture:
    """The parts in turns, each with its share of the sequences; an epoch has shown all of every finite part.

    Of the first n sequences, the first part has n times its share, rounded; the second has its share of the
    rest, and so on. So at any time each part has had its share, to within two sequences or so, and where a
    sequence belongs follows from its number alone. The shares are whole numbers: after as many sequences as
    their sum the pattern repeats, and nothing is lost to rounding.
    """

    def __init__(self, counts: Sequence[float], weights: Sequence[float]) -> None:
        self.counts = np.array([int(min(count, ENDLESS)) for count in counts])
        self.shares = whole_shares(weights)
        self.period = sum(self.shares)
        ends = [
            bisect.bisect_left(range(ENDLESS), count, key=lambda n: self.among_first(np.array([n]))[part, 0])
            for part, count in enumerate(counts)
            if count < math.inf
        ]
        self.n_sequences: float = max(ends, default=math.inf)

    def among_first(self, n: np.ndarray) -> np.ndarray:
        """How many of the first n sequences [m] belong to each part: int64 [parts, m]."""
        turns, rest = np.divmod(n, self.period)
        left, found = self.period, []
        for share in self.shares:
            mine = (2 * share * rest + left) // (2 * left)  # share / left of the rest, rounded
            found.append(turns * share + mine)
            rest, left = rest - mine, left - share
        return np.stack(found)

    def locate(self, first: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the n sequences from `first` on are: (pass through the part, part, number in the pass)."""
        among_first = self.among_first(first + np.arange(n + 1))
        parts = np.diff(among_first).argmax(0)  # the one that has one more after this sequence
        passes, within = np.divmod(among_first[parts, np.arange(n)], self.counts[parts])
        return passes, parts, within

    def position(self, first: int) -> tuple[int, int, int]:
        """See BatchSource."""
        epoch, number = divmod(first, self.n_sequences) if self.n_sequences < math.inf else (0, first)
        return int(epoch), 0, int(number)


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportions, exactly if their sum is below 2^30, else to within 1 / 2^30."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 means a tenth, not the nearest float
    unit = Fraction(math.gcd(*(f.numerator for f in exact)), math.lcm(*(f.denominator for f in exact)))
    unit = max(unit, sum(exact, Fraction()) / (1 << 30))  # so that products of two of them fit in 64 bits
    return [max(1, round(weight / unit)) for weight in exact]


# ---- batches of sequences --------------------------------------------------------------------------


class TokenBatches:
    """A BatchSource of token files and tasks.

    Args:
        files: a curriculum, trained on in this order; or, with weights, the parts of a mixture. A task is in
            it as the `TaskPart` of tasks/parts.py.
        block_size: the largest number of tokens in a row.
        batch_size: rows of a batch; for training, of the global batch.
        weights: of the parts of a mixture: their shares of the sequences, relative to each other.

    UserError if a file has no sequence that counts.
    """

    def __init__(
        self, files: Iterable[TokenFile | Part], block_size: int, batch_size: int, seed: int = 1337,
        weights: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.parts: list[Part] = [
            FilePart(file, block_size) if isinstance(file, TokenFile) else file for file in files
        ]
        self.block_size, self.batch_size, self.seed, self.weights = block_size, batch_size, seed, weights
        counts = [part.n_sequences for part in self.parts]
        self.counts = np.array([int(min(count, ENDLESS)) for count in counts])
        self.order: Curriculum | Mixture = Mixture(counts, weights) if weights else Curriculum(counts)
        self.position = self.order.position
        self.sequences_per_epoch = self.order.n_sequences
        self.size = sum(weights) or self.sequences_per_epoch
        self.tokens_per_epoch = sum(part.n_tokens for part in self.parts)
        self.n_truncated = sum(part.n_truncated for part in self.parts)
        self.n_left_out = sum(part.n_left_out for part in self.parts)
        # About how many tokens of each part count in `size` sequences.
        sizes = zip(weights or counts, self.parts, strict=True)
        self.tokens_counted = [size * part.tokens_counted for size, part in sizes]
        self.loss_weight = sum(self.tokens_counted)
        texts = [part.text_size for part in self.parts if part.text_size]
        self.text_size = (sum(n for n, _ in texts), sum(n for _, n in texts)) if texts else None

    @property
    def description(self) -> str:
        if not self.weights:
            return f"{self.tokens_per_epoch:,} tokens an epoch"
        what, n = "a mixture" if len(self.weights) > 1 else self.parts[0].name, self.sequences_per_epoch
        return f"{what}, {n:,} sequences an epoch" if n < math.inf else f"{what}, without end"

    def notes(self, n_sequences: float) -> list[str]:
        """What is cut, and what each part of a mixture is in `n_sequences` sequences."""
        notes = []
        parts = zip(self.parts, self.weights, self.tokens_counted, strict=True)
        for part, weight, counted in parts if len(self.weights) > 1 else ():
            share, often = weight / self.size, "drawn anew every time"
            if part.n_sequences < math.inf:
                often = f"seen {self.sequences_per_epoch * share / part.n_sequences:.2f} times in an epoch"
                if n_sequences < math.inf:
                    often += f", {n_sequences * share / part.n_sequences:.2f} times in the run"
            tokens = counted / self.loss_weight
            notes.append(f"{share:.2%} {part.name}: {tokens:.2%} of the tokens that count; {often}")
        if n := self.n_truncated:
            notes.append(f"{n:,} conversations are longer than block_size and lose their end")
        if n := self.n_left_out:
            notes.append(f"{n:,} conversations are left out: block_size ends before their answer")
        return notes + [note for part in self.parts for note in part.notes]

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        found = [{"fingerprint": part.fingerprint, "size": part.size} for part in self.parts]
        if len(self.weights) < 2:
            return found
        # A mixture is one whole: with another part or weight, every sequence is another one.
        content = [whole_shares(self.weights), [part["fingerprint"] for part in found]]
        sizes = zip(self.weights, found, strict=True)
        return [{
            "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
            "size": " + ".join(f"{weight / self.size:.2%} of {part['size']}" for weight, part in sizes),
        }]  # fmt: skip

    def __call__(self, first: int) -> Batch:
        """The batch that begins with sequence `first`: "x", "y" [B, T] int64 and "mask" [B, T] float32.

        T is the length of the longest row, rounded up to a multiple of 8, and at most block_size. Shorter
        rows are padded with <|padding|> and mask 0. In every row at least one token counts.
        """
        passes, parts, within = self.order.locate(first, self.batch_size)
        groups = sorted(set(zip(passes.tolist(), parts.tolist(), strict=True)))
        places = [np.flatnonzero((passes == number) & (parts == part)) for number, part in groups]
        keys = np.empty((9, self.batch_size), np.uint64)
        for (number, part), here in zip(groups, places, strict=True):
            keys[:, here] = random_keys(9, self.seed, number, part)[:, None]
        numbers = shuffled(within, self.counts[parts], keys[:8])
        rows: list[Any] = [None] * self.batch_size
        for (_, part), here in zip(groups, places, strict=True):
            found = self.parts[part].rows(numbers[here], keys[:, here[0]])
            for place, row in zip(here.tolist(), found, strict=True):
                rows[place] = row
        width = max(len(ids) for ids, _ in rows) - 1
        width = min(-(-width // 8) * 8, self.block_size)
        ids = np.full((self.batch_size, width + 1), Tokenizer.padding_id, np.int64)
        mask = np.zeros((self.batch_size, width), np.float32)
        for row, (row_ids, row_mask) in enumerate(rows):
            ids[row, : len(row_ids)] = row_ids
            mask[row, : len(row_ids) - 1] = row_mask
        return {"x": ids[:, :-1].copy(), "y": ids[:, 1:].copy(), "mask": mask}


if __name__ == "__main__":
    from preparation.data_command import main

    run(main)
