"""Weights under the names of transformers, read as ours, and written as a folder that its `from_pretrained` opens."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.errors import UserError
from jaxdist.models import hugging_face
from jaxdist.run.warm_start.weight_files import CONFIG_NAME, NamedWeights, with_slashes
from jaxdist.rundir import files

WEIGHTS_NAME = "model.safetensors"


def as_ours(model: Any, weights: NamedWeights, config: Mapping[str, Any] | None) -> NamedWeights:
    """Return weights under our names; what transformers keeps besides weights is among those left out.

    `config` is that of their model, None where it is not known.

    Raises:
      UserError: the model is of an unknown kind, or was not made for these weights.
    """
    found = hugging_face.correspondence(model)
    hugging_face.check_config(model, found, config)
    known = {with_slashes(name) for each in found.table for name in each.theirs}
    prefix = with_slashes(found.prefix)
    # Files of the model without a head lack the prefix.
    stored = {prefix + name if prefix + name in known else name: name for name in weights.names}
    _check_copies(found, weights, stored)
    table = {each.ours: each for each in found.table if all(with_slashes(name) in stored for name in each.theirs)}
    used = {with_slashes(name) for each in table.values() for name in each.theirs}
    ignored = tuple(map(with_slashes, found.ignored))
    left = {name for name in stored if name.endswith(ignored) or name in map(with_slashes, found.same_as)} - used
    others = tuple(name for name in stored if name not in used and name not in left)

    def read(name: str) -> np.ndarray:
        if name in others:
            return weights.read(stored[name])
        each = table[name]
        return each.to_ours(*(weights.read(stored[with_slashes(theirs)]) for theirs in each.theirs))

    names = (*table, *others)
    return NamedWeights(weights.source, names, read, tuple(sorted(stored[name] for name in left)))


def write(model: Any, arrays: Mapping[str, np.ndarray], folder: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Write arrays under the names of transformers, and its config.json, to a new folder.

    Raises:
      UserError: the model has no counterpart in transformers.
    """
    found = hugging_face.correspondence(model)
    config = hugging_face.config_of(model, {name: array.shape for name, array in arrays.items()})
    theirs: dict[str, np.ndarray] = dict.fromkeys(found.counters, np.zeros((), np.int64))
    for each in found.table:
        theirs |= dict(zip(each.theirs, map(np.ascontiguousarray, each.to_theirs(arrays[each.ours])), strict=True))
    # The word "pt" is what transformers asks for: the arrays are in torch's order.
    content = extras.require("safetensors.numpy", extra="export").save(theirs, metadata={**metadata, "format": "pt"})
    folder.mkdir(parents=True)
    files.write(folder / WEIGHTS_NAME, [content])
    files.write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _check_copies(found: hugging_face.Correspondence, weights: NamedWeights, stored: Mapping[str, str]) -> None:
    for copy, original in found.same_as.items():
        names = [stored[with_slashes(name)] for name in (copy, original) if with_slashes(name) in stored]
        if len(names) == 2 and not np.array_equal(weights.read(names[0]), weights.read(names[1])):
            raise UserError(
                f"{copy} and {original} of {weights.source} differ, and this model uses one array for both. Set the "
                "model's tie_embeddings to False."
            )
