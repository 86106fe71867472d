"""Continue many prompts at once, each as if it were alone.

`generate` (decoding/sampling.py) is the plain way to continue one text. A server has many, which start and
end at different times, and a step for sixteen of them takes hardly longer than a step for one, since most of
the time goes into reading the weights. So a `BatchedDecoder` has a KV cache with a row for each of `n_slots`
requests. Every step gives one token to each running request; a request that ends leaves its row to one that
waits ("continuous batching"; Yu et al. 2022, "Orca", section 3). A long prompt is read in pieces, one per
step, so that the other requests need not wait for all of it (Agrawal et al. 2023, "Sarathi", section 4.1).

    decoder = BatchedDecoder(model, n_slots=16)
    request = decoder.add(Request(prompt_ids, max_tokens=100, temperature=0.8, seed=1))
    while decoder.is_busy:
        for request in decoder.step():
            ...                     # request.tokens has one more id, or request.finish_reason is set

The result of a request depends on nothing but itself: it has its own random seed, its prompt is read
separately, and no row of a batch sees another. A BatchedDecoder is not thread-safe: the server talks to it
through queues.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from decoding.backend import (
    DecodeBackend,
    TorchBackend,
    compiled_backend_for,
    prepare,
    supports,
    weight_format,
)
from decoding.compile_cache import is_compiled
from decoding.sampling import TokenCounts, check_prompt, has_penalty, is_greedy, logits_to_probs, sample
from model import GPT

PREFILL_CHUNK = 256  # tokens of a prompt that are read in one step

Logprob = tuple[float, list[tuple[int, float]]]  # of a token, and of the likeliest tokens in its place


class Request:
    """A prompt, how to continue it, and the result so far.

    prompt: ids. max_tokens: generate at most this many. options: temperature, top_k, ... of
    `logits_to_probs`. seed: None for a random one. n_logprobs: report this many of the likeliest tokens with
    each token; None for no logprobs. scores_prompt: report logprobs of the prompt's tokens, too.

    tokens: the ids generated so far. logprobs: one `Logprob` for each of them, in nats, from the model's own
    distribution, before temperature and all other options. prompt_logprobs: the same for the prompt, without
    its first token, which follows nothing. ending: (stop token, its Logprob) if one was drawn.
    finish_reason: None while the request is running; then "stop" (a stop token was drawn; it is not in
    `tokens`), "length" (max_tokens reached) or "cancelled" (`BatchedDecoder.remove`).
    """

    def __init__(
        self,
        prompt: Iterable[int],
        max_tokens: int,
        *,
        stop_tokens: Iterable[int] = (),
        seed: int | None = None,
        n_logprobs: int | None = None,
        scores_prompt: bool = False,
        **options: Any,
    ) -> None:
        self.context = [int(token) for token in prompt]  # prompt and answer
        self.n_prompt, self.max_tokens = len(self.context), max_tokens
        self.stop_tokens, self.seed = frozenset(stop_tokens), seed
        self.n_logprobs, self.scores_prompt = n_logprobs, bool(scores_prompt) and n_logprobs is not None
        self.options, self.is_greedy = options, is_greedy(options)
        self.logprobs: list[Logprob] = []
        self.prompt_logprobs: list[Logprob] = []
        self.ending: tuple[int, Logprob] | None = None
        self.finish_reason = None if max_tokens > 0 or self.scores_prompt else "length"
        self.generator: torch.Generator | None = None
        self.counts: TokenCounts | None = None  # only where a penalty needs it

    @property
    def tokens(self) -> list[int]:
        return self.tokens_from(0)

    def tokens_from(self, n: int) -> list[int]:
        """All tokens but the first n."""
        return self.context[self.n_prompt + n :]


class BatchedDecoder:
    """Continues up to `n_slots` requests at a time; further ones wait in `waiting`.

    The model must be causal and in eval(). The cache holds model.config.block_size tokens per request. When a
    request grows longer, the older half of its context is dropped, as in `generate`.
    """

    def __init__(self, model: GPT, n_slots: int = 1) -> None:
        self.model, self.n_slots = model, n_slots
        self.backend: DecodeBackend = TorchBackend(model, n_slots)
        # running[i] has row i of the cache. The prompt of `reading` is being read into the row after them.
        self.running: list[Request] = []
        self.reading: Request | None = None
        self.waiting: collections.deque[Request] = collections.deque()
        self._compiling: threading.Thread | None = None

    def compile(self, wait: bool = False) -> None:
        """Switch to the compiled backend, which is several times as fast, once it is ready.

        The first time on a machine, that takes a quarter of a minute, later half a second (`is_prepared`).
        PyTorch goes on meanwhile, unless `wait`. It stays where the model is not supported, where Numba is
        missing, and where its results cannot be stored. The weights are moved to another layout
        (decoding/packed.py): the model can still be used, but not trained.
        """
        if supports(self.model) and isinstance(self.backend, TorchBackend) and not self._compiling:
            # The thread does not get the model: freeing tensors in it while the program exits would crash.
            weights = weight_format(self.model)
            self._compiling = threading.Thread(target=prepare, args=(weights,), daemon=True)
            self._compiling.start()
            if wait:
                self._compiling.join()

    @property
    def is_prepared(self) -> bool:
        """Whether the compiled backend only needs to be loaded: it was compiled on this machine before."""
        return is_compiled(weight_format(self.model))

    @property
    def is_busy(self) -> bool:
        return bool(self.running or self.reading or self.waiting)

    def add(self, request: Request) -> Request:
        """Put a request in the queue; returns it.

        Raises ValueError for a prompt that `check_prompt` refuses, for options that `logits_to_probs`
        refuses, and when logprobs are wanted of a prompt that is longer than the context.
        """
        check_prompt(self.model, request.context)
        vocab_size = self.model.config.vocab_size
        logits_to_probs(-torch.arange(float(vocab_size)), **request.options)
        if request.scores_prompt and request.n_prompt > self.backend.capacity:
            raise ValueError(f"the prompt holds more than the {self.backend.capacity} tokens of the context")
        if request.generator is None and request.seed is not None:
            request.generator = torch.Generator().manual_seed(request.seed)
        if has_penalty(request.options):
            request.counts = TokenCounts(request.context, vocab_size, self.model.device)
        if request.finish_reason is None:
            self.waiting.append(request)
        return request

    def remove(self, request: Request) -> None:
        """Cancel a request, whatever its state."""
        if request is self.reading:
            self.reading = None
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self._free_row(self.running.index(request))
        request.finish_reason = request.finish_reason or "cancelled"

    def step(self) -> list[Request]:
        """Generate a token for each running request; returns these requests, with those that end now.

        Before that, read on in the prompts of waiting requests; one with a long prompt starts in a later
        step.
        """
        if isinstance(self.backend, TorchBackend) and self._compiling and not self._compiling.is_alive():
            self._switch_backend()
        scored = self._read_prompts()
        if not self.running:
            return scored
        capacity = self.backend.capacity
        for row, (request, length) in enumerate(
            zip(self.running, self.backend.lengths.tolist(), strict=False)
        ):
            if length == capacity:
                # The context is full: keep the newer half, to have room for as many tokens again.
                self.backend.refill(row, request.context[-max(1, capacity // 2) : -1])
        logits, likeliest = self.backend.step([request.context[-1] for request in self.running])
        advanced = list(self.running)
        tokens = self._sample(logits, likeliest)
        for row in reversed(range(len(advanced))):
            request, token = advanced[row], tokens[row]
            if token in request.stop_tokens:
                request.finish_reason = "stop"
            else:
                request.context.append(token)
                if request.counts:
                    request.counts.add(token)
                if len(request.context) - request.n_prompt == request.max_tokens:
                    request.finish_reason = "length"
            if request.finish_reason:
                self._free_row(row)
        return scored + advanced

    def run(
        self, requests: Iterable[Request], on_end: Callable[[Request], object] = lambda request: None
    ) -> None:
        """Add requests and step until all have ended; on_end is called with each as it ends."""
        for request in requests:
            self.add(request)
        while self.is_busy:
            for request in self.step():
                if request.finish_reason:
                    on_end(request)

    def _switch_backend(self) -> None:
        """From PyTorch to the compiled backend, if it could be compiled. Running requests are read again."""
        lengths = self.backend.lengths
        self._compiling, backend = None, compiled_backend_for(self.model, self.n_slots)
        if backend:
            self.backend = backend
            for row, request in enumerate(self.running):
                last = len(request.context) - 1
                backend.refill(row, request.context[last - lengths[row] : last])
            if self.reading:
                self.reading.prompt_logprobs.clear()  # its prompt is read from the beginning again

    def _read_prompts(self) -> list[Request]:
        """Read a chunk of a prompt, or more while no request is running, and start those that are complete.

        Returns requests that end here because they only wanted logprobs of their prompt.
        """
        scored, n_left = [], PREFILL_CHUNK if self.running else 8 * PREFILL_CHUNK
        while n_left > 0 and (self.reading or self.waiting and len(self.running) < self.n_slots):
            row = len(self.running)
            if not self.reading:
                self.reading = self.waiting.popleft()
                self.backend.clear_row(row)
            request = self.reading
            n_left -= self._read_chunk(request, row)
            # The last token of the prompt is left to `step`, which needs the logits after it.
            if self.backend.lengths[row] == min(request.n_prompt, self.backend.capacity) - 1:
                self.reading = None
                if request.max_tokens > 0:
                    self.running.append(request)
                else:
                    request.finish_reason = "length"
                    scored.append(request)
        return scored

    def _read_chunk(self, request: Request, row: int) -> int:
        """Read the next chunk of a prompt into the row; returns its number of tokens.

        Where chunks begin depends on the prompt alone, because it may affect rounding.
        """
        first = max(0, request.n_prompt - self.backend.capacity) + int(self.backend.lengths[row])
        size = min(PREFILL_CHUNK, self.backend.max_logits) if request.scores_prompt else PREFILL_CHUNK
        chunk = request.context[first : min(first + size, request.n_prompt - 1)]
        if chunk:
            logits = self.backend.extend(row, chunk, request.scores_prompt)
            if logits is not None:
                targets = request.context[first + 1 : first + 1 + len(chunk)]
                request.prompt_logprobs += logprobs_of(logits, targets, request.n_logprobs or 0)
        return len(chunk)

    def _sample(self, logits: torch.Tensor, likeliest: list[int]) -> list[int]:
        """Choose a token for each running request from logits [n or more, V]; record its logprob."""
        tokens = []
        for row, request in enumerate(self.running):
            if request.is_greedy:
                token = likeliest[row]
            else:
                token = sample(logits[row], request.generator, counts=request.counts, **request.options)
            if request.n_logprobs is not None:
                (logprob,) = logprobs_of(logits[row : row + 1], [token], request.n_logprobs)
                if token in request.stop_tokens:
                    request.ending = token, logprob
                else:
                    request.logprobs.append(logprob)
            tokens.append(token)
        return tokens

    def _free_row(self, row: int) -> None:
        """Move the last row to the one that is free now, so that the rows in use stay contiguous."""
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last
            self.backend.copy_row(len(self.running), row)
        if self.reading:
            self.backend.copy_row(len(self.running) + 1, len(self.running))


def logprobs_of(logits: torch.Tensor, tokens: list[int], n: int) -> list[Logprob]:
    """For each row of logits [N, V] and its token: (its logprob, [(id, logprob) of the n likeliest])."""
    logprobs = logits.log_softmax(-1)
    own = logprobs[range(len(tokens)), tokens].tolist()
    top = logprobs.topk(min(n, logprobs.shape[-1]))
    likeliest = map(zip, top.indices.tolist(), top.values.tolist())
    return list(zip(own, map(list, likeliest), strict=True))
