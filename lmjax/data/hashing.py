"""Keys, counter-based random numbers and keyed permutations, the same on every machine.

The permutation is a Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002), in NumPy, so it does not depend on the version of any library.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8  # of the Feistel network; 4 rounds already look random to a chosen-plaintext adversary


def key_of(*parts: int | str) -> np.ndarray:
    """A 64-bit key from integers and strings: uint64 [], an array because arrays wrap silently."""
    text = "\0".join(f"{type(p).__name__}:{p}" for p in parts)
    return np.array(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"), np.uint64)


def mix64(x: np.ndarray) -> np.ndarray:
    """A random-looking bijection of uint64: SplitMix64's finaliser (Steele et al., 2014)."""
    x = np.atleast_1d(np.asarray(x, np.uint64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(key: np.ndarray, *counters: np.ndarray | int) -> np.ndarray:
    """A counter-based generator: a random-looking uint64 for each (key, counters...), broadcast."""
    value = np.atleast_1d(np.asarray(key, np.uint64))
    for counter in counters:
        counter = np.atleast_1d(np.asarray(counter)).astype(np.uint64)
        value = mix64(value + mix64(counter + np.uint64(0x9E3779B97F4A7C15)))
    return value


def uniform(random: np.ndarray) -> np.ndarray:
    """Random uint64 to float64 in [0, 1), from the highest 53 bits."""
    return (random >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """The place of each index in a keyed, random-looking permutation of range(n).

    Args:
      index: integers in [0, n).
      n: size of the permuted range, 1 to 2**53; one for all or one per index.
      key: uint64; one for all or one per index.
    Returns:
      int64 of the shape of `index`; for one key and one n a bijection of range(n).
    """
    x, n, key = np.broadcast_arrays(np.asarray(index).astype(np.uint64), np.asarray(n, np.uint64),
                                    np.asarray(key, np.uint64))
    n, key = n.reshape(-1), key.reshape(-1)
    bits = np.frexp((n - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)  # of n - 1
    x = _feistel(x.reshape(-1), bits, key)
    # Cycle walking: at most half of 2**bits is outside.
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = _feistel(x[outside], bits[outside], key[outside])
    return x.astype(np.int64).reshape(np.shape(index))


def _feistel(x: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of the integers of `bits` bits, of which the lower half has `low` bits."""
    one, high = np.uint64(1), bits // np.uint64(2)
    low = bits - high
    low_mask, high_mask = (one << low) - one, (one << high) - one
    high_half, low_half = x >> low, x & low_mask
    for r in range(0, ROUNDS, 2):
        low_half = low_half ^ (fold(key, high_half, r) & low_mask)
        high_half = high_half ^ (fold(key, low_half, r + 1) & high_mask)
    return (high_half << low) | low_half
