"""A token file: the ids of many documents, end to end, in the form that training reads.

One is several files with the same name before the suffix:

    .bin      the ids: uint16, or uint32 if the vocabulary has more than 65,536 tokens
    .starts   where each document starts in them, and where the last one ends: int64
    .mask     for conversations only: 1 where the loss counts, else 0: uint8
    .json     counts, checksums, and the fingerprint of the tokenizer

All numbers are little-endian. Without its .json, which is put into place last, a token file does not count.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from common.errors import UserError
from common.files import AtomicFiles
from config.stages import STAGES
from preparation import stages_with_files
from sources.reading import CHUNK

if TYPE_CHECKING:
    from tokenizer import Tokenizer

FORMAT = {"format": "nano-tokens", "version": 1}
COUNTS = ("n_tokens", "n_documents", "n_bytes", "n_unknown", "n_loss_tokens", "n_loss_bytes")


def part_path(stem: Path, part: str) -> Path:
    """The path of a part ("bin", "starts", "mask", "json") of a token file; `stem`: without a suffix."""
    return stem.with_name(f"{stem.name}.{part}")


def meta_checksum(meta: dict[str, Any]) -> int:
    """CRC-32 of the canonical form of a .json without its own checksum."""
    return zlib.crc32(json.dumps(meta, sort_keys=True, separators=(",", ":")).encode())


def fingerprint_of(meta: dict[str, Any]) -> str:
    """Identifies a token file by its .json, without the checksum of that one: it has those of all parts."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]


class TokenWriter:
    """Writes one token file, a batch of documents at a time.

    Args:
        files: puts all the files written into place at once, in the end.
        stem: the path without suffix.
        kind: the name of the training stage it is for.
    """

    def __init__(self, files: AtomicFiles, stem: Path, kind: str, tokenizer: Tokenizer) -> None:
        self.stem, self.kind, self.tokenizer = stem, kind, tokenizer
        parts = ("bin", "starts", "mask") if STAGES[kind].documents == "chats" else ("bin", "starts")
        self.crc32 = dict.fromkeys(parts, 0)
        self.counts = collections.Counter(dict.fromkeys(COUNTS, 0))
        self.together = files
        self.files = {part: files.open(part_path(stem, part)) for part in parts}

    def _write(self, part: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8).data
        self.crc32[part] = zlib.crc32(data, self.crc32[part])
        self.files[part].write(data)

    def add(
        self, ids: np.ndarray, starts: np.ndarray, mask: np.ndarray | None, n_bytes: int, n_loss_bytes: int
    ) -> None:
        """Append ids [n], the positions in them where documents start, and for conversations the mask [n].

        n_bytes: of the text, in UTF-8; n_loss_bytes: of the part of it that the mask counts.
        """
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

    def finish(self) -> dict[str, Any]:
        """Complete all parts, the .json last; returns its content."""
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


class TokenFile:
    """A token file, opened by the path of its .bin. Everything in it is checked before it is used.

    tokens       [n_tokens] uint16 or uint32
    starts       [n_documents + 1] int64
    mask         [n_tokens] uint8, or None if all tokens count
    meta         the content of the .json: kind, dtype, vocab_size, tokenizer (its fingerprint), n_tokens,
                 n_documents, n_bytes (of the text in UTF-8), n_unknown, n_loss_tokens and n_loss_bytes (what
                 the mask counts), crc32
    kind         the name of the training stage it was prepared for
    documents    what it holds: "text", a stream of documents, or "chats", conversations with a mask

    The arrays are memory-mapped: what has been read stays in the system's cache, which can drop it again.

    UserError, naming the file, if anything is missing, damaged or foreign, or if `fingerprint` is given and
    the file was made with another tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str | None = None) -> None:
        self.path = Path(path)
        if self.path.suffix != ".bin":
            raise UserError(f"{path}: the name of a token file ends in .bin")
        self._stem = self.path.with_suffix("")
        try:
            self.meta = meta = self._read_meta()
            self.kind: str = meta["kind"]
            self.documents = STAGES[self.kind].documents
            self.starts = self._map("starts", "<i8", meta["n_documents"] + 1)
            self.tokens = self._map("bin", np.dtype(meta["dtype"]).newbyteorder("<"), meta["n_tokens"])
            has_mask = self.documents == "chats"
            self.mask = self._map("mask", np.uint8, meta["n_tokens"]) if has_mask else None
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            why = "does not exist; run `python data.py` first" if missing else str(error.strerror).lower()
            raise UserError(f"{error.filename or path} {why}") from None
        self._verify()
        if fingerprint is not None and meta["tokenizer"] != fingerprint:
            raise UserError(
                f"{path} was made with another tokenizer than this run's; prepare its text again with "
                "`python data.py --tokenizer FILE`, where FILE is the checkpoint to start from, "
                "or else the run's tokenizer_path"
            )

    @property
    def fingerprint(self) -> str:
        """Identifies a file by its content, wherever it is: a digest of all its counts and checksums."""
        return fingerprint_of(self.meta)

    @functools.cached_property
    def min_block_sizes(self) -> np.ndarray:
        """The smallest block_size with which a token counts, for each conversation: int64 [n_documents].

        The largest int64 where no token counts at all.
        """
        assert self.mask is not None
        sizes = np.full(len(self.starts) - 1, np.iinfo(np.int64).max)
        first = 0
        while first < len(sizes):
            # As many documents as fit in a chunk, or a single one that is longer.
            base = int(self.starts[first])
            last = max(first + 1, int(np.searchsorted(self.starts, base + CHUNK, side="right")) - 1)
            begins, ends = self.starts[first:last] - base, self.starts[first + 1 : last + 1] - base
            counted = np.append(np.flatnonzero(self.mask[base : base + ends[-1]]), ends[-1])
            # The first token of a document is only an input; it is never predicted.
            first_counted = counted[np.searchsorted(counted, begins + 1)]
            sizes[first:last] = np.where(first_counted < ends, first_counted - begins, sizes[first:last])
            first = last
        return sizes

    def _fail(self, part: str, problem: str) -> NoReturn:
        raise UserError(
            f"{part_path(self._stem, part)} {problem}; run the `python data.py` that wrote it again"
        )

    def _read_meta(self) -> dict[str, Any]:
        try:
            with open(part_path(self._stem, "json"), "rb") as file:
                meta = json.loads(file.read(1 << 16))  # it has a few hundred bytes
        except (ValueError, RecursionError):
            self._fail("json", "is damaged")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT["format"]:
            self._fail("json", "does not describe a Nano token file")
        if meta.get("version") != FORMAT["version"]:
            self._fail("json", f"has version {meta.get('version')!r}, not {FORMAT['version']}")
        crc32, kinds = meta.get("crc32"), [stage.name for stage in stages_with_files()]
        is_sound = (
            meta.pop("checksum", None) == meta_checksum(meta)
            and meta.get("kind") in kinds
            and meta.get("dtype") in ("uint16", "uint32")
            and isinstance(meta.get("tokenizer"), str)
            and all(type(meta.get(key)) is int and 0 <= meta[key] < 1 << 62 for key in COUNTS)
            and meta["n_documents"] >= 1
            and meta["n_tokens"] >= 2
            and meta["n_bytes"] >= 1
            and type(meta.get("vocab_size")) is int
            and isinstance(crc32, dict)
            and {"bin", "starts"} <= crc32.keys()
            and (STAGES[meta["kind"]].documents != "chats" or "mask" in crc32)
        )
        if not is_sound:
            self._fail("json", "is damaged")
        return meta

    def _map(self, part: str, dtype: Any, length: int) -> np.ndarray:
        path, dtype = part_path(self._stem, part), np.dtype(dtype)
        if os.path.getsize(path) != length * dtype.itemsize:
            self._fail(part, "is truncated or does not belong to its .json")
        return np.asarray(np.memmap(path, dtype, "r", shape=(length,)))

    def _verify(self) -> None:
        """Check the checksums of all parts, chunk by chunk, and that their numbers are in range."""
        limits = {"bin": self.meta["vocab_size"], "starts": self.meta["n_tokens"] + 1, "mask": 2}
        for part, array in (("bin", self.tokens), ("starts", self.starts), ("mask", self.mask)):
            if array is None:
                continue
            crc32 = 0
            for start in range(0, len(array), CHUNK):
                chunk = array[start : start + CHUNK]
                crc32 = zlib.crc32(chunk.data, crc32)
                if chunk.min() < 0 or chunk.max() >= limits[part]:
                    self._fail(part, "holds numbers out of range")
                if part == "starts" and (np.diff(array[start : start + CHUNK + 1]) <= 0).any():
                    self._fail(part, "is out of order")
            if crc32 != self.meta["crc32"][part]:
                self._fail(part, "is damaged")
        if self.starts[0] != 0 or self.starts[-1] != len(self.tokens):
            self._fail("starts", "does not fit its .bin")
