"""From the description of an optimizer to the optax optimizer.

Every rule here works element by element. The one exception is clipping, which needs the norm over all gradients; it
therefore wants to see them whole, on the global view or on replicated gradients.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdist.optimizers.averages import ema
from jaxdist.optimizers.described import SETTINGS, STEPS_GIVE_NONE, Group, Optimizer, check_settings
from jaxdist.optimizers.param_settings import check_groups, decay_mask, freeze, scale_by_group, scale_by_path
from jaxdist.optimizers.rates import RateSchedule
from jaxdist.spmd.state import WithInputs

PyTree: TypeAlias = Any


def build(
    optimizer: Optimizer | optax.GradientTransformation,
    *,
    global_batch_size: int,
    steps_per_epoch: int | None = None,
    max_steps: int | None = None,
    offset: int = 0,
    rate_factors: Callable[[str], float] | None = None,
    of_some_params: bool = False,
) -> optax.GradientTransformation:
    """Return the optax optimizer; an optax optimizer is returned unchanged.

    In order: clipping, coupled weight decay, the rule, decoupled weight decay, the learning rate, the params' average.

    Args:
      optimizer: the description.
      global_batch_size: examples of a step, for the linear scaling rule.
      steps_per_epoch: for schedules in epochs. None if unknown.
      max_steps: the last step of the run, for decays without a length. None if unknown.
      offset: steps to add to the count, after a change of the batch size; see `RateSchedule`.
      rate_factors: what the update of each param is multiplied by, by its path, before decoupled weight decay is
        added: the factors of muP; see `models.mup`.
      of_some_params: whether it may be given some of the params, as on a parameter server. Else its `init` raises
        ValueError where a group matches none.

    Raises:
      ValueError: settings that contradict each other, have no effect, or need an unknown length.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    check_settings(optimizer)
    schedule = RateSchedule.make(
        optimizer,
        global_batch_size=global_batch_size,
        steps_per_epoch=steps_per_epoch,
        max_steps=max_steps,
        offset=offset,
    )
    groups, clip_norm, ema_decay = optimizer.groups, optimizer.clip_norm, optimizer.ema_decay
    chain = optax.chain(
        *([freeze(groups)] if groups else []),
        *([] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]),
        *_updates(optimizer, schedule, rate_factors),
        *([scale_by_group(groups)] if groups else []),
        *([] if ema_decay is None else [ema(ema_decay)]),
    )
    init = chain.init if of_some_params else functools.partial(_init_of_all, groups, chain.init)
    is_described = optimizer.name in SETTINGS and not schedule.is_given
    made = optax.GradientTransformationExtraArgs(init, chain.update)
    return WithInputs.make(made, schedule.inputs, has_finite_rates=is_described)


def _init_of_all(groups: Sequence[Group], init: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    check_groups(groups, params)
    return init(params)


def _updates(
    optimizer: Optimizer, schedule: RateSchedule, rate_factors: Callable[[str], float] | None
) -> list[optax.GradientTransformation]:
    """Return what turns gradients into updates: the rule, its weight decay and the learning rate."""
    if optimizer.name not in SETTINGS:
        return [_ready_made(optimizer, schedule)]
    decay = [_add_decay(optimizer)] if optimizer.weight_decay else []
    rule = [_rule(optimizer), *([] if rate_factors is None else [scale_by_path(rate_factors)])]
    if optimizer.name in ("adamw", "lion"):
        return [*rule, *decay, _scale_by_rate(schedule)]
    return [*decay, *rule, _scale_by_rate(schedule)]


def _scale_by_rate(schedule: RateSchedule) -> optax.GradientTransformationExtraArgs:
    """Return what multiplies by the negative learning rate of the given step, or of its own count without one."""

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: optax.ScaleByScheduleState,
        params: PyTree = None,
        *,
        step: jax.Array | None = None,
        inputs: jax.Array | None = None,
        **_: Any,
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        del params
        count = state.count if step is None else step
        size = -1 * _rate_at(schedule, count, inputs)
        scaled = jax.tree.map(lambda update: jnp.array(size, dtype=update.dtype) * update, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(count))

    return optax.GradientTransformationExtraArgs(init, update)


def _rate_at(schedule: RateSchedule, count: jax.Array, inputs: jax.Array | None) -> jax.Array:
    rates = jnp.asarray(schedule.inputs) if inputs is None else inputs
    rate = schedule.rate(count.astype(jnp.float32), rates)
    # A negative rate climbs: the step refuses an update that is not finite (see `spmd.dependence.factors`).
    return jnp.where(rate < 0, jnp.nan, rate) if schedule.is_given else rate


def _ready_made(optimizer: Optimizer, schedule: RateSchedule) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of optax whose learning rate is set before each update.

    Its own count would stop while updates are skipped.
    """
    function = getattr(optax, optimizer.name)
    known = inspect.signature(function).parameters
    arguments = STEPS_GIVE_NONE.get(optimizer.name, {}) | optimizer.arguments
    if optimizer.weight_decay:
        arguments |= {"weight_decay": optimizer.weight_decay, "mask": functools.partial(decay_mask, optimizer)}
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(
            f"{optimizer.name} of optax takes {', '.join(known)}; got {', '.join(unknown)}. Leave it out, or choose "
            "another optimizer."
        )
    others = tuple(name for name in known if name != "learning_rate")
    with_rate = functools.partial(optax.inject_hyperparams(function, static_args=others), **arguments)
    inner = with_rate(learning_rate=0.0)

    def init(params: PyTree) -> Any:
        # rprop begins with steps of the learning rate.
        first = _rate_at(schedule, jnp.zeros((), jnp.int32), None)
        return _ReadyState(jnp.zeros((), jnp.int32), with_rate(learning_rate=first).init(params))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        step: jax.Array | None = None,
        inputs: jax.Array | None = None,
        **_: Any,
    ) -> tuple[PyTree, Any]:
        count = state.num_steps if step is None else step
        rate = _rate_at(schedule, count, inputs)
        hyperparams = {**state.inner.hyperparams, "learning_rate": rate}
        updates, new_inner = inner.update(updates, state.inner._replace(hyperparams=hyperparams), params)
        return updates, _ReadyState(optax.safe_increment(count), new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


class _ReadyState(NamedTuple):
    num_steps: jax.Array
    inner: Any


def _add_decay(optimizer: Optimizer) -> optax.GradientTransformation:
    if optimizer.decay_mask == "all" and not optimizer.groups:
        return optax.add_decayed_weights(optimizer.weight_decay)
    return optax.add_decayed_weights(optimizer.weight_decay, functools.partial(decay_mask, optimizer))


def _rule(optimizer: Optimizer) -> optax.GradientTransformation:
    given = {name: getattr(optimizer, name) for name in SETTINGS[optimizer.name]}
    value = {name: usual if given[name] is None else given[name] for name, usual in SETTINGS[optimizer.name].items()}
    match optimizer.name:
        case "sgd":
            return optax.identity()
        case "momentum" | "nesterov":
            return optax.trace(value["momentum"], nesterov=optimizer.name == "nesterov")
        case "adam" | "adamw":
            return optax.scale_by_adam(value["beta1"], value["beta2"], value["epsilon"])
        case "lion":
            return optax.scale_by_lion(value["beta1"], value["beta2"])
