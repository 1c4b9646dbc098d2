"""The parts of one experiment on given devices: loaders, functions, optimizer, state, steps. Nothing runs here."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxdist import adapters, data, errors, optimizers, stop
from jaxdist.adapters.initial_shapes import InitialShapes
from jaxdist.config import data_fields
from jaxdist.config.experiment import Experiment
from jaxdist.data import fingerprints
from jaxdist.data.sources import wrap
from jaxdist.errors import ConfigError, UserError
from jaxdist.guards import step_hashes
from jaxdist.models import mup
from jaxdist.run import preflight
from jaxdist.run.warm_start import beginning
from jaxdist.rundir import record
from jaxdist.spmd import evaluate, mesh, precision, state, step, strategies
from jaxdist.spmd.canonical import canonical_step
from jaxdist.spmd.metrics import Batch, unshared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """An experiment put together for some devices.

    Attributes:
      experiment: what was asked for.
      identity: what its run directory belongs to.
      strategy: mesh, layout and how the batch is sharded.
      sizes: examples per device and so on.
      loader: the training batches, from the first.
      eval_loaders: the batches of each set of held-out examples by name; '' is the name of one alone.
      functions: of the model, in the experiment's precision.
      optimizer: in optax.
      learning_rate: step -> learning rate; None where the optimizer is optax's own.
      abstract_state: the state's shapes, dtypes and shardings, as jax.ShapeDtypeStructs.
      step: the training step.
      fields: shapes and dtypes of a global batch.
      eval_step: the evaluation step, or None without held-out data.
      collecting: the metrics of an evaluation that are no means, or None.
    """

    experiment: Experiment
    identity: "Identity"
    strategy: strategies.Strategy
    sizes: mesh.BatchSizes
    loader: data.Loader
    eval_loaders: Mapping[str, data.Loader]
    functions: adapters.Functions
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[int], float] | None
    abstract_state: state.TrainState
    fields: Mapping[str, jax.ShapeDtypeStruct]
    step: step.Step
    eval_step: evaluate.EvalStep | None
    collecting: evaluate.Collecting | None

    def create_state(self) -> state.TrainState:
        """Return the state before the first step, with the weights of `init_from`."""
        return beginning.create_state(self.experiment, self.functions.init_fn, self.optimizer, self.strategy)

    def with_other_inputs(self, experiment: Experiment, identity: "Identity | None" = None) -> "Parts | None":
        """Return the parts of an experiment that differs in numbers which enter the same compiled programs.

        These are the learning rate and the seed; see `shares_programs`. None if the step takes no such numbers.
        """
        optimizer, learning_rate = make_optimizer(experiment, known_ends(experiment, self.loader.steps_per_epoch))
        same_program = step.with_inputs_of(self.step, optimizer, self.strategy.mesh)
        if same_program is None:
            return None
        fingerprint = self.identity.data
        return dataclasses.replace(
            self,
            experiment=experiment,
            identity=identity or identity_of(experiment, fingerprint),
            loader=make_loader(experiment, fingerprint=fingerprint),
            eval_loaders=make_eval_loaders(experiment),
            optimizer=optimizer,
            learning_rate=learning_rate,
            step=same_program,
        )

    def check_weights(self) -> beginning.WarmStart | None:
        """Return the weights that the run begins with, after reading all of them; None without `init_from`."""
        return beginning.check(self.experiment, (self.abstract_state.params, self.abstract_state.model_state))

    def continued(self, progress: stop.Progress) -> "Parts":
        """Return the parts for a run that is resumed: a schedule in epochs continues where the examples brought it.

        `progress` is told the batch size, for the next time.

        Raises:
          ConfigError: the batch size has changed, and the schedule counts both steps and epochs.
        """
        experiment, loader = self.experiment, self.loader
        size, before, described = experiment.global_batch_size, progress.global_batch_size, experiment.optimizer
        sizes = {"num_examples": len(experiment.data.train), "steps_per_epoch": loader.steps_per_epoch}
        offset = stop.schedule_offset(progress, global_batch_size=size, **sizes) if progress.step else 0
        progress.global_batch_size, progress.schedule_offset = size, offset
        if not isinstance(described, optimizers.Optimizer) or not offset:
            return self
        known_end = known_ends(experiment, loader.steps_per_epoch)
        ends_in_epochs = known_end["max_steps"] != experiment.stop.max_steps
        units = optimizers.units(described, global_batch_size=size, ends_in_epochs=ends_in_epochs)
        if len(units) > 1 and before not in (None, size):
            raise ConfigError(
                "A run whose schedule counts both steps and epochs keeps its batch size, since another one would move "
                f"its parts against each other; it was trained with global_batch_size={before}, got {size}. Resume "
                "with that, or count everything in epochs: optimizer.schedule.unit, warmup and length."
            )
        if "epochs" not in units:
            return self
        optimizer, learning_rate = make_optimizer(experiment, known_end, offset=offset)
        step_fn = make_step(experiment, self.strategy, self.functions, optimizer)
        return dataclasses.replace(self, optimizer=optimizer, learning_rate=learning_rate, step=step_fn)

    def batches(self, start: data.Position | None = None) -> Iterator[tuple[Batch, data.Position]]:
        """Return the training batches on the mesh, each with the position after it, from `start` on."""
        loader = self.loader if start is None else self.loader.starting_at(start)
        return self._feed(loader)

    def _feed(self, loader: data.Loader) -> Iterator[tuple[Batch, data.Position]]:
        strategy, prefetch = self.strategy, self.experiment.data.prefetch
        return data.feed(loader, strategy.mesh, strategy.batch_axes, prefetch, logical_shards=strategy.logical_shards)

    def evaluate(self, train_state: state.TrainState) -> dict[str, float]:
        """Return loss and metrics on the held-out data; of the averaged params, where the optimizer keeps them."""
        step = self.eval_step
        assert step is not None
        params, model_state = params_in_use(train_state), train_state.model_state

        def evaluate_set(loader: data.Loader) -> dict[str, float]:
            batches = (batch for batch, _ in self._feed(loader))
            return evaluate.evaluate(step, params, model_state, batches, self.collecting)

        return of_all_sets({name: evaluate_set(loader) for name, loader in self.eval_loaders.items()})

    def evaluate_one_batch(self, train_state: state.TrainState) -> None:
        """Evaluate the first batch of each set of held-out examples, so that all that it needs is compiled."""
        step = self.collecting.step if self.collecting else self.eval_step
        for loader in self.eval_loaders.values():
            with contextlib.closing(self._feed(loader)) as batches:  # type: ignore[type-var]
                batch, _ = next(batches)
            assert step is not None
            jax.block_until_ready(step(params_in_use(train_state), train_state.model_state, batch))


def of_all_sets(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of all sets of held-out examples; those of a set with a name begin with that and a slash."""
    return {
        f"{name}/{metric}" if name else metric: value
        for name, metrics in found.items()
        for metric, value in metrics.items()
    }


def params_in_use(train_state: state.TrainState) -> Any:
    """Return the params that a trained model is used with: the averaged ones, where the optimizer keeps them."""
    return optimizers.params_in_use(train_state.params, train_state.opt_state)


def put_together(
    experiment: Experiment,
    *,
    devices: Sequence[jax.Device],
    identity: "Identity | None" = None,
    is_checked: bool = False,
) -> Parts:
    """Return the parts of `experiment` on `devices`; an identity that is already known is not computed again.

    With `is_checked` model, loss, metrics and examples are not tried in advance: the job has trained with them before.

    Raises:
      ValueError: settings that do not fit the devices, the data or each other; the message says which.
    """
    strategy = strategies.build(
        experiment.strategy,
        devices=devices,
        mesh_axes=experiment.mesh,
        reduction=experiment.reduction,
        logical_shards=experiment.logical_shards,
        rules=experiment.layout.rules,
        names=experiment.layout.names,
        min_size=experiment.layout.min_size,
    )
    sizes = mesh.batch_sizes(
        experiment.global_batch_size,
        strategy.mesh,
        axes=strategy.batch_axes,
        num_microbatches=experiment.num_microbatches,
        logical_shards=strategy.logical_shards,
    )
    loader = make_loader(experiment, fingerprint=identity.data if identity else None)
    shapes = example_batch(loader)
    initial = InitialShapes(strategy.mesh if is_checked else None)
    functions = make_functions(experiment, shapes, is_checked=is_checked, initial=initial)
    known_end = known_ends(experiment, loader.steps_per_epoch)
    optimizer, learning_rate = make_optimizer(experiment, known_end)
    # A leaf that cannot be sharded as requested is found here, before anything is written.
    init_fn = initial.alike(functions.init_fn)
    abstract = state.abstract_state(init_fn, optimizer, mesh=strategy.mesh, layout=strategy.layout)
    eval_loaders = make_eval_loaders(experiment)
    if not is_checked:
        parts = strategy.logical_shards or sizes.global_batch_size // sizes.device_batch_size
        together = sizes.global_batch_size // parts // sizes.num_microbatches
        check_early(experiment, functions, abstract, loader, eval_loaders, shapes, num_together=together)
        preflight.check_update(optimizer, abstract, same_bits=experiment.reduction == "canonical")
    return Parts(
        experiment=experiment,
        identity=identity or identity_of(experiment, loader.beginning.fingerprint),
        strategy=strategy,
        sizes=sizes,
        loader=loader,
        eval_loaders=eval_loaders,
        functions=functions,
        optimizer=optimizer,
        learning_rate=learning_rate,
        abstract_state=abstract,
        fields=shapes,
        step=make_step(experiment, strategy, functions, optimizer),
        eval_step=strategy.make_eval_step(functions.eval_fn) if eval_loaders else None,
        collecting=make_collecting(experiment, functions, strategy.make_step_with_rows),
    )


def check_early(
    experiment: Experiment,
    functions: adapters.Functions,
    abstract: state.TrainState,
    loader: data.Loader,
    eval_loaders: Mapping[str, data.Loader],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    num_together: int,
) -> None:
    """Check all that can be known before the first step: model, loss and metrics are traced, and examples read.

    `num_together` is how many examples of a batch one call of the loss sees.

    Raises:
      ValueError: something is wrong; see `preflight`.
    """
    experiment.stop.rule()
    if isinstance(experiment.optimizer, optimizers.Optimizer):
        preflight.check_groups(experiment.optimizer, abstract.params)
        ends, size = known_ends(experiment, loader.steps_per_epoch), experiment.global_batch_size
        preflight.check_rates(experiment.optimizer, global_batch_size=size, **ends)
    collect_fn = make_collect_fn(experiment, functions)
    eval_shapes = {name: example_batch(each) for name, each in eval_loaders.items()}
    preflight.check(experiment, functions, abstract, shapes, eval_shapes, collect_fn)
    if num_together < experiment.global_batch_size:
        preflight.check_order(functions, abstract, shapes)
    preflight.check_labels(experiment, functions, abstract, shapes)
    preflight.check_coupling(experiment, functions, abstract, shapes, loader, num_together=num_together)
    preflight.check_evaluation(experiment, functions, abstract, eval_loaders)
    preflight.check_state(functions, abstract, loader, num_together=num_together)
    forms = preflight.check_samples(loader, "data.train", among=preflight.EARLY_BATCHES)
    preflight.check_forms(functions, abstract, forms, held_out=False)
    same_bits = experiment.reduction == "canonical"
    preflight.check_repeatable(loader, "data.train", same_bits=same_bits)
    preflight.check_arrays_of_their_own(loader, "data.train", alone=not eval_loaders)
    for name, each in eval_loaders.items():
        setting = data_fields.setting_of_set(name)
        preflight.check_forms(functions, abstract, preflight.check_samples(each, setting), held_out=True)
        preflight.check_repeatable(each, setting, same_bits=same_bits)
        preflight.check_arrays_of_their_own(each, setting, alone=False)
    preflight.check_no_sums(experiment, functions, abstract, loader, eval_loaders)


def make_loader(experiment: Experiment, *, fingerprint: str | None = None) -> data.Loader:
    """Return the loader of the training examples; it never ends, since the stop rules say when to end.

    `fingerprint` is that of the training data, where it is known already.
    """
    return data.Loader(
        experiment.data.train,
        global_batch_size=experiment.global_batch_size,
        seed=experiment.seed,
        shuffle=experiment.data.order or experiment.data.shuffle,
        example_fn=experiment.data.example_fn,
        batch_fn=experiment.data.batch_fn,
        num_threads=experiment.data.num_threads,
        num_workers=experiment.data.num_workers,
        on_bad=experiment.data.on_bad,
        timeout_seconds=experiment.data.timeout_seconds,
        fingerprint=data_fingerprint(experiment) if fingerprint is None else fingerprint,
    )


def make_eval_loaders(experiment: Experiment) -> dict[str, data.Loader]:
    """Return a loader for each set of held-out examples: each of them once, in the source's order."""
    sources = data_fields.named_sources(experiment.data.eval)
    settings = {"on_bad": experiment.data.on_bad, "global_batch_size": experiment.global_batch_size}
    return {name: held_out_loader(experiment, source, **settings) for name, source in sources.items()}


def held_out_loader(experiment: Experiment, source: data.Source, **settings: Any) -> data.Loader:
    """Return the loader of examples that are not trained on; the caller sets `global_batch_size`, perhaps `on_bad`."""
    return data.Loader(
        source,
        seed=experiment.seed,
        shuffle=False,
        num_epochs=1,
        example_fn=experiment.data.eval_example_fn,
        num_threads=experiment.data.num_threads,
        num_workers=experiment.data.num_workers,
        timeout_seconds=experiment.data.timeout_seconds,
        fingerprint="",  # No position in these data is ever stored.
        **settings,
    )


def make_collect_fn(experiment: Experiment, functions: adapters.Functions) -> evaluate.CollectFn | None:
    """Return what collects the rows of the metrics that are not means, by number; None if there are no such metrics.

    Raises:
      ConfigError: the model's outputs cannot be had.
    """
    metrics, predict_fn = experiment.eval.metrics, functions.predict_fn
    if not metrics:
        return None
    if predict_fn is None:
        raise ConfigError(
            "eval.metrics are computed from the model's outputs, and a model given as adapters.Functions gives them by "
            "its predict_fn(params, batch); it has none. Add it."
        )

    def collect(params: Any, model_state: Any, batch: Batch) -> list[Any]:
        outputs = predict_fn(params, unshared(batch), *(() if model_state is None else (model_state,)))
        return [dict(metric.collect(*unshared((outputs, batch)))) for metric in metrics]

    return collect


def make_collecting(
    experiment: Experiment,
    functions: adapters.Functions,
    make_step: Callable[[evaluate.EvalFn, evaluate.CollectFn], evaluate.StepWithRows],
) -> evaluate.Collecting | None:
    """Return the metrics of an evaluation that are not means; None if there are no such metrics.

    Raises:
      ConfigError: the model's outputs cannot be had.
    """
    collect_fn = make_collect_fn(experiment, functions)
    if collect_fn is None:
        return None

    def compute(rows: Sequence[Any]) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric, own in zip(experiment.eval.metrics, rows, strict=True):
            try:
                values = {name: float(value) for name, value in dict(metric.compute(own)).items()}
            except Exception as error:
                raise UserError(
                    f"The metric {errors.named(metric)} of eval.metrics failed: {errors.describe(error)}. Its "
                    "`compute` returns a dict with a number for each of its names."
                ) from error
            if set(values) != set(metric.names):
                raise UserError(
                    f"The metric {errors.named(metric)} reports {sorted(values)}, but its names are "
                    f"{sorted(metric.names)}."
                )
            found |= values
        return found

    return evaluate.Collecting(make_step(functions.eval_fn, collect_fn), compute)


def example_batch(loader: data.Loader) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of a global batch, by reading its first example."""
    return {
        name: jax.ShapeDtypeStruct(
            (loader.global_batch_size, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype)
        )
        for name, array in loader.first_example().items()
    }


def make_functions(
    experiment: Experiment,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    is_checked: bool = False,
    initial: InitialShapes | None = None,
) -> adapters.Functions:
    """Return the model's functions in the experiment's precision; `is_checked` as in `put_together`."""
    return adapters.from_model(
        experiment.model,
        experiment.loss,
        shapes,
        inputs=experiment.inputs,
        precision=experiment.precision,
        is_checked=is_checked,
        initial=initial,
    )


def make_step(
    experiment: Experiment,
    strategy: strategies.Strategy,
    functions: adapters.Functions,
    optimizer: optax.GradientTransformation,
) -> step.Step:
    """Return the training step."""
    hashing = step_hashes.StepHashing() if experiment.guards.step_hashes else canonical_step.NO_HASHING
    return strategy.make_step(
        functions.loss_fn, optimizer, num_microbatches=experiment.num_microbatches, hashing=hashing
    )


def known_ends(experiment: Experiment, steps_per_epoch: int) -> dict[str, int | None]:
    """Return `steps_per_epoch` and `max_steps`, as `optimizers.build` takes them."""
    return {"steps_per_epoch": steps_per_epoch, "max_steps": experiment.stop.last_step(steps_per_epoch)}


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run directory belongs to. Devices, strategy, stop rules, batch size and the like are not part of it.

    Attributes:
      name: of the experiment.
      model: hash of its settings.
      data: fingerprint of the training data.
      seed: of the experiment.
      init_from: hash of the settings of the weights that the run begins with; "" for random params.
    """

    name: str
    model: str
    data: str
    seed: int
    init_from: str = ""

    def __str__(self) -> str:
        weights = [self.init_from] if self.init_from else []
        return f"{self.name}:{_short_hash([self.model, self.data, self.seed, *weights])}"

    def to_json(self) -> dict[str, Any]:
        """Return the identity as the run record keeps it: `init_from` only where there are weights."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "init_from" or value}


def identity(experiment: Experiment) -> Identity:
    """Return the identity of `experiment`; takes the fingerprint of its data, which may look at every file."""
    return identity_of(experiment, data_fingerprint(experiment))


def data_fingerprint(experiment: Experiment) -> str:
    """Return the fingerprint of the training examples: of samples, or, where `data.strict` says so, of all contents."""
    source = wrap.as_source(experiment.data.train)
    return fingerprints.strict_fingerprint(source) if experiment.data.strict else source.fingerprint()


def identity_of(experiment: Experiment, fingerprint: str) -> Identity:
    """Return the identity of `experiment`, whose training data have this fingerprint."""
    return Identity(
        name=experiment.name,
        model=_short_hash(settings_of_model(experiment.model)),
        data=fingerprint,
        seed=experiment.seed,
        init_from="" if experiment.init_from is None else _short_hash(record.plain(experiment.init_from)),
    )


def settings_of_model(model: Any) -> Any:
    """Return the settings of a model as plain data, without predict_fn, which may be added after training."""
    settings = record.plain(model)
    if isinstance(model, adapters.Functions) and isinstance(settings, dict):
        settings.pop("predict_fn")
    return settings


def _short_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def make_optimizer(
    experiment: Experiment, known_end: Mapping[str, int | None], *, offset: int = 0
) -> tuple[optax.GradientTransformation, Callable[[int], float] | None]:
    """Return the optimizer of `experiment`, and step -> learning rate (None where the optimizer is optax's own).

    `known_end` is that of `known_ends`; for `offset` see `optimizers.build`.
    """
    described = experiment.optimizer
    settings: dict[str, Any] = {"global_batch_size": experiment.global_batch_size, "offset": offset, **known_end}
    name = described.name if isinstance(described, optimizers.Optimizer) else None
    factors = mup.rate_factors(experiment.model, name)
    built = optimizers.build(described, **settings, rate_factors=factors, of_some_params=True)  # preflight looks at all
    optimizer = precision.with_loss_scale(built, experiment.precision)
    if not isinstance(described, optimizers.Optimizer):
        return optimizer, None
    made = optimizers.make_schedule(described, **settings)
    schedule = jax.jit(lambda count: made(count))
    # On the host, so that logging it does not queue behind the steps on an accelerator.
    host = jax.local_devices(backend="cpu")[0]

    def learning_rate(number: int) -> float:
        with jax.default_device(host):
            return float(schedule(np.int32(number - 1)))

    return optimizer, learning_rate


def watched_metric(experiment: Experiment) -> tuple[str | None, stop.Mode]:
    """Return the metric whose best state is kept, or None, and which of its values are good."""
    kept, ends = experiment.checkpoints, experiment.stop
    if kept.best_metric is not None:
        return kept.best_metric, kept.best_mode
    return (ends.target_metric if ends.target is not None or ends.patience is not None else None), ends.mode
