"""`CompiledBackend`: the weights, the KV cache and the threads for decoding/compiled.py."""

from __future__ import annotations

import math
import mmap
import queue
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import nn

from config.schema import ModelConfig
from decoding.backend import DecodeBackend
from decoding.compile_cache import compiled_mark, delete_outdated
from decoding.compiled import ASLEEP, STATE, ModelSizes, Scratch, StepBuffers, Weights, lead, work
from decoding.packed import GROUP, ROWS, Int8Linear, TiedEmbedding, pack, quantize
from model import GPT

f32 = np.float32
CHUNK = 32  # tokens of a prompt that go through the network at once
HUGE_PAGE = 1 << 21  # bytes


class CompiledBackend(DecodeBackend):
    """Runs models that `decoding.backend.supports`, with compiled code and a team of threads.

    The model's matrices are packed (decoding/packed.py) and moved into one block of memory each kind. The
    model's own modules become views of that memory, so no weight is stored twice.
    """

    def __init__(self, model: GPT, n_rows: int = 1, n_threads: int | None = None) -> None:
        c = model.config
        if type(model.lm_head) is nn.Linear:
            pack(model)
        self.n_threads, self.capacity = n_threads or torch.get_num_threads(), c.block_size
        self.max_logits = CHUNK
        self.row_numbers, self.lengths = np.arange(n_rows), np.zeros(n_rows, np.int64)
        control = np.zeros(STATE + 8 * self.n_threads, np.int64)
        control[STATE::8] = ASLEEP
        n, n_blocks = max(n_rows, CHUNK), -(-c.block_size // ROWS)
        shared: dict[str, Any] = dict(
            control=control,
            counts=np.zeros(2, np.int64),
            tokens=np.zeros(n, np.int64),
            rows=np.zeros(n, np.int64),
            positions=np.zeros(n, np.int64),
            lengths=self.lengths,
            weights=collect_weights(model),
            sizes=ModelSizes(c.n_embd, c.n_head, c.head_dim, c.n_hidden, c.vocab_size, c.norm_eps),
            cache=aligned_zeros(c.n_layer, n_rows, c.n_kv_head, n_blocks, 2, ROWS * round_up(c.head_dim)),
            added=padded_zeros(c.n_embd, 2, self.n_threads, n),
            logits=padded_zeros(c.vocab_size, n),
            best_token=np.zeros((self.n_threads, n), np.int64),
            best_logit=np.zeros((self.n_threads, n), f32),
        )
        self.buffers, *others = (
            StepBuffers(**shared, scratch=make_scratch(c, n)) for _ in range(self.n_threads)
        )
        self.logits = torch.from_numpy(self.buffers.logits[:, : c.vocab_size])
        self.argmax = self.buffers.best_token[0]
        self.is_needed = [True]  # a list, which the threads can share without a reference to this object
        self.wake_up_calls: list[queue.SimpleQueue[str]] = [queue.SimpleQueue() for _ in others]
        team = [
            threading.Thread(
                target=serve_team, args=(self.is_needed, calls, buffers, rank, self.n_threads),
                name="decoding", daemon=True,
            )
            for rank, (calls, buffers) in enumerate(zip(self.wake_up_calls, others, strict=True), 1)
        ]  # fmt: skip
        for thread in team:
            thread.start()
        weakref.finalize(self, end_team, self.is_needed, self.wake_up_calls, team)  # also at program exit

    def extend(self, row: int, tokens: list[int], return_logits: bool = False) -> torch.Tensor | None:
        for first in range(0, len(tokens), CHUNK):
            self.forward(tokens[first : first + CHUNK], row, return_logits)
        return self.logits[: len(tokens)] if return_logits else None

    def step(self, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
        n = len(tokens)
        self.forward(tokens, self.row_numbers[:n], return_logits=True)
        return self.logits, self.argmax[:n].tolist()

    def forward(self, tokens: list[int], rows: int | np.ndarray, return_logits: bool) -> None:
        """Append tokens to rows of the cache: all of them to one row, or one to each."""
        n, buffers = len(tokens), self.buffers
        buffers.tokens[:n], buffers.rows[:n] = tokens, rows
        while not lead(buffers, n, n * return_logits, self.n_threads):
            for calls in self.wake_up_calls:
                if calls.empty():
                    calls.put("wake up")
            time.sleep(0)  # lets the threads start

    def copy_row(self, source: int, target: int) -> None:
        self.lengths[target] = self.lengths[source]
        cache, n_blocks = self.buffers.cache, -(-self.lengths[source] // ROWS)
        cache[:, target, :, :n_blocks] = cache[:, source, :, :n_blocks]

    def clear_row(self, row: int) -> None:
        self.lengths[row] = 0  # what lies behind a row's length is never read


# ---- threads ---------------------------------------------------------------------------------------


def serve_team(
    is_needed: list[bool], calls: queue.SimpleQueue[str], buffers: StepBuffers, rank: int, n_threads: int
) -> None:
    """What each thread but the first runs: work when woken up, sleep when there has been nothing to do."""
    while calls.get() and is_needed[0]:
        work(buffers, rank, n_threads)


def end_team(
    is_needed: list[bool], wake_up_calls: list[queue.SimpleQueue[str]], team: list[threading.Thread]
) -> None:
    is_needed[0] = False
    for thread, calls in zip(team, wake_up_calls, strict=True):
        calls.put("end")
        thread.join(1)


# ---- memory ----------------------------------------------------------------------------------------


def round_up(size: int, unit: int = ROWS) -> int:
    return -(-size // unit) * unit


def aligned_empty(*shape: int, dtype: DTypeLike = f32) -> np.ndarray:
    """An array in huge pages where the system has them, which makes reading faster.

    It starts at the beginning of a cache line; otherwise each vector would be split between two of them.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Memory from malloc may be in small pages already, so map fresh memory.
        unit, mapped = HUGE_PAGE, mmap.mmap(-1, n_bytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(mapped, np.uint8)
    else:
        unit, memory = 64, np.empty(n_bytes + 64, np.uint8)
    return memory[-memory.ctypes.data % unit :][:n_bytes].view(dtype).reshape(shape)


def aligned_zeros(*shape: int) -> np.ndarray:
    array = aligned_empty(*shape)
    array.fill(0)
    return array


def padded_zeros(size: int, *shape: int) -> np.ndarray:
    """Zeros [*shape, size], the last dimension padded to whole groups, and by a vector more.

    Compiled code reads and writes whole vectors, and one may begin with the last number.
    """
    return aligned_zeros(*shape, round_up(size, GROUP) + ROWS)


def make_scratch(c: Any, n: int) -> Scratch:
    """The Scratch of one thread, for n tokens at once. c: the model's configuration."""
    heads, head_size = c.n_head * c.head_dim, round_up(c.head_dim)
    widest = round_up(max(c.n_embd, heads, c.n_hidden), GROUP) + ROWS
    return Scratch(
        x=padded_zeros(c.n_embd, n),
        h=padded_zeros(c.n_embd, n),
        qkv=padded_zeros(heads + 2 * c.n_kv_head * c.head_dim, n),
        y=padded_zeros(heads, n),
        gate_up=padded_zeros(2 * c.n_hidden, n),
        hidden=padded_zeros(c.n_hidden, n),
        rounded=np.zeros(n * widest, np.int16),
        scales=np.zeros(n * widest // GROUP, f32),
        head=aligned_zeros(head_size + ROWS),
        rotated=aligned_zeros(head_size + ROWS),
        scores=aligned_zeros(round_up(c.block_size)),
        out=aligned_zeros(head_size),
    )


def collect_weights(model: GPT) -> Weights:
    """The weights of a packed model in the arrays that compiled code takes."""
    c, layers = model.config, list[Any](model.blocks)

    def moved(tensors: Sequence[torch.Tensor]) -> np.ndarray:
        """Move the data of L tensors into one array [L, ...]; the tensors become views of it."""
        stack = aligned_empty(len(tensors), *tensors[0].shape, dtype=tensors[0].detach().numpy().dtype)
        for tensor, part in zip(tensors, torch.from_numpy(stack), strict=True):
            tensor.data = part.copy_(tensor.detach())
        return stack

    def linear(modules: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(weights, scales, biases) of L modules; without scales or biases, arrays of size 0."""
        nothing = np.empty((len(modules), 0), f32)
        return (
            moved([m.w for m in modules]),
            moved([m.scales for m in modules]) if isinstance(modules[0], Int8Linear) else nothing,
            moved([m.bias for m in modules]) if modules[0].bias is not None else nothing,
        )

    def copied(tensors: Sequence[torch.Tensor]) -> np.ndarray:
        """[L, ..., N], a copy, with N padded to whole vectors"""
        stack = torch.stack([tensor.detach() for tensor in tensors])
        return nn.functional.pad(stack, (0, -stack.shape[-1] % ROWS)).numpy()

    def gains(norms: Sequence[Any]) -> np.ndarray:
        return copied([norm.weight for norm in norms])

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
        wpe=np.empty((0, 0), f32) if model.wpe is None else model.wpe.weight.detach().numpy(),
        rotary=copied([*map(model.get_buffer, ("rotary_cos", "rotary_sin"))])
        if c.use_rope
        else np.empty((2, 0, 0), f32),
        head=head,
    )


def warm_up(weights: str) -> None:
    """Make Numba compile everything for a weight format, or load it from its cache, with a tiny model."""
    sizes = dict(block_size=2, n_layer=1, n_head=1, n_embd=2, n_hidden=2, vocab_size=2)
    model = GPT(ModelConfig.model_validate(sizes))
    backend = CompiledBackend(quantize(model) if weights == "int8" else model, 1, 1)
    backend.step([0])
    work(backend.buffers, 0, 1)  # otherwise only called by the other threads of a team


if __name__ == "__main__":
    for weights in sys.argv[1:] or ("float32", "int8"):
        warm_up(weights)
        compiled_mark(weights).touch()
    delete_outdated()
