"""Shuffling without a list: the order of an epoch as a formula, so that training can start anywhere in it."""

import hashlib

import numpy as np


def random_keys(count: int, *names: object) -> np.ndarray:
    """`count` uint64 that look random but follow from `names` alone, on every machine."""
    label = "/".join(map(str, names)).encode()
    return np.frombuffer(hashlib.shake_128(label).digest(8 * count), "<u8").astype(np.uint64)


def shuffled(indices: np.ndarray, n: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The elements at `indices` [m] of a shuffled list of 0 ... n - 1, computed without making the list.

    On numbers of b bits, three operations can be undone: multiplying by an odd number, adding, and xor with
    one's own upper half. So any chain of them is a permutation. n is rarely 2^b; a result beyond n is put
    through the chain again until it is below n ("cycle walking"; Black & Rogaway 2002).
    `keys`: an even number of uint64 that choose the order. Each index may be of a list of its own: then n is
    int64 [m], and the keys are [.., m].
    """
    bits = np.maximum(1, np.frexp(np.asarray(n, np.float64) - 1)[1]).astype(np.uint64)
    one = np.uint64(1)
    mask, half = (one << bits) - one, (bits + one) >> one

    def permute(x: np.ndarray) -> np.ndarray:
        for multiplier, offset in zip(keys[::2], keys[1::2], strict=True):
            x = (x * (multiplier | one) + offset) & mask
            x = x ^ (x >> half)
        return x

    x = permute(indices.astype(np.uint64))
    while (beyond := x >= n).any():
        x = np.where(beyond, permute(x), x)
    return x.astype(np.int64)
