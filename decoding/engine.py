"""Many prompts at once, each answered as if it were alone.

`GPT.generate` in model.py is the plain way to continue one text. A server has many to continue, which begin
and end at different times, and a step of sixteen texts takes hardly longer than a step of one: reading the
weights is what takes the time. So a `Decoder` owns a KV cache with a row for each of `n_slots` requests. In
every step each running request gets one token; one that ends leaves its row to one that waits
("continuous batching"; Yu et al. 2022, "Orca", section 3). A long prompt is read in pieces, one a step, so
that nobody has to wait for all of it (Agrawal et al. 2023, "Sarathi", section 4.1).

    decoder = Decoder(model, n_slots=16)
    request = decoder.add(Request(prompt_ids, max_tokens=100, temperature=0.8, seed=1))
    while decoder.is_busy:
        for request in decoder.step():
            ...                     # request.tokens has grown by one, or request.finish_reason is set

What a request gets depends on nothing but itself: it has its own seed, its prompt is read alone, and no row
of a batch looks at another. A Decoder belongs to one thread; engine and server talk through queues.
"""

import atexit
import codecs
import collections
import importlib.util
import os
import shutil
import subprocess
import sys
import threading

import torch
from torch import nn

from common.config import ANY, ROOT, unsupported
from decoding.compile_cache import CACHE, is_compiled
from decoding.packed import Int8Linear, PackedLinear, TiedEmbedding
from model import (
    GPT,
    MLP,
    Attention,
    Block,
    RMSNorm,
    TokenCounts,
    has_penalty,
    is_greedy,
    logits_to_probs,
    sample,
)

PIECE = 256  # tokens of a prompt that are read at once


class Request:
    """A prompt, how to continue it, and what has come of it so far.

    prompt: list of ids. max_tokens: as many at most. temperature, top_k, ...: see `logits_to_probs`.
    seed: int; None: a random one. n_logprobs: how many of the likeliest tokens are told with each token; None: no
    logprobs at all. scores_prompt: logprobs of the prompt's tokens, too.

    tokens: the ids drawn so far. logprobs: for each of them (its log-probability, [(id, log-probability),
    ... the likeliest]), in nats, by the model itself: before temperature and everything else.
    prompt_logprobs: the same for each token of the prompt but the first, which follows nothing. ending: the
    stop token and the same for it, if one was drawn.
    finish_reason: None while it runs; then "stop" (a token of `stop_tokens` was drawn, which is not among
    `tokens`), "length" (max_tokens are there) or "cancelled" (`Decoder.remove`).
    """

    def __init__(
        self, prompt, max_tokens, *, stop_tokens=(), seed=None, n_logprobs=None, scores_prompt=False,
        **options,
    ):  # fmt: skip
        self.context = [int(token) for token in prompt]
        self.n_prompt, self.max_tokens = len(self.context), max_tokens
        self.stop_tokens, self.seed = frozenset(stop_tokens), seed
        self.n_logprobs, self.scores_prompt = n_logprobs, bool(scores_prompt) and n_logprobs is not None
        self.options, self.is_greedy = options, is_greedy(options)
        self.logprobs, self.prompt_logprobs, self.ending = [], [], None
        self.finish_reason = None if max_tokens > 0 or self.scores_prompt else "length"
        self.generator, self.counts = None, None  # random numbers, and what `model.TokenCounts` counts

    @property
    def tokens(self):
        return self.tokens_from(0)

    def tokens_from(self, n):
        """Those after the first n."""
        return self.context[self.n_prompt + n :]


class Decoder:
    """Continues up to `n_slots` requests at a time; further ones wait in `waiting`.

    The model must be causal and in eval(). The cache holds model.config.block_size tokens of every request;
    one that becomes longer forgets its older half, as in GPT.generate.
    """

    def __init__(self, model, n_slots=1):
        self.model, self.n_slots, self.steps = model, n_slots, TorchSteps(model, n_slots)
        # running[i] has row i of the cache; the prompt of `reading` is read into the row behind them.
        self.running, self.reading, self.waiting = [], None, collections.deque()
        self._compiling = None

    def compile(self, wait=False):
        """Let decoding/compiled.py do the steps, which is several times as fast, as soon as it is ready.

        That takes a quarter of a minute for the first time on a machine, and half a second ever after
        (`is_prepared`). PyTorch does the steps meanwhile, unless `wait`; and for good where there is no
        Numba, where what it compiles cannot be kept, or where the network is another one. The model's weights
        are moved to lie otherwise (decoding/packed.py): it can still be used, but not trained.
        """
        if supports(self.model) and isinstance(self.steps, TorchSteps) and not self._compiling:
            # Not the model itself: a thread that frees tensors while the program ends makes it crash.
            self._compiling = threading.Thread(target=prepare, args=(weights_of(self.model),), daemon=True)
            self._compiling.start()
            if wait:
                self._compiling.join()

    @property
    def is_prepared(self):
        return is_compiled(weights_of(self.model))

    @property
    def is_busy(self):
        return bool(self.running or self.reading or self.waiting)

    def add(self, request):
        """Let it wait for a row; returns it. ValueError for a prompt that is empty or holds a foreign id,
        for options that make no sense, and for logprobs of a prompt that is longer than the context."""
        self.model.prompt(request.context)
        vocab_size = self.model.config.vocab_size
        logits_to_probs(-torch.arange(float(vocab_size)), **request.options)
        if request.scores_prompt and request.n_prompt > self.steps.capacity:
            raise ValueError(f"the prompt holds more than the {self.steps.capacity} tokens of the context")
        if request.generator is None and request.seed is not None:
            request.generator = torch.Generator().manual_seed(request.seed)
        if has_penalty(request.options):
            request.counts = TokenCounts(request.context, vocab_size, self.model.device)
        if request.finish_reason is None:
            self.waiting.append(request)
        return request

    def remove(self, request):
        """Nobody wants to hear the rest of it."""
        if request is self.reading:
            self.reading = None
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self._leave(self.running.index(request))
        request.finish_reason = request.finish_reason or "cancelled"

    def step(self):
        """One more token for all that run; returns these requests, those that have just ended among them.

        Before that it reads on in the prompts of those that wait; one whose prompt is long runs later.
        """
        if isinstance(self.steps, TorchSteps) and self._compiling and not self._compiling.is_alive():
            self._change_steps()
        scored = self._read_prompts()
        if not self.running:
            return scored
        capacity = self.steps.capacity
        for row, (request, length) in enumerate(zip(self.running, self.steps.lengths.tolist(), strict=False)):
            if length == capacity:
                # The context is full: half of it makes room for as much again.
                self.steps.read(row, request.context[-max(1, capacity // 2) : -1])
        logits, likeliest = self.steps.next([request.context[-1] for request in self.running])
        advanced = list(self.running)
        tokens = self._draw(logits, likeliest)
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
                self._leave(row)
        return scored + advanced

    def run(self, requests, on_end=lambda request: None):
        """All of them to their end."""
        for request in requests:
            self.add(request)
        while self.is_busy:
            for request in self.step():
                if request.finish_reason:
                    on_end(request)

    def _change_steps(self):
        """From PyTorch's to the compiled ones, if they could be compiled; what was read is read again."""
        lengths = self.steps.lengths
        self._compiling, steps = None, compiled_steps(self.model, self.n_slots)
        if steps:
            self.steps = steps
            for row, request in enumerate(self.running):
                last = len(request.context) - 1
                steps.read(row, request.context[last - lengths[row] : last])
            if self.reading:
                self.reading.prompt_logprobs.clear()  # from the beginning

    def _read_prompts(self):
        """A piece of a prompt, or more while nobody runs; returns those who only wanted logprobs of it."""
        scored, n_left = [], PIECE if self.running else 8 * PIECE
        while n_left > 0 and (self.reading or self.waiting and len(self.running) < self.n_slots):
            row = len(self.running)
            if not self.reading:
                self.reading = self.waiting.popleft()
                self.steps.lengths[row] = 0
            request = self.reading
            n_left -= self._read_on(request, row)
            # All but the last token, which the next step reads.
            if self.steps.lengths[row] == min(request.n_prompt, self.steps.capacity) - 1:
                self.reading = None
                if request.max_tokens > 0:
                    self.running.append(request)
                else:
                    request.finish_reason = "length"
                    scored.append(request)
        return scored

    def _read_on(self, request, row):
        """Read the next piece of its prompt into the row; returns how many tokens it has.

        Where pieces begin depends on nothing else, as rounding may depend on it.
        """
        first = max(0, request.n_prompt - self.steps.capacity) + int(self.steps.lengths[row])
        end = first + (min(PIECE, self.steps.n_logits) if request.scores_prompt else PIECE)
        piece = request.context[first : min(end, request.n_prompt - 1)]
        if piece:
            logits = self.steps.extend(row, piece, request.scores_prompt)
            if request.scores_prompt:
                targets = request.context[first + 1 : first + 1 + len(piece)]
                request.prompt_logprobs += logprobs_of(logits, targets, request.n_logprobs)
        return len(piece)

    def _draw(self, logits, likeliest):
        """A token for each row of the logits [n, V]; notes logprobs where they are asked for."""
        tokens = []
        for row, request in enumerate(self.running):
            if request.is_greedy:
                token = likeliest[row]
            else:
                token = sample(logits[row], request.generator, counts=request.counts, **request.options)
            if request.n_logprobs is not None:
                (told,) = logprobs_of(logits[row : row + 1], [token], request.n_logprobs)
                if token in request.stop_tokens:
                    request.ending = token, told
                else:
                    request.logprobs.append(told)
            tokens.append(token)
        return tokens

    def _leave(self, row):
        """The last row takes the place of one that ends, so that those in use lie side by side."""
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last
            self.steps.move(len(self.running), row)
        if self.reading:
            self.steps.move(len(self.running) + 1, len(self.running))


def logprobs_of(logits, tokens, n):
    """For each row of logits [N, V] and its token: (its logprob, the n likeliest [(id, logprob), ...])."""
    logprobs = logits.log_softmax(-1)
    own = logprobs[range(len(tokens)), tokens].tolist()
    top = logprobs.topk(min(n, logprobs.shape[-1]))
    likeliest = map(zip, top.indices.tolist(), top.values.tolist())
    return list(zip(own, map(list, likeliest), strict=True))


class TorchSteps:
    """Steps as PyTorch's operations: for any model, on any device.

    lengths [n_slots]: how many tokens of `capacity` each row of the cache holds. n_logits: of how many tokens
    at most `extend` computes logits.
    """

    def __init__(self, model, n_slots):
        self.model, self.cache = model, model.new_cache(n_slots)
        self.lengths, self.capacity = self.cache.lengths, self.cache.capacity
        self.n_logits = max(1, (1 << 22) // model.config.vocab_size)  # 16 MB of numbers

    @torch.inference_mode()
    def extend(self, row, tokens, has_logits=False):
        """Append tokens (a list of ids) to a row; returns the logits [n, V] after each of them, if asked."""
        x = self.model.hidden(torch.tensor([tokens], device=self.model.device), self.cache.rows(row, row + 1))
        return self.model.logits(x[0]).float() if has_logits else None

    def read(self, row, tokens):
        """Fill a row anew."""
        self.lengths[row] = 0
        if tokens:
            self.extend(row, tokens)

    @torch.inference_mode()
    def next(self, tokens):
        """A token for each of the first n rows -> (logits [n, V] of the next one, n likeliest ones)."""
        n = len(tokens)
        cache = self.cache.rows(0, n, int(self.lengths[:n].max()) + 1)
        x = self.model.hidden(torch.tensor(tokens, device=self.model.device).unsqueeze(1), cache)
        logits = self.model.logits(x[:, -1]).float()
        # (NumPy takes a hundredth of PyTorch's time for it.)
        return logits, (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()

    def move(self, source, target):
        """Copy a row over another one."""
        self.cache.copy_row(source, target)


LOADING = threading.Lock()
atexit.register(LOADING.acquire)  # a program that ended while Numba loads would crash


# Of which parts, and of what configuration, decoding/compiled.py computes the network.
PARTS = {
    GPT, Attention, Block, MLP, RMSNorm, PackedLinear, Int8Linear, TiedEmbedding,
    nn.Dropout, nn.Embedding, nn.Identity, nn.Linear, nn.ModuleList,
}  # fmt: skip
IMPLEMENTED = {
    "architecture": ("nano",),
    "is_causal": (True,),
    **dict.fromkeys(
        ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_hidden",
         "bias", "use_rope", "rope_theta", "rope_scaling", "norm_eps", "qk_norm", "tie_embeddings",
         "dropout"),  # which is for training
        ANY,
    ),
}  # fmt: skip


def supports(model):
    """Whether decoding/compiled.py does the steps of it: nano, float32 on a CPU, and Numba is there.

    NUMBA_DISABLE_JIT=1, which tells Numba to compile nothing, leaves the steps to PyTorch.
    """
    return (
        {type(module) for module in model.modules()} <= PARTS
        and not unsupported(model.config, IMPLEMENTED, "decoding/compiled.py")
        and (model.device.type, model.dtype) == ("cpu", torch.float32)
        and importlib.util.find_spec("numba") is not None
        and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
    )


def weights_of(model):
    return "int8" if isinstance(model.lm_head, Int8Linear) else "float32"


def prepare(weights):
    """Compile, in a process of its own, which may go on when this one ends, and load."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
    except OSError:  # nothing can be kept
        return
    if not is_compiled(weights):
        command = [sys.executable, "-m", "decoding.compiled_steps", weights]
        subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True)
    if is_compiled(weights):
        with LOADING:
            try:
                from decoding import compiled_steps

                compiled_steps.warm_up(weights)
            except Exception:  # in many kinds, when what lies there is damaged: the next start compiles anew
                shutil.rmtree(CACHE, ignore_errors=True)


def compiled_steps(model, n_slots):
    """The CompiledSteps of a model that is prepared, or None: they could not be compiled."""
    if not is_compiled(weights_of(model)):
        return None
    from decoding.compiled_steps import CompiledSteps

    return CompiledSteps(model, n_slots)


def word_of(tokenizer, token):
    """The bytes of a token that was drawn: a model may have more rows than its tokenizer has tokens."""
    return tokenizer.token_bytes[token if token < tokenizer.vocab_size else tokenizer.unknown_id]


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces, and looks at each character once.

    An automaton (Aho & Corasick 1975, "Efficient String Matching"). Its state is the longest end of the text
    that one of the strings begins with; 0 is none. For each state, next: {character: the longer state},
    back: the next shorter end that some string begins with, length: its number of characters, found: the
    length of the longest string that ends here, 0 if none does.
    """

    def __init__(self, strings=()):
        self.next, self.back, self.length, self.found = [{}], [0], [0], [0]
        for string in strings:
            state = 0
            for character in string:
                state = self.next[state].setdefault(character, len(self.next))
                if state == len(self.next):
                    self.next.append({})
                    self.length.append(0)
                    self.found.append(0)
                    self.back.append(0)
            self.found[state] = len(string)
        states = collections.deque([0])
        while states:  # the shorter before the longer
            state = states.popleft()
            for character, longer in self.next[state].items():
                back = self.step(self.back[state], character) if state else 0
                self.back[longer], self.length[longer] = back, self.length[state] + 1
                self.found[longer] = self.found[longer] or self.found[back]
                states.append(longer)

    def step(self, state, character):
        """The state when another character follows."""
        while state and character not in self.next[state]:
            state = self.back[state]
        return self.next[state].get(character, 0)


class TextStream:
    """Ids one by one in, text out, as soon as it is certain.

    A token may be a part of a character, and the end of a text may be the beginning of one of the strings
    `stop` (a list, or StopStrings): both wait. At a stop string the text ends before it, and `is_stopped`
    becomes true; of several that overlap, the one that is complete first counts, or if these are several, the
    longest of them.
    """

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.is_stopped = tokenizer, False
        self.stop = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state, self._held = 0, ""

    def feed(self, token):
        """The text that is certain now; "" if there is none."""
        return self._release(self._decoder.decode(word_of(self.tokenizer, token)))

    def end(self):
        """What still waits when no token follows."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text):
        if self.is_stopped:
            return ""
        whole = self._held + text
        for place, character in enumerate(text, len(self._held) + 1):
            self._state = self.stop.step(self._state, character)
            if n_found := self.stop.found[self._state]:
                self.is_stopped, self._held = True, ""
                return whole[: place - n_found]
        n_certain = len(whole) - self.stop.length[self._state]
        self._held = whole[n_certain:]
        return whole[:n_certain]
