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
keeps the shuffled order of an epoch in memory; here it is a formula (`shuffled`).

    files = [TokenFile("dataset/prepared/pretrain_train.bin")]
    batches = TokenBatches(files, block_size=256, batch_size=16, seed=1337)
    batch = batches(consumed)  # batch["x"], ["y"] and ["mask"] are [16, 256]; consumed += 16
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from common.errors import UserError, run  # first: it explains an import that fails

# isort: split
import numpy as np

from common.config import resolve_path
from preparation import DATASET, default_inputs, default_names, stages_with_files
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
    def n_loss_tokens(self) -> float:
        """About how many tokens of an epoch count in the loss: the weight of a source among several."""

    @property
    def text_size(self) -> tuple[int, int] | None:
        """(tokens, bytes) of its text, for the loss in bits per byte; None: it has no text."""

    @property
    def description(self) -> str:
        """How much data there is, in a few words."""

    @property
    def notes(self) -> list[str]:
        """Sentences that a user must read before training starts, such as how much is left out."""

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        """What a checkpoint remembers of the data: {"fingerprint", "size" (in words)} of each file."""

    def __call__(self, first: int) -> Batch:
        """The batch of the sequences from number `first` on."""

    def position(self, first: int) -> tuple[int, int, int]:
        """Where this sequence is: (epoch, index of the file in the curriculum, number in that file)."""


# ---- shuffling without a list ----------------------------------------------------------------------


def random_keys(count: int, *names: object) -> np.ndarray:
    """`count` uint64 that look random but follow from `names` alone, on every machine."""
    label = "/".join(map(str, names)).encode()
    return np.frombuffer(hashlib.shake_128(label).digest(8 * count), "<u8").astype(np.uint64)


def shuffled(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The elements at `indices` (int64) of a shuffled list of 0 ... n - 1, computed without making the list.

    On numbers of b bits, three operations can be undone: multiplying by an odd number, adding, and xor with
    one's own upper half. So any chain of them is a permutation. n is rarely 2^b; a result beyond n is put
    through the chain again until it is below n ("cycle walking"; Black & Rogaway 2002).
    `keys`: an even number of uint64 that choose the order.
    """
    bits = max(1, (n - 1).bit_length())
    mask, half = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)

    def permute(x: np.ndarray) -> np.ndarray:
        for multiplier, offset in zip(keys[::2], keys[1::2], strict=True):
            x = (x * (multiplier | np.uint64(1)) + offset) & mask
            x = x ^ (x >> half)
        return x

    x = permute(indices.astype(np.uint64))
    while (beyond := x >= n).any():
        x[beyond] = permute(x[beyond])
    return x.astype(np.int64)


# ---- batches of token files ------------------------------------------------------------------------


def _why_nothing_counts(file: TokenFile, block_size: int) -> str:
    least = int(file.min_block_sizes.min())
    if least > len(file.tokens):
        return f"{file.path}: no token in it counts, so nothing can be learned from it"
    return (
        f"{file.path}: block_size={block_size} cuts every conversation before its answer; "
        f"the first answer needs a model whose block_size is {least} or more"
    )


class TokenBatches:
    """A BatchSource of token files.

    Args:
        files: a curriculum. They are trained on in this order, one pass each, which together are an epoch.
        block_size: the largest number of tokens in a row.
        batch_size: rows of a batch; for training, of the global batch.

    A sequence of a file of text is a block of the stream of its documents. The stream is treated as a ring,
    and each epoch starts cutting it at another position, so the blocks differ from epoch to epoch; every
    token but one is predicted once an epoch. A sequence of a file of chats is one conversation. If it is
    longer than a block, its end is cut off (`n_truncated`); if nothing that counts is left then, it is left
    out altogether (`n_left_out`).

    UserError if a file has no sequence that counts.
    """

    def __init__(
        self, files: Iterable[TokenFile], block_size: int, batch_size: int, seed: int = 1337
    ) -> None:
        self.files, self.block_size, self.batch_size, self.seed = list(files), block_size, batch_size, seed
        self.tokens_per_epoch = self.n_truncated = self.n_left_out = 0
        counts: list[int] = []  # sequences of each file
        self._kept: list[np.ndarray | None] = []  # the conversations of each file that count
        for file in self.files:
            if file.documents == "text":
                n_targets, kept = len(file.tokens) - 1, None
                counts.append(-(-n_targets // block_size))
                self.tokens_per_epoch += n_targets
            else:
                kept = np.flatnonzero(file.min_block_sizes <= block_size)
                if not len(kept):
                    raise UserError(_why_nothing_counts(file, block_size))
                lengths = np.diff(file.starts)[kept] - 1
                counts.append(len(kept))
                self.tokens_per_epoch += int(np.minimum(lengths, block_size).sum())
                self.n_truncated += int((lengths > block_size).sum())
                self.n_left_out += len(file.starts) - 1 - len(kept)
            self._kept.append(kept)
        self._bounds = np.cumsum([0, *counts])  # of the files, among the sequences of an epoch
        self.sequences_per_epoch = int(self._bounds[-1])
        # What will be cut off counts here, too: for the weights of validation files that is near enough.
        metas = [file.meta for file in self.files]
        self.n_loss_tokens = sum(meta["n_loss_tokens"] for meta in metas)
        self.text_size = sum(meta["n_tokens"] for meta in metas), sum(meta["n_bytes"] for meta in metas)

    @property
    def description(self) -> str:
        return f"{self.tokens_per_epoch:,} tokens an epoch"

    @property
    def notes(self) -> list[str]:
        notes = []
        if n := self.n_truncated:
            notes.append(f"{n:,} conversations are longer than block_size and lose their end")
        if n := self.n_left_out:
            notes.append(f"{n:,} conversations are left out: block_size ends before their answer")
        return notes

    @property
    def fingerprints(self) -> list[dict[str, str]]:
        sizes = [f"{f.meta['n_documents']:,} documents, {f.meta['n_tokens']:,} tokens" for f in self.files]
        return [
            {"fingerprint": file.fingerprint, "size": size}
            for file, size in zip(self.files, sizes, strict=True)
        ]

    def position(self, first: int) -> tuple[int, int, int]:
        epoch, within_epoch = divmod(first, self.sequences_per_epoch)
        file = int(np.searchsorted(self._bounds, within_epoch, side="right")) - 1
        return epoch, file, int(within_epoch - self._bounds[file])

    def __call__(self, first: int) -> Batch:
        """The batch that begins with sequence `first`: "x", "y" [B, T] int64 and "mask" [B, T] float32.

        T is the length of the longest row, rounded up to a multiple of 8, and at most block_size. Shorter
        rows are padded with <|padding|> and mask 0. In every row at least one token counts.
        """
        epochs, within = np.divmod(first + np.arange(self.batch_size), self.sequences_per_epoch)
        indices = np.searchsorted(self._bounds, within, side="right") - 1  # of the files
        rows: list[tuple[np.ndarray, np.ndarray | int]] = []
        for epoch, index in sorted(set(zip(epochs.tolist(), indices.tolist(), strict=True))):
            here = (epochs == epoch) & (indices == index)
            rows += self._sequences(epoch, index, within[here] - self._bounds[index])
        width = max(len(ids) for ids, _ in rows) - 1
        width = min(-(-width // 8) * 8, self.block_size)
        ids = np.full((self.batch_size, width + 1), Tokenizer.padding_id, np.int64)
        mask = np.zeros((self.batch_size, width), np.float32)
        for row, (row_ids, row_mask) in enumerate(rows):
            ids[row, : len(row_ids)] = row_ids
            mask[row, : len(row_ids) - 1] = row_mask
        return {"x": ids[:, :-1].copy(), "y": ids[:, 1:].copy(), "mask": mask}

    def _sequences(
        self, epoch: int, index: int, within_file: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray | int]]:
        """(ids [n + 1], mask [n] or 1) of sequences of a file, by their numbers in the shuffled order."""
        file, size, kept = self.files[index], self.block_size, self._kept[index]
        keys = random_keys(9, self.seed, epoch, index)
        count = int(self._bounds[index + 1] - self._bounds[index])
        numbers = shuffled(within_file, count, keys[:8])
        if kept is None:
            n = len(file.tokens)
            offset = int(keys[8]) % n
            for number in numbers.tolist():
                length = min(size + 1, n - number * size)
                start = (offset + number * size) % n
                ids = file.tokens[start : start + length]
                if len(ids) < length:  # past the end of the ring
                    ids = np.concatenate([ids, file.tokens[: length - len(ids)]])
                yield ids, 1
        else:
            assert file.mask is not None
            for number in kept[numbers].tolist():
                start, end = file.starts[number : number + 2].tolist()
                end = min(end, start + size + 1)
                yield file.tokens[start:end], file.mask[start + 1 : end]


# ---- the command line ------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    stages = stages_with_files()
    names = " and ".join(f"dataset/{' or '.join(default_names(stage))}" for stage in stages)
    parser = argparse.ArgumentParser(
        description=f"Text files to token files: {names} to dataset/prepared/.",
        epilog="examples:\n"
        "  python data.py\n"
        "  python data.py --pretrain books/*.txt --out dataset/books --kind bpe --vocab_size 8192\n"
        "  python data.py --sft chats.jsonl --tokenizer checkpoint/x.pt --skip-bad-lines",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    shapes = {
        "text": 'text in UTF-8, or JSON lines with {"text": ...}',
        "chats": "JSON lines of conversations; doc/data.md has their shapes",
    }
    for stage in stages:
        add(f"--{stage.name}", dest=stage.name, nargs="+", metavar="FILE", help=shapes[stage.documents])
    add("--out", metavar="DIR", help="default: dataset/prepared")
    add("--val_fraction", type=float, default=0.05, help="share of documents to hold out (0.05)")
    add("--seed", type=int, default=1337, help="decides which documents these are (1337)")
    add("--kind", choices=("char", "bpe"), help="tokenizer to train (char)")
    add("--vocab_size", type=int, help="tokens of bpe, special ones included (32000)")
    add("--tokenizer", metavar="FILE",
        help="use this tokenizer.json, or that of a checkpoint or model folder; train none")  # fmt: skip
    add("--skip-bad-lines", action="store_true", help="leave bad lines out and say how many")
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be 0 or more and fit in 63 bits, not {args.seed}")
    if args.tokenizer and (args.kind or args.vocab_size):
        raise UserError("--tokenizer names a finished tokenizer; leave --kind and --vocab_size out")
    if args.vocab_size is not None and args.kind != "bpe":
        raise UserError("--vocab_size is for --kind bpe; char has one token for every character")
    return args


def all_default_inputs() -> tuple[dict[str, list[Path]], list[str]]:
    """The input files in dataset/ for each stage, and notices about stages without any.

    Only the first stage for text and the first for chats get a notice: these two are what everyone expects.
    """
    stages = stages_with_files()
    inputs = {stage.name: default_inputs(stage) for stage in stages}
    if not any(inputs.values()):
        names = [name for stage in stages for name in default_names(stage)]
        raise UserError(
            f"there is no {', '.join(names[:-1])} or {names[-1]} in {DATASET}; put your text there,"
            " or let `python dataset/sample_world.py` write a sample"
        )
    first = {stage.documents: stage for stage in reversed(stages)}
    absent = [stage for stage in stages if stage is first[stage.documents] and not inputs[stage.name]]
    return inputs, [
        f"no {DATASET / default_names(stage)[0]}: nothing is prepared for {stage.title}" for stage in absent
    ]


def main() -> None:
    args = parse_arguments()
    inputs = {stage.name: getattr(args, stage.name) or [] for stage in stages_with_files()}
    notices: list[str] = []
    if not any(inputs.values()):
        inputs, notices = all_default_inputs()
    tokenizer = None
    if args.tokenizer:
        from formats import load_tokenizer

        tokenizer = load_tokenizer(resolve_path(args.tokenizer))
    from preparation.display import prepare_and_show

    prepare_and_show(
        inputs,
        Path(args.out) if args.out else DATASET / "prepared",
        notices,
        tokenizer_path=args.tokenizer,
        tokenizer=tokenizer,
        kind=args.kind or "char",
        vocab_size=args.vocab_size or 32000,
        val_fraction=args.val_fraction,
        seed=args.seed,
        skip_bad_lines=args.skip_bad_lines,
    )


if __name__ == "__main__":
    run(main)
