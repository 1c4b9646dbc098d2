"""Weights by name from whatever holds them: a run, a checkpoint, safetensors, npz, msgpack, an Orbax export.

Names are joined by slashes, `params/Dense_0/kernel`; the dots that separate names in safetensors and npz files are read
as slashes. An array is read when it is asked for, so that the host need not hold all of them.
"""

import dataclasses
import functools
import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdist import adapters, optimizers
from jaxdist.checkpoint import checkpoints, orbax_trees, step_names
from jaxdist.checkpoint.manifest import CheckpointError
from jaxdist.config.starting_weights import InitFrom
from jaxdist.errors import UserError
from jaxdist.run.warm_start import safetensors_file
from jaxdist.rundir import chosen_checkpoint, record
from jaxdist.spmd.layout import path_name

CONFIG_NAME = "config.json"
"""Beside the weights in a folder of transformers: the settings of the model."""
_KINDS = (
    "a run directory, a checkpoint in one, an Orbax export, a .safetensors, .npz or .msgpack file, or a folder with "
    ".safetensors files"
)
_AVERAGE_COUNT = "num_updates"
"""What the state of the averaged params has beside them, see `optimizers.averages.EmaState`."""


@dataclasses.dataclass(frozen=True)
class NamedWeights:
    """Arrays by name.

    Attributes:
      source: where they come from, for messages.
      names: of all arrays.
      read: returns the array of a name; raises UserError where it is damaged.
      left: names that are no weights, and are left out.
    """

    source: str
    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]
    left: tuple[str, ...] = ()


def open_weights(settings: InitFrom) -> NamedWeights:
    """Return the weights that `settings` name; nothing is looked for elsewhere than on this machine.

    Raises:
      UserError: there are none, or they are damaged.
    """
    path = pathlib.Path(settings.path)
    if not path.exists():
        raise UserError(
            f"init_from reads {_KINDS}; there is no {settings.path}. Nothing is downloaded: fetch the file, and give "
            "its path."
        )
    if settings.checkpoint != "best" and not (path / record.FILE_NAME).is_file():
        raise UserError(f"init_from.checkpoint needs a run directory; {path} is not a run directory. Leave it out.")
    try:
        return _open(path, settings)
    except (CheckpointError, OSError) as error:
        raise UserError(f"init_from cannot read {path}: {error}") from error


def _open(path: pathlib.Path, settings: InitFrom) -> NamedWeights:
    if path.is_dir():
        if (path / record.FILE_NAME).is_file():
            return _of_run(path, settings)
        if checkpoints.is_checkpoint(path):
            return _of_checkpoint(path, str(path))
        if any((path / name).exists() for name in ("_CHECKPOINT_METADATA", "_METADATA")):
            return _of_tree(orbax_trees.read(path), path)
        files = sorted(path.glob("*.safetensors"))
        if files:
            return _of_safetensors(files, path)
    elif path.suffix == ".safetensors":
        return _of_safetensors([path], path)
    elif path.suffix == ".npz":
        return _of_npz(path)
    elif path.suffix == ".msgpack":
        return _of_tree(adapters.from_msgpack(path.read_bytes(), str(path)), path)
    raise UserError(f"init_from reads {_KINDS}; {path} is none of these. Save the weights in one of these forms.")


def _of_run(run_dir: pathlib.Path, settings: InitFrom) -> NamedWeights:
    made = record.RunRecord.read(run_dir)
    saved = step_names.committed(run_dir / checkpoints.FOLDER_NAME)
    step = chosen_checkpoint.chosen_step(made, run_dir, sorted(saved), settings.checkpoint)
    return _of_checkpoint(saved[step][-1], f"{run_dir}, step {step}")


def _of_checkpoint(path: pathlib.Path, source: str) -> NamedWeights:
    """Return params and model_state of a checkpoint; the averaged params, where its optimizer kept them."""
    manifest = checkpoints.open_manifest(path)
    stored = weights_of_state(manifest.leaves)
    averaged = schedule_free_leaves(manifest.leaves)

    def read(name: str) -> np.ndarray:
        try:
            own = manifest.read_leaf(stored[name])
            if name not in averaged:
                return own
            return np.asarray(optimizers.schedule_free_average(own, *map(manifest.read_leaf, averaged[name])))
        except CheckpointError as error:
            raise UserError(f"init_from cannot read {path}: {error} Name another checkpoint.") from error

    return NamedWeights(source, tuple(stored), read)


def weights_of_state(leaves: Iterable[str]) -> dict[str, str]:
    """Return, for each param and leaf of model_state, the leaf of a saved state that holds its value in use."""
    leaves = list(leaves)
    own = [name for name in leaves if re.match(r"(params|model_state)(/|$)", name)]
    params = [name for name in own if name.startswith("params")]
    found = {name: name for name in own}
    for count in (name for name in leaves if name.startswith("opt_state/") and name.endswith(f"/{_AVERAGE_COUNT}")):
        prefix = count.removesuffix(_AVERAGE_COUNT)
        if all(prefix + name in leaves for name in params):
            return found | {name: prefix + name for name in params}
    return found


def schedule_free_leaves(leaves: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return, for each param that optax.contrib.schedule_free trained, the leaves z and b1 that its average needs."""
    leaves = set(leaves)
    weights = (name.removesuffix("weight_sum") for name in leaves if re.match(r"opt_state/(.*/)?weight_sum$", name))
    return {
        name: (own, f"{prefix}b1")
        for prefix in weights
        for name in leaves
        if f"{prefix}b1" in leaves and name.startswith("params") and (own := _beside(prefix, name)) in leaves
    }


def _beside(prefix: str, name: str) -> str:
    """Return the name of the leaf z of the state of schedule_free that belongs to the param of this name."""
    return f"{prefix}z{name.removeprefix('params')}"


def _of_safetensors(files: list[pathlib.Path], path: pathlib.Path) -> NamedWeights:
    opened = [safetensors_file.open_file(file) for file in files]
    places: dict[str, Callable[[], np.ndarray]] = {}
    for file in opened:
        for stored in file.entries:
            name = with_slashes(stored)
            if name in places:
                raise UserError(f"{path} holds two arrays with the name {name}. Remove one.")
            places[name] = functools.partial(file.read, stored)
    return NamedWeights(str(path), tuple(places), lambda name: places[name]())


def read_config(path: pathlib.Path) -> Mapping[str, Any] | None:
    """Return the settings that transformers stored beside its weights, None without.

    `path` is that of the weights, or of their folder.

    Raises:
      UserError: the file is damaged.
    """
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}. Copy or download it again.") from error
    return content if isinstance(content, dict) else None


def _of_npz(path: pathlib.Path) -> NamedWeights:
    def opened(name: str | None) -> Any:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                return list(content.files) if name is None else content[name]
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            why = str(error).rstrip(".")
            raise UserError(f"{path} is no whole .npz file of arrays: {why}. Copy or write it again.") from error

    stored: dict[str, str] = {}
    for member in opened(None):
        name = with_slashes(member)
        if name in stored:
            raise UserError(f"{path} holds two arrays with the name {name}. Remove one.")
        stored[name] = member
    return NamedWeights(str(path), tuple(stored), lambda name: opened(stored[name]))


def _of_tree(tree: Any, path: pathlib.Path) -> NamedWeights:
    leaves = {path_name(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def read(name: str) -> np.ndarray:
        if not isinstance(leaves[name], np.ndarray | np.generic | jax.Array | int | float | bool):
            raise UserError(f"{name} in {path} is {type(leaves[name]).__name__}, no array. Leave it out by a rule.")
        return np.asarray(leaves[name])

    return NamedWeights(str(path), tuple(leaves), read)


def with_slashes(name: str) -> str:
    """Return a name whose parts are separated by dots, as our names are."""
    return name.replace(".", "/")
