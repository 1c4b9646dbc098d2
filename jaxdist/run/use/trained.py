"""A trained run for use: its params, its predictions, its evaluation; needs the experiment file, not its training data.

>>> run = jaxdist.load("runs/digits_cnn-20261128-120000-000000")  # doctest: +SKIP
>>> run.predict({"image": images})  # doctest: +SKIP
"""

import dataclasses
import functools
import math
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import adapters, data, errors
from jaxdist.config import data_fields
from jaxdist.config.experiment import Experiment
from jaxdist.config.loading import load_experiment
from jaxdist.config.overrides import override
from jaxdist.config.starting_weights import Which
from jaxdist.data.sources import wrap
from jaxdist.run import components, directory
from jaxdist.run.use import shown_run
from jaxdist.rundir import chosen_checkpoint, record
from jaxdist.rundir.remote import fetching
from jaxdist.rundir.remote.run_address import RunPlace, place_of_run
from jaxdist.spmd import evaluate, state, strategies
from jaxdist.spmd.layout import path_name

_USED = ("model", "loss", "inputs", "precision")
"""The settings of an experiment that decide what a trained model computes."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedRun:
    """A trained run: the result of `load` and of `train`. It shows itself in a terminal and in a notebook.

    Attributes:
      run_dir: the run directory, or its address.
      record: its run record.
      experiment: the experiment that was trained.
      step: the step of the checkpoint.
      params: the params; the averaged ones, if the optimizer keeps them.
      model_state: the statistics that the model keeps; None if it keeps none.
      functions: the functions of the model.
      fields: the fields of an example, with shapes and dtypes of a batch.
      strategy: the mesh that predictions and evaluations are computed on.
    """

    run_dir: RunPlace
    record: record.RunRecord
    experiment: Experiment
    step: int
    params: Any
    model_state: Any
    functions: adapters.Functions
    fields: Mapping[str, jax.ShapeDtypeStruct]
    strategy: strategies.Strategy

    def __repr__(self) -> str:
        return shown_run.as_line(self.run_dir, self.step, self.record)

    def __rich__(self) -> Any:
        return shown_run.as_table(self._rows())

    def _repr_html_(self) -> str:
        return shown_run.as_html(self._rows())

    def _rows(self) -> dict[str, str]:
        return shown_run.rows(self.run_dir, self.step, self.record)

    def predict(self, inputs: Any) -> Any:
        """Return the model's outputs as NumPy arrays: a row for each example, in order.

        Args:
          inputs: a Source or map-style data set, a dict of arrays, or the array of the model's only input. The
            experiment's `eval_example_fn` is applied, as in an evaluation; labels are not needed.

        Raises:
          UserError: the model is an `adapters.Functions` without predict_fn, or the inputs do not fit it.
        """
        with errors.as_user_error():
            source = self._source(inputs)
            outputs: list[Any] = []
            for batch in self._batches(source):
                if not outputs:
                    self._check_rows(batch)
                outputs.append(jax.device_get(self._predict(self.params, self.model_state, batch)))
            # The last batch is padded.
            found = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *outputs)
        _warn_of_nan(found)
        return found

    def evaluate(self, source: Any = None) -> dict[str, float]:
        """Return the loss and the metrics on `source`, by default the experiment's held-out data, each example once.

        The metrics of several sets of examples by name, `{"day": ..., "night": ...}`, begin with the name and a slash.

        Raises:
          UserError: there are no such data, or they do not fit the model.
        """
        source = self.experiment.data.eval if source is None else source
        if source is None:
            raise errors.UserError(
                f"An evaluation needs data, and {self.experiment.name} has no data.eval. Name a data set."
            )
        step = self.strategy.make_eval_step(self.functions.eval_fn)
        with errors.as_user_error():
            make_step = self.strategy.make_step_with_rows
            collecting = components.make_collecting(self.experiment, self.functions, make_step)
            sets = data_fields.named_sources(data_fields.as_sources(source, "evaluate"))
            found = {
                name: evaluate.evaluate(step, self.params, self.model_state, self._batches(each), collecting)
                for name, each in sets.items()
            }
            return components.of_all_sets(found)

    def outputs(self, params: Any, model_state: Any, batch: Mapping[str, Any]) -> Any:
        """Return the model's outputs for a batch: a function that JAX can trace.

        Raises:
          UserError: the model is an `adapters.Functions` without predict_fn.
        """
        if self.functions.predict_fn is None:
            raise errors.UserError(
                "A model given as adapters.Functions needs a predict_fn(params, batch) to predict; it has none. Add it."
            )
        return self.functions.predict_fn(params, batch, *(() if model_state is None else (model_state,)))

    def _check_rows(self, batch: Mapping[str, Any]) -> None:
        """Raise UserError where an output of the model has no row for each example."""
        size = next(iter(batch.values())).shape[0]
        for rows in (size, 2 * size):  # a table of the model may have as many rows as one batch
            shapes = {
                name: jax.ShapeDtypeStruct((rows, *field.shape[1:]), field.dtype) for name, field in batch.items()
            }
            try:
                found = jax.eval_shape(self.outputs, self.params, self.model_state, shapes)
            except Exception:
                if rows == size:
                    raise
                return  # a model that is made for one number of examples is fine
            for path, leaf in jax.tree_util.tree_leaves_with_path(found):
                if leaf.shape[:1] != (rows,):
                    raise errors.UserError(
                        f"A prediction has a row for each example, but the output {path_name(path) or 'of the model'} "
                        f"has shape {leaf.shape} for {rows} examples. Return it in training alone, or compute it by "
                        "outputs(params, model_state, batch) of the loaded run."
                    )

    @functools.cached_property
    def _predict(self) -> Any:
        return jax.jit(self.outputs)

    def _source(self, inputs: Any) -> data.Source:
        if isinstance(inputs, Mapping):
            return data.ArraySource(inputs)
        if isinstance(inputs, np.ndarray | jax.Array):
            field = self.experiment.inputs
            if not isinstance(field, str):
                raise errors.UserError(f"The model takes the inputs {field}; pass a dict of arrays with these names.")
            return data.ArraySource({field: np.asarray(inputs)})
        return wrap.as_source(inputs)

    def _batches(self, source: data.Source) -> Any:
        experiment, mesh = self.experiment, self.strategy.mesh
        size = math.ceil(experiment.global_batch_size / mesh.size) * mesh.size
        loader = components.held_out_loader(experiment, source, global_batch_size=size)
        for number, (batch, _) in enumerate(
            data.feed(loader, mesh, self.strategy.batch_axes, experiment.data.prefetch)
        ):
            if number == 0:
                _warn_of_other_fields(self.fields, batch)
            yield batch


def _warn_of_other_fields(trained: Mapping[str, jax.ShapeDtypeStruct], given: Mapping[str, Any]) -> None:
    """Warn where a field is of another kind than in training, which many models compute with all the same.

    Images of 0 to 255 are to one that was trained on 0 to 1 just bright. Sizes may differ: sequences are longer.
    """
    for name in sorted({*trained} & {*given}):
        was, is_now = trained[name], given[name]
        if (_kind(was.dtype), len(was.shape)) != (_kind(is_now.dtype), len(is_now.shape)):
            warnings.warn(
                f"An example has {name} as {is_now.dtype} of shape {is_now.shape[1:]}; the model was trained on "
                f"{was.dtype} of shape {was.shape[1:]}. The outputs are of use if it means the same.",
                stacklevel=3,
            )


def _kind(dtype: Any) -> str:
    kinds: dict[str, Any] = {"whole numbers": jnp.integer, "real numbers": jnp.floating, "truths": jnp.bool_}
    return next((kind for kind, of in kinds.items() if jnp.issubdtype(dtype, of)), str(dtype))


def _warn_of_nan(outputs: Any) -> None:
    """Warn where outputs are NaN: what a model makes of an input that is not finite, or of an id past an embedding."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]
    rows = [np.isnan(leaf).reshape(len(leaf), -1).any(1) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    bad = np.flatnonzero(np.any(rows, axis=0)) if rows else np.empty(0, np.int64)
    if bad.size:
        warnings.warn(
            f"The outputs of {bad.size} of {len(rows[0])} examples are NaN, first those of example {bad[0]} (counted "
            "from 0). Inputs that are not finite do this, and ids that are not below the size of an embedding.",
            stacklevel=3,
        )


def load(
    run_dir: str | os.PathLike[str],
    checkpoint: Which = "best",
    *,
    experiment: str | os.PathLike[str] | Experiment | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainedRun:
    """Return the trained model of a run directory.

    Args:
      run_dir: the run directory, or its address: `s3://bucket/run`.
      checkpoint: "best" (the last, where the run watched no metric), "last", or a step that has a checkpoint.
      experiment: the experiment, or its file where that was moved; None is the file that was trained, with the
        settings it was trained with.
      devices: what to compute on, all devices by default; the params are replicated.

    Raises:
      UserError: the directory holds no run, the run has no such checkpoint, or the experiment is not the one trained.
    """
    place = place_of_run(os.fspath(run_dir))
    with fetching.fetched(place, fetching.one(checkpoint)) as local:
        return dataclasses.replace(_load(local, checkpoint, experiment, devices), run_dir=place)


def _load(
    run_dir: pathlib.Path,
    checkpoint: Which,
    experiment: str | os.PathLike[str] | Experiment | None,
    devices: Sequence[jax.Device] | None,
) -> TrainedRun:
    with errors.as_user_error():
        made = record.of_run(run_dir)
        found = experiment_of(made, run_dir, experiment)
        _check_same(made, found, run_dir)
        strategy = strategies.build("data-parallel", devices=devices)
        fields, steps_per_epoch = _data_of(made, run_dir)
        functions = components.make_functions(found, fields)
        optimizer, _ = components.make_optimizer(found, components.known_ends(found, steps_per_epoch))
        template = state.abstract_state(functions.init_fn, optimizer, mesh=strategy.mesh, layout=strategy.layout)
        with directory.open_checkpoints(found, run_dir, _identity_of(made, run_dir)) as checkpointer:
            step = chosen_checkpoint.chosen_step(made, run_dir, checkpointer.steps(), checkpoint)
            restored, _ = checkpointer.restore(template, step)
    params = components.params_in_use(restored)
    return TrainedRun(run_dir, made, found, step, params, restored.model_state, functions, fields, strategy)


def experiment_of(
    made: record.RunRecord, run_dir: pathlib.Path, given: str | os.PathLike[str] | Experiment | None
) -> Experiment:
    """Return the experiment that a run was trained with; `given` is it, or its file where that was moved.

    Raises:
      UserError: its file is not there, or not known.
    """
    if isinstance(given, Experiment):
        return given
    trained = made.extra.get("experiment") or {}
    file = trained.get("file") if given is None else os.fspath(given)
    if file is None:
        raise errors.UserError(
            f"The record of {run_dir} names no experiment file: it was trained from Python. Pass experiment=, the "
            "file or the Experiment."
        )
    if not pathlib.Path(file).is_file():
        raise errors.UserError(
            f"The experiment of {run_dir} {'was' if given is None else 'is to be'} {file}, which is not there. Name "
            "its new place: experiment= (in a command, --experiment)."
        )
    return override(load_experiment(file), trained.get("assignments", ()))


def _check_same(made: record.RunRecord, found: Experiment, run_dir: pathlib.Path) -> None:
    """Raise UserError where the experiment differs from the one that was trained; name what differs."""
    differing = directory.changed_settings(found, made.config, _USED)
    if differing:
        raise errors.UserError(
            f"A run is loaded with the experiment it was trained with; these settings have changed since {run_dir} was "
            f"trained: {differing}. Name the file as it was: experiment= (in a command, --experiment)."
        )


def _identity_of(made: record.RunRecord, run_dir: pathlib.Path) -> components.Identity:
    """Return what the run directory belongs to."""
    stored = _recorded(made, run_dir, "identity")
    names = [field.name for field in dataclasses.fields(components.Identity) if field.name in stored]
    return components.Identity(**{name: stored[name] for name in names})


def _data_of(made: record.RunRecord, run_dir: pathlib.Path) -> tuple[dict[str, jax.ShapeDtypeStruct], int]:
    """Return the fields of a batch and the steps of an epoch."""
    batch = _recorded(made, run_dir, "batch")
    try:
        fields = {
            name: jax.ShapeDtypeStruct(tuple(field["shape"]), field["dtype"]) for name, field in batch["fields"].items()
        }
    except (TypeError, ValueError) as error:
        raise errors.UserError(f"The run record names an array of a batch that cannot be made: {error}.") from error
    return fields, batch["steps_per_epoch"]


def _recorded(made: record.RunRecord, run_dir: pathlib.Path, key: str) -> Any:
    if key not in made.extra:
        raise errors.UserError(f"A run is loaded with what its record says of it; that of {run_dir} lacks {key}.")
    return made.extra[key]
