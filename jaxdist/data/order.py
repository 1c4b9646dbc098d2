"""The order of the examples: pure functions from (num_examples, seed, epoch, start, stop) to example ids.

The shuffled order is a keyed permutation that is never stored: a Feistel network permutes the numbers of b bits, b the
fewest that hold all ids, and cycle walking (apply again until the result is a valid id) narrows it to the ids. Any
position is found without walking through those before it, in O(1) memory. Black and Rogaway, "Ciphers with Arbitrary
Finite Domains" (2002), prove that cycle walking keeps a permutation a permutation; Levanter orders training data this
way. A rotation by a keyed offset comes first, so that even in a tiny data set each example is equally likely anywhere.
"""

import dataclasses
import hashlib
from typing import Protocol

import numpy as np

ORDER_VERSION = 1
"""Changes whenever the same arguments would give other ids, so that a stored position is never misread."""

MAX_EXAMPLES = 2**62

_NUM_ROUNDS = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd


class Order(Protocol):
    """Which example stands at which position of an epoch. `version` names the scheme and its settings."""

    @property
    def version(self) -> str:
        """A short text that differs whenever the ids may differ."""

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""


@dataclasses.dataclass(frozen=True)
class Sequential:
    """Examples in the order of the source, in every epoch."""

    @property
    def version(self) -> str:
        """See Order."""
        return f"sequential-{ORDER_VERSION}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """See Order."""
        _check_range(num_examples, seed, epoch, start, stop)
        return np.arange(start, stop, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """A permutation of all examples, another one in every epoch and for every seed."""

    @property
    def version(self) -> str:
        """See Order."""
        return f"shuffled-{ORDER_VERSION}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """See Order."""
        _check_range(num_examples, seed, epoch, start, stop)
        permutation = Permutation.make(num_examples, "shuffled", seed, epoch)
        return permutation(np.arange(start, stop, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A keyed permutation of range(size) that can be evaluated, and inverted, at any point."""

    size: int
    offset: int
    round_keys: tuple[int, ...]

    @classmethod
    def make(cls, size: int, *name: str | int) -> "Permutation":
        """Return the permutation of range(size) that belongs to `name`, all of whose parts matter."""
        text = "\0".join(map(str, ("jaxdist order", ORDER_VERSION, size, *name)))
        words = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * (_NUM_ROUNDS + 1)), "<u8").tolist()
        return cls(size, words[0] % max(size, 1), tuple(words[1:]))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return what stands at `positions`, each in [0, size); int64, same shape."""
        walked = self._walk((positions + self.offset) % max(self.size, 1), range(_NUM_ROUNDS))
        return walked.astype(np.int64)

    def inverse(self, ids: np.ndarray) -> np.ndarray:
        """Return the positions at which `ids` stand; int64, same shape."""
        walked = self._walk(ids, range(_NUM_ROUNDS - 1, -1, -1)).astype(np.int64)
        return (walked - self.offset) % max(self.size, 1)

    def _walk(self, values: np.ndarray, rounds: range) -> np.ndarray:
        values = self._encrypt(values.astype(np.uint64), rounds)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._encrypt(values[outside], rounds)
            outside = outside[values[outside] >= self.size]
        return values

    def _encrypt(self, values: np.ndarray, rounds: range) -> np.ndarray:
        """Permute the numbers of b bits; the high and the low half take turns, so an odd b needs no special case."""
        num_bits = max(self.size - 1, 0).bit_length()
        low_bits = num_bits - num_bits // 2
        shift, mask = np.uint64(low_bits), np.uint64((1 << low_bits) - 1)
        high_mask = np.uint64((1 << (num_bits - low_bits)) - 1)
        high, low = values >> shift, values & mask
        for index in rounds:
            key = np.uint64(self.round_keys[index])
            if index % 2:
                high ^= _mix(low, key) & high_mask
            else:
                low ^= _mix(high, key) & mask
        return (high << shift) | low


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed hash of 64 bits to 64 bits: multiply, fold the good high bits down, multiply, fold (as in splitmix64)."""
    values = (values ^ key) * _MULTIPLIER
    values ^= values >> np.uint64(32)
    values *= _MULTIPLIER
    values ^= values >> np.uint64(29)
    return values


def _check_range(num_examples: int, seed: int, epoch: int, start: int, stop: int) -> None:
    if not 0 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(f"num_examples must be in [0, 2**62]; got {num_examples}.")
    if epoch < 0:
        raise ValueError(f"epoch must not be negative; got {epoch}.")
    if not 0 <= start <= stop <= num_examples:
        raise ValueError(
            f"Positions must satisfy 0 <= start <= stop <= num_examples; got start={start}, stop={stop}, "
            f"num_examples={num_examples} (seed {seed}, epoch {epoch})."
        )
