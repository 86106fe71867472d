"""The forward pass for decoding on a CPU, as one function that Numba compiles to machine code.

When there is only one token to process, PyTorch spends more time between its operations than in them. Here a
single function, `forward`, runs the whole pass. A small team of threads calls it together: each thread
computes some of the attention heads and some of the hidden features of the MLP, and they wait for each other
(`barrier`) where one needs the results of the others. The tokens may belong to one text or to many: each has
a row of the KV cache and a position in it. The network is that of model.py, with weights in float32 or int8
(decoding/packed.py), and no other. decoding/compiled_backend.py owns the memory and the threads.

The result for a token does not depend on the tokens beside it: its numbers are added in the same order
however many tokens there are.

How to read this file. Functions under `@jit` are Python with NumPy arrays that Numba translates to machine
code. They work on whole vectors of 16 numbers, since compilers do not find the best loops for these matrix
products by themselves. The vectors and their operations are defined in the section "vectors": there,
`@intrinsic` functions generate code for LLVM, the compiler behind Numba. Everything after that section reads
like NumPy:

    load(array, offset, i)        the vector array[offset + i : offset + i + 16]
    broadcast(array, offset, i)   a vector with array[offset + i] in all of its 16 lanes
    a + b, a * b, np.maximum      lane by lane
    store(array, offset, i, a)    array[offset + i : offset + i + 16] = a

Numba contains the compiler, so no other is needed. It compiles for some seconds on the first call and stores
the result on disk. It compares the time of one source file to see whether that is outdated, so all compiled
code is in this file.
"""

# mypy: ignore-errors
# Numba compiles these functions, with its own types: type checkers do not know what a vector is.

from __future__ import annotations

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
from decoding.packed import GROUP, PAIRS_ARE_NEIGHBOURS, ROWS

config.CACHE_DIR = str(CACHE)

SPINS_BEFORE_YIELD = 2000  # a waiting thread looks this often before it offers its core to other threads
SPINS_BEFORE_SLEEP = (
    4000  # a thread without work looks this often before it sleeps: some tenths of a millisecond
)

# Threads are managed here and not by Numba (parallel=True): its thread pools cost 100 us per loop
# (workqueue), or stall when another process wants a core (OpenMP). fastmath is off because it may change the
# order of additions. _nrt=False switches reference counting off. All threads would count references to the
# same arrays, in the same places in memory, and their cores would wait for one another. So nothing may be
# allocated in compiled code.
JIT_OPTIONS = dict(nogil=True, boundscheck=False, cache=True, error_model="numpy", _nrt=False)
jit, jit_inline = njit(**JIT_OPTIONS), njit(inline="always", **JIT_OPTIONS)
yield_core = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())
f32 = np.float32


# ---- threads that wait for each other ----------------------------------------------------------------

# Indices in `control`, an array of int64 that all threads read and write. They are 8 apart so that each is in
# a cache line of its own (64 bytes): cores would slow each other down by writing to the same line.
ARRIVED = 0  # how many times a thread has arrived at a barrier
N_PASSES = 8  # how many passes the team has been asked to do
STATE = 16  # STATE + 8 * rank: the state of a thread; the number after it: how many passes it has done
AWAKE, WORKING, ASLEEP = 0, 1, 2

# The functions below are intrinsics: Numba calls them while it compiles. Each returns the types of its result
# and arguments, and `generate`, which adds instructions for LLVM by means of `builder`. "seq_cst" makes an
# operation atomic and its result visible to all threads in the same order.


def element_pointer(context, builder, array_type, array, index):
    """The address of array[index]; the array is contiguous."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


@intrinsic
def atomic_add(typingctx, array, i, n):
    """array[i] += n; returns the value before."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw(
            "add", element_pointer(context, builder, array, *args[:2]), args[2], "seq_cst"
        )

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def atomic_load(typingctx, array, i):
    """array[i]"""

    def generate(context, builder, signature, args):
        return builder.load_atomic(element_pointer(context, builder, array, *args[:2]), "seq_cst", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def atomic_store(typingctx, array, i, n):
    """array[i] = n"""

    def generate(context, builder, signature, args):
        address = element_pointer(context, builder, array, *args[:2])
        builder.store_atomic(args[2], address, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def compare_and_swap(typingctx, array, i, old, new):
    """array[i] = new if it is old; returns whether it was."""

    def generate(context, builder, signature, args):
        address = element_pointer(context, builder, array, *args[:2])
        return builder.extract_value(builder.cmpxchg(address, args[2], args[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(array, types.int64, types.int64, types.int64), generate


@jit
def barrier(control, n_threads):
    """Wait until all threads have called this."""
    goal = (atomic_add(control, ARRIVED, 1) // n_threads + 1) * n_threads
    spins = 0
    while atomic_load(control, ARRIVED) < goal:
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            yield_core()


# ---- vectors ----------------------------------------------------------------------------------------- A
# vector has ROWS = 16 lanes. LLVM maps it to the registers of the processor: one of AVX-512, two of AVX2,
# four of Arm's NEON. Matrix products keep several sums in registers at once, so the basic type here is a
# tuple of vectors. Offsets are indices in a flat array. They are not checked for being negative, as Numba's
# a[i] does for each number.

INT32, FLOAT = ir.IntType(32), ir.FloatType()


class Vectors(types.Type):
    """Numba's type for `count` vectors of ROWS lanes of 32 bits: a float32, an int32, or two int16 per lane.

    Operators such as a + b apply to all lanes of all vectors. b may also be a single vector or a number,
    which is then combined with each vector of a.
    """

    def __init__(self, count, element):
        self.count, self.element = count, element
        super().__init__(name=f"Vectors({count}, {element})")


@register_model(Vectors)
class VectorsModel(models.PrimitiveModel):
    """In LLVM: an array of vectors."""

    def __init__(self, manager, kind):
        number, n_numbers = manager.lookup(kind.element).get_value_type(), ROWS * 32 // kind.element.bitwidth
        super().__init__(manager, kind, ir.ArrayType(ir.VectorType(number, n_numbers), kind.count))


def count_of(offsets):
    """How many vectors there are at these offsets (a tuple of them, or one), or in a Vectors."""
    return offsets.count if isinstance(offsets, types.UniTuple | Vectors) else 1


def map_vectors(builder, function, *values):
    """Apply function to the first vector of each value, to the second of each, and so on; returns an array.

    A value that is not an array, or has a single vector, is used each time.
    """
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


def fill_lanes(builder, value, kind):
    """A vector with a number in all lanes"""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT32(0))
    return shuffle(builder, one, one, [0] * kind.count)


def shuffle(builder, a, b, order):
    """A vector of the numbers with these indices; those of b are counted on from those of a"""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, len(order)), [*order]))


def maximum(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def define_operator(function, generate_one):
    """Let function(a, b) accept vectors of float32 in compiled code: generate_one(builder, a, b) for each."""

    @type_callable(function)
    def of(context):
        def typer(a, b):
            vectors = [kind for kind in (a, b) if isinstance(kind, Vectors)]
            return max(vectors, key=lambda kind: kind.count, default=None)

        return typer

    def generate(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type).element
        args = [fill_lanes(builder, arg, kind) if arg.type == FLOAT else arg for arg in args]
        return map_vectors(builder, lambda a, b: generate_one(builder, a, b), *args)

    for kinds in ((Vectors, Vectors), (Vectors, types.Float), (types.Float, Vectors)):
        lower_builtin(function, *kinds)(generate)


# "contract" allows a fused multiply-add: a * b + c in one instruction, rounded once.
define_operator(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=["contract"]))
define_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=["contract"]))
define_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=["contract"]))
define_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))
define_operator(np.maximum, maximum)
define_operator(np.minimum, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))


def call_llvm(builder, name, result, *args):
    """Call one of LLVM's own functions."""
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(name, fnty=function), args)


def define_unary(function, name):
    """Let function(x) accept vectors of float32 in compiled code: LLVM's function of this name."""

    @type_callable(function)
    def of(context):
        return lambda x: x if isinstance(x, Vectors) else None

    @lower_builtin(function, Vectors)
    def generate(context, builder, signature, args):
        return map_vectors(builder, lambda x: call_llvm(builder, f"llvm.{name}.v{ROWS}f32", x.type, x), *args)


define_unary(np.floor, "floor")
define_unary(np.rint, "rint")
define_unary(np.abs, "fabs")


@intrinsic
def power_of_two(typingctx, n):
    """2^n for whole numbers in float32 from -126 to 127: they become the exponent bits of the result"""

    def generate(context, builder, signature, args):
        def one(n):
            number, shift = (ir.Constant(ir.VectorType(INT32, ROWS), [value] * ROWS) for value in (127, 23))
            bits = builder.shl(builder.add(builder.fptosi(n, number.type), number), shift)
            return builder.bitcast(bits, n.type)

        return map_vectors(builder, one, *args)

    return n(n), generate


def reduce_lanes(builder, join, vectors):
    """Combine all vectors by join(a, b), then the halves of the result, and so on, down to one number."""
    vector, *others = (builder.extract_value(vectors, k) for k in range(vectors.type.count))
    for other in others:
        vector = join(vector, other)
    while (half := vector.type.count // 2) >= 1:
        vector = join(*(shuffle(builder, vector, vector, range(k, k + half)) for k in (0, half)))
    return builder.extract_element(vector, INT32(0))


@intrinsic
def sum_lanes(typingctx, vectors):
    """The sum of all lanes of all vectors"""

    def generate(context, builder, signature, args):
        return reduce_lanes(builder, builder.fadd, *args)

    return types.float32(vectors), generate


@intrinsic
def max_lanes(typingctx, vectors):
    """The largest of all lanes of all vectors"""

    def generate(context, builder, signature, args):
        return reduce_lanes(builder, lambda a, b: maximum(builder, a, b), *args)

    return types.float32(vectors), generate


@intrinsic(prefer_literal=True)
def zeros(typingctx, count, element):
    """`count` vectors of float32 or int32; count: a number, or Vectors, for as many as these are"""
    number = count.literal_value if isinstance(count, types.Literal) else count.count
    kind = Vectors(number, element.dtype)

    def generate(context, builder, signature, args):
        return ir.Constant(context.get_value_type(kind), None)

    return kind(count, element), generate


@intrinsic(prefer_literal=True)
def clipped_range(typingctx, first, step, last, count):
    """A tuple of `count` offsets: first, first + step, ..., each at most `last`"""

    def generate(context, builder, signature, args):
        first, step, last, _ = args
        offsets = []
        for k in range(count.literal_value):
            offset = builder.add(first, builder.mul(step, step.type(k)))
            offsets.append(builder.select(builder.icmp_signed("<", offset, last), offset, last))
        return context.make_tuple(builder, signature.return_type, offsets)

    kind = types.UniTuple(types.int64, count.literal_value)
    return kind(types.int64, types.int64, types.int64, count), generate


@intrinsic
def times(typingctx, offsets, n):
    """An offset, or each of a tuple of offsets, times n"""

    def generate(context, builder, signature, args):
        if isinstance(offsets, types.UniTuple):
            return map_vectors(builder, builder.mul, *args)
        return builder.mul(*args)

    return offsets(offsets, types.int64), generate


@intrinsic
def load(typingctx, array, offsets, i):
    """For each offset, the vector of the numbers from array[offset + i] on. int8 is converted to int16."""
    kind = Vectors(count_of(offsets), types.int16 if array.dtype == types.int8 else array.dtype)

    def generate(context, builder, signature, args):
        vector = context.get_value_type(kind).element

        def load_one(offset):
            address = element_pointer(context, builder, array, args[0], builder.add(offset, args[2]))
            stored = ir.VectorType(address.type.pointee, vector.count)
            address = builder.bitcast(address, stored.as_pointer())
            numbers = builder.load(address, align=array.dtype.bitwidth // 8)
            return builder.sext(numbers, vector) if array.dtype == types.int8 else numbers

        return map_vectors(builder, load_one, args[1])

    return kind(array, offsets, types.int64), generate


@intrinsic
def broadcast(typingctx, array, offsets, i):
    """For each offset, a vector with array[offset + i] in all lanes.

    A lane has 32 bits, so of an int16 array it holds two numbers: array[offset + i] and the one after it.
    """
    kind = Vectors(count_of(offsets), array.dtype)

    def generate(context, builder, signature, args):
        n_lanes = context.get_value_type(kind).element.count
        n_numbers = n_lanes // ROWS
        order = [k if PAIRS_ARE_NEIGHBOURS else k // ROWS for k in range(n_lanes)]

        def broadcast_one(offset):
            address = element_pointer(context, builder, array, args[0], builder.add(offset, args[2]))
            few = ir.VectorType(address.type.pointee, n_numbers)
            few = builder.load(builder.bitcast(address, few.as_pointer()), align=array.dtype.bitwidth // 8)
            return shuffle(builder, few, few, [k % n_numbers for k in order])

        return map_vectors(builder, broadcast_one, args[1])

    return kind(array, offsets, types.int64), generate


@intrinsic
def store(typingctx, array, offsets, i, vectors):
    """array[offset + i : offset + i + ROWS] = vector, for each offset. An int16 array takes float32, too."""

    def generate(context, builder, signature, args):
        def store_one(offset, vector):
            address = element_pointer(context, builder, array, args[0], builder.add(offset, args[2]))
            if array.dtype != vectors.element:
                vector = builder.fptosi(vector, ir.VectorType(address.type.pointee, ROWS))
            address = builder.bitcast(address, vector.type.as_pointer())
            builder.store(vector, address, align=array.dtype.bitwidth // 8)

        map_vectors(builder, store_one, args[1], args[3])
        return context.get_dummy_value()

    return types.void(array, offsets, types.int64, vectors), generate


@intrinsic
def add_pair_products(typingctx, sums, a, b):
    """sums + a * b in int32, where a and b have two int16 in each lane: both products are added to the lane.

    See PAIRS_ARE_NEIGHBOURS in decoding/packed.py. LLVM finds the processor's instruction for this pattern.
    """
    n = ROWS
    neighbours, halves = (range(0, 2 * n, 2), range(1, 2 * n, 2)), (range(n), range(n, 2 * n))
    orders = neighbours if PAIRS_ARE_NEIGHBOURS else halves

    def generate(context, builder, signature, args):
        def one(total, a, b):
            wide = ir.VectorType(INT32, 2 * n)
            products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
            return builder.add(total, builder.add(*(shuffle(builder, products, products, o) for o in orders)))

        return map_vectors(builder, one, *args)

    return sums(sums, a, b), generate


@intrinsic
def to_float(typingctx, vectors):
    """Vectors of int32 as float32"""

    def generate(context, builder, signature, args):
        return map_vectors(builder, lambda one: builder.sitofp(one, ir.VectorType(FLOAT, ROWS)), *args)

    return Vectors(vectors.count, types.float32)(vectors), generate


@intrinsic
def prefetch(typingctx, array, index):
    """Have array[index] fetched into the second-level cache. An index outside the array does no harm."""

    def generate(context, builder, signature, args):
        address = builder.bitcast(element_pointer(context, builder, array, *args), ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [address.type, INT32, INT32, INT32])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [address.type], function)
        builder.call(fetch, [address, INT32(0), INT32(2), INT32(1)])  # to read, second-level cache, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@jit_inline
def exp(x):
    """e^x, with a relative error of at most 3e-7.

    e^x = 2^n * e^f with a whole number n and |f| <= ln(2) / 2, for which a Taylor polynomial is exact enough.
    """
    x = np.minimum(np.maximum(x, f32(-87)), f32(88)) * f32(1.4426950408889634)
    n = np.floor(x + f32(0.5))
    f = (x - n) * f32(0.6931471805599453)
    p = f * (f * f32(1 / 720) + f32(1 / 120)) + f32(1 / 24)
    p = f * (f * (f * (f * p + f32(1 / 6)) + f32(1 / 2)) + f32(1)) + f32(1)
    return p * power_of_two(n)


# ---- matrix products --------------------------------------------------------------------------------- out
# [n, M] = x [n, N] times a matrix [M, N], for n tokens. The matrix is packed: blocks of ROWS rows, stored
# column by column (decoding/packed.py). So a vector of weights holds one weight of each row of a block. It is
# multiplied by one number of x, broadcast to all lanes, and added to a vector of sums, which becomes ROWS
# numbers of out.


@jit
def share(size, rank, n_threads):
    """The part of 0 .. size - 1 that belongs to this thread: (begin, end)"""
    return size * rank // n_threads, size * (rank + 1) // n_threads


# int8 weights are multiplied by integers, too: each group of GROUP numbers of x is scaled so that the largest
# becomes 32,767, and rounded to 16 bits. Nothing else is rounded: the sum of a group's products fits in 29
# bits.
VECTORS_PER_GROUP = GROUP // ROWS


@jit
def round_to_int16(rounded, scales, x, n, begin, end):
    """Round groups begin .. end - 1 of each row of x [n, N].

    Then x is approximately rounded [n, N] times scales [n, N / GROUP], both of which are flat arrays.
    """
    stride, n_groups, flat = x.shape[1], x.shape[1] // GROUP, x.reshape(-1)
    for b in range(n):
        for g in range(begin, end):
            offsets = clipped_range(b * stride + g * GROUP, ROWS, n * stride, VECTORS_PER_GROUP)
            numbers = load(flat, offsets, 0)
            most = max_lanes(np.abs(numbers))
            scales[b * n_groups + g], factor = most / f32(32767), f32(32767) / max(most, f32(1e-30))
            store(rounded, offsets, 0, np.rint(numbers * factor))


# @overload selects one of several implementations when a call is compiled, here by the type of the weights w.
# The function that it decorates is never run in Python; the one before it with an empty body gives it its
# name.


def prepare_input(w, x, n, columns, scratch):
    """Columns (begin, end) of x [n, N] in the form that `accumulate` takes for weights w.

    A tuple: numbers, their scales, distance between two tokens in both, begin, end. For int8, the numbers are
    rounded, and begin and end count groups.
    """


@overload(prepare_input)
def _(w, x, n, columns, scratch):
    def float32(w, x, n, columns, scratch):
        return x.reshape(-1), scratch.scales, x.shape[1], 0, columns[0], columns[1]

    def int8(w, x, n, columns, scratch):
        begin, end = columns[0] // GROUP, (columns[1] + GROUP - 1) // GROUP
        round_to_int16(scratch.rounded, scratch.scales, x, n, begin, end)
        return scratch.rounded, scratch.scales, x.shape[1], x.shape[1] // GROUP, begin, end

    return float32 if w.dtype == types.float32 else int8


def accumulate(sums, w, scales, blocks, x, tokens, next_block, tile, pace):
    """Return sums + blocks of w times tokens of x (from `prepare_input`).

    Either several blocks and one token, or one block and several tokens; `sums` has a vector for each of
    them. next_block: the block that is needed next. It is prefetched meanwhile: `pace` of its numbers with
    each step of the loop, starting where the tiles before this one (number `tile`) stopped. With pace = 0,
    that is left to the processor.
    """


@overload(accumulate, inline="always")
def _(sums, w, scales, blocks, x, tokens, next_block, tile, pace):
    def float32(sums, w, scales, blocks, x, tokens, next_block, tile, pace):
        numbers, _, stride, _, begin, end = x
        size, flat = w.shape[1] * ROWS, w.reshape(-1)
        offsets, rows = times(blocks, size), times(tokens, stride)
        ahead = next_block * size + begin * ROWS + ((end - begin) * tile - begin) * pace
        for i in range(begin, end):
            if pace:
                prefetch(flat, ahead + i * pace)
            sums = sums + load(flat, offsets, i * ROWS) * broadcast(numbers, rows, i)
        return sums

    def int8(sums, w, scales, blocks, x, tokens, next_block, tile, pace):
        numbers, x_scales, stride, n_groups, begin, end = x
        size, flat, factors = 2 * w.shape[1] * ROWS, w.reshape(-1), scales.reshape(-1)
        offsets, groups = times(blocks, size), times(blocks, scales.shape[1] * ROWS)
        rows, x_groups = times(tokens, stride), times(tokens, n_groups)
        for g in range(begin, end):
            parts = zeros(sums, np.int32)
            for i in range(g * GROUP, (g + 1) * GROUP, 2):
                parts = add_pair_products(parts, load(flat, offsets, i * ROWS), broadcast(numbers, rows, i))
            sums = sums + to_float(parts) * (
                load(factors, groups, g * ROWS) * broadcast(x_scales, x_groups, g)
            )
        return sums

    return float32 if w.dtype == types.float32 else int8


@jit
def multiply_few_tokens(out, w, scales, x, n, begin, end):
    """Blocks begin .. end - 1, a multiple of four of them, times n tokens, one token after the other.

    Four blocks at once, far apart in memory: a processor reads several streams of memory faster than one.
    """
    results, stride, quarter = out.reshape(-1), out.shape[1], (end - begin) // 4
    for block in range(begin, begin + quarter):
        blocks = clipped_range(block, quarter, end, 4)
        for b in range(n):
            sums = accumulate(zeros(4, f32), w, scales, blocks, x, b, 0, 0, 0)
            store(results, times(blocks, ROWS), b * stride, sums)


# How many tokens are multiplied at once: so many that their sums just fit into the registers. AVX-512 has
# twice as many registers as other instruction sets.
TILE = 8 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
HALF_TILE = TILE // 2


@jit_inline
def multiply_tile(results, stride, w, scales, x, n, block, tile, pace, count):
    """One block times `count` tokens, starting at TILE * tile. Those beyond the last repeat the last."""
    tokens = clipped_range(TILE * tile, 1, n - 1, count)
    sums = accumulate(zeros(count, f32), w, scales, block, x, tokens, block + 1, tile, pace)
    store(results, times(tokens, stride), block * ROWS, sums)


@jit
def multiply_many_tokens(out, w, scales, x, n, begin, end):
    """Blocks begin .. end - 1, one after the other, times n tokens, TILE or HALF_TILE of them at once."""
    results, stride, n_tiles = out.reshape(-1), out.shape[1], (n + TILE - 1) // TILE
    pace = ROWS // n_tiles
    for block in range(begin, end):
        for tile in range(n_tiles):
            if n - TILE * tile > HALF_TILE:
                multiply_tile(results, stride, w, scales, x, n, block, tile, pace, TILE)
            else:
                multiply_tile(results, stride, w, scales, x, n, block, tile, pace, HALF_TILE)


@jit
def multiply(out, matrix, x, n, rows, columns, has_bias, scratch):
    """out [n, M] = x [n, N] times the matrix [M, N], only the blocks that contain rows (begin, end).

    columns (begin, end): only these columns of the matrix are multiplied, as if x were zero elsewhere.
    """
    w, scales, bias = matrix
    begin, end = rows[0] // ROWS, (rows[1] + ROWS - 1) // ROWS
    numbers, rest = prepare_input(w, x, n, columns, scratch), begin
    if n <= (2 if scales.shape[0] else 1):  # reading the weights takes most of the time; less so with 8 bits
        rest = end - (end - begin) % 4
        multiply_few_tokens(out, w, scales, numbers, n, begin, rest)
    multiply_many_tokens(out, w, scales, numbers, n, rest, end)
    if has_bias:
        for b in range(n):
            for r in range(begin * ROWS, min(end * ROWS, bias.shape[0])):
                out[b, r] += bias[r]


# ---- the layers --------------------------------------------------------------------------------------
# Sizes are padded with zeros to whole vectors.


@jit
def rms_norm(out, x, size, weight, eps):
    """out = RMSNorm of x [size]"""
    squares = zeros(1, f32)
    for i in range(0, size, ROWS):
        numbers = load(x, i, 0)
        squares = squares + numbers * numbers
    factor = f32(1) / np.sqrt(sum_lanes(squares) / f32(size) + f32(eps))
    for i in range(0, size, ROWS):
        store(out, i, 0, load(x, i, 0) * factor * load(weight, i, 0))


@jit
def apply_rotary_emb(out, x, half, rotary, position, factor):
    """out = factor times x [2 half] with pairs (i, i + half) rotated. rotary: cos, sin [2, length, half]"""
    _, n_positions, size = rotary.shape
    table, cos, sin = rotary.reshape(-1), position * size, (n_positions + position) * size
    for i in range(0, half, ROWS):
        c, s = load(table, cos, i) * factor, load(table, sin, i) * factor
        store(out, i, 0, load(x, i, 0) * c - load(x, half, i) * s)
    for i in range(0, half, ROWS):  # the last vector of the loop before may have written into this half
        c, s = load(table, cos, i) * factor, load(table, sin, i) * factor
        store(out, half, i, load(x, half, i) * c + load(x, i, 0) * s)


@jit
def swiglu(out, gate_up, size, columns):
    """out [F] = SiLU(gate) * up, only columns (begin, end). gate_up [2 F] holds both, size is F."""
    for i in range(columns[0], columns[1], ROWS):
        gate = load(gate_up, i, 0)
        store(out, i, 0, gate / (exp(f32(0) - gate) + f32(1)) * load(gate_up, size, i))


@jit
def softmax(scores, size):
    """Replace scores[:size] by e^(score - the largest); returns 1 / their sum, the factor still missing."""
    top, sums = zeros(1, f32) - f32(3e38), zeros(1, f32)
    for s in range(0, size, ROWS):
        top = np.maximum(top, load(scores, s, 0))
    most = max_lanes(top)
    for s in range(0, size, ROWS):
        weights = exp(load(scores, s, 0) - most)
        store(scores, s, 0, weights)
        sums = sums + weights
    return f32(1) / sum_lanes(sums)


@jit
def attend(out, q, cache, offset, next_offset, S, scores):
    """out [D] = softmax(q [D] times S keys) times S values, for one head of one token.

    Keys and values begin at `offset` in the flat cache: ROWS keys, their values, the next ROWS keys, and so
    on. Keys are stored column by column, [D, ROWS], so that a vector holds one number of each of ROWS keys;
    values row by row, [ROWS, D]. next_offset: where the keys begin that are needed next, to prefetch them; -1
    for none.
    """
    size, n_scores = out.shape[0], (S + ROWS - 1) // ROWS * ROWS
    for s in range(0, n_scores, 2 * ROWS):  # two blocks of keys at once
        blocks, sums, others = clipped_range(s, ROWS, n_scores - ROWS, 2), zeros(2, f32), zeros(2, f32)
        rows = times(blocks, 2 * size)
        for i in range(0, size, 2):
            if next_offset >= 0:
                for k in range(4):
                    prefetch(cache, next_offset + s * size + (2 * i + k) * ROWS)
            sums = sums + load(cache, rows, offset + i * ROWS) * broadcast(q, i, 0)
            others = others + load(cache, rows, offset + (i + 1) * ROWS) * broadcast(q, i, 1)
        store(scores, blocks, 0, sums + others)
    for s in range(S, n_scores):
        scores[s] = f32(-3e38)
    factor = softmax(scores, n_scores)
    if S % 2:
        scores[S] = (
            0  # values are read two at a time, so the last one may be followed by one that does not count
        )
    for i in range(0, size, 2 * ROWS):
        # Two vectors of two values at once, in separate sums: an addition has to wait for the one before it.
        parts, one, other = clipped_range(i, ROWS, size - ROWS, 2), zeros(2, f32), zeros(2, f32)
        for first in range(0, S, ROWS):
            for s in range(first, min(first + ROWS, S), 2):
                row = offset + (first + ROWS) * size + s * size
                if next_offset >= 0:
                    for k in range(2):
                        prefetch(cache, next_offset + (n_scores + s) * size + parts[k])
                        prefetch(cache, next_offset + (n_scores + s + 1) * size + parts[k])
                one = one + load(cache, parts, row) * broadcast(scores, s, 0)
                other = other + load(cache, parts, row + size) * broadcast(scores, s, 1)
        store(out, parts, 0, (one + other) * factor)


# ---- the network -----------------------------------------------------------------------------------------
# Letters in shapes: L layers, B tokens of a pass, C = n_embd, H = n_head, G = n_kv_head, D = head_dim, F =
# n_hidden, V = vocab_size, S = block_size. Numba compiles these tuples as structures with fixed types.


class Weights(NamedTuple):
    """The weights of all L layers. A matrix is a tuple: weights [L, ...], scales, bias [L, M].

    Weights and scales are packed as in decoding/packed.py; float32 has no scales. A part that a model does
    not have is an array of size 0. (None would be another type, for which Numba would compile everything
    again.)
    """

    qkv: tuple[np.ndarray, np.ndarray, np.ndarray]
    proj: tuple[np.ndarray, np.ndarray, np.ndarray]
    gate_up: tuple[np.ndarray, np.ndarray, np.ndarray]
    down: tuple[np.ndarray, np.ndarray, np.ndarray]
    attn_norm: np.ndarray  # [L, C]
    mlp_norm: np.ndarray
    q_norm: np.ndarray  # [L, D]
    k_norm: np.ndarray
    norm: np.ndarray  # [1, C]
    wte: np.ndarray  # [V / R, C, R], R being ROWS if the embedding is also the output head (tied), else 1
    wpe: np.ndarray
    rotary: np.ndarray  # [2, S, D / 2]: cos, sin
    head: tuple[np.ndarray, np.ndarray, np.ndarray]  # [1, ...]


class ModelSizes(NamedTuple):
    """As in the model's configuration"""

    n_embd: int
    n_head: int
    head_dim: int
    n_hidden: int
    vocab_size: int
    norm_eps: float


class Scratch(NamedTuple):
    """A thread's memory for intermediate results. Rows are padded with zeros to whole blocks and groups."""

    x: np.ndarray  # [B, C]: the residual stream; every thread computes all of it
    h: np.ndarray  # [B, C]: the normalised stream
    qkv: np.ndarray  # [B, (H + 2 G) D]
    y: np.ndarray  # [B, H D]: output of attention
    gate_up: np.ndarray  # [B, 2 F]
    hidden: np.ndarray  # [B, F]
    rounded: np.ndarray  # int16 and its scales, see `round_to_int16`
    scales: np.ndarray
    head: np.ndarray  # [D]: a query or key
    rotated: np.ndarray  # [D]
    scores: np.ndarray  # [S]
    out: np.ndarray  # [D]: output of attention for one head


class StepBuffers(NamedTuple):
    """All that a thread works with. Everything but `scratch` is shared by all threads."""

    control: np.ndarray  # see "threads that wait for each other"
    counts: np.ndarray  # [2]: tokens in this pass, and how many of them, from the first on, need logits
    tokens: np.ndarray  # [B]
    rows: np.ndarray  # [B]: the row of the cache that each token belongs to
    positions: np.ndarray  # [B]: its position there
    lengths: np.ndarray  # [rows]: how many tokens each row holds
    weights: Weights
    sizes: ModelSizes
    cache: np.ndarray  # [L, rows, G, S / ROWS, 2, ROWS D]: keys and values by blocks of ROWS, see `attend`
    added: np.ndarray  # [2, n_threads, B, C]: each thread's result of attention, and of the MLP
    logits: np.ndarray  # [B, V]
    best_token: np.ndarray  # [n_threads, B]: the likeliest token among the logits a thread has computed
    best_logit: np.ndarray  # [n_threads, B]: its logit
    scratch: Scratch


@jit
def of_layer(matrix, layer):
    w, scales, bias = matrix
    return w[layer], scales[layer], bias[layer]


@jit
def copy_head(out, x, first, D, factor):
    """out [D] = factor times x[first : first + D]; the rest of out is filled with zeros."""
    for i in range(0, D, ROWS):
        store(out, i, 0, load(x, first, i) * factor)
    for i in range(D, out.shape[0]):
        out[i] = 0


@jit
def rotate_head(scratch, x, first, D, weight, rotary, position, eps, factor):
    """scratch.rotated [D] = factor times the query or key x[first : first + D], normalised and rotated"""
    head, rotated = scratch.head, scratch.rotated
    copy_head(head, x, first, D, f32(1))
    if weight.shape[0]:
        rms_norm(head, head, D, weight, eps)
    if rotary.shape[1]:
        apply_rotary_emb(rotated, head, D // 2, rotary, position, factor)
    else:
        copy_head(rotated, head, 0, D, factor)


@jit
def attention(buffers, layer, heads, groups):
    """scratch.qkv [n, (H + 2 G) D] -> scratch.y [n, H D], for heads (begin, end) in groups (begin, end).

    A group is the heads that share a key and a value. Where threads share a group, each of them writes its
    key and value; they are the same.
    """
    scratch, weights, sizes, positions = buffers.scratch, buffers.weights, buffers.sizes, buffers.positions
    _, n_rows, G, n_blocks, _, half = buffers.cache.shape
    H, D, eps, n, rotary = sizes.n_head, sizes.head_dim, sizes.norm_eps, buffers.counts[0], weights.rotary
    cache, rotated, out = buffers.cache.reshape(-1), scratch.rotated, scratch.out
    capacity = 2 * n_blocks * half  # numbers of one row and group in the cache
    k_norm, q_norm, scale = weights.k_norm[layer], weights.q_norm[layer], f32(1 / np.sqrt(D))
    for g in range(groups[0], groups[1]):
        begin, end = max(heads[0], g * (H // G)), min(heads[1], (g + 1) * (H // G))
        for b in range(n):
            qkv, y, position = scratch.qkv[b], scratch.y[b], positions[b]
            offset = ((layer * n_rows + buffers.rows[b]) * G + g) * capacity
            next_token = ((layer * n_rows + buffers.rows[min(b + 1, n - 1)]) * G + g) * capacity
            # Write key and value into the cache.
            rotate_head(scratch, qkv, (H + g) * D, D, k_norm, rotary, position, eps, f32(1))
            block, column = offset + position // ROWS * 2 * half, position % ROWS
            for i in range(D):
                cache[block + i * ROWS + column] = rotated[i]
            copy_head(out, qkv, (H + G + g) * D, D, f32(1))
            for i in range(0, out.shape[0], ROWS):
                store(cache, block + half + column * out.shape[0], i, load(out, i, 0))
            for h in range(begin, end):
                rotate_head(scratch, qkv, h * D, D, q_norm, rotary, position, eps, scale)
                next_offset = next_token if h + 1 == end else -1
                attend(out, rotated, cache, offset, next_offset, position + 1, scratch.scores)
                for i in range(0, out.shape[0], ROWS):
                    store(y, h * D, i, load(out, i, 0))


@jit
def argmax(logits, begin, end):
    """(index of the largest of logits[begin:end], its value). The first one counts if there are several."""
    most, index = f32(-np.inf), begin
    for first in range(begin, end, 256):
        last = min(first + 256, end)
        last_vector = last - (last - first) % ROWS
        top = zeros(1, f32) - f32(np.inf)
        for i in range(first, last_vector, ROWS):
            top = np.maximum(top, load(logits, i, 0))
        highest = max_lanes(top)
        for i in range(last_vector, last):
            highest = max(highest, logits[i])
        if highest > most:
            most, index = highest, first
    while index < end - 1 and logits[index] != most:
        index += 1
    return index, most


@jit
def embed(buffers):
    """scratch.x [n, C] = the embeddings of the tokens"""
    x, wte, wpe = buffers.scratch.x, buffers.weights.wte, buffers.weights.wpe
    for b in range(buffers.counts[0]):
        block, row = buffers.tokens[b] // wte.shape[2], buffers.tokens[b] % wte.shape[2]
        for i in range(wte.shape[1]):
            x[b, i] = wte[block, i, row]
            if wpe.shape[0]:
                x[b, i] += wpe[buffers.positions[b], i]


@jit
def add_to_stream(x, added, size):
    """The residual stream x [C] += the results of all threads, [n_threads, C]"""
    for i in range(0, size, ROWS):
        numbers = load(x, i, 0)
        for rank in range(added.shape[0]):
            numbers = numbers + load(added[rank], i, 0)
        store(x, i, 0, numbers)


@jit
def forward(buffers, rank, n_threads):
    """One thread's share of a pass: the tokens enter the cache, and logits are computed.

    Tensor parallelism as in Megatron-LM (Shoeybi et al. 2019, section 3): a thread has some of the heads and
    some of the hidden features, with the rows of qkv and gate_up that produce them and the columns of proj
    and down that they are multiplied with. So threads need each other's results only twice per layer, where
    they are added to the stream.
    """
    weights, sizes, scratch = buffers.weights, buffers.sizes, buffers.scratch
    added, logits = buffers.added, buffers.logits
    C, F, D, eps = sizes.n_embd, sizes.n_hidden, sizes.head_dim, sizes.norm_eps
    x, h, n, n_logits = scratch.x, scratch.h, buffers.counts[0], buffers.counts[1]
    H, L, G = sizes.n_head, buffers.cache.shape[0], buffers.cache.shape[2]
    # This thread's heads, the groups they are in, and its hidden features, in whole groups of int8 weights.
    stream, heads = (0, C), share(H, rank, n_threads)
    groups = (heads[0] // (H // G), (heads[1] + H // G - 1) // (H // G))
    units = share((F + GROUP - 1) // GROUP, rank, n_threads)
    features = (units[0] * GROUP, min(units[1] * GROUP, F))
    embed(buffers)
    for layer in range(L):
        for b in range(n):
            rms_norm(h[b], x[b], C, weights.attn_norm[layer], eps)
        matrix = of_layer(weights.qkv, layer)
        for first, last in (heads, (H + groups[0], H + groups[1]), (H + G + groups[0], H + G + groups[1])):
            multiply(scratch.qkv, matrix, h, n, (first * D, last * D), stream, True, scratch)
        attention(buffers, layer, heads, groups)
        matrix, columns = of_layer(weights.proj, layer), (heads[0] * D, heads[1] * D)
        multiply(added[0, rank], matrix, scratch.y, n, stream, columns, rank == 0, scratch)
        barrier(buffers.control, n_threads)
        for b in range(n):
            add_to_stream(x[b], added[0, :, b], C)
            rms_norm(h[b], x[b], C, weights.mlp_norm[layer], eps)
        matrix = of_layer(weights.gate_up, layer)
        for first in (0, F):
            rows = (first + features[0], first + features[1])
            multiply(scratch.gate_up, matrix, h, n, rows, stream, True, scratch)
        for b in range(n):
            swiglu(scratch.hidden[b], scratch.gate_up[b], F, features)
        matrix = of_layer(weights.down, layer)
        multiply(added[1, rank], matrix, scratch.hidden, n, stream, features, rank == 0, scratch)
        barrier(buffers.control, n_threads)
        for b in range(n):
            add_to_stream(x[b], added[1, :, b], C)
    if n_logits:
        matrix = of_layer(weights.head, 0)
        blocks = share(matrix[0].shape[0], rank, n_threads)
        rows = (blocks[0] * ROWS, blocks[1] * ROWS)
        for b in range(n_logits):
            rms_norm(h[b], x[b], C, weights.norm[0], eps)
        multiply(logits, matrix, h, n_logits, rows, stream, True, scratch)
        for b in range(n_logits):
            found = argmax(logits[b], rows[0], min(rows[1], sizes.vocab_size))
            buffers.best_token[rank, b], buffers.best_logit[rank, b] = found
        barrier(buffers.control, n_threads)


# ---- the team of threads ---------------------------------------------------------------------------------
# Thread 0 is the one that calls `lead`. The others run `work`, and sleep in Python when it returns
# (decoding/compiled_backend.py). Both functions release Python's global lock while they run.


@jit
def lead(buffers, n, n_logits, n_threads):
    """Have the team do one pass for the first n tokens of `buffers`, which are appended to their rows.

    Returns False, having done nothing, if one of the other threads is asleep: wake them up and call again.

    Threads are first marked as working, so that none falls asleep during the pass. From then on nothing may
    raise an exception here: they would wait forever for this thread's share. Ctrl-C has no effect in compiled
    code.
    """
    control, best_token, best_logit = buffers.control, buffers.best_token, buffers.best_logit
    lengths = buffers.lengths
    for rank in range(1, n_threads):
        while not compare_and_swap(control, STATE + 8 * rank, AWAKE, WORKING):
            if atomic_load(control, STATE + 8 * rank) == ASLEEP:
                for other in range(1, rank):
                    atomic_store(control, STATE + 8 * other, AWAKE)
                return False
    buffers.counts[0], buffers.counts[1] = n, n_logits
    for b in range(n):
        buffers.positions[b] = lengths[buffers.rows[b]]
        lengths[buffers.rows[b]] += 1
    atomic_add(control, N_PASSES, 1)
    # A plain 0 would be of another type, for which Numba would compile `forward` a second time.
    forward(buffers, np.int64(0), n_threads)
    for b in range(n_logits):
        for rank in range(1, n_threads):
            if best_logit[rank, b] > best_logit[0, b]:
                best_token[0, b], best_logit[0, b] = best_token[rank, b], best_logit[rank, b]
    return True


@jit
def work(buffers, rank, n_threads):
    """Do this thread's share of all passes, until there has been none for a while.

    Waking a thread takes 50 to 100 us, a tenth of a pass, so it keeps looking for work for a while before it
    returns.
    """
    control, me, spins = buffers.control, STATE + 8 * rank, 0
    compare_and_swap(control, me, ASLEEP, AWAKE)
    while True:
        if atomic_load(control, N_PASSES) > control[me + 1]:
            forward(buffers, rank, n_threads)
            control[me + 1] += 1
            atomic_store(control, me, AWAKE)
            spins = 0
        elif spins > SPINS_BEFORE_SLEEP and compare_and_swap(control, me, AWAKE, ASLEEP):
            return
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            yield_core()
