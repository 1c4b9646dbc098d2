"""The state that a run begins with where `init_from` names weights: params and model_state loaded, all else fresh.

`check` reads every value before a run directory exists, an array at a time, and forgets it again; `create_state` reads
them once more onto the devices.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import jax
import ml_dtypes
import numpy as np
import optax

from jaxdist import adapters
from jaxdist.checkpoint.pieces import place
from jaxdist.config.experiment import Experiment
from jaxdist.config.starting_weights import InitFrom
from jaxdist.errors import ConfigError, UserError, as_user_error
from jaxdist.run.warm_start import hugging_face_files, matching, weight_files
from jaxdist.spmd import keys, state, strategies
from jaxdist.spmd.layout import path_name

PyTree: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What a run began with; the run record keeps it.

    Attributes:
      source: of the weights.
      loaded: leaves of the model that were loaded.
      left: leaves of the source that were left out.
      fresh: leaves of the model that began as without weights.
      sha256: over the bytes of the loaded leaves, in the model's order.
    """

    source: str
    loaded: tuple[str, ...]
    left: tuple[str, ...]
    fresh: tuple[str, ...]
    sha256: str

    def __str__(self) -> str:
        parts = {"loaded": self.loaded, "left out": self.left, "fresh": self.fresh}
        return f"{self.source}: " + ", ".join(f"{len(names)} leaves {how}" for how, names in parts.items() if names)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that fit a model: which leaf is which, and the values by the model's names."""

    opened: weight_files.NamedWeights
    match: matching.Match
    structs: Mapping[str, Any]

    def value(self, leaf: str) -> np.ndarray:
        """Return the values of a leaf of the model.

        Raises:
          UserError: they are damaged, or of another shape or kind than the leaf.
        """
        name = self.match.loaded[leaf]
        with as_user_error():
            array = self.opened.read(name)
            rule = self.match.rules.get(name)
            if rule is not None and rule.function is not None:
                array = np.asarray(rule.function(array))
        return _fitted(array, self.structs[leaf], f"{leaf} from {name} of {self.opened.source}")

    def read_all(self) -> WarmStart:
        """Read every value, and return what was found."""
        digest = hashlib.sha256()
        for leaf in self.match.loaded:
            values = self.value(leaf)
            _check_numbers(values, f"{leaf} from {self.match.loaded[leaf]} of {self.opened.source}")
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        match = self.match
        left = (*match.left, *self.opened.left)
        return WarmStart(self.opened.source, tuple(match.loaded), left, match.fresh, digest.hexdigest())


def settings_of(experiment: Experiment) -> InitFrom | None:
    """Return the settings of the weights that a run begins with; None for random params."""
    return cast(InitFrom | None, experiment.init_from)


def check(experiment: Experiment, initial: tuple[PyTree, PyTree]) -> WarmStart | None:
    """Return what the run begins with, after reading all of it; None for random params.

    `initial` are shapes and dtypes of params and model_state.

    Raises:
      UserError: the weights are missing, damaged, or do not fit the model.
    """
    found = open_for(experiment, initial)
    return None if found is None else found.read_all()


def check_source(experiment: Experiment) -> None:
    """Raise UserError where there are no weights to begin with; for a supervisor, which makes no model."""
    settings = settings_of(experiment)
    if settings is not None:
        weight_files.open_weights(settings)


def open_for(experiment: Experiment, initial: tuple[PyTree, PyTree]) -> Weights | None:
    """Return the weights of an experiment, matched with the leaves of its model; see `check`."""
    settings = settings_of(experiment)
    if settings is None:
        return None
    opened = weight_files.open_weights(settings)
    if settings.names == "hugging-face":
        config = weight_files.read_config(pathlib.Path(settings.path))
        opened = hugging_face_files.as_ours(experiment.model, opened, config)
    structs, names = _leaves_of(initial)
    found = matching.match(opened.names, names, settings, source=opened.source)
    in_order = {leaf: found.loaded[leaf] for leaf in structs if leaf in found.loaded}
    return Weights(opened, dataclasses.replace(found, loaded=in_order), structs)


def check_not_removed(experiment: Experiment, run_dir: pathlib.Path, *, overwrite: bool) -> None:
    """Raise UserError where --overwrite would remove the weights that the run begins with."""
    settings = settings_of(experiment)
    if settings and overwrite and pathlib.Path(settings.path).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"--overwrite removes the run in {run_dir}, and init_from reads {settings.path}. Choose another --run-dir."
        )


def check_same(began: WarmStart, recorded: Mapping[str, Any] | None) -> None:
    """Raise ConfigError where a run that begins again would begin with other weights than it did before."""
    if recorded is not None and recorded.get("sha256") != began.sha256:
        raise ConfigError(
            f"A run without a checkpoint begins again with the weights it began with; those of {began.source} have "
            "changed since. Restore them, or start another run."
        )


def create_state(
    experiment: Experiment,
    init_fn: state.InitFn,
    optimizer: optax.GradientTransformation,
    strategy: strategies.Strategy,
) -> state.TrainState:
    """Return the state before the first step, with the weights that the experiment names."""
    mesh, rule = strategy.mesh, strategy.layout
    abstract = state.abstract_state(init_fn, optimizer, mesh=mesh, layout=rule)
    found = open_for(experiment, (abstract.params, abstract.model_state))
    is_canonical = strategy.logical_shards is not None
    if found is None:
        make = state.create_same_state if is_canonical else state.create_state
        return make(init_fn, optimizer, mesh=mesh, seed=experiment.seed, layout=rule)

    def replace(params: PyTree, model_state: PyTree) -> tuple[PyTree, PyTree]:
        leaves, structure = jax.tree.flatten((params, model_state))
        structs = jax.tree.leaves((abstract.params, abstract.model_state))
        pairs = zip(found.structs, leaves, structs, strict=True)
        new = [place(found.value(name), struct) if name in found.match.loaded else leaf for name, leaf, struct in pairs]
        return jax.tree.unflatten(structure, new)

    make_with = functools.partial(state.create_same_state, replace=replace)
    if not is_canonical:
        make_with = functools.partial(state.create_state_with, replace)
    return make_with(init_fn, optimizer, mesh=mesh, seed=experiment.seed, layout=rule)


def replace_leaves(found: Weights, leaves: list[np.ndarray]) -> list[np.ndarray]:
    """Return the leaves of params and model_state, in tree order, with those that are loaded replaced."""
    pairs = zip(found.structs, leaves, strict=True)
    return [found.value(name) if name in found.match.loaded else leaf for name, leaf in pairs]


def _leaves_of(initial: tuple[PyTree, PyTree]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the leaves of params and model_state by name, in tree order, and the names that each may have.

    A param whose dims its module has named is in a box; its name is that without, as in an export.
    """
    trees = {"params": initial[0]} | ({} if initial[1] is None else {"model_state": initial[1]})
    boxed = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees)]
    plain = jax.tree_util.tree_leaves_with_path(adapters.unboxed(trees))
    # In the order of a pair (params, model_state).
    by_tree = sorted(zip(boxed, plain, strict=True), key=lambda pair: not pair[0].startswith("params"))
    structs = {path_name(path): leaf for _, (path, leaf) in by_tree}
    names = {name: path_name(path) for name, (path, _) in by_tree}
    return structs, names | {name: name for name in structs}


def _fitted(array: np.ndarray, struct: Any, what: str) -> np.ndarray:
    """Return an array as the leaf that it is loaded into; only kinds that lose nothing are converted."""
    if keys.is_key(struct):
        raise UserError(f"{what} is a random key of JAX, which is not loaded. Name it in init_from.fresh.")
    if tuple(array.shape) != tuple(struct.shape):
        raise UserError(
            f"A loaded leaf has the shape of the model's; {what} has {tuple(array.shape)} and needs "
            f"{tuple(struct.shape)}. Change it by the function of a WeightRule, or name the leaf in init_from.fresh."
        )
    if array.dtype == struct.dtype:
        return array
    if not _is_wider(array.dtype, np.dtype(struct.dtype)):
        raise UserError(
            f"A loaded leaf keeps its values; {what} is {array.dtype}, which {struct.dtype} cannot hold exactly. "
            "Convert it by the function of a WeightRule."
        )
    return array.astype(struct.dtype)


def _check_numbers(values: np.ndarray, what: str) -> None:
    """Raise UserError for a param that is NaN somewhere: no step could be made from it. Statistics may hold some."""
    if what.startswith("params") and np.isnan(values).any():
        raise UserError(
            f"A loaded param is a number everywhere; {what} is NaN at {np.count_nonzero(np.isnan(values)):,} of "
            f"{values.size:,} places. Take an earlier checkpoint of the run that wrote it, or name the leaf in "
            "init_from.fresh."
        )


@functools.cache
def _is_wider(given: np.dtype, needed: np.dtype) -> bool:
    """Return whether every value of a dtype can be held by another."""
    if given == ml_dtypes.bfloat16:
        return needed in (np.dtype(np.float32), np.dtype(np.float64))
    return bool(np.can_cast(given, needed, "safe"))
