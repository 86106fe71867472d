"""How likely a model finds given continuations: `log_likelihoods`.

Multiple-choice benchmarks and perplexities are computed from these numbers. What the texts share is read
once, such as the question before its four choices, or the examples before all questions of a benchmark: the
texts form a tree of shared beginnings, and every node of it is read in a row of a KV cache that starts as a
copy of its parent's row. Nodes of all lengths are read in batches. Only the tokens of the continuations get
logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from decoding.sampling import check_prompt
from model import GPT, Cache

MIN_SHARED = 8  # a beginning shorter than this is not worth a pass of its own
CPU_BATCH, GPU_BATCH = 2048, 32768  # tokens read at once: few stay in a CPU's caches, many keep a GPU busy
MAX_LOGITS = 1 << 23  # numbers in the logits that are computed at once: 32 MB of float32


class Likelihood(NamedTuple):
    """Of a continuation.

    logprob    its log-probability after the context, in nats
    is_greedy  whether each of its tokens is the likeliest one
    n_tokens   its tokens
    n_dropped  how many tokens of the context were left out, the oldest ones, for the rest to fit
    """

    logprob: float
    is_greedy: bool
    n_tokens: int
    n_dropped: int = 0


class Node(NamedTuple):
    """Tokens start .. end - 1, which texts first .. last - 1 share; `children` go on from there."""

    first: int
    last: int
    start: int
    end: int
    children: list[Node]

    @property
    def size(self) -> int:
        return self.end - self.start


def log_likelihoods(
    model: GPT,
    requests: Sequence[tuple[list[int], list[int]]],
    on_done: Callable[[int, Likelihood], object] = lambda number, likelihood: None,
) -> list[Likelihood]:
    """The likelihood of each request (ids of the context, ids of the continuation), in the same order.

    Context and continuation together may hold one token more than the model's context, since the last token
    is only predicted; beyond that, the oldest tokens are left out. on_done is called with the number of each
    request, and its result, as soon as there is one; they end in any order.

    Raises ValueError for a context or continuation that is empty, holds ids outside the vocabulary, or is a
    continuation that does not fit in the context; and for a model with is_causal = false.
    """
    capacity = model.config.block_size
    texts = []
    for context, continuation in requests:
        if len(continuation) > capacity:
            raise ValueError(f"{len(continuation)} tokens do not fit in a context of {capacity}")
        texts.append(check_prompt(model, context) + check_prompt(model, continuation))
    inputs = [np.array(text[-capacity - 1 : -1], ">u4") for text in texts]
    # Sorted as bytes, texts that begin alike are neighbours, and one that others begin with comes first.
    order = sorted(range(len(texts)), key=[ids.tobytes() for ids in inputs].__getitem__)
    reader = Reader(model, [inputs[number] for number in order])
    results: list[Likelihood] = [Likelihood(0.0, True, 0)] * len(texts)

    def finish(place: int, logprob: float, is_greedy: bool) -> None:
        number = order[place]
        n_dropped = max(0, len(texts[number]) - capacity - 1)
        results[number] = Likelihood(logprob, is_greedy, len(requests[number][1]), n_dropped)
        on_done(number, results[number])

    was_training = model.training
    model.eval()
    try:
        reader.run([texts[number][-len(requests[number][1]) :] for number in order], finish)
    finally:
        model.train(was_training)
    return results


class Reader:
    """Reads sorted texts, each an array of ids, and scores the targets of their last positions."""

    def __init__(self, model: GPT, texts: list[np.ndarray]) -> None:
        self.model, self.texts = model, texts
        self.batch_tokens = CPU_BATCH if model.device.type == "cpu" else GPU_BATCH

    def run(self, targets: list[list[int]], finish: Callable[[int, float, bool], None]) -> None:
        """targets: the tokens that follow the last len(targets[i]) positions of text i. finish is called with
        i, the sum of their log-probabilities, and whether all of them are the likeliest."""
        self.targets, self.finish = targets, finish
        self.logprobs, self.are_greedy = np.zeros(len(targets)), np.ones(len(targets), bool)
        with torch.inference_mode():
            self.read([(0, node) for node in tree(self.texts)], None)

    def read(self, nodes: list[tuple[int, Node]], parents: Cache | None) -> None:
        """Read nodes and all below them. Each comes with its parent's row in `parents`."""
        for batch in self.batches(nodes):
            longest = max(node.size for _, node in batch)
            tokens = np.zeros((len(batch), longest), np.int64)
            for row, (_, node) in enumerate(batch):
                tokens[row, : node.size] = self.texts[node.first][node.start : node.end]
            cache = None
            if parents or any(node.children for _, node in batch):
                cache = self.model.new_cache(len(batch), max(node.start for _, node in batch) + longest)
            if cache and parents:
                cache.copy_rows(parents, [parent for parent, _ in batch])
            x = self.model.hidden(
                torch.from_numpy(tokens).to(self.model.device),
                cache,
                torch.tensor([node.size for _, node in batch], device=self.model.device),
            )
            self.score([node for _, node in batch], x)
            if children := [(row, child) for row, (_, node) in enumerate(batch) for child in node.children]:
                self.read(children, cache)

    def batches(self, nodes: list[tuple[int, Node]]) -> Iterator[list[tuple[int, Node]]]:
        """Put nodes of similar sizes together, so that there is little padding, and limit the memory."""
        batch: list[tuple[int, Node]] = []
        past = 0
        for parent, node in sorted(nodes, key=lambda pair: (pair[1].size, pair[1].start)):
            past, rows = max(past, node.start), len(batch) + 1
            if batch and (
                rows * node.size > self.batch_tokens
                or rows * (past + node.size) > 8 * self.batch_tokens  # tokens in the cache
                or past + node.size > self.model.config.block_size
            ):
                yield batch
                batch, past = [], node.start
            batch.append((parent, node))
        if batch:
            yield batch

    def score(self, nodes: list[Node], x: Tensor) -> None:
        """Add up the log-probabilities of the targets at the positions of these nodes. x [B, T, C]: their
        final vectors."""
        where: list[int] = []  # in x [B * T, C]
        targets: list[int] = []
        owners: list[int] = []  # the text that each target belongs to
        for row, node in enumerate(nodes):
            for number in range(node.first, node.last):
                start = len(self.texts[number]) - len(self.targets[number])  # position of its first target
                found = self.targets[number][max(0, node.start - start) : max(0, node.end - start)]
                first = row * x.shape[1] + max(start, node.start) - node.start
                where += range(first, first + len(found))
                targets += found
                owners += [number] * len(found)
        # Several targets may be asked for at one position; its logits are computed once.
        places, place_of = np.unique(np.array(where, np.int64), return_inverse=True)
        n = max(1, MAX_LOGITS // self.model.config.vocab_size)
        for start in range(0, len(places), n):
            logits = self.model.logits(x.flatten(0, 1)[places[start : start + n]])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = np.flatnonzero((place_of >= start) & (place_of < start + n))
            at, target, owner = place_of[chosen] - start, np.array(targets)[chosen], np.array(owners)[chosen]
            logprobs = logits.log_softmax(-1)[at, target]  # on a CPU a quarter of the time of logsumexp
            np.add.at(self.logprobs, owner, logprobs.double().cpu().numpy())
            # On a CPU, NumPy's argmax takes a hundredth of the time of PyTorch's.
            on_cpu = logits.device.type == "cpu"
            best = logits.numpy().argmax(-1) if on_cpu else logits.argmax(-1).cpu().numpy()
            np.logical_and.at(self.are_greedy, owner, best[at] == target)
        for node in nodes:
            for number in range(node.first, node.last):
                if node.end == len(self.texts[number]):
                    self.finish(number, float(self.logprobs[number]), bool(self.are_greedy[number]))


def tree(texts: Sequence[np.ndarray]) -> list[Node]:
    """The tree of sorted texts: its roots. A text ends where a node ends."""
    n_shared = np.zeros(len(texts), np.int64)  # tokens that a text shares with the one before it
    for number in range(1, len(texts)):
        size = min(len(texts[number - 1]), len(texts[number]))
        differs = texts[number - 1][:size] != texts[number][:size]
        n_shared[number] = differs.argmax() if differs.any() else size
    roots: list[Node] = []
    waiting = (
        [(0, len(texts), 0, roots)] if len(texts) else []
    )  # texts that share a beginning, its node's children
    while waiting:
        first, last, start, siblings = waiting.pop()
        end = int(n_shared[first + 1 : last].min()) if last - first > 1 else len(texts[first])
        ends = end == len(texts[last - 1])  # the longest of them
        if ends or end - start >= MIN_SHARED:
            node = Node(first, last, start, end, [])
            siblings.append(node)
            siblings, start = node.children, end
        if not ends:
            bounds = [first, *(first + 1 + np.flatnonzero(n_shared[first + 1 : last] == end)), last]
            for a, b in itertools.pairwise(bounds):
                if len(texts[b - 1]) > start:  # those that end with the node need no child
                    waiting.append((int(a), int(b), start, siblings))
    return roots
