"""Optimizers as configuration: a frozen dataclass that the command line can override, turned into an optax optimizer.

The one idea: `Optimizer` only describes, `build` builds. Whatever the description cannot say is said in optax:
an `optax.GradientTransformation` is taken in its place everywhere.

Every rule here works element by element. The one exception is clipping, which needs the norm over all gradients; it
therefore wants to see them whole, on the global view or on replicated gradients.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

PyTree: TypeAlias = Any

SCALED_WARMUP_EPOCHS = 5
"""The warm-up of Goyal et al. (2017), taken where the learning rate is scaled up and no other warm-up is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate moves: a linear warm-up, then constant, or a decay by a cosine or a straight line."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup: float | None = None
    """Length of the warm-up, in `unit`. None: none, or that of Goyal et al. where the learning rate is scaled up."""
    length: float | None = None
    """Where the decay ends, in `unit`, counted from the first step. None: at the end of the run, max_steps or
    max_epochs of its stop rule; then a run with another end has another schedule from its first step on."""
    final_fraction: float = 0.0
    """The learning rate after the decay, as a fraction of its peak."""
    unit: Literal["steps", "epochs"] = "steps"

    def __post_init__(self) -> None:
        _check_choice("schedule.name", self.name, ("constant", "cosine", "linear"))
        _check_choice("schedule.unit", self.unit, ("steps", "epochs"))
        _check("schedule.warmup", self.warmup, at_least=0)
        _check("schedule.length", self.length, above=0)
        _check("schedule.final_fraction", self.final_fraction, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What `build` builds. A setting left at None takes its optimizer's usual value, or stays out."""

    name: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "lion"]
    learning_rate: float
    """The peak of the schedule; with `base_batch_size`, that peak at a batch of this size."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    base_batch_size: int | None = None
    """The global batch size that `learning_rate` was found at. Set, it scales the learning rate with the batch size and
    warms up from the unscaled one: the linear scaling rule of Goyal et al. (2017), made for SGD with momentum."""
    clip_norm: float | None = None
    """Gradients whose global norm is larger are scaled down to it."""
    weight_decay: float = 0.0
    """sgd, momentum, nesterov: added to the gradient (L2). adamw, lion: decoupled, times the learning rate."""
    decay_mask: Literal["matrices", "all"] = "matrices"
    """matrices: no decay on leaves of fewer than two dims, which biases and the scales of norms are."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the params, for evaluation: see `ema_params`."""
    momentum: float | None = None
    """momentum and nesterov: 0.9."""
    beta1: float | None = None
    """adam, adamw and lion: 0.9."""
    beta2: float | None = None
    """adam, adamw: 0.999; lion: 0.99."""
    epsilon: float | None = None
    """adam, adamw: 1e-8."""

    def __post_init__(self) -> None:
        _check_choice("optimizer.name", self.name, tuple(_SETTINGS))
        _check_choice("optimizer.decay_mask", self.decay_mask, ("matrices", "all"))
        _check("optimizer.learning_rate", self.learning_rate, at_least=0)
        _check("optimizer.base_batch_size", self.base_batch_size, above=0)
        _check("optimizer.clip_norm", self.clip_norm, above=0)
        _check("optimizer.weight_decay", self.weight_decay, at_least=0)
        _check("optimizer.epsilon", self.epsilon, above=0)
        for name in ("ema_decay", "momentum", "beta1", "beta2"):
            _check(f"optimizer.{name}", getattr(self, name), at_least=0, below=1)


_SETTINGS: dict[str, dict[str, float]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9},
    "adam": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
}
"""Which settings each optimizer has, and their usual values."""


def build(
    optimizer: Optimizer | optax.GradientTransformation,
    *,
    global_batch_size: int,
    steps_per_epoch: int | None = None,
    max_steps: int | None = None,
) -> optax.GradientTransformation:
    """Return the optax optimizer; one that is ready comes back as it is.

    In order: clipping, coupled weight decay, the rule, decoupled weight decay, the learning rate, the params' average.

    Args:
      optimizer: the description.
      global_batch_size: examples of a step, for the linear scaling rule.
      steps_per_epoch: for schedules in epochs. None if unknown.
      max_steps: the last step of the run, for decays without a length. None if unknown.

    Raises:
      ValueError: settings that contradict each other, have no effect, or need an unknown length.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    _check_settings(optimizer)
    schedule = make_schedule(
        optimizer, global_batch_size=global_batch_size, steps_per_epoch=steps_per_epoch, max_steps=max_steps
    )
    mask = _matrices if optimizer.decay_mask == "matrices" else None
    decay = [optax.add_decayed_weights(optimizer.weight_decay, mask)] if optimizer.weight_decay else []
    decoupled = optimizer.name in ("adamw", "lion")
    return optax.chain(
        *([] if optimizer.clip_norm is None else [optax.clip_by_global_norm(optimizer.clip_norm)]),
        *([] if decoupled else decay),
        _rule(optimizer),
        *(decay if decoupled else []),
        optax.scale_by_learning_rate(schedule),
        *([] if optimizer.ema_decay is None else [ema(optimizer.ema_decay)]),
    )


def make_schedule(
    optimizer: Optimizer, *, global_batch_size: int, steps_per_epoch: int | None = None, max_steps: int | None = None
) -> optax.Schedule:
    """Return `schedule(count) -> learning rate`, float32, where `count` is the number of finished updates.

    For the arguments and errors see `build`. The learning rate of step n, counted from 1, is schedule(n - 1).
    """
    schedule = optimizer.schedule
    steps_per_unit = _steps_per_unit(schedule, steps_per_epoch)
    scale = global_batch_size / (optimizer.base_batch_size or global_batch_size)
    peak = optimizer.learning_rate * scale
    start = optimizer.learning_rate if scale > 1 else 0.0
    if schedule.warmup is None and scale > 1:
        warmup = _scaled_warmup(steps_per_epoch)
    else:
        warmup = round((schedule.warmup or 0) * steps_per_unit)
    end = _decay_end(schedule, steps_per_unit, warmup=warmup, max_steps=max_steps)
    if end is not None and end <= warmup:
        raise ValueError(
            f"The {schedule.name} decay must end after the warm-up; it ends at step {end} and the warm-up at {warmup}. "
            "Set optimizer.schedule.warmup lower, or optimizer.schedule.length higher."
        )
    # Reciprocals of constants here, so that no layout's compiler gets to choose between dividing and multiplying.
    per_warmup, per_decay = 1 / max(warmup, 1), 1 / (1 if end is None else end - warmup)

    def learning_rate(count: jax.Array | int) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        # The first step of a warm-up already moves: from `start` by one part in `warmup`, to `peak` at its last.
        rising = start + (peak - start) * (count + 1) * per_warmup
        done = jnp.clip((count - warmup) * per_decay, 0.0, 1.0)
        return jnp.where(count < warmup, rising, peak * _decay(schedule, done)).astype(jnp.float32)

    return learning_rate


def learning_rate_at(
    optimizer: Optimizer,
    step: int,
    *,
    global_batch_size: int,
    steps_per_epoch: int | None = None,
    max_steps: int | None = None,
) -> float:
    """Return the learning rate of `step`, the first being 1; for the arguments see `build`."""
    schedule = make_schedule(
        optimizer, global_batch_size=global_batch_size, steps_per_epoch=steps_per_epoch, max_steps=max_steps
    )
    return float(schedule(step - 1))


class EmaState(NamedTuple):
    """The average, float32 and shaped like the params, and how many updates it has seen (int32 scalar)."""

    num_updates: jax.Array
    params: PyTree


def ema(decay: float) -> optax.GradientTransformation:
    """Return a transformation, the last of a chain, that leaves updates alone and averages the params they lead to.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a short run's average is not its first params
    (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def init(params: PyTree) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(lambda param: jnp.array(param, jnp.float32), params))

    def update(updates: PyTree, state: EmaState, params: PyTree = None) -> tuple[PyTree, EmaState]:
        if params is None:
            raise ValueError("The average of params needs them: call optimizer.update(grads, opt_state, params).")
        count = optax.safe_increment(state.num_updates)
        new_weight = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
        average = jax.tree.map(
            lambda old, new: old + new_weight * (new.astype(jnp.float32) - old),
            state.params,
            optax.apply_updates(params, updates),
        )
        return updates, EmaState(count, average)

    return optax.GradientTransformation(init, update)


def ema_params(opt_state: PyTree) -> PyTree | None:
    """Return the averaged params that `ema` keeps, float32, wherever it stands in the optimizer; None if nowhere."""
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_ema) if _is_ema(node)]
    return found[0].params if found else None


def _is_ema(node: Any) -> bool:
    return isinstance(node, EmaState)


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda param: jnp.ndim(param) >= 2, params)


def _rule(optimizer: Optimizer) -> optax.GradientTransformation:
    given = {name: getattr(optimizer, name) for name in _SETTINGS[optimizer.name]}
    value = {name: usual if given[name] is None else given[name] for name, usual in _SETTINGS[optimizer.name].items()}
    match optimizer.name:
        case "sgd":
            return optax.identity()
        case "momentum" | "nesterov":
            return optax.trace(value["momentum"], nesterov=optimizer.name == "nesterov")
        case "adam" | "adamw":
            return optax.scale_by_adam(value["beta1"], value["beta2"], value["epsilon"])
        case "lion":
            return optax.scale_by_lion(value["beta1"], value["beta2"])


def _decay(schedule: Schedule, done: jax.Array) -> jax.Array:
    """Return the fraction of the peak that is left when `done`, in [0, 1], of the decay is behind."""
    if schedule.name == "constant":
        return jnp.ones_like(done)
    left = 1 - done if schedule.name == "linear" else 0.5 + 0.5 * jnp.cos(math.pi * done)
    return schedule.final_fraction + (1 - schedule.final_fraction) * left


def _decay_end(schedule: Schedule, steps_per_unit: float, *, warmup: int, max_steps: int | None) -> int | None:
    if schedule.name == "constant":
        if schedule.length is not None or schedule.final_fraction:
            raise ValueError(
                "A constant schedule has no decay: optimizer.schedule.length and final_fraction have no effect. "
                "Leave them out, or set optimizer.schedule.name to cosine or linear."
            )
        return None
    if schedule.length is not None:
        return round(schedule.length * steps_per_unit)
    if max_steps is None:
        raise ValueError(
            f"A {schedule.name} decay needs to know where it ends, and this run has no last step. "
            "Set optimizer.schedule.length (in optimizer.schedule.unit), or stop.max_steps or stop.max_epochs."
        )
    return max(max_steps, warmup + 1)  # A run that ends inside its warm-up never comes to the decay.


def _steps_per_unit(schedule: Schedule, steps_per_epoch: int | None) -> float:
    if schedule.unit == "steps":
        return 1
    if steps_per_epoch is None:
        raise ValueError(
            "A schedule in epochs needs the length of an epoch, which this data does not tell. "
            "Set optimizer.schedule.unit to steps."
        )
    return steps_per_epoch


def _scaled_warmup(steps_per_epoch: int | None) -> int:
    if steps_per_epoch is None:
        raise ValueError(
            f"A learning rate scaled up with the batch size warms up for {SCALED_WARMUP_EPOCHS} epochs, and the length "
            "of an epoch is not known. Set optimizer.schedule.warmup (0 for none)."
        )
    return SCALED_WARMUP_EPOCHS * steps_per_epoch


def _check_settings(optimizer: Optimizer) -> None:
    for name in ("momentum", "beta1", "beta2", "epsilon"):
        if getattr(optimizer, name) is not None and name not in _SETTINGS[optimizer.name]:
            having = ", ".join(key for key, settings in _SETTINGS.items() if name in settings)
            raise ValueError(
                f"optimizer.{name} has no effect on {optimizer.name}; it belongs to {having}. Leave it out, or choose "
                "one of these."
            )
    if optimizer.name == "adam" and optimizer.weight_decay:
        raise ValueError("adam has no weight decay of its own (L2 in the gradient does not decay under it). Use adamw.")
    if optimizer.decay_mask != "matrices" and not optimizer.weight_decay:
        raise ValueError("optimizer.decay_mask has no effect without decay. Set optimizer.weight_decay.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def _check(
    name: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
) -> None:
    """Raise ValueError unless value is None, or a number in the range. Written so that NaN fails, too."""
    if value is None:
        return
    rule = f"at least {at_least}" if above is None else f"above {above}"
    rule += "" if below == math.inf else f" and below {below}"
    low_enough = value < below
    high_enough = value >= at_least if at_least is not None else value > (above or 0)
    if not (low_enough and high_enough):
        raise ValueError(f"{name} must be {rule}; got {value}.")
