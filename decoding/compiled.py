"""Decoding on a CPU: one pass of some tokens through the network, compiled by Numba.

PyTorch spends more time between its operations than in them when there is one token. Here one function runs
the whole pass, in every thread of a small team: each has a share of the heads and of the hidden features, and
waits for the others (`meet`) where it needs what they have computed. The tokens may be of one text or of
many: each has a row of the cache and a place there. It is the network of model.py, with weights in float32 or
int8 (decoding/packed.py), and knows no other. decoding/compiled_steps.py calls it.

What a token gets does not depend on the others: its numbers are added up in the same order, however many
there are.

Numba brings its own compiler, so nobody needs to have one. It works for some seconds when a pass is run for
the first time, and keeps the result; so all that it compiles is in this file, which tells it when that is
out of date.
"""

import operator
import os
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import config, njit, types
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    overload,
    register_model,
    type_callable,
)

from decoding.compile_cache import CACHE
from decoding.packed import GROUP, NEIGHBOURS, ROWS

config.CACHE_DIR = str(CACHE)

SPINS = 2000  # looks before a waiting thread offers its core to others
PATIENCE = 4000  # looks before a thread that has nothing to do goes to sleep: some tenths of a millisecond

# Not parallel=True: Numba's own pools cost 100 us for each loop (workqueue) or stall where another process
# wants a core (OpenMP). Not fastmath: the order in which numbers are added is ours.
# _nrt=False: nobody counts who uses an array. All threads would do so in the same places of memory, for which
# their cores would have to wait for one another; so nothing is allocated here.
options = dict(nogil=True, boundscheck=False, cache=True, error_model="numpy", _nrt=False)
compiled, inlined = njit(**options), njit(inline="always", **options)
give_way = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())
f32 = np.float32


# ---- threads that wait for each other ----------------------------------------------------------------

# Places in `control`, each in a cache line of its own, as others look at them.
ARRIVED = 0  # see `meet`
ASKED = 8  # how many passes there are to do
STATE = 16  # STATE + 8 rank: of that thread; the place after that: how many passes it has done
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
# Each processor gets them cut to the size of its registers. They are read and written at places in a flat
# array, and nobody looks whether these are negative, as Numba's a[i] does for each number.

INT32, FLOAT = ir.IntType(32), ir.FloatType()


class Vectors(types.Type):
    """`count` vectors of ROWS lanes of 32 bits, each of which is a float32, an int32, or two int16.

    a + b and the like: of all lanes; b may be one vector, or a number, for all vectors of a.
    """

    def __init__(self, count, element):
        self.count, self.element = count, element
        super().__init__(name=f"Vectors({count}, {element})")


@register_model(Vectors)
class VectorsModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        number, n_numbers = manager.lookup(kind.element).get_value_type(), ROWS * 32 // kind.element.bitwidth
        super().__init__(manager, kind, ir.ArrayType(ir.VectorType(number, n_numbers), kind.count))


def count_of(places):
    return places.count if isinstance(places, types.UniTuple | Vectors) else 1


def each(builder, function, *values):
    """function of all first parts of the values, of all second ones, ...; no array is its own part."""
    count = max((v.type.count for v in values if isinstance(v.type, ir.ArrayType)), default=1)

    def part(value, k):
        is_array = isinstance(value.type, ir.ArrayType)
        return builder.extract_value(value, min(k, value.type.count - 1)) if is_array else value

    results = [function(*(part(value, k) for value in values)) for k in range(count)]
    if results[0] is not None:
        packed = ir.Constant(ir.ArrayType(results[0].type, count), ir.Undefined)
        for k, result in enumerate(results):
            packed = builder.insert_value(packed, result, k)
        return packed


def filled(builder, value, kind):
    """A number in all lanes of a vector."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT32(0))
    return taken(builder, one, one, [0] * kind.count)


def taken(builder, a, b, order):
    """The numbers of these places in a and b, one behind the other."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(order)), [*order]))


def larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def arithmetic(function, generate_one):
    """Have function(a, b) do generate_one(builder, a, b) with vectors a and b of float32."""

    @type_callable(function)
    def of(context):
        def typer(a, b):
            vectors = [kind for kind in (a, b) if isinstance(kind, Vectors)]
            return max(vectors, key=lambda kind: kind.count, default=None)

        return typer

    def generate(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type).element
        args = [filled(builder, arg, kind) if arg.type == FLOAT else arg for arg in args]
        return each(builder, lambda a, b: generate_one(builder, a, b), *args)

    for kinds in ((Vectors, Vectors), (Vectors, types.Float), (types.Float, Vectors)):
        lower_builtin(function, *kinds)(generate)


# "contract": a product that is added to something is rounded once, together with the sum.
arithmetic(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=["contract"]))
arithmetic(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=["contract"]))
arithmetic(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=["contract"]))
arithmetic(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))
arithmetic(np.maximum, larger)
arithmetic(np.minimum, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))


def called(builder, name, result, *args):
    """One of LLVM's functions."""
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(name, fnty=function), args)


def unary(function, name):
    """Have function(x) be one of LLVM's functions of a vector of float32."""

    @type_callable(function)
    def of(context):
        return lambda x: x if isinstance(x, Vectors) else None

    @lower_builtin(function, Vectors)
    def generate(context, builder, signature, args):
        return each(builder, lambda x: called(builder, f"llvm.{name}.v{ROWS}f32", x.type, x), *args)


unary(np.floor, "floor")
unary(np.rint, "rint")
unary(np.abs, "fabs")


@intrinsic
def power_of_two(typingctx, n):
    """2^n for whole numbers in float32 from -126 to 127"""

    def generate(context, builder, signature, args):
        def one(n):
            number, shift = (ir.Constant(ir.VectorType(INT32, ROWS), [value] * ROWS) for value in (127, 23))
            bits = builder.shl(builder.add(builder.fptosi(n, number.type), number), shift)
            return builder.bitcast(bits, n.type)

        return each(builder, one, *args)

    return n(n), generate


def across(builder, join, vectors):
    """join(a, b) of all vectors, then of the halves of what is left, and so on, up to one number"""
    vector, *others = (builder.extract_value(vectors, k) for k in range(vectors.type.count))
    for other in others:
        vector = join(vector, other)
    while (half := vector.type.count // 2) >= 1:
        vector = join(*(taken(builder, vector, vector, range(k, k + half)) for k in (0, half)))
    return builder.extract_element(vector, INT32(0))


@intrinsic
def total(typingctx, vectors):
    """The sum of all lanes of all vectors"""

    def generate(context, builder, signature, args):
        return across(builder, builder.fadd, *args)

    return types.float32(vectors), generate


@intrinsic
def largest(typingctx, vectors):
    """The largest of all lanes of all vectors"""

    def generate(context, builder, signature, args):
        return across(builder, lambda a, b: larger(builder, a, b), *args)

    return types.float32(vectors), generate


@intrinsic(prefer_literal=True)
def zeros(typingctx, count, element):
    """As many vectors as `count` says, or has, of float32 or int32"""
    number = count.literal_value if isinstance(count, types.Literal) else count.count
    kind = Vectors(number, element.dtype)

    def generate(context, builder, signature, args):
        return ir.Constant(context.get_value_type(kind), None)

    return kind(count, element), generate


@intrinsic(prefer_literal=True)
def clipped(typingctx, first, step, last, count):
    """The places first, first + step, ..., `count` of them, but `last` for those that lie behind it"""

    def generate(context, builder, signature, args):
        first, step, last, _ = args
        places = []
        for k in range(count.literal_value):
            place = builder.add(first, builder.mul(step, step.type(k)))
            places.append(builder.select(builder.icmp_signed("<", place, last), place, last))
        return context.make_tuple(builder, signature.return_type, places)

    kind = types.UniTuple(types.int64, count.literal_value)
    return kind(types.int64, types.int64, types.int64, count), generate


@intrinsic
def times(typingctx, places, n):
    """A place, or each of a tuple of places, times n"""

    def generate(context, builder, signature, args):
        if isinstance(places, types.UniTuple):
            return each(builder, builder.mul, *args)
        return builder.mul(*args)

    return places(places, types.int64), generate


@intrinsic
def load(typingctx, array, places, i):
    """The vectors of the numbers from array[place + i] on; int8 becomes int16."""
    kind = Vectors(count_of(places), types.int16 if array.dtype == types.int8 else array.dtype)

    def generate(context, builder, signature, args):
        vector = context.get_value_type(kind).element

        def load_one(place):
            place = pointer(context, builder, array, args[0], builder.add(place, args[2]))
            stored = ir.VectorType(place.type.pointee, vector.count)
            place = builder.bitcast(place, stored.as_pointer())
            numbers = builder.load(place, align=array.dtype.bitwidth // 8)
            return builder.sext(numbers, vector) if array.dtype == types.int8 else numbers

        return each(builder, load_one, args[1])

    return kind(array, places, types.int64), generate


@intrinsic
def spread(typingctx, array, places, i):
    """The vectors of array[place + i] in each lane; of int16, of that and the next one."""
    kind = Vectors(count_of(places), array.dtype)

    def generate(context, builder, signature, args):
        n_lanes = context.get_value_type(kind).element.count
        n_numbers = n_lanes // ROWS
        order = [k if NEIGHBOURS else k // ROWS for k in range(n_lanes)]

        def spread_one(place):
            place = pointer(context, builder, array, args[0], builder.add(place, args[2]))
            few = ir.VectorType(place.type.pointee, n_numbers)
            few = builder.load(builder.bitcast(place, few.as_pointer()), align=array.dtype.bitwidth // 8)
            return taken(builder, few, few, [k % n_numbers for k in order])

        return each(builder, spread_one, args[1])

    return kind(array, places, types.int64), generate


@intrinsic
def store(typingctx, array, places, i, vectors):
    """array[place + i : place + i + ROWS] = the vectors; float32 becomes int16 where the array is."""

    def generate(context, builder, signature, args):
        def store_one(place, vector):
            place = pointer(context, builder, array, args[0], builder.add(place, args[2]))
            if array.dtype != vectors.element:
                vector = builder.fptosi(vector, ir.VectorType(place.type.pointee, ROWS))
            place = builder.bitcast(place, vector.type.as_pointer())
            builder.store(vector, place, align=array.dtype.bitwidth // 8)

        each(builder, store_one, args[1], args[3])
        return context.get_dummy_value()

    return types.void(array, places, types.int64, vectors), generate


@intrinsic
def products_of_pairs(typingctx, sums, a, b):
    """sums + a * b, int32; of a and b, int16, each lane gives two products. See NEIGHBOURS."""
    n = ROWS
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
    """Vectors of int32 as float32"""

    def generate(context, builder, signature, args):
        return each(builder, lambda one: builder.sitofp(one, ir.VectorType(FLOAT, ROWS)), *args)

    return Vectors(vectors.count, types.float32)(vectors), generate


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


@inlined
def exp(x):
    """e^x to 3e-7 of it"""
    x = np.minimum(np.maximum(x, f32(-87)), f32(88)) * f32(1.4426950408889634)
    n = np.floor(x + f32(0.5))
    f = (x - n) * f32(0.6931471805599453)
    p = f * (f * f32(1 / 720) + f32(1 / 120)) + f32(1 / 24)
    p = f * (f * (f * (f * p + f32(1 / 6)) + f32(1 / 2)) + f32(1)) + f32(1)
    return p * power_of_two(n)


# ---- products ----------------------------------------------------------------------------------------
# out [n, M] = x [n, N] times a matrix [M, N], of which ROWS rows, a block, lie together (decoding/packed.py).
# A vector of weights has one of each row, and is multiplied by one number of x.


@compiled
def share(size, rank, n_threads):
    """Which of the numbers 0 .. size - 1 are this thread's: from, to."""
    return size * rank // n_threads, size * (rank + 1) // n_threads


# int8 weights are multiplied by whole numbers, too: x is rounded to 16 bits, 32,767 being the largest number
# of a group. Then nothing more is lost: the sum of a group has at most 29 bits.
PARTS = GROUP // ROWS


@compiled
def rounded(whole, scales, x, n, begin, end):
    """whole [n, N], scales [n, N / GROUP] = these groups of x [n, N], rounded; both are flat."""
    stride, n_groups, flat = x.shape[1], x.shape[1] // GROUP, x.reshape(-1)
    for b in range(n):
        for g in range(begin, end):
            places = clipped(b * stride + g * GROUP, ROWS, n * stride, PARTS)
            numbers = load(flat, places, 0)
            most = largest(np.abs(numbers))
            scales[b * n_groups + g], factor = most / f32(32767), f32(32767) / max(most, f32(1e-30))
            store(whole, places, 0, np.rint(numbers * factor))


def operand(w, x, n, columns, scratch):
    """These columns (from, to) of x [n, N] as `sums_of` takes them.

    That is: numbers, scales, how far apart the rows of both are, from, to; of int8, from and to in groups.
    """


@overload(operand)
def _(w, x, n, columns, scratch):
    def float32(w, x, n, columns, scratch):
        return x.reshape(-1), scratch.scales, x.shape[1], 0, columns[0], columns[1]

    def int8(w, x, n, columns, scratch):
        begin, end = columns[0] // GROUP, (columns[1] + GROUP - 1) // GROUP
        rounded(scratch.whole, scratch.scales, x, n, begin, end)
        return scratch.whole, scratch.scales, x.shape[1], x.shape[1] // GROUP, begin, end

    return float32 if w.dtype == types.float32 else int8


def sums_of(sums, w, scales, blocks, x, tokens, soon, turn, pace):
    """sums plus the products of blocks of w and tokens of x (`operand`); of one of the two there is only one.

    soon: the block that is wanted next. It is fetched meanwhile, `pace` of its numbers with each
    multiplication, of which this is the turn-th round; 0: the processor finds out by itself.
    """


@overload(sums_of, inline="always")
def _(sums, w, scales, blocks, x, tokens, soon, turn, pace):
    def float32(sums, w, scales, blocks, x, tokens, soon, turn, pace):
        numbers, _, stride, _, begin, end = x
        size, flat = w.shape[1] * ROWS, w.reshape(-1)
        places, rows = times(blocks, size), times(tokens, stride)
        ahead = soon * size + begin * ROWS + ((end - begin) * turn - begin) * pace
        for i in range(begin, end):
            if pace:
                prefetch(flat, ahead + i * pace)
            sums = sums + load(flat, places, i * ROWS) * spread(numbers, rows, i)
        return sums

    def int8(sums, w, scales, blocks, x, tokens, soon, turn, pace):
        numbers, x_scales, stride, n_groups, begin, end = x
        size, flat, factors = 2 * w.shape[1] * ROWS, w.reshape(-1), scales.reshape(-1)
        places, groups = times(blocks, size), times(blocks, scales.shape[1] * ROWS)
        rows, x_groups = times(tokens, stride), times(tokens, n_groups)
        for g in range(begin, end):
            parts = zeros(sums, np.int32)
            for i in range(g * GROUP, (g + 1) * GROUP, 2):
                parts = products_of_pairs(parts, load(flat, places, i * ROWS), spread(numbers, rows, i))
            sums = sums + as_float(parts) * (load(factors, groups, g * ROWS) * spread(x_scales, x_groups, g))
        return sums

    return float32 if w.dtype == types.float32 else int8


@compiled
def few(out, w, scales, x, n, begin, end):
    """Of few tokens, one after the other: blocks begin .. end - 1, whose number is a multiple of four.

    Four at once, from far apart: a processor fetches several streams of memory faster than one.
    """
    results, stride, quarter = out.reshape(-1), out.shape[1], (end - begin) // 4
    for block in range(begin, begin + quarter):
        blocks = clipped(block, quarter, end, 4)
        for b in range(n):
            sums = sums_of(zeros(4, f32), w, scales, blocks, x, b, 0, 0, 0)
            store(results, times(blocks, ROWS), b * stride, sums)


# So many at once: their sums just fit into the registers, of which AVX-512 has twice as many as others have.
TOKENS = 8 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
HALF = TOKENS // 2


@inlined
def tile(results, stride, w, scales, x, n, block, turn, pace, count):
    """One block, and `count` tokens from TOKENS * turn on."""
    tokens = clipped(TOKENS * turn, 1, n - 1, count)
    sums = sums_of(zeros(count, f32), w, scales, block, x, tokens, block + 1, turn, pace)
    store(results, times(tokens, stride), block * ROWS, sums)


@compiled
def many(out, w, scales, x, n, begin, end):
    """Of many tokens, TOKENS or HALF of them at once: blocks begin .. end - 1."""
    results, stride, turns = out.reshape(-1), out.shape[1], (n + TOKENS - 1) // TOKENS
    pace = ROWS // turns
    for block in range(begin, end):
        for turn in range(turns):
            if n - TOKENS * turn > HALF:
                tile(results, stride, w, scales, x, n, block, turn, pace, TOKENS)
            else:
                tile(results, stride, w, scales, x, n, block, turn, pace, HALF)


@compiled
def product(out, matrix, x, n, rows, columns, has_bias, scratch):
    """out [n, M] = x [n, N] times the matrix [M, N]: the blocks that hold these rows of it (from, to).

    columns: those of the matrix that count; x is taken for zero elsewhere.
    """
    w, scales, bias = matrix
    begin, end = rows[0] // ROWS, (rows[1] + ROWS - 1) // ROWS
    numbers, rest = operand(w, x, n, columns, scratch), begin
    if n <= (2 if scales.shape[0] else 1):  # with 8 bits there is less to wait for
        rest = end - (end - begin) % 4
        few(out, w, scales, numbers, n, begin, rest)
    many(out, w, scales, numbers, n, rest, end)
    if has_bias:
        for b in range(n):
            for r in range(begin * ROWS, min(end * ROWS, bias.shape[0])):
                out[b, r] += bias[r]


# ---- what lies between them --------------------------------------------------------------------------
# Sizes are filled up with zeros to whole vectors.


@compiled
def norm(out, x, size, weight, eps):
    """out = RMSNorm of x [size]"""
    squares = zeros(1, f32)
    for i in range(0, size, ROWS):
        numbers = load(x, i, 0)
        squares = squares + numbers * numbers
    factor = f32(1) / np.sqrt(total(squares) / f32(size) + f32(eps))
    for i in range(0, size, ROWS):
        store(out, i, 0, load(x, i, 0) * factor * load(weight, i, 0))


@compiled
def apply_rotary_emb(out, x, half, rotary, position, factor):
    """out = factor times x [2 half], the pairs (i, i + half) turned. rotary: [2, positions, half]"""
    _, n_positions, size = rotary.shape
    table, cos, sin = rotary.reshape(-1), position * size, (n_positions + position) * size
    for i in range(0, half, ROWS):
        c, s = load(table, cos, i) * factor, load(table, sin, i) * factor
        store(out, i, 0, load(x, i, 0) * c - load(x, half, i) * s)
    for i in range(0, half, ROWS):  # overwrites what was too much of the first half
        c, s = load(table, cos, i) * factor, load(table, sin, i) * factor
        store(out, half, i, load(x, half, i) * c + load(x, i, 0) * s)


@compiled
def swiglu(out, gate_up, size, columns):
    """These columns (from, to) of out [F] = SiLU of gate times up; gate_up [2 F]"""
    for i in range(columns[0], columns[1], ROWS):
        gate = load(gate_up, i, 0)
        store(out, i, 0, gate / (exp(f32(0) - gate) + f32(1)) * load(gate_up, size, i))


@compiled
def softmax(scores, size):
    """scores[:size] become e^(x - the largest one); returns 1 / their sum."""
    top, sums = zeros(1, f32) - f32(3e38), zeros(1, f32)
    for s in range(0, size, ROWS):
        top = np.maximum(top, load(scores, s, 0))
    most = largest(top)
    for s in range(0, size, ROWS):
        weights = exp(load(scores, s, 0) - most)
        store(scores, s, 0, weights)
        sums = sums + weights
    return f32(1) / total(sums)


@compiled
def attend(out, q, cache, place, soon, S, scores):
    """out [D] = softmax(q [D] times S keys) times S values.

    They begin at `place` of the cache: ROWS keys, their values, the next ROWS keys, and so on. soon: where
    those begin that are wanted next, or -1.
    """
    size, n_scores = out.shape[0], (S + ROWS - 1) // ROWS * ROWS
    for s in range(0, n_scores, 2 * ROWS):  # two blocks of keys at once
        blocks, sums, others = clipped(s, ROWS, n_scores - ROWS, 2), zeros(2, f32), zeros(2, f32)
        rows = times(blocks, 2 * size)
        for i in range(0, size, 2):
            if soon >= 0:
                for k in range(4):
                    prefetch(cache, soon + s * size + (2 * i + k) * ROWS)
            sums = sums + load(cache, rows, place + i * ROWS) * spread(q, i, 0)
            others = others + load(cache, rows, place + (i + 1) * ROWS) * spread(q, i, 1)
        store(scores, blocks, 0, sums + others)
    for s in range(S, n_scores):
        scores[s] = f32(-3e38)
    factor = softmax(scores, n_scores)
    if S % 2:
        scores[S] = 0  # of the value behind the last one, if they are taken by twos
    for i in range(0, size, 2 * ROWS):
        # Two parts of two values at once: a sum that is added to waits for itself.
        parts, one, other = clipped(i, ROWS, size - ROWS, 2), zeros(2, f32), zeros(2, f32)
        for first in range(0, S, ROWS):
            for s in range(first, min(first + ROWS, S), 2):
                row = place + (first + ROWS) * size + s * size
                if soon >= 0:
                    for k in range(2):
                        prefetch(cache, soon + (n_scores + s) * size + parts[k])
                        prefetch(cache, soon + (n_scores + s + 1) * size + parts[k])
                one = one + load(cache, parts, row) * spread(scores, s, 0)
                other = other + load(cache, parts, row + size) * spread(scores, s, 1)
        store(out, parts, 0, (one + other) * factor)


# ---- the network -----------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Of all L layers one after the other; a matrix is (weights [L, ...], scales, bias [L, M]).

    Weights and scales lie as in decoding/packed.py; float32 has no scales. What a model lacks is an empty
    array: None would be another type, and a compilation of its own.
    """

    qkv: tuple
    proj: tuple
    gate_up: tuple
    down: tuple
    attn_norm: np.ndarray  # [L, C]
    mlp_norm: np.ndarray
    q_norm: np.ndarray  # [L, D]
    k_norm: np.ndarray
    norm: np.ndarray  # [1, C]
    wte: np.ndarray  # [V / R, C, R]: R is 1, or ROWS where it is the output head, too
    wpe: np.ndarray
    rotary: np.ndarray  # [2, block_size, D / 2]: cos, sin
    head: tuple  # [1, ...]


class Sizes(NamedTuple):
    """As in the model's configuration."""

    n_embd: int
    n_head: int
    head_dim: int
    n_hidden: int
    vocab_size: int
    norm_eps: float


class Scratch(NamedTuple):
    """What a thread has for itself. Rows are filled up with zeros, to whole blocks and groups."""

    x: np.ndarray  # [B, C]: the stream, the same for all threads
    h: np.ndarray  # [B, C]
    qkv: np.ndarray  # [B, (H + 2 G) D]
    y: np.ndarray  # [B, H D]
    gate_up: np.ndarray  # [B, 2 F]
    hidden: np.ndarray  # [B, F]
    whole: np.ndarray  # int16, see `rounded`
    scales: np.ndarray
    head: np.ndarray  # [D]: a query or key
    turned: np.ndarray  # [D]
    scores: np.ndarray  # [S]
    out: np.ndarray  # [D]: of attention


class Job(NamedTuple):
    """What a thread works with; all but `scratch` are the same for all."""

    control: np.ndarray  # see above
    counts: np.ndarray  # [2]: of the tokens, and of those (the first ones) of which logits are wanted
    tokens: np.ndarray  # [B]
    rows: np.ndarray  # [B]: of the cache, one for each token
    positions: np.ndarray  # [B]: there
    lengths: np.ndarray  # [rows]: how many tokens each row holds
    weights: Weights
    sizes: Sizes
    cache: np.ndarray  # [L, rows, G, S / ROWS, 2, ROWS D]: blocks of keys [D, ROWS] and of values [ROWS, D]
    added: np.ndarray  # [2, n_threads, B, C]: to the stream, after attention and after the MLP
    logits: np.ndarray  # [B, V]
    best: np.ndarray  # [n_threads, B]: the likeliest token of those that a thread has computed
    most: np.ndarray  # [n_threads, B]: its logit
    scratch: Scratch


@compiled
def of_layer(matrix, layer):
    w, scales, bias = matrix
    return w[layer], scales[layer], bias[layer]


@compiled
def copy_head(out, x, first, D, factor):
    """out [D] = factor times x[first : first + D]; zeros fill it up."""
    for i in range(0, D, ROWS):
        store(out, i, 0, load(x, first, i) * factor)
    for i in range(D, out.shape[0]):
        out[i] = 0


@compiled
def turn_head(scratch, x, first, D, weight, rotary, position, eps, factor):
    """scratch.turned [D] = factor times the numbers x[first : first + D], normalized and rotated"""
    head, turned = scratch.head, scratch.turned
    copy_head(head, x, first, D, f32(1))
    if weight.shape[0]:
        norm(head, head, D, weight, eps)
    if rotary.shape[1]:
        apply_rotary_emb(turned, head, D // 2, rotary, position, factor)
    else:
        copy_head(turned, head, 0, D, factor)


@compiled
def attention(job, layer, heads, groups):
    """qkv [n, (H + 2 G) D] -> y [n, H D]; of these heads, and groups of heads (from, to)."""
    scratch, weights, sizes, positions = job.scratch, job.weights, job.sizes, job.positions
    _, n_rows, G, n_blocks, _, half = job.cache.shape
    H, D, eps, n, rotary = sizes.n_head, sizes.head_dim, sizes.norm_eps, job.counts[0], weights.rotary
    cache, turned, out, capacity = job.cache.reshape(-1), scratch.turned, scratch.out, 2 * n_blocks * half
    k_norm, q_norm, scale = weights.k_norm[layer], weights.q_norm[layer], f32(1 / np.sqrt(D))
    for g in range(groups[0], groups[1]):
        begin, end = max(heads[0], g * (H // G)), min(heads[1], (g + 1) * (H // G))
        for b in range(n):
            qkv, y, position = scratch.qkv[b], scratch.y[b], positions[b]
            place = ((layer * n_rows + job.rows[b]) * G + g) * capacity
            following = ((layer * n_rows + job.rows[min(b + 1, n - 1)]) * G + g) * capacity
            turn_head(scratch, qkv, (H + g) * D, D, k_norm, rotary, position, eps, f32(1))
            block, column = place + position // ROWS * 2 * half, position % ROWS
            for i in range(D):
                cache[block + i * ROWS + column] = turned[i]
            copy_head(out, qkv, (H + G + g) * D, D, f32(1))
            for i in range(0, out.shape[0], ROWS):
                store(cache, block + half + column * out.shape[0], i, load(out, i, 0))
            for h in range(begin, end):
                turn_head(scratch, qkv, h * D, D, q_norm, rotary, position, eps, scale)
                soon = following if h + 1 == end else -1
                attend(out, turned, cache, place, soon, position + 1, scratch.scores)
                for i in range(0, out.shape[0], ROWS):
                    store(y, h * D, i, load(out, i, 0))


@compiled
def likeliest(logits, begin, end):
    """(the place of the largest of logits[begin:end], the first one if there are several, and what it is)"""
    most, place = f32(-np.inf), begin
    for first in range(begin, end, 256):
        last = min(first + 256, end)
        whole = last - (last - first) % ROWS
        top = zeros(1, f32) - f32(np.inf)
        for i in range(first, whole, ROWS):
            top = np.maximum(top, load(logits, i, 0))
        highest = largest(top)
        for i in range(whole, last):
            highest = max(highest, logits[i])
        if highest > most:
            most, place = highest, first
    while place < end - 1 and logits[place] != most:
        place += 1
    return place, most


@compiled
def embed(job):
    """x [n, C] of the tokens"""
    x, wte, wpe = job.scratch.x, job.weights.wte, job.weights.wpe
    for b in range(job.counts[0]):
        block, row = job.tokens[b] // wte.shape[2], job.tokens[b] % wte.shape[2]
        for i in range(wte.shape[1]):
            x[b, i] = wte[block, i, row]
            if wpe.shape[0]:
                x[b, i] += wpe[job.positions[b], i]


@compiled
def add_to(x, added, size):
    """The stream x [C] += what each of the threads has computed, [n_threads, C]."""
    for i in range(0, size, ROWS):
        numbers = load(x, i, 0)
        for rank in range(added.shape[0]):
            numbers = numbers + load(added[rank], i, 0)
        store(x, i, 0, numbers)


@compiled
def forward(job, rank, n_threads):
    """One thread's share of a pass: the tokens are written into the cache, and logits computed.

    It has some of the heads and some of the hidden features, and of each matrix the rows that make them, or
    the columns that they are multiplied with. So what the others have computed is needed twice a layer only,
    where it is added to the stream (Shoeybi et al. 2019, "Megatron-LM", section 3).
    """
    weights, sizes, scratch, added, logits = job.weights, job.sizes, job.scratch, job.added, job.logits
    C, F, D, eps = sizes.n_embd, sizes.n_hidden, sizes.head_dim, sizes.norm_eps
    x, h, n, n_logits = scratch.x, scratch.h, job.counts[0], job.counts[1]
    H, L, G = sizes.n_head, job.cache.shape[0], job.cache.shape[2]
    stream, heads = (0, C), share(H, rank, n_threads)
    groups = (heads[0] // (H // G), (heads[1] + H // G - 1) // (H // G))
    units = share((F + GROUP - 1) // GROUP, rank, n_threads)
    features = (units[0] * GROUP, min(units[1] * GROUP, F))
    embed(job)
    for layer in range(L):
        for b in range(n):
            norm(h[b], x[b], C, weights.attn_norm[layer], eps)
        matrix = of_layer(weights.qkv, layer)
        for first, last in (heads, (H + groups[0], H + groups[1]), (H + G + groups[0], H + G + groups[1])):
            product(scratch.qkv, matrix, h, n, (first * D, last * D), stream, True, scratch)
        attention(job, layer, heads, groups)
        matrix, columns = of_layer(weights.proj, layer), (heads[0] * D, heads[1] * D)
        product(added[0, rank], matrix, scratch.y, n, stream, columns, rank == 0, scratch)
        meet(job.control, n_threads)
        for b in range(n):
            add_to(x[b], added[0, :, b], C)
            norm(h[b], x[b], C, weights.mlp_norm[layer], eps)
        matrix = of_layer(weights.gate_up, layer)
        for first in (0, F):
            rows = (first + features[0], first + features[1])
            product(scratch.gate_up, matrix, h, n, rows, stream, True, scratch)
        for b in range(n):
            swiglu(scratch.hidden[b], scratch.gate_up[b], F, features)
        matrix = of_layer(weights.down, layer)
        product(added[1, rank], matrix, scratch.hidden, n, stream, features, rank == 0, scratch)
        meet(job.control, n_threads)
        for b in range(n):
            add_to(x[b], added[1, :, b], C)
    if n_logits:
        matrix = of_layer(weights.head, 0)
        blocks = share(matrix[0].shape[0], rank, n_threads)
        rows = (blocks[0] * ROWS, blocks[1] * ROWS)
        for b in range(n_logits):
            norm(h[b], x[b], C, weights.norm[0], eps)
        product(logits, matrix, h, n_logits, rows, stream, True, scratch)
        for b in range(n_logits):
            found = likeliest(logits[b], rows[0], min(rows[1], sizes.vocab_size))
            job.best[rank, b], job.most[rank, b] = found
        meet(job.control, n_threads)


# ---- a team of threads -----------------------------------------------------------------------------------


@compiled
def lead(job, n, n_logits, n_threads):
    """One pass by the whole team, of which the caller is rank 0; returns whether it was done.

    The first n of the job's tokens are appended to their rows. The pass is not done if one of the others is
    asleep. From here on, nobody falls asleep, and nothing raises: Ctrl-C, for instance, would leave them
    waiting for this thread's share for ever.
    """
    control, best, most, lengths = job.control, job.best, job.most, job.lengths
    for rank in range(1, n_threads):
        while not swap(control, STATE + 8 * rank, AWAKE, ENGAGED):
            if read(control, STATE + 8 * rank) == ASLEEP:
                for other in range(1, rank):
                    write(control, STATE + 8 * other, AWAKE)
                return False
    job.counts[0], job.counts[1] = n, n_logits
    for b in range(n):
        job.positions[b] = lengths[job.rows[b]]
        lengths[job.rows[b]] += 1
    add(control, ASKED, 1)
    forward(job, np.int64(0), n_threads)  # a mere 0 is of another type, and needs another compilation
    for b in range(n_logits):
        for rank in range(1, n_threads):
            if most[rank, b] > most[0, b]:
                best[0, b], most[0, b] = best[rank, b], most[rank, b]
    return True


@compiled
def follow(job, rank, n_threads):
    """Do this thread's share of passes, until there is nothing to do for long.

    To be woken takes 50 to 100 us, a tenth of a pass: so it looks around for a while before it falls asleep.
    """
    control, me, looks = job.control, STATE + 8 * rank, 0
    swap(control, me, ASLEEP, AWAKE)
    while True:
        if read(control, ASKED) > control[me + 1]:
            forward(job, rank, n_threads)
            control[me + 1] += 1
            write(control, me, AWAKE)
            looks = 0
        elif looks > PATIENCE and swap(control, me, AWAKE, ASLEEP):
            return
        looks += 1
        if looks > SPINS:
            give_way()
