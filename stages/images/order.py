"""The order of samples in an epoch: a keyed permutation that is computed, never stored."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

MAX_LENGTH = 2**60
"""All pairs of a thousand million images are fewer."""
ROUNDS = 8
SMALLEST_BITS = 4  # with fewer, the halves are so short that some permutations come up too seldom


class Order:
    """Position in the epoch -> position of the sample, a permutation of range(length).

    A Feistel network over the smallest power of two that holds `length` permutes that range; values outside are
    permuted again until they fall inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"). Time per position and memory do not depend on `length`, so an epoch starts anywhere at once.
    """

    def __init__(self, seed: int, epoch: int, length: int):
        """Args:
        seed: any integer.
        epoch: another permutation for each.
        length: samples, up to 2**60.
        """
        if not 0 <= length <= MAX_LENGTH:
            raise ValueError(f"length must be from 0 to 2**60, not {length}")
        self.seed, self.epoch, self.length = seed, epoch, length
        self._halves = _halves(length)
        self._keys = _keys(seed, epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, positions: ArrayLike | slice) -> np.ndarray:
        """Sample positions, int64, in the shape of `positions` (a slice, or integers from 0 to length - 1).

        Raises:
            IndexError: a position lies outside.
        """
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(self.length))
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.length):
            raise IndexError(f"positions must be from 0 to {self.length - 1}")
        values = _permute(wanted.astype(np.uint64).ravel(), self._halves, self._keys)
        outside = np.flatnonzero(values >= self.length)
        while outside.size:
            values[outside] = _permute(values[outside], self._halves, self._keys)
            outside = outside[values[outside] >= self.length]
        return values.astype(np.int64).reshape(wanted.shape)


def order(seed: int, epoch: int, length: int) -> Order:
    """The order of `length` samples in an epoch: `order(seed, epoch, length)[positions]` are sample positions."""
    return Order(seed, epoch, length)


def orders(seeds: Sequence[int], epoch: int, lengths: np.ndarray) -> np.ndarray:
    """`order(seed, epoch, length)[:]` of every seed with its length, one after another, at the cost of one.

    Args:
        lengths: int64 [C].

    Returns:
        int64 [sum of lengths]
    """
    halves = np.array([_halves(length) for length in lengths.tolist()], dtype=np.uint64).reshape(-1, 3)
    keys = np.array([_keys(seed, epoch) for seed in seeds], dtype=np.uint64).reshape(-1, ROUNDS)
    whose = np.repeat(np.arange(len(lengths)), lengths)
    values = (np.arange(len(whose)) - (np.cumsum(lengths) - lengths)[whose]).astype(np.uint64)
    outside = np.arange(len(whose))
    while outside.size:
        there = whose[outside]
        values[outside] = _permute(values[outside], halves[there].T, (key[there] for key in keys.T))
        outside = outside[values[outside] >= lengths.astype(np.uint64)[there]]
    return values.astype(np.int64)


def hashed(seed: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
    """A number from 0 to 2**63 - 1 for each of int64 [n], another one in each epoch."""
    digest = hashlib.blake2b(f"hashed/{seed}/{epoch}".encode(), digest_size=8).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)[0]
    return (_mix(_mix(numbers.astype(np.uint64), key), key) >> np.uint64(1)).astype(np.int64)


def _halves(length: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Bits of the lower half of a position, and masks of both halves."""
    bits = max(SMALLEST_BITS, (length - 1).bit_length())
    return np.uint64(bits // 2), np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)


def _keys(seed: int, epoch: int) -> np.ndarray:
    """Of the rounds, uint64 [ROUNDS]."""
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _permute(
    values: np.ndarray, halves: Sequence[np.uint64] | np.ndarray, keys: Iterable[np.uint64 | np.ndarray]
) -> np.ndarray:
    """One pass of the network over uint64 [n]; halves and keys are of all, or [n] for each."""
    low_bits, low_mask, high_mask = halves
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        if number % 2 == 0:
            high ^= _mix(low, key) & high_mask
        else:
            low ^= _mix(high, key) & low_mask
    return (high << low_bits) | low


def _mix(values: np.ndarray, key: np.uint64 | np.ndarray) -> np.ndarray:
    """A keyed hash of uint64 [n]: the finaliser of splitmix64 (Steele et al. 2014)."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
