"""The order of the examples: pure functions from (num_examples, seed, epoch, start, stop) to example ids.

The shuffled order is a keyed permutation that is never stored: a Feistel network permutes the numbers of b bits, b the
fewest that hold all ids, and cycle walking (apply again until the result is a valid id) narrows it to the ids. Any
position is found without walking through those before it, in O(1) memory. Black and Rogaway, "Ciphers with Arbitrary
Finite Domains" (2002), prove that cycle walking keeps a permutation a permutation; Levanter orders training data this
way. A rotation by a keyed offset comes first, so that even in a tiny data set each example is equally likely anywhere.
"""

import abc
import bisect
import dataclasses
import functools
import hashlib
import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxdist.setting_group import whole_number

ORDER_VERSION = 1
"""Changes whenever the same arguments would give other ids, so that a stored position is never misread."""

MAX_EXAMPLES = 2**62

_IDS_AT_A_TIME = 4096
_NUM_ROUNDS = 6
"""With so many, pairs of positions are as good as independent, from ten examples on; fewer would need more rounds."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
_MULTIPLIER = np.uint64(_GOLDEN)
_WORD = 2**64 - 1
_FEW = 8
_MOST_WEIGHT = 10**6
_HALF = np.uint64(32)


class BatchIds(NamedTuple):
    """The ids of a batch, one per row; rows whose mask is 0 are padding. `after` is the position after the batch."""

    ids: np.ndarray
    mask: np.ndarray
    after: int


class Order(Protocol):
    """Which example is at which position of an epoch, and which positions make a batch."""

    @property
    def version(self) -> str:
        """A short text that differs whenever the ids may differ: the scheme's version and its settings."""

    def batches(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> Iterator[BatchIds]:
        """Yield the batches of `size` rows from position `start` to the end of the epoch."""

    def num_batches(self, num_examples: int, size: int) -> int:
        """Return the number of batches of `size` rows in a whole epoch."""


class Contiguous(abc.ABC):
    """An order whose batches are runs of positions; the last one is padded with its first id."""

    @abc.abstractmethod
    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""

    def batches(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> Iterator[BatchIds]:
        """See Order."""
        # Many ids at a time: the overhead of a call is more than the cost of the ids of a small batch.
        run = max(_IDS_AT_A_TIME // size, 1) * size
        for begin in range(start, num_examples, run):
            ids = self(num_examples, seed, epoch, begin, min(begin + run, num_examples))
            for first in range(0, len(ids), size):
                yield padded_batch(ids[first : first + size], size, begin + first)

    def num_batches(self, num_examples: int, size: int) -> int:
        """See Order."""
        return -(-num_examples // size)


def padded_batch(ids: np.ndarray, size: int, start: int) -> BatchIds:
    """Return the batch of `ids`, which start at position `start`; it is padded with the first one."""
    count = len(ids)
    if count == size:
        return BatchIds(ids, np.ones(size, np.float32), start + size)
    mask = (np.arange(size) < count).astype(np.float32)
    return BatchIds(np.concatenate([ids, np.full(size - count, ids[0])]), mask, start + count)


@dataclasses.dataclass(frozen=True)
class Sequential(Contiguous):
    """Examples in the order of the source, in every epoch."""

    @property
    def version(self) -> str:
        """See Order."""
        return f"sequential-{ORDER_VERSION}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        check_range(num_examples, epoch, start, stop)
        return np.arange(start, stop, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class Shuffled(Contiguous):
    """A permutation of all examples, different in every epoch and for every seed."""

    @property
    def version(self) -> str:
        """See Order."""
        return f"shuffled-{ORDER_VERSION}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        check_range(num_examples, epoch, start, stop)
        permutation = Permutation.make(num_examples, "shuffled", seed, epoch)
        return permutation(np.arange(start, stop, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class BlockShuffled(Contiguous):
    """A permutation of blocks of `block_size` neighbours, each block permuted in itself: for storage that seeks slowly.

    A run of positions touches few blocks, so a source that reads or caches whole blocks reads each about once an epoch.
    """

    block_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", whole_number("block_size", self.block_size))

    @property
    def version(self) -> str:
        """See Order."""
        return f"blocks-{ORDER_VERSION}:{self.block_size}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        check_range(num_examples, epoch, start, stop)
        num_blocks, size = -(-num_examples // self.block_size), self.block_size
        if start == stop:
            return np.empty(0, np.int64)
        blocks = Permutation.make(num_blocks, "blocks", seed, epoch)
        # The source's last block may be short, and may be at any place; the blocks after it start that much earlier.
        short, missing = int(blocks.inverse(np.array([num_blocks - 1]))[0]), num_blocks * size - num_examples
        behind_short = (short + 1) * size - missing
        parts = []
        while start < stop:
            place = start // size if start < behind_short else (start + missing) // size
            begin = place * size - (missing if place > short else 0)
            end = begin + size - (missing if place == short else 0)
            block = int(blocks(np.array([place]))[0])
            inside = Permutation.make(end - begin, "in block", seed, epoch, block)
            parts.append(block * size + inside(np.arange(start, min(stop, end), dtype=np.int64) - begin))
            start = end
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Mixed(Contiguous):
    """Several sources, with consecutive ids, drawn in fixed proportions: see `mix`.

    Of any sum(weights) positions that start at a multiple of it, source i has exactly weights[i], evenly spread; a
    weight of 0 leaves a source out. Each source is read again and again, every pass in another permutation with each of
    its examples once. An epoch is as many positions as the sources have examples in all; the next epoch continues where
    it ended.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", whole_sizes(self.sizes))
        object.__setattr__(self, "weights", whole_weights(self.weights, len(self.sizes)))

    @property
    def version(self) -> str:
        """See Order."""
        return f"mixed-{ORDER_VERSION}:{','.join(map(str, self.weights))}"

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        check_range(num_examples, epoch, start, stop)
        if num_examples != sum(self.sizes):
            raise ValueError(f"These sources have {sum(self.sizes)} examples in all; got num_examples={num_examples}.")
        positions = np.arange(start, stop, dtype=np.int64) + epoch * num_examples
        return drawn_in_turn(self.sizes, self.weights, positions, (0,) * len(self.sizes), seed)


def whole_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of examples of some sources, each of which has one."""
    return tuple(whole_number("A size of `sizes`, its examples,", size) for size in sizes)


def whole_weights(weights: Sequence[int], num_sources: int) -> tuple[int, ...]:
    """Return the weights of a mixture: one a source, which is left out where it is 0; ValueError where they are not."""
    are_whole = all(isinstance(weight, numbers.Integral) and weight >= 0 for weight in weights)
    if len(weights) != num_sources or not are_whole or not 0 < sum(map(int, weights)) <= _MOST_WEIGHT:
        raise ValueError(
            f"Weights are whole numbers of at least 0, one for each of the {num_sources} sources, not all of them 0, "
            f"with a sum of a million or less, such as (7, 2, 1); got {weights}."
        )
    return tuple(map(int, weights))


def drawn_in_turn(
    sizes: tuple[int, ...], weights: tuple[int, ...], positions: np.ndarray, drawn: tuple[int, ...], seed: int
) -> np.ndarray:
    """Return the ids at `positions` of turns in the proportion of `weights`, int64; `drawn` were drawn before them."""
    turn = np.array(spread(weights))
    cycles, places = np.divmod(positions, len(turn))
    ids = np.empty(len(positions), np.int64)
    for index, (size, weight) in enumerate(zip(sizes, weights)):
        rank = np.cumsum(turn == index) - 1  # how many of this source's turns come before, in a cycle
        mine = turn[places] == index
        passes, within = np.divmod(drawn[index] + cycles[mine] * weight + rank[places[mine]], size)
        chosen = np.empty(len(within), np.int64)
        for number in np.unique(passes).tolist():
            permutation = Permutation.make(size, "mixed", index, seed, number)
            chosen[passes == number] = permutation(within[passes == number])
        ids[mine] = sum(sizes[:index]) + chosen
    return ids


def spread(weights: tuple[int, ...]) -> list[int]:
    """Return sum(weights) turns, weights[i] of them i, those of each i as evenly spaced as can be."""
    turns = [((2 * k + 1) / (2 * weight), index) for index, weight in enumerate(weights) for k in range(weight)]
    return [index for _, index in sorted(turns)]


@dataclasses.dataclass(frozen=True)
class Resampled(Contiguous):
    """Examples drawn in proportion to weights, with replacement: an epoch is as many draws as there are examples.

    An example whose share of the weights is w comes floor(n w) or ceil(n w) times in an epoch of n draws, n w on
    average (systematic sampling), in a shuffled order. Exactly once does not hold, and cannot.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        values = np.asarray(self.weights, np.float64)
        with np.errstate(over="ignore"):
            total = values.sum()
        if values.ndim != 1 or not ((values >= 0).all() and 0 < total < np.inf):
            raise ValueError("Weights are numbers with a finite sum, one an example, at least 0 and not all of them 0.")
        object.__setattr__(self, "weights", tuple(values.tolist()))

    @property
    def version(self) -> str:
        """See Order."""
        digest = hashlib.sha256(np.asarray(self.weights).tobytes()).hexdigest()[:12]
        return f"weighted-{ORDER_VERSION}:{digest}"

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Where each example's part of [0, 1] ends."""
        ends = np.cumsum(self.weights)
        return ends / ends[-1]

    def __call__(self, num_examples: int, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions [start, stop) of the epoch, int64."""
        check_range(num_examples, epoch, start, stop)
        if num_examples != len(self.weights):
            raise ValueError(f"There are {len(self.weights)} weights; the source has {num_examples} examples.")
        draws = Permutation.make(num_examples, "weighted", seed, epoch)(np.arange(start, stop, dtype=np.int64))
        points = (draws + _uniform("weighted", seed, epoch)) / num_examples
        last = np.flatnonzero(self.weights)[-1]  # rounding may put the last point behind the last end
        return np.minimum(np.searchsorted(self._ends, points, side="right"), last)


def _uniform(*name: str | int) -> float:
    """Return a number of [0, 1) that belongs to `name`."""
    text = "\0".join(map(str, ("jaxdist uniform", ORDER_VERSION, *name)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") / 2**32


@dataclasses.dataclass(frozen=True)
class Dealt:
    """Shards that live on different hosts: shard v fills the v-th part of each batch from a permutation of its own.

    `sizes` are the examples of each shard, in the order of their ids. A shard that ends early pads its part. A
    position counts the examples of all shards; each has given equally many of them, as far as it could.
    """

    sizes: tuple[int, ...]
    shuffle: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", whole_sizes(self.sizes))
        if not self.sizes:
            raise ValueError("There must be at least one shard; got no sizes.")

    @property
    def version(self) -> str:
        """See Order."""
        sizes = hashlib.sha256(str(self.sizes).encode()).hexdigest()[:8]
        return f"dealt-{ORDER_VERSION}:{len(self.sizes)} shards {sizes}{'' if self.shuffle else ' unshuffled'}"

    def batches(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> Iterator[BatchIds]:
        """See Order."""
        while start < num_examples:
            batch = self.batch(num_examples, seed, epoch, start, size)
            yield batch
            start = batch.after

    def batch(self, num_examples: int, seed: int, epoch: int, start: int, size: int) -> BatchIds:
        """Return the batch that starts at position `start`, which is below num_examples."""
        check_range(num_examples, epoch, start, num_examples)
        rows, first = self._rows_of_each(num_examples, size), self._taken_from_each(start)
        ids, mask, offset = [], [], 0
        for shard, shard_size in enumerate(self.sizes):
            places = np.arange(first, first + rows, dtype=np.int64)
            true_places = places < shard_size
            places = np.where(true_places, places, 0)
            if self.shuffle:
                places = Permutation.make(shard_size, "dealt", shard, seed, epoch)(places)
            ids.append(offset + places)
            mask.append(true_places.astype(np.float32))
            offset += shard_size
        return BatchIds(np.concatenate(ids), np.concatenate(mask), self._position(first + rows))

    def num_batches(self, num_examples: int, size: int) -> int:
        """See Order."""
        return -(-max(self.sizes) // self._rows_of_each(num_examples, size))

    def _rows_of_each(self, num_examples: int, size: int) -> int:
        """Return how many of the `size` rows of a batch each shard fills."""
        if size % len(self.sizes) or num_examples != sum(self.sizes):
            raise ValueError(
                f"A batch takes equally many rows of each of the {len(self.sizes)} shards (with {sum(self.sizes)} "
                f"examples), so global_batch_size must be a multiple of {len(self.sizes)}; got {size}, and "
                f"{num_examples} examples."
            )
        return size // len(self.sizes)

    def _position(self, taken: int) -> int:
        """Return the number of examples read after each shard was asked for `taken`."""
        return int(np.minimum(self.sizes, taken).sum())

    def _taken_from_each(self, position: int) -> int:
        """Invert `_position`, which rises strictly until the largest shard is empty."""
        return bisect.bisect_left(range(max(self.sizes) + 1), position, key=self._position)


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A keyed permutation of range(size) that can be evaluated, and inverted, at any point."""

    size: int
    offset: int
    round_keys: tuple[int, ...]

    @classmethod
    def make(cls, size: int, *name: str | int) -> "Permutation":
        """Return the permutation of range(size) that belongs to `name`; every part of it matters."""
        text = "\0".join(map(str, ("jaxdist order", ORDER_VERSION, size, *name)))
        words = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * (_NUM_ROUNDS + 1)), "<u8").tolist()
        return cls(size, words[0] % max(size, 1), tuple(words[1:]))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the ids at `positions`, each in [0, size); int64, same shape."""
        walked = self._walk((positions + self.offset) % max(self.size, 1), range(_NUM_ROUNDS))
        return walked.astype(np.int64)

    def inverse(self, ids: np.ndarray) -> np.ndarray:
        """Return the positions of `ids`; int64, same shape."""
        walked = self._walk(ids, range(_NUM_ROUNDS - 1, -1, -1)).astype(np.int64)
        return (walked - self.offset) % max(self.size, 1)

    def _walk(self, values: np.ndarray, rounds: range) -> np.ndarray:
        values = self._encrypt(values.astype(np.uint64), rounds)
        outside = np.flatnonzero(values >= self.size)
        while outside.size > _FEW:
            values[outside] = self._encrypt(values[outside], rounds)
            outside = outside[values[outside] >= self.size]
        for place in outside.tolist():
            values[place] = self._walk_one(int(values[place]), rounds)
        return values

    def _walk_one(self, value: int, rounds: range) -> int:
        """Do the same as `_walk` for one number: 256 ids take half as long again if all are arrays."""
        num_bits = max(self.size - 1, 0).bit_length()
        low_bits = num_bits - num_bits // 2
        mask, high_mask = (1 << low_bits) - 1, (1 << (num_bits - low_bits)) - 1
        while value >= self.size:
            high, low = value >> low_bits, value & mask
            for index in rounds:
                if index % 2:
                    high ^= _mix_one(low, self.round_keys[index]) & high_mask
                else:
                    low ^= _mix_one(high, self.round_keys[index]) & mask
            value = high << low_bits | low
        return value

    def _encrypt(self, values: np.ndarray, rounds: range) -> np.ndarray:
        """Permute the numbers of b bits; the high and the low half take turns, so an odd b needs no special case."""
        num_bits = max(self.size - 1, 0).bit_length()
        low_bits = num_bits - num_bits // 2
        shift, mask = np.uint64(low_bits), np.uint64((1 << low_bits) - 1)
        high_mask = np.uint64((1 << (num_bits - low_bits)) - 1)
        high, low = values >> shift, values & mask
        mixed, scratch = np.empty_like(low), np.empty_like(low)
        for index in rounds:
            source, target, kept = (low, high, high_mask) if index % 2 else (high, low, mask)
            _mix(source, np.uint64(self.round_keys[index]), mixed, scratch)
            np.bitwise_and(mixed, kept, out=mixed)
            np.bitwise_xor(target, mixed, out=target)
        return (high << shift) | low


def _mix(values: np.ndarray, key: np.uint64, mixed: np.ndarray, scratch: np.ndarray) -> None:
    """Hash up to 32 bits to 32 bits, into `mixed`: multiply, fold the high bits down, multiply, take the high bits."""
    np.bitwise_xor(values, key, out=mixed)
    np.multiply(mixed, _MULTIPLIER, out=mixed)
    np.right_shift(mixed, _HALF, out=scratch)
    np.bitwise_xor(mixed, scratch, out=mixed)
    np.multiply(mixed, _MULTIPLIER, out=mixed)
    np.right_shift(mixed, _HALF, out=mixed)


def _mix_one(value: int, key: int) -> int:
    """Do the same as `_mix` for one number."""
    mixed = (value ^ key) * _GOLDEN & _WORD
    mixed ^= mixed >> 32
    return (mixed * _GOLDEN & _WORD) >> 32


def check_range(num_examples: int, epoch: int, start: int, stop: int) -> None:
    """Raise ValueError unless [start, stop) are positions of an epoch."""
    if not 0 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(f"num_examples must be in [0, 2**62]; got {num_examples}.")
    if epoch < 0:
        raise ValueError(f"epoch must not be negative; got {epoch}.")
    if not 0 <= start <= stop <= num_examples:
        raise ValueError(
            f"Positions must satisfy 0 <= start <= stop <= num_examples; got start={start}, stop={stop}, "
            f"num_examples={num_examples}."
        )
