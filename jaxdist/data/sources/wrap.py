"""Any object with `__len__` and `__getitem__` as a source: Hugging Face, torch and Grain data sets among them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist.data.sources.source import Example, Source, fingerprint_example, fingerprint_text, plain_array
from jaxdist.data.sources.vocabulary import listed
from jaxdist.data.streams.equivalents import equivalent

_NUM_SAMPLES = 16


def as_source(dataset: Any) -> Source:
    """Return `dataset` where it is a Source, and otherwise a MapSource of it, whose items must have names."""
    return dataset if isinstance(dataset, Source) else MapSource(dataset)


def named(item: Any, names: Sequence[str], *, of: str) -> Example:
    """Return a tuple of values, or one value, as an example with these names; `of` says whose item it is.

    Raises:
      ValueError: there are not as many names as values.
    """
    values = item if isinstance(item, tuple | list) else (item,)
    if len(values) != len(names):
        raise ValueError(
            f"{of} have {len(values)} values without names; name them, as in names=('image', 'label'). "
            f"Got names={tuple(names)}."
        )
    return {name: plain_array(name, value) for name, value in zip(names, values)}


class MapSource:
    """Wraps a map-style data set.

    >>> source = MapSource(torch_dataset, names=("image", "label"))
    >>> source = MapSource(hugging_face_dataset)

    Args:
      dataset: its items are dicts, or tuples, or single arrays; their values anything that numpy converts to numbers
        (Pillow images, torch tensors, lists).
      names: of the fields where the items are tuples or single arrays.
      fingerprint: names the data and their version. None uses the data set's own `_fingerprint` where it has one, and
        otherwise hashes the length and 16 evenly spread items.
    """

    def __init__(self, dataset: Any, *, names: Sequence[str] = (), fingerprint: str | None = None):
        if (sentence := equivalent(dataset)) is not None:
            raise ValueError(sentence)
        if isinstance(dataset, Mapping) or hasattr(dataset, "iloc"):
            raise ValueError(
                f"A {type(dataset).__name__} has its columns by name, not its examples by number. Give it as "
                "data.ArraySource(columns)."
            )
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method):
                raise ValueError(
                    f"A source needs random access; {type(dataset).__name__} has no {method}. Give a stream as "
                    "`data.StreamSource`, or load the examples into arrays (`ArraySource`)."
                )
        self._dataset, self._names, self._fingerprint = dataset, listed(names, what="`names`"), fingerprint
        if len(dataset):
            self[0]  # items without names are refused here, not in the middle of a run

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        item = self._dataset[index]
        if isinstance(item, Mapping):
            return {name: plain_array(name, value) for name, value in item.items()}
        return named(item, self._names, of=f"Items of {type(self._dataset).__name__}")

    def fingerprint(self) -> str:
        """See Source."""
        given = self._fingerprint or getattr(self._dataset, "_fingerprint", None)
        if given is not None:
            return fingerprint_text("map", given, *self._names)
        ids = np.unique(np.linspace(0, len(self) - 1, min(len(self), _NUM_SAMPLES), dtype=np.int64)).tolist()
        return fingerprint_text("map", len(self), *(fingerprint_example(self[number]) for number in ids))
