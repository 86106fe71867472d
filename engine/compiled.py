"""Decoding on a CPU: a step of the network for B tokens, each of another row of the cache, compiled by Numba.

PyTorch spends more time between its operations than in them when there is one token. Here one function runs
the whole step, in every thread of a small team: each computes its share of the rows of each matrix, and
waits for the others (`meet`) before it reads what they wrote. Weights are float32 or int8
(engine/quantize.py). It is the network of model.py and knows no other. engine/compiled_step.py calls it.

Numba brings its own compiler, so nobody needs to have one. It works for some seconds when a step is run for
the first time, and keeps the result; so all that it compiles is in this file, which tells it when that is
out of date.
"""

import os
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic, models, overload, register_model

from engine.compile_cache import CACHE
from engine.quantize import GROUP, NEIGHBOURS, ROWS

config.CACHE_DIR = str(CACHE)

SPINS = 2000  # looks before a waiting thread offers its core to others
PATIENCE = 4000  # looks before a thread that has nothing to do goes to sleep: some tenths of a millisecond

# Not parallel=True: Numba's own pools cost 100 us for each loop (workqueue) or stall where another process
# wants a core (OpenMP). Not fastmath, but where a loop adds up numbers of one token: what a token gets would
# depend on its column, as the compiler would cut the loops otherwise.
options = dict(nogil=True, boundscheck=False, cache=True, error_model="numpy")
compiled, fast = njit(**options), njit(**options, fastmath=True)
inlined = njit(inline="always", **options)
give_way = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())
f32 = np.float32


# ---- threads that wait for each other ----------------------------------------------------------------

# Places in `control`, each in a cache line of its own, as others look at them.
ARRIVED = 0  # see `meet`
ASKED = 8  # how many steps there are to do
NUMBER = 16  # of the job that they belong to
STATE = 24  # STATE + 8 rank: of that thread; the place after that: how many steps it has done
AWAKE, ENGAGED, ASLEEP = 0, 1, 2


def pointer(context, builder, kind, array, place):
    """To array[place]; kind: the type of the array, which is contiguous."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [place])


@intrinsic
def add(typingctx, array, i, n):
    """Atomically array[i] += n; gives what it was."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(context, builder, array, *args[:2]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def read(typingctx, array, i):
    def generate(context, builder, signature, args):
        return builder.load_atomic(pointer(context, builder, array, *args[:2]), "seq_cst", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def write(typingctx, array, i, n):
    def generate(context, builder, signature, args):
        place = pointer(context, builder, array, *args[:2])
        builder.store_atomic(args[2], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def swap(typingctx, array, i, old, new):
    """Atomically array[i] = new if it is old; returns whether it was."""

    def generate(context, builder, signature, args):
        place = pointer(context, builder, array, *args[:2])
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
# What the compiler does not make of loops by itself: sums that stay in registers, of a shape that we choose.
# Each processor gets them cut to the size of its registers. Places are counted in the flat array; a tuple of
# them gives a tuple of vectors. Nobody looks whether they are negative, as Numba's a[i] does for each number.

INT32 = ir.IntType(32)


class Vector(types.Type):
    """`width` lanes of 32 bits: of a float32, an int32, or two int16 each."""

    def __init__(self, width, element):
        self.width, self.element = width, element
        super().__init__(name=f"Vector({width}, {element})")

    @property
    def count(self):
        return self.width * 32 // self.element.bitwidth


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        element = manager.lookup(kind.element).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, kind.count))


def kind_of(like, element):
    """The type of a vector as wide as `like`, the type of a written number or of a tuple of vectors."""
    return Vector(like.literal_value if isinstance(like, types.Literal) else like.dtype.width, element)


def as_many(places, kind):
    """The type of `kind` for each of the places."""
    return types.UniTuple(kind, places.count) if isinstance(places, types.UniTuple) else kind


def each(builder, function, *values):
    """function of values, or of all their first parts, all their second parts, ...: a tuple.

    Of a value that is no tuple, every part is the value.
    """
    is_tuple = [isinstance(value.type, ir.ArrayType) for value in values]
    if not any(is_tuple):
        return function(*values)
    count = values[is_tuple.index(True)].type.count
    results = []
    for k in range(count):
        parts = zip(values, is_tuple, strict=True)
        results.append(function(*(builder.extract_value(v, k) if many else v for v, many in parts)))
    if results[0] is None:
        return None
    packed = ir.Constant(ir.ArrayType(results[0].type, count), ir.Undefined)
    for k, result in enumerate(results):
        packed = builder.insert_value(packed, result, k)
    return packed


def taken(builder, a, b, order):
    """The numbers of these places in a and b, one behind the other."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(order)), [*order]))


def called(builder, name, x):
    """One of LLVM's functions of a vector of float32"""
    function = ir.FunctionType(x.type, [x.type])
    return builder.call(builder.module.declare_intrinsic(f"{name}.v{x.type.count}f32", fnty=function), [x])


@intrinsic(prefer_literal=True)
def zeros(typingctx, count, width, element):
    """A tuple of `count` vectors of zeros, f32 or np.int32"""
    kind = types.UniTuple(kind_of(width, element.dtype), count.literal_value)

    def generate(context, builder, signature, args):
        return ir.Constant(context.get_value_type(kind), None)

    return kind(count, width, element), generate


@intrinsic(prefer_literal=True)
def clipped(typingctx, first, step, last, count):
    """The places first, first + step, ..., `count` of them, but `last` for those that lie behind it."""

    def generate(context, builder, signature, args):
        first, step, last, _ = args
        places = []
        for k in range(count.literal_value):
            place = builder.add(first, builder.mul(step, step.type(k)))
            places.append(builder.select(builder.icmp_signed("<", place, last), place, last))
        return context.make_tuple(builder, signature.return_type, places)

    kind = types.UniTuple(types.int64, count.literal_value)
    return kind(types.int64, types.int64, types.int64, count), generate


@intrinsic(prefer_literal=True)
def load(typingctx, array, places, i, width):
    """The vector of the numbers from array[place + i] on; int8 becomes int16. width: see `kind_of`."""
    element = types.int16 if array.dtype == types.int8 else array.dtype
    kind = kind_of(width, element)

    def generate(context, builder, signature, args):
        def load_one(place):
            place = pointer(context, builder, array, args[0], builder.add(place, args[2]))
            stored = ir.VectorType(place.type.pointee, kind.count)
            place = builder.bitcast(place, stored.as_pointer())
            vector = builder.load(place, align=array.dtype.bitwidth // 8)
            return builder.sext(vector, context.get_value_type(kind)) if array.dtype == types.int8 else vector

        return each(builder, load_one, args[1])

    placed = as_many(places, types.int64)
    return as_many(places, kind)(array, placed, types.int64, width), generate


@intrinsic(prefer_literal=True)
def spread(typingctx, array, places, i, width):
    """The vector of array[place + i] in each lane; of int16, of that and the next one."""
    kind = kind_of(width, array.dtype)
    n_numbers = kind.count // kind.width
    order = [k if NEIGHBOURS else k // kind.width for k in range(kind.count)]

    def generate(context, builder, signature, args):
        def spread_one(place):
            place = pointer(context, builder, array, args[0], builder.add(place, args[2]))
            few = ir.VectorType(place.type.pointee, n_numbers)
            few = builder.load(builder.bitcast(place, few.as_pointer()), align=array.dtype.bitwidth // 8)
            return taken(builder, few, few, [k % n_numbers for k in order])

        return each(builder, spread_one, args[1])

    placed = as_many(places, types.int64)
    return as_many(places, kind)(array, placed, types.int64, width), generate


@intrinsic
def store(typingctx, array, places, i, vectors):
    """array[place + i : place + i + width] = the vector"""

    def generate(context, builder, signature, args):
        def store_one(place, vector):
            place = pointer(context, builder, array, args[0], builder.add(place, args[2]))
            place = builder.bitcast(place, vector.type.as_pointer())
            builder.store(vector, place, align=array.dtype.bitwidth // 8)

        each(builder, store_one, args[1], args[3])
        return context.get_dummy_value()

    return types.void(array, as_many(places, types.int64), types.int64, vectors), generate


@intrinsic
def multiply_add(typingctx, sums, a, b):
    """sums + a * b, float32, each of which may be a tuple of vectors or one for all"""

    def generate(context, builder, signature, args):
        def one(total, a, b):
            return builder.fadd(total, builder.fmul(a, b, flags=["contract"]), flags=["contract"])

        return each(builder, one, *args)

    return sums(sums, a, b), generate


@intrinsic
def multiply_add_pairs(typingctx, sums, a, b):
    """sums + a * b, int32; of a and b, int16, each lane gives two products. See NEIGHBOURS."""
    n = sums.dtype.width
    orders = (range(0, 2 * n, 2), range(1, 2 * n, 2)) if NEIGHBOURS else (range(n), range(n, 2 * n))

    def generate(context, builder, signature, args):
        def one(total, a, b):
            wide = ir.VectorType(INT32, 2 * n)
            products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
            return builder.add(total, builder.add(*(taken(builder, products, products, o) for o in orders)))

        return each(builder, one, *args)

    return sums(sums, a, b), generate


@intrinsic
def as_float(typingctx, vectors):
    """A tuple of vectors of int32 as float32"""
    kind = types.UniTuple(kind_of(vectors, types.float32), vectors.count)

    def generate(context, builder, signature, args):
        element = context.get_value_type(kind.dtype)
        return each(builder, lambda one: builder.sitofp(one, element), *args)

    return kind(vectors), generate


@intrinsic
def larger(typingctx, vectors, x):
    """Of a tuple of vectors and of the absolute numbers of x, the larger ones"""

    def generate(context, builder, signature, args):
        def one(most, x):
            x = called(builder, "llvm.fabs", x)
            return builder.select(builder.fcmp_ordered(">", x, most), x, most)

        return each(builder, one, *args)

    return vectors(vectors, x), generate


@intrinsic
def totals(typingctx, vectors):
    """Of a tuple of vectors, the sums of their numbers: a vector, as wide as there are vectors."""
    kind = Vector(vectors.count, types.float32)

    def generate(context, builder, signature, args):
        def added(a, b, *orders):
            return builder.fadd(*(taken(builder, a, b, order) for order in orders))

        parts = [builder.extract_value(args[0], k) for k in range(kind.width)]
        while (half := parts[0].type.count // 2) >= kind.width:
            parts = [added(v, v, range(half), range(half, 2 * half)) for v in parts]
        evens, odds = range(0, 2 * kind.width, 2), range(1, 2 * kind.width, 2)
        while len(parts) > 1:  # neighbours are added, of two vectors at a time; one of each vector is left
            parts = [added(a, b, evens, odds) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    return kind(vectors), generate


@intrinsic
def transpose(typingctx, out, i, n_columns, x, j, n_rows):
    """out[i + r * n_columns + k] = x[j + k * n_rows + r] for r, k = 0 .. 7"""

    def generate(context, builder, signature, args):
        def row(array, number, first, r, stride):
            place = builder.add(first, builder.mul(stride, stride.type(r)))
            place = pointer(context, builder, array, number, place)
            return builder.bitcast(place, ir.VectorType(ir.FloatType(), 8).as_pointer())

        rows = [builder.load(row(x, *args[3:5], r, args[5]), align=4) for r in range(8)]
        for half in (4, 2, 1):  # blocks beside the diagonal change places, ever smaller ones
            for r in (r for r in range(8) if not r & half):
                pair = rows[r], rows[r + half]
                low = [8 + k - half if k & half else k for k in range(8)]
                for number, order in ((r, low), (r + half, [k + half for k in low])):
                    rows[number] = taken(builder, *pair, order)
        for r, vector in enumerate(rows):
            builder.store(vector, row(out, *args[:2], r, args[2]), align=4)
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, x, types.int64, types.int64), generate


@intrinsic
def prefetch(typingctx, array, place):
    """array[place] is wanted soon, in the second cache. Where there is none, nothing happens."""

    def generate(context, builder, signature, args):
        place = builder.bitcast(pointer(context, builder, array, *args), ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [place.type, INT32, INT32, INT32])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], function)
        builder.call(fetch, [place, INT32(0), INT32(2), INT32(1)])  # not to write it, second cache, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


# ---- products ----------------------------------------------------------------------------------------
# out [n, M] = or += x [n, N] times a matrix [M, N]; rows of x and out are `stride` numbers apart (`Scratch`).


@compiled
def share(size, rank, n_threads):
    """Which of the numbers 0 .. size - 1 are this thread's: from, to."""
    return size * rank // n_threads, size * (rank + 1) // n_threads


@compiled
def dots(out, w, x, add_to, begin, end):
    """Of one token: out[begin:end] = or += rows of w [M, N] times x [N].

    Four rows at once, from far apart: a processor fetches several streams of memory faster than one.
    """
    N, flat, quarter, results = w.shape[1], w.reshape(-1), (end - begin + 3) // 4, np.empty(4, f32)
    for r in range(begin, begin + quarter):
        rows, sums = clipped(r * N, quarter * N, (end - 1) * N, 4), zeros(4, 16, f32)
        for i in range(0, N - 15, 16):
            sums = multiply_add(sums, load(flat, rows, i, 16), load(x, 0, i, 16))
        store(results, 0, 0, totals(sums))
        for k in range(4):
            row, result = r + k * quarter, results[k]
            if row < end:
                for i in range(N - N % 16, N):
                    result += w[row, i] * x[i]
                out[row] = out[row] + result if add_to else result


TILE = 6  # rows at once: their sums for 16 tokens just fit into the registers of AVX2
BLOCK = 24  # rows, which are turned into columns 8 by 8


@compiled
def tiles(out, stride, w, x, B, b, width, add_to, begin, end, nothing):
    """Of `width` tokens from b on: blocks begin .. end - 1 of the rows of w [M, N] times x [N, B].

    nothing: TILE vectors of zeros, as wide as there are tokens.
    """
    M, N, flat, results = w.shape[0], w.shape[1], w.reshape(-1), np.empty(BLOCK * width, f32)
    for first in range(begin * BLOCK, end * BLOCK, BLOCK):
        for c in range(0, width if add_to else 0, 8):
            for r in range(0, BLOCK, 8):
                transpose(results, r * width + c, width, out, (b + c) * stride + first + r, stride)
        for r in range(0, BLOCK, TILE):
            place, targets = (first + r) * N, clipped(r * width, width, BLOCK * width, TILE)
            rows, sums = clipped(place, N, (M - 1) * N, TILE), nothing
            if add_to:
                sums = load(results, targets, 0, nothing)
            for j in range(0, N, 16):
                for k in range(TILE):  # the rows after the next ones, in the order of memory
                    prefetch(flat, place + TILE * (2 * N + j) + 16 * k)
                for i in range(j, min(j + 16, N)):
                    sums = multiply_add(sums, spread(flat, rows, i, nothing), load(x, b, i * B, nothing))
            store(results, targets, 0, sums)
        for c in range(0, width, 8):
            for r in range(0, BLOCK, 8):
                transpose(out, (b + c) * stride + first + r, stride, results, r * width + c, width)


# int8 weights are multiplied by whole numbers, too: x is rounded to 16 bits, 32,767 being the largest number
# of a group. Then nothing more is lost, and nothing depends on n: the sum of a group has at most 29 bits.


@compiled
def rounded(x, n, N):
    """x [n, N] -> int16 [n N] and their scales [n N / GROUP]"""
    flat, stride = x.reshape(-1), x.shape[1]
    whole, scales, lanes = np.empty(n * N, np.int16), np.empty(n * N // GROUP, f32), np.empty(16, f32)
    for first in range(0, n * N, GROUP):
        place, most, largest = first // N * stride + first % N, zeros(1, 16, f32), f32(0)
        for i in range(0, GROUP, 16):
            most = larger(most, load(flat, place, i, 16))
        store(lanes, 0, 0, most[0])
        for k in range(16):
            largest = max(largest, lanes[k])
        scales[first // GROUP], factor = largest / f32(32767), f32(32767) / max(largest, f32(1e-30))
        for i in range(GROUP):
            whole[first + i] = np.int16(np.rint(flat[place + i] * factor))
    return whole, scales


@inlined
def int8_sums(sums, n_groups, q, places, scales, groups, x, tokens, x_scales, x_groups):
    """sums, four vectors of ROWS rows, plus four times a block of ROWS rows of q times a token of x.

    places, groups: of the blocks in q and scales; tokens, x_groups: in x and x_scales. Of each, one or four.
    """
    for g in range(n_groups):
        parts = zeros(4, 16, np.int32)
        for i in range(g * GROUP, (g + 1) * GROUP, 2):
            parts = multiply_add_pairs(parts, load(q, places, i * ROWS, 16), spread(x, tokens, i, 16))
        of_x = spread(x_scales, x_groups, g, 16)
        scale = multiply_add(zeros(4, 16, f32), load(scales, groups, g * ROWS, 16), of_x)
        sums = multiply_add(sums, as_float(parts), scale)
    return sums


@compiled
def int8_dots(out, stride, q, scales, x, x_scales, n, add_to, begin, end):
    """Of few tokens, one after the other: blocks begin .. end - 1, four of them at once, as in `dots`."""
    N, n_groups, flat, factors = 2 * q.shape[1], scales.shape[1], q.reshape(-1), scales.reshape(-1)
    quarter = (end - begin + 3) // 4
    for block in range(begin, begin + quarter):
        places = clipped(block * ROWS * N, quarter * ROWS * N, (end - 1) * ROWS * N, 4)
        groups = clipped(block * ROWS * n_groups, quarter * ROWS * n_groups, (end - 1) * ROWS * n_groups, 4)
        for b in range(n):
            first, last = b * stride + block * ROWS, b * stride + (end - 1) * ROWS
            targets, sums = clipped(first, quarter * ROWS, last, 4), zeros(4, 16, f32)
            if add_to:
                sums = load(out, targets, 0, 16)
            sums = int8_sums(sums, n_groups, flat, places, factors, groups, x, b * N, x_scales, b * n_groups)
            for k in range(4):
                if block + k * quarter < end:
                    store(out, targets[k], 0, sums[k])


@compiled
def int8_tiles(out, stride, q, scales, x, x_scales, n, add_to, begin, end):
    """Of many tokens, four at once: blocks begin .. end - 1."""
    N, n_groups, flat, factors = 2 * q.shape[1], scales.shape[1], q.reshape(-1), scales.reshape(-1)
    for block in range(begin, end):
        place, group, target = block * ROWS * N, block * ROWS * n_groups, block * ROWS
        for b in range(0, n, 4):
            tokens = clipped(b * N, N, (n - 1) * N, 4)
            x_groups = clipped(b * n_groups, n_groups, (n - 1) * n_groups, 4)
            targets = clipped(b * stride + target, stride, (n - 1) * stride + target, 4)
            sums = zeros(4, 16, f32)
            if add_to:
                sums = load(out, targets, 0, 16)
            sums = int8_sums(sums, n_groups, flat, place, factors, group, x, tokens, x_scales, x_groups)
            store(out, targets, 0, sums)


def multiply(out, w, scales, x, n, add_to, rank, n_threads):
    """This thread's part of out for n tokens; returns which rows of the matrix that were: from, to."""


@overload(multiply)
def _(out, w, scales, x, n, add_to, rank, n_threads):
    def float32(out, w, scales, x, n, add_to, rank, n_threads):
        results, source, stride = out.reshape(-1), x.reshape(-1), out.shape[1]
        (M, N), B = w.shape, out.shape[0]
        if n == 1:
            begin, end = share(M, rank, n_threads)
            dots(results, w, source, add_to, begin, end)
            return begin, end
        columns = np.empty((N + 7) // 8 * 8 * B, f32)
        for i in range(0, N, 8):
            for b in range(0, B, 8):
                transpose(columns, i * B + b, B, source, b * x.shape[1] + i, x.shape[1])
        begin, end = share((M + BLOCK - 1) // BLOCK, rank, n_threads)
        for b in range(0, B - 15, 16):
            tiles(results, stride, w, columns, B, b, 16, add_to, begin, end, zeros(TILE, 16, f32))
        if B % 16 == 8:
            tiles(results, stride, w, columns, B, B - 8, 8, add_to, begin, end, zeros(TILE, 8, f32))
        return begin * BLOCK, end * BLOCK

    def int8(out, w, scales, x, n, add_to, rank, n_threads):
        begin, end = share(w.shape[0], rank, n_threads)
        whole, x_scales = rounded(x, n, 2 * w.shape[1])
        if n < 4:
            int8_dots(out.reshape(-1), out.shape[1], w, scales, whole, x_scales, n, add_to, begin, end)
        else:
            int8_tiles(out.reshape(-1), out.shape[1], w, scales, whole, x_scales, n, add_to, begin, end)
        return begin * ROWS, end * ROWS

    return float32 if w.dtype == types.float32 else int8


@compiled
def product(out, matrix, x, n, add_to, rank, n_threads):
    """This thread's part of out [n, M] = x [n, N] times the matrix [M, N], or += if add_to."""
    w, scales, bias = matrix
    begin, end = multiply(out, w, scales, x, n, add_to, rank, n_threads)
    for b in range(n):
        for r in range(begin, min(end, bias.shape[0])):
            out[b, r] += bias[r]


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
def norm_of(out, x, n, weight, eps):
    """out [n, C] = RMSNorm of the rows of x [n, C]"""
    C, flat, lanes = weight.shape[0], x.reshape(-1), np.empty(1, f32)
    for b in range(n):
        squares = zeros(1, 16, f32)
        for i in range(0, C - 15, 16):
            numbers = load(flat, b * x.shape[1], i, 16)
            squares = multiply_add(squares, numbers, numbers)
        store(lanes, 0, 0, totals(squares))
        mean = lanes[0]
        for i in range(C - C % 16, C):
            mean += x[b, i] * x[b, i]
        factor = f32(1) / np.sqrt(mean / f32(C) + f32(eps))
        for i in range(C):
            out[b, i] = x[b, i] * factor * weight[i]


@fast
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
def rotate(x, rotary, position):
    """Turn the pairs (i, i + D/2) of x [D] in place."""
    if rotary.shape[1]:
        half = x.shape[0] // 2
        for i in range(half):
            cos, sin, first, second = rotary[0, position, i], rotary[1, position, i], x[i], x[half + i]
            x[i] = first * cos - second * sin
            x[half + i] = second * cos + first * sin


@fast
def attend(out, q, keys, values, place, soon, scores):
    """out [D] = softmax(q [D] times keys [S, D]) times values [S, D]; scores [S + 4].

    Of the flat arrays keys and values, S D numbers from `place` on; those from `soon` on are wanted next.
    """
    S, D = scores.shape[0] - 4, q.shape[0]
    whole = D - D % 16
    scale, largest, weights = f32(1 / np.sqrt(D)), f32(-3e38), f32(0)
    for s in range(0, S, 4):
        rows, sums = clipped(place + s * D, D, place + (S - 1) * D, 4), zeros(4, 16, f32)
        for i in range(0, whole, 16):
            for k in range(4):
                prefetch(keys, soon + (s + k) * D + i)
            sums = multiply_add(sums, load(keys, rows, i, 16), load(q, 0, i, 16))
        store(scores, s, 0, totals(sums))
    for i in range(whole, D):
        for s in range(S):
            scores[s] += q[i] * keys[place + s * D + i]
    for s in range(S):
        largest = max(largest, scores[s])
    for s in range(S):
        scores[s] = exp((scores[s] - largest) * scale)
        weights += scores[s]
    scores[S], scores[S + 1] = 0, f32(1) / weights
    factor = spread(scores, S + 1, 0, 16)
    for i in range(0, whole, 32):
        # Two parts of two rows at once: a sum that is added to waits for itself.
        parts = clipped(i, 16, whole - 16, 2)
        one, other = zeros(2, 16, f32), zeros(2, 16, f32)
        for s in range(0, S, 2):
            first, second = s * D, min(s + 1, S - 1) * D
            for k in range(2):
                prefetch(values, soon + first + parts[k])
                prefetch(values, soon + second + parts[k])
            one = multiply_add(one, load(values, parts, place + first, 16), spread(scores, s, 0, 16))
            other = multiply_add(other, load(values, parts, place + second, 16), spread(scores, s, 1, 16))
        both = multiply_add(multiply_add(zeros(2, 16, f32), one, factor), other, factor)
        store(out, parts, 0, both)
    for i in range(whole, D):
        out[i] = 0
        for s in range(S):
            out[i] += scores[s] * scores[S + 1] * values[place + s * D + i]


# ---- the network -----------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Of all L layers one after the other; a matrix is (weights [L, M, N], scales, bias [L, M]).

    Of int8, weights and scales are those of Int8Linear, and float32 has no scales. What a model lacks is an
    empty array: None would be another type, and a compilation of its own.
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
    n_head: int
    n_hidden: int


class Scratch(NamedTuple):
    """What threads give to one another, [B, size]: B is 1, or `n` filled up to a multiple of 8.

    Rows are filled up with zeros, so that blocks of weights of any shape end within them.
    """

    x: np.ndarray  # [B, C]: the stream
    qkv: np.ndarray
    y: np.ndarray  # [B, H D]
    gate_up: np.ndarray  # [B, 2 F]
    logits: np.ndarray  # [B, V]


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
def attention(scratch, weights, layer, all_keys, all_values, positions, eps, rank, n_threads):
    """qkv [n, (H + 2 G) D] -> y [n, H D]; this thread's share of the n G groups of heads."""
    _, n_rows, G, S, D = all_keys.shape
    keys, values, H = all_keys.reshape(-1), all_values.reshape(-1), weights.n_head
    qkv, y = scratch.qkv, scratch.y
    head, out, scores = np.empty(D, f32), np.empty(D, f32), np.empty(S + 4, f32)
    begin, end = share(positions.shape[0] * G, rank, n_threads)
    for item in range(begin, end):
        b, g = item // G, item % G
        position = positions[b]
        place = ((layer * n_rows + b) * G + g) * S * D
        for i in range(D):
            head[i] = qkv[b, (H + g) * D + i]
            values[place + position * D + i] = qkv[b, (H + G + g) * D + i]
        norm(head, weights.k_norm[layer], eps)
        rotate(head, weights.rotary, position)
        for i in range(D):
            keys[place + position * D + i] = head[i]
        for h in range(g * (H // G), (g + 1) * (H // G)):
            for i in range(D):
                head[i] = qkv[b, h * D + i]
            norm(head, weights.q_norm[layer], eps)
            rotate(head, weights.rotary, position)
            is_last = h + 1 == (g + 1) * (H // G)
            soon = place + S * D if is_last else place
            attend(out, head, keys, values, place, soon, scores[: position + 5])
            for i in range(D):
                y[b, h * D + i] = out[i]


@compiled
def step(job, rank, n_threads):
    """One thread's share of the logits for the tokens of a job, which are written into its cache, too."""
    _, control, tokens, positions, weights, keys, values, scratch, eps = job
    x, gate_up = scratch.x, scratch.gate_up
    n, L, C, F = tokens.shape[0], keys.shape[0], weights.norm.shape[0], weights.n_hidden
    h, hidden = np.zeros_like(x), np.zeros_like(gate_up)
    if rank == 0:
        for b in range(n):
            for i in range(C):
                x[b, i] = weights.wte[tokens[b], i]
                if weights.wpe.shape[0]:
                    x[b, i] += weights.wpe[positions[b], i]
    meet(control, n_threads)
    for i in range(4 * L + 1):
        # One call of `product` for all matrices: Numba compiles a function anew wherever it is called.
        layer, part = i // 4, i % 4
        if layer == L:
            norm_of(h, x, n, weights.norm, eps)
            matrix, source, out = weights.head, h, scratch.logits
        elif part == 0:
            norm_of(h, x, n, weights.attn_norm[layer], eps)
            matrix, source, out = of_layer(weights.qkv, layer), h, scratch.qkv
        elif part == 1:
            attention(scratch, weights, layer, keys, values, positions, eps, rank, n_threads)
            meet(control, n_threads)
            matrix, source, out = of_layer(weights.proj, layer), scratch.y, x
        elif part == 2:
            norm_of(h, x, n, weights.mlp_norm[layer], eps)
            matrix, source, out = of_layer(weights.gate_up, layer), h, gate_up
        else:
            for b in range(n):  # each thread all of it: none needs to wait once more
                for k in range(F):
                    hidden[b, k] = gate_up[b, F + k] * gate_up[b, k] / (f32(1) + exp(-gate_up[b, k]))
            matrix, source, out = of_layer(weights.down, layer), hidden, x
        product(out, matrix, source, n, part % 2 == 1, rank, n_threads)
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
    step(job, np.int64(0), n_threads)  # a mere 0 is of another type, and needs another compilation
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
