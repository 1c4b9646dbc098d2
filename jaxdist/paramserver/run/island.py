"""An experiment on the parameter server: initial params, a shard's optimizer, a worker's gradient, an evaluation.

What is trained is the pair (params, model_state) as one list of leaves. Params move by the optimizer; model_state, the
statistics a model keeps, is averaged over the examples of a step and replaced.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist import data, optimizers
from jaxdist.config.experiments import ConfigError, Experiment
from jaxdist.guards import guard
from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.settings import ParameterServer, Settings
from jaxdist.paramserver.protocol.shard import Shard
from jaxdist.paramserver.run.shard_optimizer import Kind, OptaxUpdater, classify
from jaxdist.paramserver.run.sharding import Sharding, make_sharding
from jaxdist.paramserver.run.sparse_push import sparse
from jaxdist.paramserver.run.whole_optimizer import OptimizerCut
from jaxdist.run import components
from jaxdist.spmd import evaluate, reduce
from jaxdist.spmd.state import TrainState

NO_LIMIT = 1 << 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment put together for the parameter server; every process of a run makes the same one."""

    experiment: Experiment
    settings: Settings
    loader: data.Loader
    functions: Any
    optimizer: Any
    learning_rate: Callable[[int], float] | None
    sharding: Sharding
    structure: Any
    num_params: int
    kind: Kind

    def cut(self) -> OptimizerCut:
        """Return how the optimizer's state is cut into those of the shards."""
        return OptimizerCut(self.optimizer, self.sharding, self.num_params, self.kind == "global_norm")

    def resharded(self, num_servers: int) -> "Plan":
        """Return the plan for another number of servers."""
        pairs = zip(self.sharding.shapes, self.sharding.dtypes)
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs]
        return dataclasses.replace(self, sharding=make_sharding(leaves, num_servers=num_servers))


def make_plan(experiment: Experiment, chosen: ParameterServer, *, kind: Kind | None = None) -> Plan:
    """Return the Plan of `experiment`.

    Args:
      experiment: what to train.
      chosen: its settings under `ps.`.
      kind: how the optimizer can run on shards, where that was found out already; None tries it.

    Raises:
      ValueError: settings that contradict each other, or that the parameter server cannot keep.
    """
    components.check_experiment(experiment)
    if experiment.precision == "float16":
        raise ConfigError("the parameter server does not scale losses; use precision=bfloat16 or float32")
    loader = components.make_loader(experiment)
    functions = components.make_functions(experiment, components.example_batch(loader))
    known_end = {"steps_per_epoch": loader.steps_per_epoch, "max_steps": _last_step(experiment, loader)}
    optimizer, learning_rate = components.make_optimizer(experiment, known_end)
    shapes = jax.eval_shape(functions.init_fn, jax.random.key(0))
    params, model_state = shapes if isinstance(shapes, tuple) and len(shapes) == 2 else (shapes, None)
    leaves, structure = jax.tree.flatten((params, model_state))
    sharding = make_sharding(leaves, num_servers=chosen.servers)
    settings = chosen.settings(
        num_examples=len(experiment.data.train),
        global_batch_size=experiment.global_batch_size,
        max_steps=known_end["max_steps"] or NO_LIMIT,
        read_every=_read_periods(experiment, loader.steps_per_epoch),
    )
    num_params = len(jax.tree.leaves(params))
    kind = kind or classify(optimizer, sharding.shapes[:num_params])
    plan = Plan(
        experiment, settings, loader, functions, optimizer, learning_rate, sharding, structure, num_params, kind
    )
    _check_order(plan)
    plan.cut()  # refuses what cannot be cut
    return plan


def _check_order(plan: Plan) -> None:
    if plan.loader.steps_per_epoch != plan.settings.steps_per_epoch:
        raise ConfigError(
            f"the parameter server leases every example of an epoch, {plan.settings.steps_per_epoch} batches; this "
            f"order has {plan.loader.steps_per_epoch}. Use an order that shows each example once"
        )


def _last_step(experiment: Experiment, loader: data.Loader) -> int | None:
    return components.last_step(experiment, loader.steps_per_epoch)


def _evaluation_period(experiment: Experiment, steps_per_epoch: int) -> int | None:
    if experiment.data.eval is None:
        return None
    every = experiment.eval
    return every.every_steps or every.every_epochs * steps_per_epoch


def _read_periods(experiment: Experiment, steps_per_epoch: int) -> tuple[int, ...]:
    """Return how often the params are looked at: for checkpoints, and for evaluations."""
    evaluations = _evaluation_period(experiment, steps_per_epoch)
    return (experiment.checkpoints.every_steps, *([] if evaluations is None else [evaluations]))


def evaluation_period(plan: Plan) -> int | None:
    """Return the steps from one evaluation to the next; None without held-out data."""
    return _evaluation_period(plan.experiment, plan.settings.steps_per_epoch)


def initial_leaves(plan: Plan) -> list[np.ndarray]:
    """Return the leaves before the first step, the same that `state.create_state` makes from this seed."""
    init_key, _ = jax.random.split(jax.random.key(plan.experiment.seed))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(_pair(jax.jit(plan.functions.init_fn)(init_key)))]


def _pair(created: Any) -> tuple[Any, Any]:
    return created if isinstance(created, tuple) and len(created) == 2 else (created, None)


def make_shard(plan: Plan, number: int) -> Shard:
    """Return shard `number` before the first step."""
    blocks = plan.sharding.shards[number]
    ranks = [len(plan.sharding.shapes[block.leaf]) for block in blocks if block.leaf < plan.num_params]
    updater = OptaxUpdater(plan.optimizer, kind=plan.kind, ranks=ranks)
    params = plan.sharding.split(initial_leaves(plan))[number]
    return Shard(shard=number, settings=plan.settings, updater=updater, params=params)


class Island:
    """A worker's devices: computes the gradient sums of a lease, data-parallel over the local devices."""

    def __init__(self, plan: Plan, devices: Sequence[jax.Device]) -> None:
        self.plan = plan
        self._placement = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
        _, self._key = jax.random.split(jax.random.key(plan.experiment.seed))
        self._sums = jax.jit(self._compute_sums)
        size = plan.experiment.global_batch_size
        rows = -(-size // plan.settings.num_slices)
        self._rows = -(-rows // len(devices)) * len(devices)

    def _compute_sums(self, leaves: Any, batch: Any, step: jax.Array, slice_: jax.Array) -> Any:
        plan = self.plan
        params, model_state = jax.tree.unflatten(plan.structure, leaves)
        microbatches = plan.experiment.num_microbatches
        sums = reduce.accumulate_sums(
            plan.functions.loss_fn,
            params,
            model_state,
            batch,
            jax.random.fold_in(self._key, step),
            num_microbatches=microbatches,
            first_index=slice_ * microbatches,
        )
        # Statistics are averaged over examples, gradients over what the loss counts; one divisor serves both.
        ratio = jnp.where(sums.num_examples > 0, sums.loss.count / sums.num_examples, 0.0)
        state = jax.tree.map(lambda leaf: leaf * ratio, sums.model_state)
        grads = jax.tree.leaves(sums.grads)
        finite = jnp.stack([jnp.isfinite(sums.loss.total), *(jnp.isfinite(leaf).all() for leaf in grads)]).all()
        squares = sum(jnp.vdot(leaf, leaf) for leaf in grads)
        return (*grads, *jax.tree.leaves(state)), sums.loss, sums.metrics, finite, squares

    def gradient(self, compute: effects.Compute) -> messages.Computed:
        """Return what a worker pushes for the lease."""
        plan, lease = self.plan, compute.lease
        batch = self._batch(lease)
        leaves = plan.sharding.join(compute.params)
        batch = jax.device_put(batch, self._placement)
        sums, loss, metrics, finite, squares = jax.device_get(
            self._sums(leaves, batch, np.int32(lease.step), np.int32(lease.slice))
        )
        flat = plan.sharding.split([leaf.astype(d) for leaf, d in zip(sums, plan.sharding.dtypes, strict=True)])
        pieces = tuple(
            tuple(sparse(piece, block.row) for piece, block in zip(shard, blocks, strict=True))
            for shard, blocks in zip(flat, plan.sharding.shards, strict=True)
        )
        count = float(loss.count)
        rows = [messages.Metric("loss", float(loss.total), count)]
        rows += [messages.Metric(name, float(mean.total), float(mean.count)) for name, mean in metrics.items()]
        norm_squared = float(squares) / max(count, 1.0) ** 2
        return messages.Computed(
            compute.incarnation, compute.sequence, count, bool(finite), norm_squared, pieces, tuple(rows)
        )

    def explain_nonfinite(self, compute: effects.Compute) -> guard.NonFiniteReport:
        """Return why the gradient of the lease is not finite; its loss is that of the worker's part of the batch."""
        plan, lease = self.plan, compute.lease
        params, model_state = jax.tree.unflatten(plan.structure, plan.sharding.join(compute.params))
        state = TrainState(jnp.asarray(lease.step, jnp.int32), params, model_state, (), self._key)
        batch = jax.device_put(self._batch(lease), self._placement)
        return guard.explain_nonfinite(
            plan.functions.loss_fn, state, batch, step=lease.step + 1, first_row=self._first_row(lease)
        )

    def _first_row(self, lease: messages.Lease) -> int:
        """Return which row of the global batch is the lease's first."""
        within = lease.step % self.plan.settings.steps_per_epoch
        return lease.start - within * self.plan.experiment.global_batch_size

    def _batch(self, lease: messages.Lease) -> dict[str, np.ndarray]:
        """Return the lease's examples, padded to one size, so that the gradient compiles once."""
        size = self.plan.experiment.global_batch_size
        first = self._first_row(lease)
        rows = np.arange(first, first + max(lease.stop - lease.start, 1))
        rows = np.minimum(rows, size - 1)
        loader = self.plan.loader.with_rows(rows)
        loader.read_ahead, loader.num_threads = 0, 0
        loader.start = dataclasses.replace(loader.beginning, epoch=lease.data_epoch, position=lease.start - first)
        batches = iter(loader)
        batch = next(batches).batch
        batches.close()
        padded = {
            name: np.concatenate([array, np.repeat(array[:1], self._rows - len(array), axis=0)])
            for name, array in batch.items()
        }
        padded["mask"] = padded["mask"] * (np.arange(self._rows) < lease.stop - lease.start)
        return padded


def position(plan: Plan, step: int) -> data.Position:
    """Return where the data stand after `step` batches."""
    epoch, within = divmod(step, plan.settings.steps_per_epoch)
    if step and not within:  # the end of an epoch, not the beginning of the next
        epoch, within = epoch - 1, plan.settings.steps_per_epoch
    seen = min(within * plan.settings.global_batch_size, plan.settings.num_examples)
    return dataclasses.replace(plan.loader.beginning, epoch=epoch, position=seen)


def train_state(plan: Plan, step: int, leaves: Sequence[np.ndarray], opt_leaves: Sequence[np.ndarray]) -> TrainState:
    """Return the state that data-parallel training has after the same steps, on this process's first device."""
    params, model_state = jax.tree.unflatten(plan.structure, leaves)
    opt_state = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(plan.optimizer.init, params)), opt_leaves)
    _, key = jax.random.split(jax.random.key(plan.experiment.seed))
    return jax.device_put(
        TrainState(jnp.asarray(step, jnp.int32), params, model_state, opt_state, key), jax.local_devices()[0]
    )


class Judge:
    """Looks at the state of a cut."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._step = evaluate.eval_step(plan.functions.eval_fn)

    def state(self, cut: journal.CutFile) -> TrainState:
        """Return the training state of a cut."""
        leaves = self.plan.sharding.join([answer.pieces for answer in cut.shards])
        opt_leaves = self.plan.cut().join([answer.opt_state for answer in cut.shards])
        return train_state(self.plan, cut.step, leaves, opt_leaves)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return `eval/...` metrics, of the averaged params where the optimizer keeps them; none without data."""
        experiment = self.plan.experiment
        source = experiment.data.eval
        if source is None:
            return {}
        loader = data.Loader(
            source,
            global_batch_size=experiment.global_batch_size,
            seed=experiment.seed,
            shuffle=False,
            num_epochs=1,
            example_fn=experiment.data.eval_example_fn,
            num_threads=0,
            on_bad=experiment.data.on_bad,
        )
        averaged = optimizers.ema_params(state.opt_state)
        params = state.params if averaged is None else averaged
        batches = (jax.device_put(batch) for batch, _ in loader)
        found = evaluate.evaluate(self._step, params, state.model_state, batches)
        return {f"eval/{name}": value for name, value in found.items()}
