"""The mean gradient of a step: pushes added in slice order, whichever order they arrive in.

The sum begins with the first slice and continues as the next ones arrive, so that the commit of a step finds it done.
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxdist.paramserver.protocol import messages

Arrays = tuple[np.ndarray, ...]
Identity = tuple[int, int, int]


def identity(push: messages.Push | messages.Contributor | messages.Done) -> Identity:
    """Return what names a push."""
    return push.worker, push.incarnation, push.sequence


def fingerprint(pushes: Iterable[messages.Push | messages.Contributor | messages.Done]) -> int:
    """Return a fingerprint of which pushes these are, in this order."""
    return _fingerprint(map(identity, pushes))


def _fingerprint(identities: Iterable[Identity]) -> int:
    numbers = [number for each in identities for number in each]
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def dense(piece: messages.Piece, like: np.ndarray) -> np.ndarray:
    """Return a push's piece as an array of the block's size; repeated rows add up in the order they are listed."""
    if not isinstance(piece, messages.Rows):
        return piece
    out = np.zeros_like(like)
    width = piece.values.shape[1]
    np.add.at(out.reshape(-1, width), piece.ids, piece.values)
    return out


class PushSums:
    """The sum of some pushes, in the order in which they are added.

    Args:
      params: arrays with the shapes and dtypes of the blocks.
      num_params: the first blocks are params, averaged over what the loss counts; the others are over all examples.
    """

    def __init__(self, params: Arrays, num_params: int) -> None:
        self._params, self._num_params = params, num_params
        self._totals: list[np.ndarray] = []
        self.count = self.num_examples = 0.0
        self.finite = True
        self.added: list[Identity] = []

    def add(self, push: messages.Push) -> None:
        """Add one push."""
        pieces = [dense(piece, param) for piece, param in zip(push.pieces, self._params, strict=True)]
        if not self.added:
            self._totals = pieces
        elif len(self.added) == 1:  # the totals are still the memory of the first push
            self._totals = [total + piece for total, piece in zip(self._totals, pieces)]
        else:
            for total, piece in zip(self._totals, pieces):
                np.add(total, piece, out=total)
        self.count += push.count
        self.num_examples += push.num_examples
        self.finite = self.finite and push.finite
        self.added.append(identity(push))

    def mean(self) -> Arrays:
        """Return the mean of the pushes that were added."""
        counts = [self.count if n < self._num_params else self.num_examples for n in range(len(self._totals))]
        return tuple(
            (total / np.asarray(count, total.dtype)).astype(total.dtype, copy=False)
            for total, count in zip(self._totals, counts)
        )


def mean(pushes: Iterable[messages.Push], params: Arrays, num_params: int) -> Arrays:
    """Return the mean of `pushes`."""
    sums = PushSums(params, num_params)
    for push in pushes:
        sums.add(push)
    return sums.mean()


@dataclass(frozen=True)
class Ready:
    """What the commit of exactly the pushes `added`, in this order, needs: computed ahead of it.

    `updated` are the params and the optimizer state after the step; None if the norm over all shards is missing.
    """

    added: tuple[Identity, ...]
    mean: Arrays
    updated: tuple[Arrays, Arrays] | None

    @property
    def fingerprint(self) -> int:
        """The fingerprint of the pushes."""
        return _fingerprint(self.added)
