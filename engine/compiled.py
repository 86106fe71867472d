"""Decoding on a CPU: a step of the network for B tokens, each of another row of the cache, compiled by Numba.

PyTorch spends more time between its operations than in them when there is one token. Here one function runs
the whole step, in every thread of a small team: each computes its share of the rows of each matrix, and
waits for the others (`meet`) before it reads what they wrote. Weights are float32, in PyTorch's own memory,
or int8 (engine/quantize.py). It is the network of model.py and knows no other.

Numba brings its own compiler, so nobody needs to have one. It works for some seconds when a step is run for
the first time, and keeps the result beside this file.
"""

import contextlib
import os
import queue
import signal
import threading
import weakref
from typing import NamedTuple

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic, overload

from config.schema import ModelConfig
from engine.quantize import GROUP, Int8Linear, quantize
from model import GPT

SPINS = 2000  # looks before a waiting thread offers its core to others

# Not parallel=True: Numba's own pools cost 100 us for each loop (workqueue) or stall where another process
# wants a core (OpenMP). Not boundscheck, and fastmath, since a sum is vectorized only if it may be reordered.
compiled = njit(nogil=True, fastmath=True, boundscheck=False, cache=True, error_model="numpy")
give_way = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())
f32 = np.float32


# ---- threads that wait for each other ----------------------------------------------------------------


@intrinsic
def add(typingctx, array, n):
    """Atomically array[0] += n; gives what it was. Adding 0 reads."""

    def generate(context, builder, signature, args):
        pointer = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(array, types.int64), generate


@intrinsic
def read(typingctx, array):
    def generate(context, builder, signature, args):
        pointer = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array), generate


@compiled
def meet(arrived, n_threads):
    """Goes on when all threads are here. arrived [1] counts them, and never goes back."""
    goal = (add(arrived, 1) // n_threads + 1) * n_threads
    spins = 0
    while read(arrived) < goal:
        spins += 1
        if spins > SPINS:
            give_way()


# ---- arithmetic ----------------------------------------------------------------------------------------


# Whole arrays and indices, not rows like w[r]: a row is an object whose references Numba counts, atomically.
# And a call hands over every size and stride, 25 ns that LLVM does not inline away: no call for each row.


@compiled
def dots(out, w, scales, x, b, begin, end):
    """out[b, begin:end] += rows of w [M, N] times row b of x [B, N]; scales [M, N / GROUP] or [M, 0].

    Four rows at once, from far apart: a processor fetches several streams of memory faster than one.
    """
    quarter = (end - begin + 3) // 4
    for r0 in range(begin, begin + quarter):
        r1, r2, r3 = r0 + quarter, r0 + 2 * quarter, r0 + 3 * quarter
        s1, s2, s3 = min(r1, end - 1), min(r2, end - 1), min(r3, end - 1)
        t0 = t1 = t2 = t3 = f32(0)
        if scales.shape[1] == 0:
            for i in range(w.shape[1]):
                t0 += f32(w[r0, i]) * x[b, i]
                t1 += f32(w[s1, i]) * x[b, i]
                t2 += f32(w[s2, i]) * x[b, i]
                t3 += f32(w[s3, i]) * x[b, i]
        for g in range(scales.shape[1]):
            p0 = p1 = p2 = p3 = f32(0)
            for k in range(GROUP):  # a number that LLVM knows
                i = g * GROUP + k
                p0 += f32(w[r0, i]) * x[b, i]
                p1 += f32(w[s1, i]) * x[b, i]
                p2 += f32(w[s2, i]) * x[b, i]
                p3 += f32(w[s3, i]) * x[b, i]
            t0 += p0 * scales[r0, g]
            t1 += p1 * scales[s1, g]
            t2 += p2 * scales[s2, g]
            t3 += p3 * scales[s3, g]
        out[b, r0] += t0
        if r1 < end:
            out[b, r1] += t1
        if r2 < end:
            out[b, r2] += t2
        if r3 < end:
            out[b, r3] += t3


@compiled
def copy(out, x):  # out[:] = x takes Numba seconds to compile
    for i in range(x.shape[0]):
        out[i] = x[i]


@compiled
def unpack(w, scales, r, out, k):
    """Row k of out: row r of w as float32."""
    for i in range(w.shape[1]):
        out[k, i] = f32(w[r, i])
    for g in range(scales.shape[1]):
        for j in range(GROUP):
            out[k, g * GROUP + j] *= scales[r, g]


def as_float(w, buffer):
    """w itself if it is float32, else the buffer for rows that `unpack` makes float32."""


@overload(as_float)
def _(w, buffer):
    return (lambda w, buffer: w) if w.dtype == types.float32 else (lambda w, buffer: buffer)


@compiled
def product(out, matrix, x, add_to, rank, n_threads):
    """This thread's rows of out [B, M] = matrix [M, N] times x [B, N], or += if add_to. B: 1 or 4 k."""
    w, scales, bias = matrix
    M, N = w.shape
    B = x.shape[0]
    begin, end = M * rank // n_threads, M * (rank + 1) // n_threads
    paired = begin if B == 1 else end - (end - begin) % 2
    for b in range(B):
        for r in range(begin, end):
            if not add_to:
                out[b, r] = 0
            if bias.shape[0]:
                out[b, r] += bias[r]
    # Two rows by four columns at once: each number that is loaded is used several times.
    buffer = np.empty((2, N), f32)
    rows = as_float(w, buffer)
    for r in range(begin, paired, 2):
        k = r
        if scales.shape[1]:
            k = 0
            unpack(w, scales, r, buffer, 0)
            unpack(w, scales, r + 1, buffer, 1)
        for b in range(0, B, 4):
            p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = f32(0)
            for i in range(N):
                p, q = rows[k, i], rows[k + 1, i]
                p0 += p * x[b, i]
                p1 += p * x[b + 1, i]
                p2 += p * x[b + 2, i]
                p3 += p * x[b + 3, i]
                q0 += q * x[b, i]
                q1 += q * x[b + 1, i]
                q2 += q * x[b + 2, i]
                q3 += q * x[b + 3, i]
            out[b, r] += p0
            out[b, r + 1] += q0
            out[b + 1, r] += p1
            out[b + 1, r + 1] += q1
            out[b + 2, r] += p2
            out[b + 2, r + 1] += q2
            out[b + 3, r] += p3
            out[b + 3, r + 1] += q3
    for b in range(B):
        dots(out, w, scales, x, b, paired, end)


@compiled
def norm(out, x, weight, eps):
    """RMSNorm of x [N]; weight [0]: a copy."""
    if weight.shape[0] == 0:
        copy(out, x)
    else:
        total = f32(0)
        for i in range(x.shape[0]):
            total += x[i] * x[i]
        factor = f32(1) / np.sqrt(total / f32(x.shape[0]) + f32(eps))
        for i in range(x.shape[0]):
            out[i] = x[i] * factor * weight[i]


@compiled
def rotate(x, rotary, position):
    """Turn the pairs (i, i + D/2) of x [D] in place."""
    if rotary.shape[1]:
        cos, sin = rotary[0, position], rotary[1, position]
        half = x.shape[0] // 2
        for i in range(half):
            first, second = x[i], x[half + i]
            x[i] = first * cos[i] - second * sin[i]
            x[half + i] = second * cos[i] + first * sin[i]


@compiled
def attend(out, q, keys, values, scores):
    """out [D] = softmax(q [D] times keys [S, D]) times values [S, D]."""
    S, D = keys.shape
    scale, largest, total = f32(1 / np.sqrt(D)), f32(-np.inf), f32(0)
    for s in range(S):
        score = f32(0)
        for i in range(D):
            score += keys[s, i] * q[i]
        scores[s] = score * scale
        largest = max(largest, scores[s])
    for s in range(S):
        scores[s] = np.exp(scores[s] - largest)
        total += scores[s]
    for i in range(D):
        out[i] = 0
    for s in range(S):
        weight = scores[s] / total
        for i in range(D):
            out[i] += weight * values[s, i]


# ---- the network -----------------------------------------------------------------------------------------


@compiled
def padded(size):
    return -(-size // GROUP) * GROUP


class Weights(NamedTuple):
    """Of all L layers one after the other; a matrix is (weights [L, M, N], scales, bias [L, M]).

    Of int8, rows are filled up with zeros to whole groups, and `Scratch` has room for these.

    What a model lacks is an empty array: None would be another type, and a compilation of its own.
    """

    qkv: tuple
    proj: tuple
    gate_up: tuple
    down: tuple
    attn_norm: np.ndarray  # [L, C]
    mlp_norm: np.ndarray
    q_norm: np.ndarray  # [L, D]
    k_norm: np.ndarray
    norm: np.ndarray  # [C]
    wte: np.ndarray  # [V, C]
    wpe: np.ndarray
    rotary: np.ndarray  # [2, block_size, D / 2]: cos, sin
    head: tuple


class Scratch(NamedTuple):
    """What threads give to one another. Rows beyond those of the batch, up to a multiple of 4, stay 0."""

    x: np.ndarray  # [B, C]: the stream
    qkv: np.ndarray
    y: np.ndarray  # [B, H D], filled up
    gate: np.ndarray  # [B, F], filled up
    up: np.ndarray
    logits: np.ndarray  # [B, V]
    arrived: np.ndarray  # [1] int64


@compiled
def of_layer(matrix, layer):
    w, scales, bias = matrix
    return w[layer], scales[layer], bias[layer]


@compiled
def attention(qkv, y, weights, layer, keys, values, positions, eps, rank, n_threads):
    """qkv [B, (H + 2 G) D] -> y [B, H D]; this thread's share of the B G groups of heads."""
    _, G, _, D = keys.shape
    B, H = positions.shape[0], qkv.shape[1] // D - 2 * G
    q = np.empty(D, f32)
    scores = np.empty(keys.shape[2], f32)
    for item in range(B * G * rank // n_threads, B * G * (rank + 1) // n_threads):
        b, g = item // G, item % G
        position = positions[b]
        key = keys[b, g, position]
        heads = qkv[b].reshape((-1, D))
        norm(key, heads[H + g], weights.k_norm[layer], eps)
        rotate(key, weights.rotary, position)
        copy(values[b, g, position], heads[H + G + g])
        for h in range(g * (H // G), (g + 1) * (H // G)):
            norm(q, heads[h], weights.q_norm[layer], eps)
            rotate(q, weights.rotary, position)
            attend(y[b, h * D : (h + 1) * D], q, keys[b, g, : position + 1], values[b, g], scores)


@compiled
def step(tokens, positions, weights, keys, values, scratch, eps, rank, n_threads):
    """One thread's share of logits [B, V] for tokens [B] at positions [B]. keys, values [L, B, G, S, D]."""
    x, gate, up, arrived = scratch.x, scratch.gate, scratch.up, scratch.arrived
    B, F = tokens.shape[0], weights.gate_up[0].shape[1] // 2
    h = np.zeros((x.shape[0], padded(x.shape[1])), f32)
    if rank == 0:
        for b in range(B):
            copy(x[b], weights.wte[tokens[b]])
            if weights.wpe.shape[0]:
                for i in range(x.shape[1]):
                    x[b, i] += weights.wpe[positions[b], i]
    meet(arrived, n_threads)
    L = keys.shape[0]
    for i in range(5 * L + 1):
        # One call of `product` for all matrices: Numba compiles a function anew wherever it is called.
        layer, part = i // 5, i % 5
        if layer == L:
            for b in range(B):
                norm(h[b], x[b], weights.norm, eps)
            matrix, source, out = weights.head, h, scratch.logits
        elif part == 0:
            for b in range(B):
                norm(h[b], x[b], weights.attn_norm[layer], eps)
            matrix, source, out = of_layer(weights.qkv, layer), h, scratch.qkv
        elif part == 1:
            attention(
                scratch.qkv,
                scratch.y,
                weights,
                layer,
                keys[layer],
                values[layer],
                positions,
                eps,
                rank,
                n_threads,
            )
            meet(arrived, n_threads)
            matrix, source, out = of_layer(weights.proj, layer), scratch.y, x
        elif part == 4:
            matrix, source, out = of_layer(weights.down, layer), gate, x
        else:
            w, scales, bias = of_layer(weights.gate_up, layer)
            if part == 2:
                for b in range(B):
                    norm(h[b], x[b], weights.mlp_norm[layer], eps)
                matrix, source, out = (w[:F], scales[:F], bias[:F]), h, gate
            else:
                matrix, source, out = (w[F:], scales[F:], bias[F:]), h, up
        product(out, matrix, source, part == 1 or part == 4, rank, n_threads)
        if part == 3:  # the same rows of gate and up are mine: nobody needs to be waited for
            for b in range(B):
                for k in range(F * rank // n_threads, F * (rank + 1) // n_threads):
                    gate[b, k] *= up[b, k] / (f32(1) + np.exp(-gate[b, k]))
        if part != 2:
            meet(arrived, n_threads)


# ---- from PyTorch ----------------------------------------------------------------------------------------


class CompiledStep:
    """The steps of a model; see `engine.decoding.supports`.

    The layers' matrices are moved to lie one after the other; the modules of the model look at them there,
    so nothing is in memory twice.
    """

    def __init__(self, model, n_threads=None):
        self.config, self.weights, self.scratches = model.config, weights_of(model), {}
        self.n_threads = n_threads or torch.get_num_threads()
        self.jobs = [queue.SimpleQueue() for _ in range(1, self.n_threads)]
        team = [
            threading.Thread(target=work, args=(jobs, rank, self.n_threads), name="decoding", daemon=True)
            for rank, jobs in enumerate(self.jobs, 1)
        ]
        for thread in team:
            thread.start()
        weakref.finalize(self, dismiss, self.jobs, team)  # also when the program ends

    def logits(self, tokens, cache):
        """The next tokens (list of n ids) of the first n rows of a cache, which grow by one -> logits [n, V].

        They are valid until the next call.
        """
        n = len(tokens)
        scratch, lengths = self.scratch(n), cache.lengths[:n]
        tokens, keys, values = np.array(tokens, np.int64), cache.keys.numpy(), cache.values.numpy()
        job = tokens, lengths.copy(), self.weights, keys, values, scratch, self.config.norm_eps
        with without_interruption():  # the others would wait for this thread's share for ever
            for jobs in self.jobs:
                jobs.put(job)
            step(*job, 0, self.n_threads)
            lengths += 1
        return torch.from_numpy(scratch.logits[:n])

    def scratch(self, n):
        """For n tokens; kept, as it holds the logits."""
        if n not in self.scratches:
            c, rows = self.config, n if n == 1 else -(-n // 4) * 4
            heads = (c.n_head + 2 * c.n_kv_head) * c.head_dim
            hidden, attended = padded(c.n_hidden), padded(c.n_head * c.head_dim)
            sizes = c.n_embd, heads, attended, hidden, hidden, c.vocab_size
            arrays = (np.zeros((rows, size), f32) for size in sizes)
            self.scratches[n] = Scratch(*arrays, np.zeros(1, np.int64))
        return self.scratches[n]


def work(jobs, rank, n_threads):
    while job := jobs.get():
        step(*job, rank, n_threads)


def dismiss(jobs, team):
    for thread, its_jobs in zip(team, jobs, strict=True):
        its_jobs.put(None)
        thread.join(1)


@contextlib.contextmanager
def without_interruption():
    """Ctrl-C, which Python raises in the main thread between any two operations, waits until the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught and callable(handler):
        handler(*caught[0])


def warm_up(is_int8):
    """Have Numba compile `step`, or load what it compiled before, by a model that is as small as can be."""
    config = ModelConfig(block_size=2, n_layer=1, n_head=1, n_embd=2, n_hidden=2)
    model = GPT(config.resolved(vocab_size=2))
    CompiledStep(quantize(model) if is_int8 else model, 1).logits([0], model.new_cache())


def weights_of(model):
    """The model's `Weights`."""
    c, blocks = model.config, model.blocks

    def together(tensors):
        """[L, ...], and the tensors' data is a part of it from now on."""
        stack = torch.stack([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, stack, strict=True):
            tensor.data = part
        return stack.numpy()

    def linear(modules):
        """[L, M, N], scales, bias"""
        empty = np.empty((len(modules), modules[0].out_features, 0), f32)
        bias = together([m.bias for m in modules]) if c.bias else empty[:, 0]
        if isinstance(modules[0], Int8Linear):
            return together([m.q for m in modules]), together([m.scales for m in modules]), bias
        return together([m.weight for m in modules]), empty, bias

    def gains(norms):
        return together([m.weight for m in norms]) if c.qk_norm else np.empty((c.n_layer, 0), f32)

    head = model.lm_head
    is_int8 = isinstance(head, Int8Linear)
    table = torch.stack((model.rotary_cos, model.rotary_sin)) if c.use_rope else torch.empty(2, 0, 0)
    return Weights(
        qkv=linear([b.attn.qkv for b in blocks]),
        proj=linear([b.attn.proj for b in blocks]),
        gate_up=linear([b.mlp.gate_up for b in blocks]),
        down=linear([b.mlp.down for b in blocks]),
        attn_norm=together([b.attn_norm.weight for b in blocks]),
        mlp_norm=together([b.mlp_norm.weight for b in blocks]),
        q_norm=gains([b.attn.q_norm for b in blocks]),
        k_norm=gains([b.attn.k_norm for b in blocks]),
        norm=model.norm.weight.detach().numpy(),
        wte=model.wte.weight.detach().numpy(),
        wpe=np.empty((0, 0), f32) if c.use_rope else model.wpe.weight.detach().numpy(),
        rotary=table.numpy(),
        head=(
            head.q.numpy() if is_int8 else head.weight.detach().numpy(),
            head.scales.numpy() if is_int8 else np.empty((c.vocab_size, 0), f32),
            np.empty(0, f32),
        ),
    )


if __name__ == "__main__":
    # What is compiled belongs to the module by its name, not to "__main__".
    from engine import compiled as module
    from engine.decoding import COMPILED

    module.warm_up(is_int8=False)
    module.warm_up(is_int8=True)
    COMPILED.parent.mkdir(exist_ok=True)
    COMPILED.touch()
