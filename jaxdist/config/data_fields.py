"""What users type where examples are expected, as a Source."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdist.data import ArraySource, MapSource, Source
from jaxdist.errors import ConfigError
from jaxdist.setting_group import show

PAIR = ("image", "label")
"""The fields of a pair of arrays `(x, y)`: the names that `Experiment.inputs` and the losses expect by default."""


def as_source(examples: Any, setting: str) -> Source:
    """Return `examples` as a Source; see `Data` for what may be given.

    Raises:
      ConfigError: these are no examples; the message names `setting` and what to write.
    """
    if isinstance(examples, Source):
        return examples
    try:
        arrays = _arrays(examples)
        return ArraySource(arrays) if arrays is not None else MapSource(examples)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{setting} cannot be used: {error}") from error


def _arrays(examples: Any) -> dict[str, np.ndarray] | None:
    """Return the named arrays that were given, None where something else was."""
    if isinstance(examples, Mapping):
        return {str(name): np.asarray(values) for name, values in examples.items()}
    if hasattr(examples, "columns") and hasattr(examples, "to_numpy"):  # a DataFrame of pandas or polars
        return {str(name): np.asarray(examples[name].to_numpy()) for name in examples.columns}
    if isinstance(examples, tuple) and len(examples) == len(PAIR) and all(hasattr(part, "shape") for part in examples):
        return dict(zip(PAIR, map(np.asarray, examples)))
    if isinstance(examples, str | bytes | tuple) or hasattr(examples, "shape") or not hasattr(examples, "__len__"):
        raise ConfigError(
            f"Examples are a Source, a dict of arrays, a DataFrame or a pair of arrays (x, y); got {show(examples)}. "
            'Write, for example, Data(train={"image": images, "label": labels}).'
        )
    return None
