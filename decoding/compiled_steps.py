"""`CompiledSteps`: the weights, the cache and the threads that decoding/compiled.py works with."""

import math
import mmap
import queue
import sys
import threading
import time
import weakref

import numpy as np
import torch
from torch import nn

from config.schema import ModelConfig
from decoding.compile_cache import forget_older, mark
from decoding.compiled import ASLEEP, STATE, Job, Scratch, Sizes, Weights, follow, lead
from decoding.packed import GROUP, ROWS, Int8Linear, TiedEmbedding, block, quantize
from model import GPT

f32 = np.float32
CHUNK = 32  # tokens of a prompt that are read at once
PAGE = 1 << 21  # bytes of a large page


class CompiledSteps:
    """What `decoding.engine.TorchSteps` does, for the models that `decoding.engine.supports`.

    The model's matrices are moved to lie one after the other, in blocks; its modules look at them there, so
    nothing is in memory twice.
    """

    def __init__(self, model, n_slots=1, n_threads=None):
        c = model.config
        if type(model.lm_head) is nn.Linear:
            block(model)
        self.n_threads, self.capacity = n_threads or torch.get_num_threads(), c.block_size
        self.n_logits = CHUNK
        self.rows, self.lengths = np.arange(n_slots), np.zeros(n_slots, np.int64)
        control = np.zeros(STATE + 8 * self.n_threads, np.int64)
        control[STATE::8] = ASLEEP
        n, n_blocks = max(n_slots, CHUNK), -(-c.block_size // ROWS)
        shared = dict(
            control=control,
            counts=np.zeros(2, np.int64),
            tokens=np.zeros(n, np.int64),
            rows=np.zeros(n, np.int64),
            positions=np.zeros(n, np.int64),
            lengths=self.lengths,
            weights=weights_of(model),
            sizes=Sizes(c.n_embd, c.n_head, c.head_dim, c.n_hidden, c.vocab_size, c.norm_eps),
            cache=zeros(c.n_layer, n_slots, c.n_kv_head, n_blocks, 2, ROWS * filled_up(c.head_dim)),
            added=rows(c.n_embd, 2, self.n_threads, n),
            logits=rows(c.vocab_size, n),
            best=np.zeros((self.n_threads, n), np.int64),
            most=np.zeros((self.n_threads, n), f32),
        )
        self.job, *jobs = (Job(**shared, scratch=scratch_of(c, n)) for _ in range(self.n_threads))
        self.logits, self.best = torch.from_numpy(self.job.logits[:, : c.vocab_size]), self.job.best[0]
        self.is_needed, self.bells = [True], [queue.SimpleQueue() for _ in jobs]
        team = [
            threading.Thread(
                target=work, args=(self.is_needed, bell, job, rank, self.n_threads), name="decoding",
                daemon=True,
            )
            for rank, (bell, job) in enumerate(zip(self.bells, jobs, strict=True), 1)
        ]  # fmt: skip
        for thread in team:
            thread.start()
        weakref.finalize(self, dismiss, self.is_needed, self.bells, team)  # also when the program ends

    def extend(self, row, tokens, has_logits=False):
        """Append tokens (a list of ids) to a row; returns the logits [n, V] after each of them, if asked.

        These are of n_logits tokens at most, and valid until the next call.
        """
        for first in range(0, len(tokens), CHUNK):
            self.forward(tokens[first : first + CHUNK], row, has_logits)
        return self.logits[: len(tokens)] if has_logits else None

    def read(self, row, tokens):
        """Fill a row anew."""
        self.lengths[row] = 0
        self.extend(row, tokens)

    def next(self, tokens):
        """A token for each of the first n rows -> (logits [n or more, V] of the next one, n likeliest ones).

        The logits are valid until the next call.
        """
        n = len(tokens)
        self.forward(tokens, self.rows[:n], has_logits=True)
        return self.logits, self.best[:n].tolist()

    def forward(self, tokens, rows, has_logits):
        """Append tokens to rows of the cache, several to one row or one to each."""
        n, job = len(tokens), self.job
        job.tokens[:n], job.rows[:n] = tokens, rows
        while not lead(job, n, n * has_logits, self.n_threads):
            for bell in self.bells:
                if bell.empty():
                    bell.put("wake up")
            time.sleep(0)  # lets them begin

    def move(self, source, target):
        """Copy a row over another one."""
        self.lengths[target] = self.lengths[source]
        cache, n_blocks = self.job.cache, -(-self.lengths[source] // ROWS)
        cache[:, target, :, :n_blocks] = cache[:, source, :, :n_blocks]


def filled_up(size, unit=ROWS):
    return -(-size // unit) * unit


def empty(*shape, dtype=f32):
    """An array in large pages, where there are such: they are read faster.

    It begins where a cache line does, too: else each vector would lie in two of them.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        unit, memory = PAGE, mmap.mmap(-1, n_bytes + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)  # of what malloc gives, a part has small pages already
        memory = np.frombuffer(memory, np.uint8)
    else:
        unit, memory = 64, np.empty(n_bytes + 64, np.uint8)
    return memory[-memory.ctypes.data % unit :][:n_bytes].view(dtype).reshape(shape)


def zeros(*shape):
    array = empty(*shape)
    array.fill(0)
    return array


def work(is_needed, bell, job, rank, n_threads):
    """What a thread of the team does, until it is not needed when it is woken."""
    while bell.get() and is_needed[0]:
        follow(job, rank, n_threads)


def dismiss(is_needed, bells, team):
    is_needed[0] = False
    for thread, bell in zip(team, bells, strict=True):
        bell.put("go home")
        thread.join(1)


def rows(size, *shape):
    """Zeros [..., size], filled up to blocks and groups, and to a vector that begins with the last number."""
    return zeros(*shape, filled_up(size, GROUP) + ROWS)


def scratch_of(c, n):
    """For n tokens."""
    heads, head_size = c.n_head * c.head_dim, filled_up(c.head_dim)
    widest = filled_up(max(c.n_embd, heads, c.n_hidden), GROUP) + ROWS
    return Scratch(
        x=rows(c.n_embd, n),
        h=rows(c.n_embd, n),
        qkv=rows(heads + 2 * c.n_kv_head * c.head_dim, n),
        y=rows(heads, n),
        gate_up=rows(2 * c.n_hidden, n),
        hidden=rows(c.n_hidden, n),
        whole=np.zeros(n * widest, np.int16),
        scales=np.zeros(n * widest // GROUP, f32),
        head=zeros(head_size + ROWS),
        turned=zeros(head_size + ROWS),
        scores=zeros(filled_up(c.block_size)),
        out=zeros(head_size),
    )


def weights_of(model):
    """The `Weights` of a model in blocks."""
    c, layers = model.config, model.blocks

    def together(tensors):
        """[L, ...], and the tensors' data is a part of it from now on."""
        stack = empty(len(tensors), *tensors[0].shape, dtype=tensors[0].detach().numpy().dtype)
        for tensor, part in zip(tensors, torch.from_numpy(stack), strict=True):
            tensor.data = part.copy_(tensor.detach())
        return stack

    def linear(modules):
        empty = np.empty((len(modules), 0), f32)
        return (
            together([m.w for m in modules]),
            together([m.scales for m in modules]) if isinstance(modules[0], Int8Linear) else empty,
            together([m.bias for m in modules]) if modules[0].bias is not None else empty,
        )

    def stacked(tensors):
        """[L, ..., N], a copy, N filled up"""
        stack = torch.stack([tensor.detach() for tensor in tensors])
        return nn.functional.pad(stack, (0, -stack.shape[-1] % ROWS)).numpy()

    def gains(norms):
        return stacked([norm.weight for norm in norms])

    nothing = np.empty((c.n_layer, 0), f32)
    head = linear([model.lm_head])
    is_tied = isinstance(model.wte, TiedEmbedding)
    return Weights(
        qkv=linear([layer.attn.qkv for layer in layers]),
        proj=linear([layer.attn.proj for layer in layers]),
        gate_up=linear([layer.mlp.gate_up for layer in layers]),
        down=linear([layer.mlp.down for layer in layers]),
        attn_norm=gains([layer.attn_norm for layer in layers]),
        mlp_norm=gains([layer.mlp_norm for layer in layers]),
        q_norm=gains([layer.attn.q_norm for layer in layers]) if c.qk_norm else nothing,
        k_norm=gains([layer.attn.k_norm for layer in layers]) if c.qk_norm else nothing,
        norm=gains([model.norm]),
        wte=head[0][0] if is_tied else model.wte.weight.detach().numpy()[:, :, None],
        wpe=np.empty((0, 0), f32) if c.use_rope else model.wpe.weight.detach().numpy(),
        rotary=stacked([model.rotary_cos, model.rotary_sin]) if c.use_rope else np.empty((2, 0, 0), f32),
        head=head,
    )


def warm_up(weights):
    """Have Numba compile all, or load what it compiled before, by a model that is as small as can be."""
    config = ModelConfig(block_size=2, n_layer=1, n_head=1, n_embd=2, n_hidden=2)
    model = GPT(config.resolved(vocab_size=2))
    steps = CompiledSteps(quantize(model) if weights == "int8" else model, 1, 1)
    steps.next([0])
    follow(steps.job, 0, 1)  # what the other threads of a team do


if __name__ == "__main__":
    for weights in sys.argv[1:] or ("float32", "int8"):
        warm_up(weights)
        mark(weights).touch()
    forget_older()
