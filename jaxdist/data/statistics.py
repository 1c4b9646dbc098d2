"""Mean and standard deviation of the fields of a data set, by channel or column: computed once, and stored.

They are of the examples as the source and `example_fn` give them, in float64 and in the order of the ids, so that every
process finds the same numbers.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdist.data import assembly
from jaxdist.data.sources.source import COUNTS, Example, Source, fingerprint_text
from jaxdist.data.sources.wrap import as_source
from jaxdist.data.transforms import Chain, Normalise, Transform
from jaxdist.rundir import files

_ROUNDING = 16 * np.finfo(np.float64).eps
_AT_A_TIME = 256


class FieldStatistics(NamedTuple):
    """The mean and the standard deviation of a field, one an entry of its last dim, over `count` values each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int  # type: ignore[assignment]  # hides tuple.count, which has no use here


@dataclasses.dataclass(frozen=True)
class DataStatistics:
    """What `field_statistics` found, by field."""

    fields: Mapping[str, FieldStatistics]

    def __getitem__(self, field: str) -> FieldStatistics:
        """Return the statistics of a field; ValueError where there are none."""
        if field not in self.fields:
            raise ValueError(f"There are statistics of {sorted(self.fields)}; got {field!r}.")
        return self.fields[field]

    def normalise(self, *fields: str) -> Transform:
        """Return the transform to mean 0 and deviation 1; what is constant becomes 0. Without names: of all fields."""
        made = []
        for field in fields or tuple(self.fields):
            found = self[field]
            std = tuple(each or 1.0 for each in found.std)
            single = len(std) == 1
            mean: Any = found.mean[0] if single else found.mean
            made.append(Normalise(mean=mean, std=std[0] if single else std, scale=1.0, field=field))
        return made[0] if len(made) == 1 else Chain(tuple(made))

    def to_json(self) -> dict[str, Any]:
        """Return a dict that JSON can hold."""
        return {field: found._asdict() for field, found in self.fields.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataStatistics":
        """Return the statistics that `to_json` wrote."""
        return cls(
            {
                field: FieldStatistics(tuple(each["mean"]), tuple(each["std"]), int(each["count"]))
                for field, each in values.items()
            }
        )


def field_statistics(
    source: Source,
    fields: Sequence[str],
    *,
    path: str | os.PathLike | None = None,
    example_fn: assembly.ExampleFn | None = None,
    over_all: Sequence[str] = (),
) -> DataStatistics:
    """Return mean and standard deviation of some fields of all examples, one an entry of the last dim of a field.

    >>> found = field_statistics(train, ("image",), path="statistics.json")
    >>> Data(train=train, example_fn=found.normalise("image"), eval_example_fn=found.normalise("image"))

    An image (height, width, channels) has one of each a channel, a vector one an entry, a number one. Examples may
    differ in their other dims. Those that do not count (see `Filtered`) are left out.

    Args:
      source: any source; it is read once, in threads.
      fields: their names.
      path: a file that keeps the result. It is read instead of the data where it belongs to these data and settings,
        and else written; with an `example_fn` of other behaviour under the same name, delete it.
      example_fn: applied first, with the randomness of seed 0 and epoch 0: decoding, cropping.
      over_all: fields with one mean over all their numbers, such as sounds.
    """
    source = as_source(source)
    names = (*fields, *(name for name in over_all if name not in fields))
    function = getattr(example_fn, "__qualname__", None) or repr(example_fn)
    made_of = fingerprint_text("statistics", source.fingerprint(), names, tuple(over_all), function)
    kept = None if path is None else pathlib.Path(path)
    if kept is not None and kept.exists():
        stored = json.loads(kept.read_text())
        if stored.get("made_of") == made_of:
            return DataStatistics.from_json(stored["fields"])
    found = _measure(assembly.Recipe(source, example_fn, 0, "raise"), names, frozenset(over_all))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(kept, json.dumps({"made_of": made_of, "fields": found.to_json()}, indent=1) + "\n")
    return found


class _Moments(NamedTuple):
    """The count, mean and sum of squared deviations of some values."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: np.ndarray
    squares: np.ndarray

    def joined(self, other: "_Moments") -> "_Moments":
        """Return the moments of both sets of values: Chan, Golub and LeVeque (1979)."""
        count, difference = self.count + other.count, other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        squares = self.squares + other.squares + difference**2 * (self.count * other.count / count)
        return _Moments(count, mean, squares)


def _measure(recipe: assembly.Recipe, names: Sequence[str], over_all: frozenset[str]) -> DataStatistics:
    totals: dict[str, _Moments] = {}
    for example_id, moments in _moments_in_order(recipe, names, over_all):
        for name, found in moments.items():
            known = totals.get(name)
            if known is not None and known.mean.shape != found.mean.shape:
                raise ValueError(
                    f"The last dim of field {name!r} is {len(found.mean)} in example {example_id} and "
                    f"{len(known.mean)} before it. Bring it to one size in example_fn, or name the field in over_all."
                )
            totals[name] = found if known is None else known.joined(found)
    if not totals:
        raise ValueError(f"There are no values of the fields {list(names)}: no example counts, or all are empty.")
    fields = {}
    for name, (count, mean, squares) in totals.items():
        std = np.sqrt(squares / count)
        std[std <= _ROUNDING * np.abs(mean)] = 0  # constant, but for the last bits of its mean
        fields[name] = FieldStatistics(tuple(mean.tolist()), tuple(std.tolist()), count)
    return DataStatistics(fields)


def _moments_in_order(
    recipe: assembly.Recipe, names: Sequence[str], over_all: frozenset[str]
) -> Iterator[tuple[int, dict[str, _Moments]]]:
    """Yield the moments of each run of examples, in the order of the ids, computed in threads."""
    size = _AT_A_TIME if recipe.whole else 1
    runs = (np.arange(begin, min(begin + size, len(recipe.source))) for begin in range(0, len(recipe.source), size))
    num_threads = 1 if recipe.whole else min(os.cpu_count() or 1, 8)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        pending: collections.deque = collections.deque()
        for ids in itertools.chain(runs, [None] * 4 * num_threads):
            if ids is not None:
                pending.append((int(ids[0]), pool.submit(_moments_of, recipe, ids, names, over_all)))
            if pending and (ids is None or len(pending) > 4 * num_threads):
                first, result = pending.popleft()
                yield first, result.result()


def _moments_of(
    recipe: assembly.Recipe, ids: np.ndarray, names: Sequence[str], over_all: frozenset[str]
) -> dict[str, _Moments]:
    """Return the moments of each field of some examples, those without values left out."""
    if recipe.whole:
        examples: Example = assembly.gather(recipe.source, ids)
        single = 0
    else:
        examples = assembly.make_example(recipe, 0, int(ids[0]))
        single = 1
    if single and not np.asarray(examples.get(COUNTS, 1)).any():
        return {}
    found = {}
    for name in names:
        if name not in examples:
            raise ValueError(f"Example {ids[0]} has no field {name!r}; its fields are {sorted(examples)}.")
        values = np.asarray(examples[name])
        if values.dtype.kind not in "biuf":
            raise ValueError(f"Field {name!r} holds {values.dtype}, which has no mean of real numbers.")
        is_number = name in over_all or values.ndim + single == 1
        rows = values.astype(np.float64).reshape(-1, 1 if is_number else values.shape[-1])
        if len(rows):
            mean = rows.mean(axis=0)
            if not np.isfinite(mean).all():
                broken = np.argwhere(~np.isfinite(rows).all(axis=1))
                place = int(broken[0, 0]) * len(ids) // len(rows) if len(broken) else 0
                raise ValueError(
                    f"Field {name!r} of example {ids[place]} holds a number that is not finite, so it has no mean. Say "
                    "what stands for missing values, or leave such examples out."
                )
            found[name] = _Moments(len(rows), mean, ((rows - mean) ** 2).sum(axis=0))
    return found
