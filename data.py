"""Text files to token files, and token files to batches.

Preparing (`python data.py`) happens once. It reads the text (sources/) twice, block by block, so that memory
does not depend on how much text there is: first to find the vocabulary and every mistake in the
input, then to write ids. What it writes, in dataset/prepared/:

    tokenizer.json      what the ids mean
    pretrain_train.bin  all documents one after another, <|bos|>text<|eos|> each: uint16 or uint32
    pretrain_train.starts   where each document starts, and where the last one ends: int64
    pretrain_train.json     what this is: counts, checksums, the tokenizer's fingerprint
    pretrain_val.*          the same for the documents that are held out
    sft_train.*, sft_val.*  conversations, with a .mask (uint8): 1 where the loss counts

A document is either for training or for validation, never for both, and this is decided before
anything is cut into blocks. All numbers are little-endian, so any program can read the files.

Reading happens all the time, and rests on one idea: the files are one endless row of sequences,
epoch after epoch, and sequence number N of it is a pure function of (files, seed, N). There is no
iterator, and the state of training is one number: how many sequences it has consumed. A run that was
killed goes on with exactly the batch it would have seen, on one machine or on four, with the batch
size it had or another. What a loader usually keeps in memory, the shuffled order of an epoch, is
here a formula (`shuffled`).

    files = [TokenFile("dataset/prepared/pretrain_train.bin")]
    batches = Batches(files, block_size=256, batch_size=16, seed=1337)
    x, y, mask = batches(consumed)  # each [16, 256]; consumed += 16
"""

import argparse
import collections
import functools
import hashlib
import itertools
import json
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.errors import UserError, run  # first: it explains an import that fails

# isort: split
import numpy as np

from common.files import Together
from config.stages import STAGES
from sources import BadLine, Found, Source
from sources.reading import CHUNK
from sources.records import messages_of, text_of
from tokenizer import ROOT, BPETokenizer, CharTokenizer, Tokenizer, merge_turns, render_chats

# ---- conversations ---------------------------------------------------------------------------------


def conversation_of(record):
    """The conversation of a record, as the chat template takes it, and notes: see sources/records.py.

    What one side says in several messages in a row is joined. UserError unless the user says something and
    the assistant has the last word.
    """
    messages, notes = messages_of(record)
    messages, n_joined = merge_turns(messages)
    if messages[-1]["role"] != "assistant":
        raise UserError("ends without an answer of the assistant")
    if "user" not in [message["role"] for message in messages]:
        raise UserError("holds nothing that the user says")
    for message in messages:
        if message["role"] == "assistant" and (not message["content"] or message["content"].isspace()):
            raise UserError("its answer is empty")
    return messages, notes + [("joined", "")] * n_joined


# ---- the split -------------------------------------------------------------------------------------


def mix64(x):
    """A well-mixed number for each uint64 of an array (SplitMix64's finalizer; Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Split:
    """Which of `n_documents` are held out for validation: by a hash of (seed, document's number).

    About `fraction` of them; at least one, and not all, when there are two or more.
    """

    def __init__(self, n_documents, fraction, seed):
        self.fraction = fraction
        self.key = mix64(np.array([seed], np.uint64))
        # One document is always held out and one never is. To look for them among the first
        # thousands suffices: where there are more, the hash holds out enough of itself.
        first = self._chance(0, min(n_documents, 1 << 16))
        self.always, self.never = int(first.argmin()), int(first.argmax())

    def _chance(self, start, count):
        numbers = np.arange(start, start + count, dtype=np.uint64)
        return mix64(numbers * np.uint64(0x9E3779B97F4A7C15) ^ self.key) / 2.0**64

    def held_out(self, start, count):
        """bool [count]: of the documents from number `start` on, the ones for validation."""
        numbers = np.arange(start, start + count)
        chosen = (self._chance(start, count) < self.fraction) | (numbers == self.always)
        return chosen & (numbers != self.never)


def cut_in_two(batches, n_characters, fraction):
    """The documents of `batches`, of which there is one, as two: its last `fraction` is the second."""
    at = min(max(1, round(n_characters * (1 - fraction))), n_characters - 1)
    earliest = max(1, 2 * at - n_characters)  # the second may be twice as long, for a whole line's sake
    seen = 0
    for texts, is_open in batches:
        for text in texts:
            if seen < at <= seen + len(text):
                line_end = text.rfind("\n", max(0, earliest - seen), at - seen) + 1
                cut = line_end or at - seen
                yield [text[:cut]], False
                yield [text[cut:]], is_open
            else:
                yield [text], is_open
            seen += len(text)


# ---- output: documents to token files --------------------------------------------------------------


FORMAT = {"format": "nano-tokens", "version": 1}
COUNTS = ("n_tokens", "n_documents", "n_bytes", "n_unknown", "n_loss_tokens", "n_loss_bytes")


def part_path(stem, part):
    """Where a part ("bin", "starts", "mask", "json") of the token file `stem` lies."""
    return Path(stem).with_name(f"{Path(stem).name}.{part}")


def meta_checksum(meta):
    """Of what the .json says of a token file: CRC-32 of its canonical form, without the checksum itself."""
    return zlib.crc32(json.dumps(meta, sort_keys=True, separators=(",", ":")).encode())


class TokenWriter:
    """Writes one token file. `stem` is the path without suffix.

    files: an `common.files.Together`, which puts all of its parts into their places in the end.
    """

    def __init__(self, files, stem, kind, tokenizer):
        self.stem, self.kind, self.tokenizer = Path(stem), kind, tokenizer
        parts = ("bin", "starts", "mask") if kind == "sft" else ("bin", "starts")
        self.crc32 = dict.fromkeys(parts, 0)
        self.counts = collections.Counter(dict.fromkeys(COUNTS, 0))
        self.together = files
        self.files = {part: files.open(part_path(stem, part)) for part in parts}

    def _write(self, part, array):
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8)
        self.crc32[part] = zlib.crc32(data, self.crc32[part])
        self.files[part].write(data)

    def add(self, ids, starts, mask, n_bytes, n_loss_bytes):
        """Append ids [n], where documents start in them, and for SFT the mask [n]."""
        self._write("starts", starts + self.counts["n_tokens"])
        self._write("bin", ids)
        if mask is not None:
            self._write("mask", mask)
        self.counts.update(
            n_tokens=len(ids),
            n_documents=len(starts),
            n_bytes=n_bytes,
            n_unknown=int(np.count_nonzero(ids == self.tokenizer.unknown_id)),
            n_loss_tokens=len(ids) if mask is None else int(np.count_nonzero(mask)),
            n_loss_bytes=n_loss_bytes,
        )

    def finish(self):
        """Complete the parts; returns the meta. The .json, which makes the others valid, is the last one."""
        self._write("starts", np.array([self.counts["n_tokens"]], np.int64))
        meta = {
            **FORMAT,
            "kind": self.kind,
            "dtype": self.tokenizer.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
            **self.counts,
            "crc32": self.crc32,
        }
        text = json.dumps({**meta, "checksum": meta_checksum(meta)}, indent=1)
        self.together.open(part_path(self.stem, "json")).write(text.encode())
        return meta


# ---- preparing -------------------------------------------------------------------------------------


class Corpus:
    """The input files of one task ("pretrain" or "sft"), which are read twice. `found`: by the first pass."""

    def __init__(self, task, paths, skip_bad_lines=False, on_read=lambda n_bytes: None):
        self.task, self.on_read = task, on_read
        of_record = conversation_of if task == "sft" else text_of
        self.sources = [Source(path, of_record, needs_records=task == "sft") for path in paths]
        self.n_bytes = sum(source.n_bytes for source in self.sources)
        self.name = str(paths[0]) if len(paths) == 1 else f"{len(paths):,} files for {task}"
        self.found = Found(skip_bad_lines)
        self.n_documents = self.n_characters = 0

    def batches(self, found):
        """(documents, is_open) of all files in order; see Source."""
        return itertools.chain.from_iterable(source.documents(found, self.on_read) for source in self.sources)

    def survey(self):
        """The first pass: yields lists of all texts, and on the way counts them and looks for bad lines."""
        was_open = False
        try:
            for documents, is_open in self.batches(self.found):
                self.n_documents += len(documents) - was_open
                was_open = is_open
                if self.task == "sft":
                    documents = [message["content"] for messages in documents for message in messages]
                self.n_characters += sum(map(len, documents))
                yield documents
        except BadLine as error:
            raise UserError(f"{error}; mend it, or use --skip-bad-lines to leave such lines out") from None
        if self.n_documents == 0:
            raise UserError(f"no usable line is left in {self.name} ({self.found.left_out[0]})")
        if self.n_documents == 1 and (self.task == "sft" or self.n_characters < 2):
            raise UserError(f"{self.name}: too little to keep some for validation; add more")

    def write(self, tokenizer, train, val, fraction, seed):
        """The second pass: encodes all documents and gives each to one of two TokenWriters."""
        batches = self.batches(Found(self.found.skip_bad_lines))
        held_out = Split(self.n_documents, fraction, seed).held_out
        if self.n_documents == 1:
            batches = cut_in_two(batches, self.n_characters, fraction)

            def held_out(start, count):
                return np.arange(start, start + count) == 1

        encode = encode_chats if self.task == "sft" else encode_texts
        n_seen, was_open = 0, False
        # Writing takes a third of the time and needs no Python: another core does it meanwhile.
        with ThreadPoolExecutor(1) as background:
            pending = background.submit(int)
            for documents, is_open in batches:
                start = n_seen - was_open  # the number of the first of `documents`
                is_val = held_out(start, len(documents))
                for writer, chosen in ((train, ~is_val), (val, is_val)):
                    if chosen.any():
                        part = list(itertools.compress(documents, chosen))
                        encoded = encode(tokenizer, part, was_open and chosen[0], is_open and chosen[-1])
                        pending.result()  # waits, so that no more than two chunks are held; raises disk full
                        pending = background.submit(writer.add, *encoded)
                n_seen, was_open = start + len(documents), is_open
            pending.result()


def encode_texts(tokenizer, texts, continues, is_open):
    """<|bos|>text<|eos|> of each text: (ids [n], starts, no mask, bytes, bytes).

    `continues`: the first text has its <|bos|> already; `is_open`: the last waits for its <|eos|>.
    """
    ids, lengths = tokenizer.encode_flat(texts)
    ends = np.cumsum(lengths)
    begins = (ends - lengths)[int(continues) :]
    ends = ends[: len(texts) - int(is_open)]
    marks = np.repeat([tokenizer.eos_id, tokenizer.bos_id], [len(ends), len(begins)])
    # Where one text ends another begins: insert puts the <|eos|> first, as it comes first in the list.
    ids = np.insert(ids, np.concatenate([ends, begins]), marks)
    n_bytes = len("".join(texts).encode())
    return ids, np.flatnonzero(ids == tokenizer.bos_id), None, n_bytes, n_bytes


def encode_chats(tokenizer, conversations, *_):
    """The conversations in their template: (ids [n], starts, mask [n], bytes, bytes the mask counts)."""
    ids, masks = zip(*render_chats(tokenizer, conversations), strict=True)
    ends = np.cumsum([len(chat) for chat in ids])
    n_bytes = collections.Counter()
    for message in itertools.chain.from_iterable(conversations):
        n_bytes[message["role"]] += len(message["content"].encode())
    starts = np.concatenate([[0], ends[:-1]])
    return np.concatenate(ids), starts, np.concatenate(masks), n_bytes.total(), n_bytes["assistant"]


BPE_SAMPLE = 50 << 20  # bytes of input that BPE learns from: more changes little and takes long


def sample(texts, share):
    """About `share` of some texts, taken evenly: all that begin in a million characters, or none."""
    n_before = 0
    for text in texts:
        million = n_before >> 20
        if int((million + 1) * share) > int(million * share):
            yield text
        n_before += len(text)


def prepare(pretrain, sft, out, val_fraction=0.05, seed=1337, kind="char", vocab_size=32000,
            tokenizer=None, skip_bad_lines=False, progress=None):  # fmt: skip
    """Write token files of the input files `pretrain` and `sft` (lists of paths) to the folder `out`.

    Either list may be empty. `tokenizer`: use this one instead of making one of `kind`.
    `progress(what, total)` returns a function to be told of bytes read. Returns
    {"pretrain_train": its meta, ...}, the tokenizer, and the corpora (for their bad lines).
    """
    progress = progress or (lambda what, total: lambda n_bytes: None)
    inputs = {"pretrain": pretrain, "sft": sft}
    corpora = [Corpus(task, paths, skip_bad_lines) for task, paths in inputs.items() if paths]
    total = sum(corpus.n_bytes for corpus in corpora)
    out = Path(out)

    def read_with(what):
        on_read = progress(what, total)
        for corpus in corpora:
            corpus.on_read = on_read

    read_with("reading")
    survey = itertools.chain.from_iterable(corpus.survey() for corpus in corpora)
    if tokenizer:
        collections.deque(survey, maxlen=0)
    elif kind == "char":
        tokenizer = CharTokenizer.train("".join(texts) for texts in survey)
    else:
        texts = sample(itertools.chain.from_iterable(survey), min(1, BPE_SAMPLE / max(1, total)))
        tokenizer = BPETokenizer.train(texts, vocab_size)

    read_with("encoding")
    with Together() as files:  # so that no old one meets a new one
        writers = {}
        for corpus in corpora:
            names = [f"{corpus.task}_{split}" for split in ("train", "val")]
            pair = [TokenWriter(files, out / name, corpus.task, tokenizer) for name in names]
            corpus.write(tokenizer, *pair, val_fraction, seed)
            writers.update(zip(names, pair, strict=True))
        files.open(out / "tokenizer.json").write(tokenizer.to_json().encode())
        metas = {name: writer.finish() for name, writer in writers.items()}
    return metas, tokenizer, corpora


# ---- token files -----------------------------------------------------------------------------------


class TokenFile:
    """A token file, opened by the path of its .bin; everything in it is checked before it is used.

    tokens [n_tokens] (uint16 or uint32), mask [n_tokens] uint8 or None, and starts [n_documents + 1]
    int64 are memory-mapped: what is read stays in the system's cache and can leave it again.
    `meta` is the .json: kind ("pretrain" or "sft"), n_tokens, n_documents, n_bytes (of its text in
    UTF-8), n_unknown, n_loss_tokens and n_loss_bytes (those the mask counts), vocab_size, tokenizer.

    UserError, naming the file, if anything is missing, damaged or foreign, or if `fingerprint` is
    given and the file was made with a tokenizer of another one.
    """

    def __init__(self, path, fingerprint=None):
        self.path = Path(path)
        if self.path.suffix != ".bin":
            raise UserError(f"{path}: a token file is named by its .bin")
        self._stem = self.path.with_suffix("")
        try:
            self.meta = meta = self._read_meta()
            self.kind = meta["kind"]
            self.starts = self._map("starts", "<i8", meta["n_documents"] + 1)
            self.tokens = self._map("bin", np.dtype(meta["dtype"]).newbyteorder("<"), meta["n_tokens"])
            self.mask = self._map("mask", np.uint8, meta["n_tokens"]) if self.kind == "sft" else None
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            why = "does not exist; run `python data.py` first" if missing else str(error.strerror).lower()
            raise UserError(f"{error.filename or path} {why}") from None
        self._verify()
        if fingerprint is not None and meta["tokenizer"] != fingerprint:
            raise UserError(
                f"{path} was made with another tokenizer than this run's; prepare its text again with "
                "`python data.py --tokenizer FILE`, where FILE is the checkpoint that is started from, "
                "or else the run's tokenizer_path"
            )

    @property
    def documents(self):
        return STAGES[self.kind].documents

    @property
    def fingerprint(self):
        """It tells files by what they hold, not by their place: a digest of all counts and checksums."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def needs(self):
        """For each document of an SFT file, the smallest block_size with which a token of it counts: int64
        [n_documents]; as large as can be where none counts at all."""
        needs = np.full(len(self.starts) - 1, np.iinfo(np.int64).max)
        first = 0
        while first < len(needs):
            # As many documents as fit in a chunk, or a single one that is longer.
            base = int(self.starts[first])
            last = max(first + 1, int(np.searchsorted(self.starts, base + CHUNK, side="right")) - 1)
            begins, ends = self.starts[first:last] - base, self.starts[first + 1 : last + 1] - base
            counted = np.append(np.flatnonzero(self.mask[base : base + ends[-1]]), ends[-1])
            # The first token of a document is read, and never predicted.
            places = counted[np.searchsorted(counted, begins + 1)]
            needs[first:last] = np.where(places < ends, places - begins, needs[first:last])
            first = last
        return needs

    def _fail(self, part, what):
        raise UserError(
            f"{part_path(self._stem, part)} {what}; write it anew, with the `python data.py` that wrote it"
        )

    def _read_meta(self):
        try:
            with open(part_path(self._stem, "json"), "rb") as file:
                meta = json.loads(file.read(1 << 16))  # it has some hundred bytes
        except (ValueError, RecursionError):
            self._fail("json", "is damaged")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT["format"]:
            self._fail("json", "does not describe a Nano token file")
        if meta.get("version") != FORMAT["version"]:
            self._fail("json", f"has version {meta.get('version')!r}, not {FORMAT['version']}")
        crc32 = meta.get("crc32")
        sound = (
            meta.pop("checksum", None) == meta_checksum(meta)
            and meta.get("kind") in ("pretrain", "sft")
            and meta.get("dtype") in ("uint16", "uint32")
            and isinstance(meta.get("tokenizer"), str)
            and all(type(meta.get(key)) is int and 0 <= meta[key] < 1 << 62 for key in COUNTS)
            and meta["n_documents"] >= 1
            and meta["n_tokens"] >= 2
            and meta["n_bytes"] >= 1
            and type(meta.get("vocab_size")) is int
            and isinstance(crc32, dict)
            and {"bin", "starts"} <= crc32.keys()
            and (meta["kind"] == "pretrain" or "mask" in crc32)
        )
        if not sound:
            self._fail("json", "is damaged")
        return meta

    def _map(self, part, dtype, length):
        path, dtype = part_path(self._stem, part), np.dtype(dtype)
        if os.path.getsize(path) != length * dtype.itemsize:
            self._fail(part, "is truncated or does not belong to its .json")
        return np.asarray(np.memmap(path, dtype, "r", shape=(length,)))

    def _verify(self):
        """Checksums of all files, chunk by chunk, and whether their numbers can be what they should be."""
        limits = {"bin": self.meta["vocab_size"], "starts": self.meta["n_tokens"] + 1, "mask": 2}
        for part, array in (("bin", self.tokens), ("starts", self.starts), ("mask", self.mask)):
            crc32 = 0
            for start in range(0, 0 if array is None else len(array), CHUNK):
                chunk = array[start : start + CHUNK]
                crc32 = zlib.crc32(chunk, crc32)
                if chunk.min() < 0 or chunk.max() >= limits[part]:
                    self._fail(part, "holds numbers out of range")
                if part == "starts" and (np.diff(array[start : start + CHUNK + 1]) <= 0).any():
                    self._fail(part, "is out of order")
            if array is not None and crc32 != self.meta["crc32"][part]:
                self._fail(part, "is damaged")
        if self.starts[0] != 0 or self.starts[-1] != len(self.tokens):
            self._fail("starts", "does not fit its .bin")


BatchSource = Any

# ---- batches ---------------------------------------------------------------------------------------


def keys(count, *names):
    """`count` uint64 that look random and depend on nothing but `names`, on every machine."""
    label = "/".join(map(str, names)).encode()
    return np.frombuffer(hashlib.shake_128(label).digest(8 * count), "<u8").astype(np.uint64)


def shuffled(places, n, keys):
    """What stands at `places` (int64 array) of a shuffled 0 ... n - 1, computed without any list of them.

    On the numbers of b bits, multiplying by an odd number, adding, and xor with the own upper half
    can each be undone: so together they only change the order. n is rarely 2^b; a number beyond n
    goes round again until it falls below ("cycle walking"; Black & Rogaway 2002).
    `keys`: an even number of uint64 that choose the order.
    """
    bits = max(1, (n - 1).bit_length())
    mask, half = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)

    def scramble(x):
        for multiplier, offset in zip(keys[::2], keys[1::2], strict=True):
            x = (x * (multiplier | np.uint64(1)) + offset) & mask
            x = x ^ (x >> half)
        return x

    x = scramble(places.astype(np.uint64))
    while (beyond := x >= n).any():
        x[beyond] = scramble(x[beyond])
    return x.astype(np.int64)


class TokenBatches:
    """Batches of token files, by number: batches(first) depends on (files, sizes, seed, first) alone.

    files       list of TokenFile, trained in this order, one pass each; together they are one
                epoch, and the next epoch starts from the first again, in another order
    block_size  tokens of a row, at most
    batch_size  rows of the global batch, whatever the number of devices

    A sequence of a pretraining file is a block of the stream of documents. The stream is taken as a
    ring, which each epoch cuts from another place on, so that blocks are not the same every time;
    every token but one is predicted once an epoch. A sequence of an SFT file is one conversation;
    of one longer than a block the end is cut off (`n_truncated` of them), and one that is cut before
    its answer, so that nothing in it counts, is left out (`n_left_out`).

    UserError if a file has no sequence that counts.
    """

    def __init__(self, files, block_size, batch_size, seed=1337):
        self.files, self.block_size, self.batch_size = list(files), block_size, batch_size
        self.seed = seed
        self.tokens_per_epoch = self.n_truncated = self.n_left_out = 0
        counts, self._kept = [], []  # the conversations of each file that count
        for file in self.files:
            if file.kind == "pretrain":
                targets, kept = len(file.tokens) - 1, None
                counts.append(-(-targets // block_size))
                self.tokens_per_epoch += targets
            else:
                kept = np.flatnonzero(file.needs <= block_size)
                if not len(kept):
                    raise UserError(_nothing_counts(file, block_size))
                targets = np.diff(file.starts)[kept] - 1
                counts.append(len(kept))
                self.tokens_per_epoch += int(np.minimum(targets, block_size).sum())
                self.n_truncated += int((targets > block_size).sum())
                self.n_left_out += len(file.needs) - len(kept)
            self._kept.append(kept)
        self._bounds = np.cumsum([0, *counts])  # of the files' sequences within an epoch
        self.sequences_per_epoch = int(self._bounds[-1])

    @property
    def notes(self):
        notes = []
        if self.n_truncated:
            notes.append(f"{self.n_truncated:,} conversations are longer than block_size and lose their end")
        if self.n_left_out:
            notes.append(f"{self.n_left_out:,} conversations are left out: block_size ends before their answer")
        return notes

    @property
    def description(self):
        return f"{self.tokens_per_epoch:,} tokens an epoch"

    @property
    def fingerprints(self):
        """What it reads, for a checkpoint to remember: [{"fingerprint", "size" (in words)}], one a file."""
        counts = [(file.meta["n_documents"], file.meta["n_tokens"]) for file in self.files]
        sizes = [f"{documents:,} documents, {tokens:,} tokens" for documents, tokens in counts]
        fingerprints = [file.fingerprint for file in self.files]
        return [dict(fingerprint=f, size=size) for f, size in zip(fingerprints, sizes, strict=True)]

    @property
    def n_loss_tokens(self):
        """How many tokens count in an epoch, or about as many: what is cut off counts here."""
        return sum(file.meta["n_loss_tokens"] for file in self.files)

    def position(self, first):
        """Where the sequence of this number stands: (epoch, number of the file, sequence in it)."""
        epoch, place = divmod(first, self.sequences_per_epoch)
        stage = int(np.searchsorted(self._bounds, place, side="right")) - 1
        return epoch, stage, int(place - self._bounds[stage])

    def __call__(self, first):
        """The batch of the sequences from number `first` on, of all that there are, epoch after epoch:
        x [B, T] and y [B, T] int64, mask [B, T] float32: predict y from x where the mask is 1.

        T is the longest row, rounded up to a multiple of 8, never above block_size; shorter rows are
        padded with <|padding|> and mask 0. In every row some token counts.
        """
        epochs, places = np.divmod(first + np.arange(self.batch_size), self.sequences_per_epoch)
        stages = np.searchsorted(self._bounds, places, side="right") - 1
        rows = []
        for epoch, stage in sorted(set(zip(epochs.tolist(), stages.tolist(), strict=True))):
            here = (epochs == epoch) & (stages == stage)
            rows += self._sequences(epoch, stage, places[here] - self._bounds[stage])
        width = max(len(ids) for ids, _ in rows) - 1
        width = min(-(-width // 8) * 8, self.block_size)
        ids = np.full((self.batch_size, width + 1), Tokenizer.padding_id, np.int64)
        mask = np.zeros((self.batch_size, width), np.float32)
        for row, (row_ids, row_mask) in enumerate(rows):
            ids[row, : len(row_ids)] = row_ids
            mask[row, : len(row_ids) - 1] = row_mask
        return {"x": ids[:, :-1].copy(), "y": ids[:, 1:].copy(), "mask": mask}

    def _sequences(self, epoch, stage, places):
        """(ids [n + 1], mask [n] or 1) of the sequences at `places` of a file's shuffled order."""
        file, size, kept = self.files[stage], self.block_size, self._kept[stage]
        *order, begin = keys(9, self.seed, epoch, stage)
        count = int(self._bounds[stage + 1] - self._bounds[stage])
        places = shuffled(places, count, order)
        if file.kind == "pretrain":
            n = len(file.tokens)
            begin = int(begin) % n
            for place in places.tolist():
                length = min(size + 1, n - place * size)
                first = (begin + place * size) % n
                ids = file.tokens[first : first + length]
                if len(ids) < length:  # over the end of the ring
                    ids = np.concatenate([ids, file.tokens[: length - len(ids)]])
                yield ids, 1
        else:
            for place in kept[places].tolist():
                first, end = file.starts[place : place + 2].tolist()
                end = min(end, first + size + 1)
                yield file.tokens[first:end], file.mask[first + 1 : end]


def _nothing_counts(file, block_size):
    least = int(file.needs.min())
    if least > len(file.tokens):
        return f"{file.path}: no token in it counts, so nothing can be learned from it"
    return (
        f"{file.path}: block_size={block_size} cuts every conversation before its answer; "
        f"the first answer needs a model whose block_size is {least} or more"
    )


# ---- the command line ------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Text files to token files: dataset/pretrain.txt (or .jsonl) and dataset/sft.jsonl"
        " to dataset/prepared/.",
        epilog="examples:\n"
        "  python data.py\n"
        "  python data.py --pretrain books/*.txt --out dataset/books --kind bpe --vocab_size 8192\n"
        "  python data.py --sft chats.jsonl --tokenizer checkpoint/x.pt --skip-bad-lines",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pretrain", nargs="+", metavar="FILE", help='text in UTF-8, or JSON lines with {"text": ...}')
    add("--sft", nargs="+", metavar="FILE", help="JSON lines of conversations; doc/data.md has their shapes")
    add("--out", metavar="DIR", help="default: dataset/prepared")
    add("--val_fraction", type=float, default=0.05, help="share of documents held out (0.05)")
    add("--seed", type=int, default=1337, help="decides which documents these are (1337)")
    add("--kind", choices=("char", "bpe"), help="tokenizer to make (char)")
    add("--vocab_size", type=int, help="tokens of bpe, special ones included (32000)")
    add("--tokenizer", metavar="FILE",
        help="use this tokenizer.json, or that of a checkpoint or model folder; make none")  # fmt: skip
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


def main():
    args = parse_arguments()
    folder = ROOT / "dataset"
    pretrain, sft = args.pretrain or [], args.sft or []
    if not pretrain and not sft:
        pretrain = [path for path in (folder / "pretrain.txt", folder / "pretrain.jsonl") if path.exists()]
        sft = [path for path in (folder / "sft.jsonl",) if path.exists()]
        if not pretrain and not sft:
            raise UserError(
                f"there is no pretrain.txt, pretrain.jsonl or sft.jsonl in {folder}; put your text there,"
                " or let `python dataset/sample_world.py` write a sample"
            )
    tokenizer = None
    if args.tokenizer:
        from common.config import find
        from formats import load_tokenizer

        tokenizer = load_tokenizer(find(args.tokenizer))
    out = Path(args.out) if args.out else folder / "prepared"

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    console = Console()
    for task, paths, file in (("pretraining", pretrain, "pretrain.txt"), ("SFT", sft, "sft.jsonl")):
        if not paths and not (args.pretrain or args.sft):
            console.print(f"no {folder / file}: nothing is prepared for {task}", style="yellow")

    columns = (TextColumn("{task.description:>8}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def progress(what, total):
            if not console.is_terminal:
                print(f"{what} {total / 1e6:,.1f} MB of text", flush=True)
            task = bar.add_task(what, total=total)
            return lambda n_bytes: bar.advance(task, n_bytes)

        metas, tokenizer, corpora = prepare(
            pretrain, sft, out, args.val_fraction, args.seed, args.kind or "char", args.vocab_size or 32000,
            tokenizer, args.skip_bad_lines, progress,
        )  # fmt: skip
    seconds = time.perf_counter() - start

    table = Table(title=f"{out}: {tokenizer.kind} tokenizer, vocabulary {tokenizer.vocab_size:,}")
    table.add_column("file")
    for name in ("documents", "tokens", "bytes of text", "unknown"):
        table.add_column(name, justify="right")
    for name, meta in metas.items():
        counts = (meta[key] for key in ("n_documents", "n_tokens", "n_bytes", "n_unknown"))
        table.add_row(f"{name}.bin", *(f"{count:,}" for count in counts))
    console.print(table)
    n_bytes = sum(meta["n_bytes"] for meta in metas.values())
    console.print(f"{n_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s", highlight=False)
    if n_unknown := sum(meta["n_unknown"] for meta in metas.values()):
        console.print(f"{n_unknown:,} characters are not in {args.tokenizer}: <|unknown|>", style="yellow")
    if args.kind == "bpe" and tokenizer.vocab_size < (args.vocab_size or 32000):
        console.print(f"the text has only enough repetitions for {tokenizer.vocab_size:,} tokens")
    for corpus in corpora:
        for sentence in corpus.found.told(corpus.name):
            print(sentence)
        for sentence in corpus.found.told_left_out(corpus.task, corpus.n_bytes):
            print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run(main)
