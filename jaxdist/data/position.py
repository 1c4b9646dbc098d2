"""The place of training in the data: the whole state of the input pipeline, in a few numbers.

A position counts global examples of the epoch that were trained on, so it means the same to any number of processes,
threads and to any batch size. It does not include what was read ahead.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Position:
    """The first `position` examples of `epoch` (and all earlier epochs) were trained on."""

    epoch: int
    position: int
    num_examples: int
    seed: int
    order_version: str
    fingerprint: str

    def to_json(self) -> dict[str, int | str]:
        """Return a dict that JSON can hold, under 1 kB as text."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Position":
        """Return the position that `to_json` wrote; ValueError names a missing or unknown key."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(values) != expected:
            raise ValueError(
                f"A data position has the keys {sorted(expected)}; got {sorted(values)}. "
                "The checkpoint was written by another version of jaxdist."
            )
        return cls(**values)

    def check_resumable(self, current: "Position") -> None:
        """Raise ValueError unless this stored position means the same in the data set that `current` describes."""
        if self.fingerprint != current.fingerprint:
            raise ValueError(
                f"The data have changed: the stored position belongs to the fingerprint {self.fingerprint}, the source "
                f"now has {current.fingerprint}. Restore the data, or start a new run."
            )
        for name, hint in (
            ("num_examples", "Restore the data, or start a new run."),
            ("seed", "Use the stored seed, or start a new run."),
            ("order_version", "Restore shuffle, or the order and its weights, or start a new run."),
        ):
            stored, now = getattr(self, name), getattr(current, name)
            if stored != now:
                raise ValueError(f"The stored data position has {name} {stored!r}, the loader has {now!r}. {hint}")
        if not (self.epoch >= 0 and 0 <= self.position <= self.num_examples):
            raise ValueError(f"Not a position of a data set of {self.num_examples} examples: {self}.")
