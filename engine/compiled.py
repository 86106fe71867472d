"""Decoding on a CPU: a step of the network for B tokens, each of another row of the cache, compiled by Numba.

PyTorch spends more time between its operations than in them when there is one token. Here one function runs
the whole step, in every thread of a small team: each computes its share of the rows of each matrix, and
waits for the others (`meet`) before it reads what they wrote. Weights are float32 or int8
(engine/quantize.py). It is the network of model.py and knows no other. engine/team.py calls it.

Activations are [features, B]: what one product writes, the next one reads, and B numbers that lie side by
side are multiplied by the same weight, as a `Vector`. B is 1 or a multiple of 8: `columns`.

Numba brings its own compiler, so nobody needs to have one. It works for some seconds when a step is run for
the first time, and keeps the result beside this file; so all that it compiles is in this file, which tells
it when that is out of date.
"""

import operator
import os
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

from engine.quantize import GROUP

SPINS = 2000  # looks before a waiting thread offers its core to others
PATIENCE = 4000  # looks before a thread that has nothing to do goes to sleep: some tenths of a millisecond

# Not parallel=True: Numba's own pools cost 100 us for each loop (workqueue) or stall where another process
# wants a core (OpenMP). Not boundscheck, and fastmath, since a sum is vectorized only if it may be reordered.
compiled = njit(nogil=True, fastmath=True, boundscheck=False, cache=True, error_model="numpy")
give_way = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())
f32 = np.float32


def columns(n):
    """How many columns activations of n tokens have. Those beyond n are computed, too, and mean nothing."""
    return n if n == 1 else -(-n // 8) * 8


# ---- threads that wait for each other ----------------------------------------------------------------

# Places in `control`, each in a cache line of its own, as others look at them.
ARRIVED = 0  # see `meet`
ASKED = 8  # how many steps there are to do
NUMBER = 16  # of the job that they belong to
STATE = 24  # STATE + 8 rank: of that thread; the place after that: how many steps it has done
AWAKE, ENGAGED, ASLEEP = 0, 1, 2


def pointer(context, builder, kinds, args):
    """To the number args[1] of the contiguous array args[0]; kinds: their types."""
    data = context.make_array(kinds[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def add(typingctx, array, i, n):
    """Atomically array[i] += n; gives what it was."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(context, builder, signature.args, args), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def read(typingctx, array, i):
    def generate(context, builder, signature, args):
        return builder.load_atomic(pointer(context, builder, signature.args, args), "seq_cst", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def write(typingctx, array, i, n):
    def generate(context, builder, signature, args):
        place = pointer(context, builder, signature.args, args)
        builder.store_atomic(args[2], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def swap(typingctx, array, i, old, new):
    """Atomically array[i] = new if it is old; returns whether it was."""

    def generate(context, builder, signature, args):
        place = pointer(context, builder, signature.args, args)
        return builder.extract_value(builder.cmpxchg(place, args[2], args[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(array, types.int64, types.int64, types.int64), generate


@compiled
def meet(control, n_threads):
    """Goes on when all threads are here."""
    goal = (add(control, ARRIVED, 1) // n_threads + 1) * n_threads
    spins = 0
    while read(control, ARRIVED) < goal:
        spins += 1
        if spins > SPINS:
            give_way()


# ---- vectors -----------------------------------------------------------------------------------------
# What the compiler does not make of loops by itself: sums that stay in registers, of a shape we choose. Each
# processor gets them cut to the size of its registers. Indices are counted in the flat array and not looked at:
# Numba's own `a[i, j]` would first ask whether it is negative, for every number.


class Vector(types.Type):
    """`width` float32 numbers: a value like others, that + and * work on."""

    def __init__(self, width):
        self.width = width
        super().__init__(name=f"Vector({width})")


def vector_of(width, element=None):
    return ir.VectorType(element or ir.FloatType(), width)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, vector_of(kind.width))


def repeated(builder, x, width):
    nothing = ir.Constant(vector_of(width), ir.Undefined)
    zeros = ir.Constant(vector_of(width, ir.IntType(32)), [0] * width)
    return builder.shuffle_vector(builder.insert_element(nothing, x, ir.IntType(32)(0)), nothing, zeros)


@intrinsic(prefer_literal=True)
def full(typingctx, x, width):
    """A vector of x."""

    def generate(context, builder, signature, args):
        return repeated(builder, args[0], width.literal_value)

    return Vector(width.literal_value)(types.float32, width), generate


@intrinsic(prefer_literal=True)
def spread(typingctx, array, i, width):
    """A vector of array[i]."""

    def generate(context, builder, signature, args):
        return repeated(
            builder, builder.load(pointer(context, builder, signature.args, args)), width.literal_value
        )

    return Vector(width.literal_value)(array, types.int64, width), generate


@intrinsic(prefer_literal=True)
def load(typingctx, array, i, width):
    """array[i : i + width], float32 or int8"""

    def generate(context, builder, signature, args):
        place = pointer(context, builder, signature.args, args)
        kind = vector_of(width.literal_value, place.type.pointee)
        vector = builder.load(builder.bitcast(place, kind.as_pointer()), align=array.dtype.bitwidth // 8)
        if array.dtype == types.float32:
            return vector
        wide = builder.sext(vector, vector_of(width.literal_value, ir.IntType(32)))
        return builder.sitofp(wide, vector_of(width.literal_value))

    return Vector(width.literal_value)(array, types.int64, width), generate


@intrinsic
def store(typingctx, array, i, vector):
    """array[i : i + width] = vector"""

    def generate(context, builder, signature, args):
        place = pointer(context, builder, signature.args, args)
        builder.store(args[2], builder.bitcast(place, args[2].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


@intrinsic
def transpose(typingctx, out, i, n_columns, x, j, n_rows):
    """out[i + b * n_columns + r] = x[j + r * n_rows + b] for b, r = 0 .. 7"""

    def generate(context, builder, signature, args):
        kinds, number = signature.args, ir.IntType(32)
        target = pointer(context, builder, kinds[:2], args[:2])
        source = pointer(context, builder, kinds[3:5], args[3:5])
        eight = vector_of(8).as_pointer()

        def row(place, r, stride):
            return builder.bitcast(builder.gep(place, [builder.mul(stride, stride.type(r))]), eight)

        rows = [builder.load(row(source, r, args[5]), align=4) for r in range(8)]
        for half in (4, 2, 1):  # blocks beside the diagonal change places, ever smaller ones
            for r in (r for r in range(8) if not r & half):
                one, two = rows[r], rows[r + half]
                low = [k if not k & half else 8 + k - half for k in range(8)]
                high = [k + half if not k & half else 8 + k for k in range(8)]
                rows[r], rows[r + half] = (
                    builder.shuffle_vector(one, two, ir.Constant(vector_of(8, number), order))
                    for order in (low, high)
                )
        for r, vector in enumerate(rows):
            builder.store(vector, row(target, r, args[2]), align=4)
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, x, types.int64, types.int64), generate


@intrinsic
def total(typingctx, vector):
    """The sum of its numbers."""

    def generate(context, builder, signature, args):
        kind = args[0].type
        function = ir.FunctionType(kind.element, [kind.element, kind])
        name = f"llvm.vector.reduce.fadd.v{kind.count}f32"
        reduce = builder.module.declare_intrinsic(name, fnty=function)
        return builder.call(reduce, [kind.element(0.0), args[0]], fastmath=["fast"])

    return types.float32(vector), generate


@intrinsic
def prefetch(typingctx, array, i):
    """array[i] is wanted soon. Where there is none, nothing happens."""

    def generate(context, builder, signature, args):
        place, number = pointer(context, builder, signature.args, args), ir.IntType(32)
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], function)
        builder.call(fetch, [place, number(0), number(2), number(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def arithmetic(instruction, *operators):
    @intrinsic
    def apply(typingctx, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=["fast"])

        return a(a, b), generate

    def chosen(a, b):
        if isinstance(a, Vector) and a == b:
            return lambda a, b: apply(a, b)

    for operation in operators:
        overload(operation)(chosen)


arithmetic("fadd", operator.add, operator.iadd)
arithmetic("fmul", operator.mul, operator.imul)


# ---- products ----------------------------------------------------------------------------------------


@compiled
def dots(out, matrix, x, add_to, begin, end):
    """out[begin:end] = or += rows of w [M, N] times x [N].

    Four rows at once, from far apart: a processor fetches several streams of memory faster than one.
    """
    w, scales, bias = matrix
    M, N = w.shape
    flat, factors, n_groups = w.reshape(-1), scales.reshape(-1), scales.shape[1]
    quarter = (end - begin + 3) // 4
    for r0 in range(begin, begin + quarter):
        r1, r2, r3 = min(r0 + quarter, end - 1), min(r0 + 2 * quarter, end - 1), min(r0 + 3 * quarter, end - 1)
        t0 = t1 = t2 = t3 = full(f32(0), 16)
        for g in range(n_groups):
            p0 = p1 = p2 = p3 = full(f32(0), 16)
            for i in range(g * GROUP, (g + 1) * GROUP, 16):
                v = load(x, i, 16)
                p0 += load(flat, r0 * N + i, 16) * v
                p1 += load(flat, r1 * N + i, 16) * v
                p2 += load(flat, r2 * N + i, 16) * v
                p3 += load(flat, r3 * N + i, 16) * v
            t0 += p0 * spread(factors, r0 * n_groups + g, 16)
            t1 += p1 * spread(factors, r1 * n_groups + g, 16)
            t2 += p2 * spread(factors, r2 * n_groups + g, 16)
            t3 += p3 * spread(factors, r3 * n_groups + g, 16)
        whole = 0 if n_groups else N - N % 16
        for i in range(0, whole, 16):
            v = load(x, i, 16)
            t0 += load(flat, r0 * N + i, 16) * v
            t1 += load(flat, r1 * N + i, 16) * v
            t2 += load(flat, r2 * N + i, 16) * v
            t3 += load(flat, r3 * N + i, 16) * v
        s0, s1, s2, s3 = total(t0), total(t1), total(t2), total(t3)
        for i in range(N if n_groups else whole, N):
            s0 += f32(w[r0, i]) * x[i]
            s1 += f32(w[r1, i]) * x[i]
            s2 += f32(w[r2, i]) * x[i]
            s3 += f32(w[r3, i]) * x[i]
        out[r0] = out[r0] + s0 if add_to else s0
        if r0 + quarter < end:
            out[r1] = out[r1] + s1 if add_to else s1
        if r0 + 2 * quarter < end:
            out[r2] = out[r2] + s2 if add_to else s2
        if r0 + 3 * quarter < end:
            out[r3] = out[r3] + s3 if add_to else s3


def as_float(w, buffer):
    """w itself if it is float32, else the buffer for rows that are made float32."""


@overload(as_float)
def _(w, buffer):
    return (lambda w, buffer: w) if w.dtype == types.float32 else (lambda w, buffer: buffer)


def tiles(width):
    """`dots` for `width` columns."""

    @compiled
    def tile(out, matrix, x, B, c, add_to, begin, end):
        """Rows begin .. end - 1, columns c .. c + width - 1 of out [M, B] = or += w [M, N] times x [N, B].

        Six rows at a time: their sums just fit into the registers of AVX2, and the processor is kept busy.
        """
        w, scales, _ = matrix
        N, flat, factors, n_groups = w.shape[1], w.reshape(-1), scales.reshape(-1), scales.shape[1]
        buffer = np.empty(6 * N if n_groups else 0, f32)
        rows = as_float(flat, buffer)
        for r in range(begin, end, 6):
            first, last = r * N, (end - 1) * N
            if n_groups:
                for k in range(6):
                    row = min(r + k, end - 1)
                    for i in range(0, N, 16):
                        factor = spread(factors, row * n_groups + i // GROUP, 16)
                        store(buffer, k * N + i, load(flat, row * N + i, 16) * factor)
                first, last = 0, 5 * N
            a1, a2, a3, a4, a5 = (
                min(first + N, last),
                min(first + 2 * N, last),
                min(first + 3 * N, last),
                min(first + 4 * N, last),
                min(first + 5 * N, last),
            )
            t0 = t1 = t2 = t3 = t4 = t5 = full(f32(0), width)
            for j in range(0, N, 16):
                if not n_groups:  # the rows after the next ones, in the order in which they lie in memory
                    for k in range(6):
                        prefetch(flat, first + 6 * (2 * N + j) + 16 * k)
                for i in range(j, min(j + 16, N)):
                    v = load(x, i * B + c, width)
                    t0 += spread(rows, first + i, width) * v
                    t1 += spread(rows, a1 + i, width) * v
                    t2 += spread(rows, a2 + i, width) * v
                    t3 += spread(rows, a3 + i, width) * v
                    t4 += spread(rows, a4 + i, width) * v
                    t5 += spread(rows, a5 + i, width) * v
            place = r * B + c
            if add_to:
                last = (end - 1) * B + c
                t0 += load(out, place, width)
                t1 += load(out, min(place + B, last), width)
                t2 += load(out, min(place + 2 * B, last), width)
                t3 += load(out, min(place + 3 * B, last), width)
                t4 += load(out, min(place + 4 * B, last), width)
                t5 += load(out, min(place + 5 * B, last), width)
            store(out, place, t0)
            if r + 1 < end:
                store(out, place + B, t1)
            if r + 2 < end:
                store(out, place + 2 * B, t2)
            if r + 3 < end:
                store(out, place + 3 * B, t3)
            if r + 4 < end:
                store(out, place + 4 * B, t4)
            if r + 5 < end:
                store(out, place + 5 * B, t5)

    return tile


eight, sixteen = tiles(8), tiles(16)


@compiled
def share(size, rank, n_threads):
    """Which of the numbers 0 .. size - 1 are this thread's: from, to."""
    return size * rank // n_threads, size * (rank + 1) // n_threads


@compiled
def product(out, matrix, x, B, add_to, rank, n_threads):
    """This thread's rows of out [M, B] = matrix [M, N] times x [N, B], or += if add_to."""
    bias = matrix[2]
    begin, end = share(matrix[0].shape[0], rank, n_threads)
    if B == 1:
        dots(out, matrix, x, add_to, begin, end)
    for c in range(0, B - 15, 16):
        sixteen(out, matrix, x, B, c, add_to, begin, end)
    if B % 16 == 8:
        eight(out, matrix, x, B, B - 8, add_to, begin, end)
    if bias.shape[0]:
        for r in range(begin, end):
            for b in range(B):
                out[r * B + b] += bias[r]


# ---- what lies between them --------------------------------------------------------------------------


@intrinsic
def power_of_two(typingctx, n):
    """2^n for an int32 from -126 to 127"""

    def generate(context, builder, signature, args):
        bits = builder.shl(builder.add(args[0], args[0].type(127)), args[0].type(23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


@compiled
def exp(x):
    """e^x to 3e-7 of it. The mathematical library's takes one number at a time, this one is vectorized."""
    x = min(max(x, f32(-87)), f32(88)) * f32(1.4426950408889634)
    n = np.floor(x + f32(0.5))
    f = (x - n) * f32(0.6931471805599453)
    p = f32(1 / 24) + f * (f32(1 / 120) + f * f32(1 / 720))
    p = f32(1) + f * (f32(1) + f * (f32(1 / 2) + f * (f32(1 / 6) + f * p)))
    return p * power_of_two(np.int32(n))


@compiled
def norm(x, weight, eps):
    """x [N] becomes its RMSNorm; weight [0]: x stays."""
    if weight.shape[0]:
        squares = f32(0)
        for i in range(x.shape[0]):
            squares += x[i] * x[i]
        factor = f32(1) / np.sqrt(squares / f32(x.shape[0]) + f32(eps))
        for i in range(x.shape[0]):
            x[i] *= factor * weight[i]


@compiled
def norm_of(out, x, B, weight, eps):
    """out [C, B] = RMSNorm of the columns of x [C, B]"""
    C = weight.shape[0]
    if B == 1:
        for i in range(C):
            out[i] = x[i]
        norm(out[:C], weight, eps)
    factors = np.empty(8, f32)
    for c in range(0, B - 7, 8):
        squares = full(f32(0), 8)
        for i in range(C):
            v = load(x, i * B + c, 8)
            squares += v * v
        store(factors, 0, squares)
        for k in range(8):
            factors[k] = f32(1) / np.sqrt(factors[k] / f32(C) + f32(eps))
        factor = load(factors, 0, 8)
        for i in range(C):
            store(out, i * B + c, load(x, i * B + c, 8) * factor * spread(weight, i, 8))


@compiled
def rotate(x, rotary, position):
    """Turn the pairs (i, i + D/2) of x [D] in place."""
    if rotary.shape[1]:
        half = x.shape[0] // 2
        for i in range(half):
            cos, sin, first, second = rotary[0, position, i], rotary[1, position, i], x[i], x[half + i]
            x[i] = first * cos - second * sin
            x[half + i] = second * cos + first * sin


@compiled
def attend(out, q, keys, values, place, soon, scores):
    """out [D] = softmax(q [D] times keys [S, D]) times values [S, D]; scores [S].

    Of the flat arrays keys and values, S D numbers from `place` on; those from `soon` on are wanted next.
    """
    S, D = scores.shape[0], q.shape[0]
    whole = D - D % 16
    scale, largest, weights = f32(1 / np.sqrt(D)), f32(-3e38), f32(0)
    for s in range(S):
        row = place + s * D
        t = full(f32(0), 16)
        for i in range(0, whole, 16):
            prefetch(keys, soon + s * D + i)
            t += load(q, i, 16) * load(keys, row + i, 16)
        score = total(t)
        for i in range(whole, D):
            score += q[i] * keys[row + i]
        scores[s] = score * scale
        largest = max(largest, scores[s])
    for s in range(S):
        scores[s] = exp(scores[s] - largest)
        weights += scores[s]
    for s in range(S):
        scores[s] /= weights
    for i in range(0, whole, 16):
        t = u = full(f32(0), 16)  # one would wait for itself
        for s in range(0, S - 1, 2):
            prefetch(values, soon + s * D + i)
            prefetch(values, soon + (s + 1) * D + i)
            t += spread(scores, s, 16) * load(values, place + s * D + i, 16)
            u += spread(scores, s + 1, 16) * load(values, place + (s + 1) * D + i, 16)
        if S % 2:
            t += spread(scores, S - 1, 16) * load(values, place + (S - 1) * D + i, 16)
        store(out, i, t + u)
    for i in range(whole, D):
        out[i] = 0
        for s in range(S):
            out[i] += scores[s] * values[place + s * D + i]


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
    """What threads give to one another: flat arrays of [features, B] but for the last one."""

    x: np.ndarray  # [C, B]: the stream
    qkv: np.ndarray
    y: np.ndarray  # [H D, B], filled up
    gate: np.ndarray  # [F, B], filled up
    up: np.ndarray
    scores: np.ndarray  # [V, B]
    logits: np.ndarray  # [B, V]: the same; of one column, the same array


class Job(NamedTuple):
    """What is the same for many steps."""

    number: int  # which job it is
    control: np.ndarray  # int64, see below
    tokens: np.ndarray  # [n]
    positions: np.ndarray
    weights: Weights
    keys: np.ndarray
    values: np.ndarray
    scratch: Scratch
    eps: float


@compiled
def of_layer(matrix, layer):
    w, scales, bias = matrix
    return w[layer], scales[layer], bias[layer]


@compiled
def attention(scratch, weights, layer, all_keys, all_values, positions, B, eps, rank, n_threads):
    """qkv [(H + 2 G) D, B] -> y [H D, B]; this thread's share of the n G groups of heads."""
    _, n_rows, G, S, D = all_keys.shape
    qkv, y, keys, values = scratch.qkv, scratch.y, all_keys.reshape(-1), all_values.reshape(-1)
    H = qkv.shape[0] // B // D - 2 * G
    head, out, scores = np.empty(D, f32), np.empty(D, f32), np.empty(S, f32)
    begin, end = share(positions.shape[0] * G, rank, n_threads)
    for item in range(begin, end):
        b, g = item // G, item % G
        position = positions[b]
        place = ((layer * n_rows + b) * G + g) * S * D
        for i in range(D):
            head[i] = qkv[((H + g) * D + i) * B + b]
            values[place + position * D + i] = qkv[((H + G + g) * D + i) * B + b]
        norm(head, weights.k_norm[layer], eps)
        rotate(head, weights.rotary, position)
        for i in range(D):
            keys[place + position * D + i] = head[i]
        for h in range(g * (H // G), (g + 1) * (H // G)):
            for i in range(D):
                head[i] = qkv[(h * D + i) * B + b]
            norm(head, weights.q_norm[layer], eps)
            rotate(head, weights.rotary, position)
            is_last = h + 1 == (g + 1) * (H // G)
            soon = place + S * D if is_last else place
            attend(out, head, keys, values, place, soon, scores[: position + 1])
            for i in range(D):
                y[(h * D + i) * B + b] = out[i]


@compiled
def step(job, rank, n_threads):
    """One thread's share of the logits for the tokens of a job, which are written into its cache, too."""
    _, control, tokens, positions, weights, keys, values, scratch, eps = job
    x, gate, up, scores = scratch.x, scratch.gate, scratch.up, scratch.scores
    n, V, C, F = tokens.shape[0], weights.wte.shape[0], weights.wte.shape[1], weights.gate_up[0].shape[1] // 2
    B = x.shape[0] // C
    h = np.zeros(padded(C) * B, f32)
    if rank == 0:
        for b in range(n):
            for i in range(C):
                x[i * B + b] = weights.wte[tokens[b], i]
                if weights.wpe.shape[0]:
                    x[i * B + b] += weights.wpe[positions[b], i]
    meet(control, n_threads)
    L = keys.shape[0]
    for i in range(5 * L + 1):
        # One call of `product` for all matrices: Numba compiles a function anew wherever it is called.
        layer, part = i // 5, i % 5
        if layer == L:
            norm_of(h, x, B, weights.norm, eps)
            matrix, source, out = weights.head, h, scores
        elif part == 0:
            norm_of(h, x, B, weights.attn_norm[layer], eps)
            matrix, source, out = of_layer(weights.qkv, layer), h, scratch.qkv
        elif part == 1:
            attention(scratch, weights, layer, keys, values, positions, B, eps, rank, n_threads)
            meet(control, n_threads)
            matrix, source, out = of_layer(weights.proj, layer), scratch.y, x
        elif part == 4:
            matrix, source, out = of_layer(weights.down, layer), gate, x
        else:
            w, scales, bias = of_layer(weights.gate_up, layer)
            if part == 2:
                norm_of(h, x, B, weights.mlp_norm[layer], eps)
                matrix, source, out = (w[:F], scales[:F], bias[:F]), h, gate
            else:
                matrix, source, out = (w[F:], scales[F:], bias[F:]), h, up
        product(out, matrix, source, B, part == 1 or part == 4, rank, n_threads)
        if part == 3:  # the same rows of gate and up are mine: nobody needs to be waited for
            begin, end = share(F, rank, n_threads)
            for k in range(begin * B, end * B):
                gate[k] *= up[k] / (f32(1) + exp(-gate[k]))
        if part != 2 and layer < L:
            meet(control, n_threads)
    begin, end = share(V, rank, n_threads)
    if B > 1:
        logits, whole = scratch.logits.reshape(-1), end - (end - begin) % 8
        for r in range(begin, whole, 8):
            for b in range(0, B, 8):
                transpose(logits, b * V + r, V, scores, r * B + b, B)
        for r in range(whole, end):
            for b in range(B):
                logits[b * V + r] = scores[r * B + b]
    meet(control, n_threads)


# ---- a team of threads -----------------------------------------------------------------------------------


@compiled
def lead(job, n_threads):
    """One step by the whole team, of which the caller is rank 0; returns whether it was done.

    It is not if one of the others is asleep. From here on, nobody falls asleep, and nothing raises: Ctrl-C,
    for instance, would leave them waiting for this thread's share for ever.
    """
    control = job.control
    for rank in range(1, n_threads):
        while not swap(control, STATE + 8 * rank, AWAKE, ENGAGED):
            if read(control, STATE + 8 * rank) == ASLEEP:
                for other in range(1, rank):
                    write(control, STATE + 8 * other, AWAKE)
                return False
    write(control, NUMBER, job.number)
    add(control, ASKED, 1)
    step(job, 0, n_threads)
    for b in range(job.positions.shape[0]):
        job.positions[b] += 1
    return True


@compiled
def follow(job, rank, n_threads):
    """Do this thread's share of the steps of a job, until there is another job, or nothing to do for long.

    To be woken takes 50 to 100 us, a tenth of a step: so it looks around for a while before it falls asleep.
    Returns whether it has.
    """
    control, me, looks = job.control, STATE + 8 * rank, 0
    swap(control, me, ASLEEP, AWAKE)
    while True:
        if read(control, ASKED) > control[me + 1]:
            if read(control, NUMBER) != job.number:
                return False
            step(job, rank, n_threads)
            control[me + 1] += 1
            write(control, me, AWAKE)
            looks = 0
        elif looks > PATIENCE and swap(control, me, AWAKE, ASLEEP):
            return True
        looks += 1
        if looks > SPINS:
            give_way()
