"""The Plan of a run: everything that its processes derive from the experiment, the same in each of them.

The trained values are the pair (params, model_state) as one list of leaves. The optimizer updates the params;
model_state, the statistics that a model keeps, is replaced by its mean over the examples of a step.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxdist import data, optimizers
from jaxdist.config.experiment import Experiment
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.errors import ConfigError
from jaxdist.paramserver.protocol.settings import Settings
from jaxdist.paramserver.protocol.shard import Shard
from jaxdist.paramserver.run.optimizer_kind import Kind, choose_kind, needs_norm, needs_whole_leaves, path_names
from jaxdist.paramserver.run.shard_optimizer import OptaxUpdater
from jaxdist.paramserver.run.sharding import Sharding, make_sharding
from jaxdist.paramserver.run.whole_optimizer import OptimizerSharding
from jaxdist.run import components, preflight
from jaxdist.spmd import keys
from jaxdist.spmd.canonical import thread_pool
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.state import TrainState, initial_state

NO_LIMIT = 1 << 40
SMALL_GRADIENT = 100_000_000
"""Products of examples, their numbers and params: a smaller gradient takes about a millisecond of one core."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the processes of a run derive from the experiment; every process makes the same Plan."""

    experiment: Experiment
    settings: Settings
    loader: data.Loader
    functions: Any
    optimizer: Any
    learning_rate: Callable[[int], float] | None
    sharding: Sharding
    structure: Any
    names: tuple[str, ...]
    kind: Kind

    def run_keys(self) -> keys.RunKeys:
        """Return the keys made from the seed of the experiment."""
        return keys.run_keys(keys.from_seed(self.experiment.seed))

    def optimizer_sharding(self) -> OptimizerSharding:
        """Return how the optimizer state is divided among the shards."""
        return OptimizerSharding(self.optimizer, self.sharding, self.names, needs_norm(self.kind))

    def resharded(self, num_servers: int) -> "Plan":
        """Return the plan for another number of servers."""
        pairs = zip(self.sharding.shapes, self.sharding.dtypes)
        leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs]
        whole = self.sharding.whole_leaves
        return dataclasses.replace(self, sharding=make_sharding(leaves, num_servers=num_servers, whole_leaves=whole))


def make_plan(
    experiment: Experiment, chosen: ParameterServer, *, kind: Kind | None = None, fingerprint: str | None = None
) -> Plan:
    """Return the Plan of `experiment`.

    Args:
      experiment: what to train.
      chosen: the settings under `ps.`.
      kind: how the optimizer runs on shards, if known; None chooses it.
      fingerprint: fingerprint of the training data, if known.

    Raises:
      ValueError: the settings contradict each other, or the parameter server does not support them.
    """
    preflight.check_settings(experiment)
    _check_has_effect(experiment)
    loader = components.make_loader(experiment, fingerprint=fingerprint)
    functions = components.make_functions(experiment, components.example_batch(loader))
    known_end = components.known_ends(experiment, loader.steps_per_epoch)
    optimizer, learning_rate = components.make_optimizer(experiment, known_end)
    make_initial = functools.partial(initial_state, functions.init_fn)
    params, model_state = jax.eval_shape(make_initial, jax.random.key(0))
    _check_counters(model_state)
    if isinstance(experiment.optimizer, optimizers.Optimizer):
        preflight.check_groups(experiment.optimizer, params)
    leaves, structure = jax.tree.flatten((params, model_state))
    settings = Settings.of(
        chosen,
        num_examples=len(experiment.data.train),
        global_batch_size=experiment.global_batch_size,
        max_steps=known_end["max_steps"] or NO_LIMIT,
        read_every=_read_periods(experiment, loader.steps_per_epoch),
        check_copies_every=experiment.guards.check_replicas_every or 0,
    )
    _check_ledger(experiment, settings)
    kind = kind or _choose_kind(optimizer, params, leaves, chosen.servers)
    sharding = make_sharding(leaves, num_servers=chosen.servers, whole_leaves=needs_whole_leaves(kind))
    plan = Plan(
        experiment,
        settings,
        loader,
        functions,
        optimizer,
        learning_rate,
        sharding,
        structure,
        path_names(params),
        kind,
    )
    _check_order(plan)
    plan.optimizer_sharding()  # raises if the state cannot be divided
    return plan


def check_early(plan: Plan) -> None:
    """Check all that can be known before the first step, as every strategy does.

    Raises:
      ValueError: something is wrong; see `components.check_early`.
    """
    pairs = zip(plan.sharding.shapes, plan.sharding.dtypes)
    params, model_state = jax.tree.unflatten(
        plan.structure, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs]
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = TrainState(jax.ShapeDtypeStruct((), np.int32), params, model_state, (), key)  # type: ignore[arg-type]
    eval_loaders, shapes = components.make_eval_loaders(plan.experiment), components.example_batch(plan.loader)
    components.check_early(
        plan.experiment,
        plan.functions,
        abstract,
        plan.loader,
        eval_loaders,
        shapes,
        num_together=rows_of_a_slice(plan, 1) // plan.experiment.num_microbatches,
    )
    opt_state = jax.eval_shape(plan.optimizer.init, params)
    preflight.check_update(plan.optimizer, dataclasses.replace(abstract, opt_state=opt_state), gives_value=False)


def _choose_kind(optimizer: Any, params: Any, leaves: Sequence[jax.ShapeDtypeStruct], num_servers: int) -> Kind:
    num_params = len(jax.tree.leaves(params))

    def shards_of(whole_leaves: bool) -> list[list[tuple[int, tuple[int, ...]]]]:
        sharding = make_sharding(leaves, num_servers=num_servers, whole_leaves=whole_leaves)
        return [[(b.leaf, sharding.shape(b)) for b in blocks if b.leaf < num_params] for blocks in sharding.shards]

    return choose_kind(optimizer, params, shards_of)


def _check_has_effect(experiment: Experiment) -> None:
    """Raise ConfigError for settings that the parameter server would ignore: what they promise would not hold."""
    if experiment.precision == "float16":
        raise ConfigError("The parameter server does not scale losses, got precision=float16. Use bfloat16 or float32.")
    if experiment.reduction != "mean":
        raise ConfigError(
            "The parameter server adds one slice of a batch for each worker, so its bits depend on ps.workers; got "
            f"reduction={experiment.reduction}. Use reduction=mean: ps.mode=sync has the same bits whichever processes "
            "die, join or leave. Or use another strategy."
        )
    layout = experiment.layout
    given = {"mesh": experiment.mesh, "layout.rules": layout.rules, "layout.names": layout.names}
    if useless := [name for name, value in given.items() if value]:
        raise ConfigError(
            f"The devices of a worker of the parameter server are data-parallel; got {', '.join(useless)}, for which "
            "it has no use. Remove it, or use another strategy."
        )


def _check_counters(model_state: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(model_state):
        if not np.issubdtype(leaf.dtype, np.floating):
            raise ConfigError(
                f"The parameter server averages only floating-point statistics; {path_name(path)} of the model is "
                f"{leaf.dtype}. Use another strategy, or a floating-point dtype."
            )


def _check_ledger(experiment: Experiment, settings: Settings) -> None:
    if experiment.recovery.ledger and not settings.synchronous:
        raise ConfigError(
            "The ledger has the examples of each step in their order, which only sync mode trains them in; got "
            f"recovery.ledger=true with ps.mode={settings.mode}. Leave the ledger out, or use ps.mode=sync."
        )


def _check_order(plan: Plan) -> None:
    if plan.loader.steps_per_epoch != plan.settings.steps_per_epoch:
        raise ConfigError(
            "The parameter server needs an order that contains each example once per epoch, which gives "
            f"{plan.settings.steps_per_epoch} batches; this order has {plan.loader.steps_per_epoch}. Use another order."
        )


def rows_of_a_slice(plan: Plan, num_devices: int) -> int:
    """Return the number of rows that a worker computes at once: the largest slice, padded to its devices."""
    rows = -(-plan.experiment.global_batch_size // plan.settings.num_slices)
    return -(-rows // num_devices) * num_devices


def num_threads(plan: Plan) -> int:
    """Return the number of XLA's threads on CPU devices of every server and worker.

    It follows from the experiment alone, because it decides bits. A small gradient has one: in a worker that has a core
    to itself, that of `digits_cnn` takes 1.2 ms with one and 1.7 with two, which hand each other parts of operations.
    """
    shapes = [leaf.shape[1:] for leaf in components.example_batch(plan.loader).values()]
    work = rows_of_a_slice(plan, 1) * max(map(math.prod, shapes)) * sum(map(math.prod, plan.sharding.shapes))
    return 1 if work <= SMALL_GRADIENT else thread_pool.LEAST


def threads_in_use(plan: Plan, num_devices: int) -> int | None:
    """Return the number of XLA's threads that servers and workers have, by their environment; None on accelerators."""
    if jax.local_devices()[0].platform != "cpu":
        return None
    environment = dict(os.environ)
    thread_pool.fix(num_threads(plan), environment)
    return thread_pool.size(num_devices, environment)


def check_microbatches(plan: Plan, num_devices: int) -> None:
    """Raise ConfigError unless a worker with `num_devices` devices can divide its slice into the microbatches."""
    rows, parts = rows_of_a_slice(plan, num_devices), plan.experiment.num_microbatches
    if rows % parts:
        raise ConfigError(
            f"num_microbatches must divide the rows that a worker computes at once. With {plan.settings.num_slices} "
            f"slices and {num_devices} devices these are {rows}, got num_microbatches={parts}. Use a divisor of {rows}."
        )


def _read_periods(experiment: Experiment, steps_per_epoch: int) -> tuple[int, ...]:
    """Return the periods, in steps, of checkpoints and of evaluations."""
    saves, every = experiment.checkpoints.period, experiment.eval
    if experiment.data.eval is None:
        return (saves,)
    return (saves, every.every_steps or every.every_epochs * steps_per_epoch)


def initial_leaves(plan: Plan) -> list[np.ndarray]:
    """Return the leaves before the first step, equal to those of `state.create_state` for the same seed."""
    make_initial = jax.jit(functools.partial(initial_state, plan.functions.init_fn))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(make_initial(plan.run_keys().init))]


def initial_shapes(plan: Plan) -> Any:
    """Return shapes and dtypes of params and model_state."""
    return jax.eval_shape(functools.partial(initial_state, plan.functions.init_fn), jax.random.key(0))


def make_shard(plan: Plan, number: int) -> Shard:
    """Return shard `number` before the first step."""
    blocks = [block for block in plan.sharding.shards[number] if block.leaf < len(plan.names)]
    shapes = [plan.sharding.shape(block) for block in blocks]
    names = [plan.names[block.leaf] for block in blocks]
    updater = OptaxUpdater(plan.optimizer, kind=plan.kind, shapes=shapes, names=names)
    params = plan.sharding.split(initial_leaves(plan))[number]
    return Shard(shard=number, settings=plan.settings, updater=updater, params=params)


def position(plan: Plan, step: int) -> data.Position:
    """Return the position in the data after `step` batches."""
    epoch, within = divmod(step, plan.settings.steps_per_epoch)
    if step and not within:  # the end of an epoch, not the beginning of the next
        epoch, within = epoch - 1, plan.settings.steps_per_epoch
    seen = min(within * plan.settings.global_batch_size, plan.settings.num_examples)
    return dataclasses.replace(plan.loader.beginning, epoch=epoch, position=seen)
