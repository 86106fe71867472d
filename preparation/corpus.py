"""Prepare training data: two passes over the input files.

The first pass finds the vocabulary and every mistake in the input, the second writes ids. Both go through the
text block by block, so memory does not depend on how much there is.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import AtomicFiles
from config.stages import STAGES, Stage
from preparation.split import Split, cut_in_two
from preparation.token_file import TokenWriter
from sources import BadLine, ReadReport, Source
from sources.reading import Note
from sources.records import messages_of, text_of
from tokenizer import BPETokenizer, CharTokenizer, Message, Tokenizer, merge_turns, render_chats

# What TokenWriter.add takes: ids [n], starts of documents, mask [n] or None, bytes of text, bytes that count.
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray | None, int, int]


def conversation_of(record: Any) -> tuple[list[Message], list[Note]]:
    """The conversation in a record, as the chat template takes it, and notes: see sources/records.py.

    Consecutive messages of one role are joined. UserError unless the user says something and the assistant
    has the last word.
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


def encode_texts(tokenizer: Tokenizer, texts: list[str], continues: bool, is_open: bool) -> Encoded:
    """<|bos|>text<|eos|> of each text.

    continues: the first text is the rest of a document whose <|bos|> has been written already
    is_open: the last text is not the end of its document, so it gets no <|eos|> yet
    """
    ids, lengths = tokenizer.encode_flat(texts)
    ends = np.cumsum(lengths)
    begins = (ends - lengths)[int(continues) :]
    ends = ends[: len(texts) - int(is_open)]
    marks = np.repeat([tokenizer.eos_id, tokenizer.bos_id], [len(ends), len(begins)])
    # Where one text ends the next begins; np.insert keeps the order of the list, so <|eos|> comes first.
    ids = np.insert(ids, np.concatenate([ends, begins]), marks)
    n_bytes = len("".join(texts).encode())
    return ids, np.flatnonzero(ids == tokenizer.bos_id), None, n_bytes, n_bytes


def encode_chats(tokenizer: Tokenizer, conversations: list[list[Message]]) -> Encoded:
    """The conversations in the chat template, with the mask of what the assistant says."""
    ids, masks = zip(*render_chats(tokenizer, conversations), strict=True)
    ends = np.cumsum([len(chat) for chat in ids])
    n_bytes: collections.Counter[str] = collections.Counter()
    for message in itertools.chain.from_iterable(conversations):
        n_bytes[message["role"]] += len(message["content"].encode())
    starts = np.concatenate([[0], ends[:-1]])
    return np.concatenate(ids), starts, np.concatenate(masks), n_bytes.total(), n_bytes["assistant"]


class Corpus:
    """The input files of one stage of training. They are read twice, by `survey` and then by `write`.

    report, n_documents, n_characters: what the first pass has found
    """

    def __init__(self, stage: Stage, paths: Sequence[Path | str], skip_bad_lines: bool = False) -> None:
        self.stage, self.is_chats = stage, stage.documents == "chats"
        of_record = conversation_of if self.is_chats else text_of
        self.sources = [Source(path, of_record, needs_records=self.is_chats) for path in paths]
        self.n_bytes = sum(source.n_bytes for source in self.sources)
        self.name = str(paths[0]) if len(paths) == 1 else f"{len(paths):,} files for {stage.name}"
        self.report = ReadReport(skip_bad_lines)
        self.n_documents = self.n_characters = 0
        self.on_read: Callable[[int], object] = lambda n_bytes: None  # is called with the bytes just read

    def batches(self, report: ReadReport) -> Iterator[tuple[list[Any], bool]]:
        """(documents, is_open) of all files in order; see Source."""
        return itertools.chain.from_iterable(
            source.documents(report, self.on_read) for source in self.sources
        )

    def survey(self) -> Iterator[list[str]]:
        """The first pass: yields all texts in lists, and counts them. UserError for the first bad line."""
        was_open = False
        try:
            for documents, is_open in self.batches(self.report):
                self.n_documents += len(documents) - was_open
                was_open = is_open
                if self.is_chats:
                    documents = [message["content"] for messages in documents for message in messages]
                self.n_characters += sum(map(len, documents))
                yield documents
        except BadLine as error:
            raise UserError(f"{error}; correct it, or use --skip-bad-lines to leave such lines out") from None
        if self.n_documents == 0:
            raise UserError(f"no usable line is left in {self.name} ({self.report.left_out[0]})")
        if self.n_documents == 1 and (self.is_chats or self.n_characters < 2):
            raise UserError(f"{self.name}: too little to hold some out for validation; add more")

    def write(
        self, tokenizer: Tokenizer, train: TokenWriter, val: TokenWriter, fraction: float, seed: int
    ) -> None:
        """The second pass: encodes each document and appends it to the training or the validation file."""
        batches = self.batches(ReadReport(self.report.skip_bad_lines))
        held_out = Split(self.n_documents, fraction, seed).held_out
        if self.n_documents == 1:
            batches = cut_in_two(batches, self.n_characters, fraction)

            def held_out(start: int, count: int) -> np.ndarray:
                return np.arange(start, start + count) == 1

        n_seen, was_open = 0, False
        # Writing takes a third of the time and does not hold Python's lock: a second core does it meanwhile.
        with ThreadPoolExecutor(1) as background:
            pending: Future[Any] = background.submit(int)
            for documents, is_open in batches:
                start = n_seen - was_open  # the number of the first of `documents`
                is_val = held_out(start, len(documents))
                for writer, chosen in ((train, ~is_val), (val, is_val)):
                    if not chosen.any():
                        continue
                    part = list(itertools.compress(documents, chosen))
                    if self.is_chats:
                        encoded = encode_chats(tokenizer, part)
                    else:
                        encoded = encode_texts(
                            tokenizer, part, bool(was_open and chosen[0]), bool(is_open and chosen[-1])
                        )
                    pending.result()  # so that no more than two batches are in memory; raises a full disk
                    pending = background.submit(writer.add, *encoded)
                n_seen, was_open = start + len(documents), is_open
            pending.result()


BPE_SAMPLE = 50 << 20  # bytes of input that BPE learns from: more of it changes little and takes long


def sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of some texts, evenly spread: of each million characters, all texts or none."""
    n_before = 0
    for text in texts:
        million = n_before >> 20
        if int((million + 1) * share) > int(million * share):
            yield text
        n_before += len(text)


def prepare(
    inputs: Mapping[str, Sequence[Path | str]],
    out: Path | str,
    val_fraction: float = 0.05,
    seed: int = 1337,
    kind: str = "char",
    vocab_size: int = 32000,
    tokenizer: Tokenizer | None = None,
    skip_bad_lines: bool = False,
    progress: Callable[[str, int], Callable[[int], object]] = lambda title, n_bytes: lambda n_read: None,
) -> tuple[dict[str, dict[str, Any]], Tokenizer, list[Corpus]]:
    """Write the token files of some input files, and the tokenizer, to the folder `out`: all of them or none.

    Args:
        inputs: {name of a training stage: its input files}; stages without files are left out.
        kind, vocab_size: of the tokenizer that is trained on the input, unless `tokenizer` is given.
        progress: progress(title of a pass, its number of bytes) returns a function that is called with the
            number of bytes just read.

    Returns {"<stage>_train" and "<stage>_val": the content of the .json}, the tokenizer, and the corpora.
    """
    corpora = [Corpus(STAGES[name], paths, skip_bad_lines) for name, paths in inputs.items() if paths]
    total, out = sum(corpus.n_bytes for corpus in corpora), Path(out)

    def start_pass(title: str) -> None:
        on_read = progress(title, total)
        for corpus in corpora:
            corpus.on_read = on_read

    start_pass("reading")
    survey = itertools.chain.from_iterable(corpus.survey() for corpus in corpora)
    if tokenizer:
        collections.deque(survey, maxlen=0)  # only counts and checks
    elif kind == "char":
        tokenizer = CharTokenizer.train("".join(texts) for texts in survey)
    else:
        texts = sample(itertools.chain.from_iterable(survey), min(1, BPE_SAMPLE / max(1, total)))
        tokenizer = BPETokenizer.train(texts, vocab_size)

    start_pass("encoding")
    with AtomicFiles() as files:  # so that new files never lie beside old ones
        writers: dict[str, TokenWriter] = {}
        for corpus in corpora:
            name = corpus.stage.name
            train, val = (TokenWriter(files, out / f"{name}_{s}", name, tokenizer) for s in ("train", "val"))
            corpus.write(tokenizer, train, val, val_fraction, seed)
            writers |= {f"{name}_train": train, f"{name}_val": val}
        files.open(out / "tokenizer.json").write(tokenizer.to_json().encode())
        metas = {name: writer.finish() for name, writer in writers.items()}
    return metas, tokenizer, corpora
