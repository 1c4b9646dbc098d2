"""Optimizers as configuration: a frozen dataclass that the command line can override, turned into an optax optimizer.

The one idea: `Optimizer` only describes, `build` builds. Whatever the description cannot say is said in optax:
an `optax.GradientTransformation` is taken in its place everywhere.

Every rule here works element by element. The one exception is clipping, which needs the norm over all gradients; it
therefore wants to see them whole, on the global view or on replicated gradients.
"""

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.optimizers import schedules
from jaxdist.optimizers.schedules import Schedule, check_choice, check_range
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.state import WithInputs

PyTree: TypeAlias = Any

SCALED_WARMUP_EPOCHS = 5
"""The warm-up of Goyal et al. (2017), taken where the learning rate is scaled up and no other warm-up is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Settings of some of the params. The first group whose pattern is found in a param's path is its own."""

    pattern: str
    """A regular expression, found in paths such as `block_0/attention/qkv/kernel`. It must match a param."""
    learning_rate: float = 1.0
    """What the learning rate is multiplied by."""
    decay: bool | None = None
    """Whether the weight decay of the optimizer holds; None: as `decay_mask` says."""
    frozen: bool = False
    """Whether the params stay as they are. Their gradients then count in no norm."""

    def __post_init__(self) -> None:
        check_range("optimizer.groups.learning_rate", self.learning_rate, at_least=0)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"optimizer.groups.pattern must be a regular expression; {self.pattern!r} is none: {error}."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What `build` builds. A setting left at None takes its optimizer's usual value, or stays out."""

    name: str
    """sgd, momentum, nesterov, adam, adamw, lion; or any optimizer of optax by its name there, such as adafactor."""
    learning_rate: float
    """The peak of the schedule; with `base_batch_size`, that peak at a batch of this size."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    base_batch_size: int | None = None
    """The global batch size that `learning_rate` was found at. Set, it scales the learning rate with the batch size and
    warms up from the unscaled one: the linear scaling rule of Goyal et al. (2017), made for SGD with momentum."""
    clip_norm: float | None = None
    """Gradients whose global norm is larger are scaled down to it."""
    weight_decay: float = 0.0
    """sgd, momentum, nesterov: added to the gradient (L2). adamw, lion: decoupled, times the learning rate. Another
    optimizer of optax: its own argument weight_decay."""
    decay_mask: Literal["matrices", "all"] = "matrices"
    """matrices: none on biases, on the scales of norms, and on other leaves of fewer than two dims; see `decays`."""
    groups: tuple[Group, ...] = ()
    """Params with a learning rate, a decay or a freeze of their own; `describe` lists what each param gets."""
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
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of an optimizer that is taken from optax by name."""

    def __post_init__(self) -> None:
        if self.name not in _SETTINGS and self.name not in _of_optax():
            known = (*_SETTINGS, *_of_optax())
            nearest = difflib.get_close_matches(self.name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"optimizer.name must be one of {', '.join(_SETTINGS)}, or an optimizer of optax ("
                f"{', '.join(_of_optax())}); got {self.name!r}. Did you mean {nearest!r}?"
            )
        check_choice("optimizer.decay_mask", self.decay_mask, ("matrices", "all"))
        check_range("optimizer.learning_rate", self.learning_rate, at_least=0)
        check_range("optimizer.base_batch_size", self.base_batch_size, above=0)
        check_range("optimizer.clip_norm", self.clip_norm, above=0)
        check_range("optimizer.weight_decay", self.weight_decay, at_least=0)
        check_range("optimizer.epsilon", self.epsilon, above=0)
        for name in ("ema_decay", "momentum", "beta1", "beta2"):
            check_range(f"optimizer.{name}", getattr(self, name), at_least=0, below=1)


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
    offset: int = 0,
) -> optax.GradientTransformation:
    """Return the optax optimizer; one that is ready comes back as it is.

    In order: clipping, coupled weight decay, the rule, decoupled weight decay, the learning rate, the params' average.

    Args:
      optimizer: the description.
      global_batch_size: examples of a step, for the linear scaling rule.
      steps_per_epoch: for schedules in epochs. None if unknown.
      max_steps: the last step of the run, for decays without a length. None if unknown.
      offset: steps to add to those that were made, after a change of the batch size; see `RateSchedule`.

    Raises:
      ValueError: settings that contradict each other, have no effect, or need an unknown length.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    _check_settings(optimizer)
    schedule = RateSchedule.make(
        optimizer,
        global_batch_size=global_batch_size,
        steps_per_epoch=steps_per_epoch,
        max_steps=max_steps,
        offset=offset,
    )
    decay = [_add_decay(optimizer)] if optimizer.weight_decay and optimizer.name in _SETTINGS else []
    decoupled = optimizer.name in ("adamw", "lion")
    ready = optimizer.name not in _SETTINGS
    chain = optax.chain(
        *([_freeze(optimizer.groups)] if optimizer.groups else []),
        *([] if optimizer.clip_norm is None else [optax.clip_by_global_norm(optimizer.clip_norm)]),
        *([] if decoupled else decay),
        *([_ready_made(optimizer, schedule)] if ready else [_rule(optimizer)]),
        *(decay if decoupled else []),
        *([] if ready else [_scale_by_rate(schedule)]),
        *([_scale_by_group(optimizer.groups)] if optimizer.groups else []),
        *([] if optimizer.ema_decay is None else [ema(optimizer.ema_decay)]),
    )
    return WithInputs.make(chain, schedule.inputs)


class RateSchedule(NamedTuple):
    """A learning rate as a function of the step, with the rates that it starts from and rises to apart.

    `inputs` (float32, 3 elements: where the warm-up starts, its rise per step, the peak) enter the compiled step as an
    argument, so that another learning rate compiles nothing. `offset` is what the steps that came before a change of
    the batch size lack, or have too many, in steps of the present size.
    """

    rate: Callable[[jax.Array, jax.Array], jax.Array]
    inputs: np.ndarray

    def __call__(self, count: jax.Array | int) -> jax.Array:
        """Return the learning rate after `count` finished steps, float32."""
        return self.rate(jnp.asarray(count, jnp.float32), jnp.asarray(self.inputs))

    @classmethod
    def make(
        cls,
        optimizer: Optimizer,
        *,
        global_batch_size: int,
        steps_per_epoch: int | None = None,
        max_steps: int | None = None,
        offset: int = 0,
    ) -> "RateSchedule":
        """Return the schedule of `optimizer`; for the arguments and errors see `build`."""
        schedule = optimizer.schedule
        schedule.check()
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
                f"The {schedule.name} decay must end after the warm-up; it ends at step {end} and the warm-up at "
                f"{warmup}. Set optimizer.schedule.warmup lower, or optimizer.schedule.length higher."
            )
        # Reciprocals of constants here, so that no layout's compiler gets to choose between dividing and multiplying.
        per_warmup, per_decay = 1 / max(warmup, 1), 1 / (1 if end is None else end - warmup)

        def rate(count: jax.Array, inputs: jax.Array) -> jax.Array:
            first, rise_per_step, highest = inputs
            count = count + offset if offset else count
            # The first step of a warm-up already moves: from the start by one part in `warmup`, to the peak at its end.
            rising = first + rise_per_step * (count + 1)
            done = jnp.clip((count - warmup) * per_decay, 0.0, 1.0)
            shape = schedules.factor(schedule, count, done, warmup=warmup, steps_per_unit=steps_per_unit)
            return jnp.where(count < warmup, rising, highest * shape).astype(jnp.float32)

        # One product, rounded once: it is what the compiler makes of two constants, and so the bits are the same.
        rise_per_step = np.float32(peak - start) * np.float32(per_warmup)
        return cls(rate, np.array([start, rise_per_step, peak], np.float32))


make_schedule = RateSchedule.make


def follows_epochs(optimizer: Optimizer, *, ends_in_epochs: bool) -> bool:
    """Return whether the place in the schedule is a number of epochs, and not of steps.

    It is if the schedule counts epochs, or decays to the end of a run that ends after so many epochs. A run that is
    resumed with another batch size then continues where the examples it was trained on have brought it.
    """
    schedule = optimizer.schedule
    return schedule.unit == "epochs" or (schedule.ends and schedule.length is None and ends_in_epochs)


def learning_rate_at(
    optimizer: Optimizer,
    step: int,
    *,
    global_batch_size: int,
    steps_per_epoch: int | None = None,
    max_steps: int | None = None,
) -> float:
    """Return the learning rate of `step`, the first being 1; for the arguments see `build`."""
    schedule = RateSchedule.make(
        optimizer, global_batch_size=global_batch_size, steps_per_epoch=steps_per_epoch, max_steps=max_steps
    )
    return float(schedule(step - 1))


def _scale_by_rate(schedule: RateSchedule) -> optax.GradientTransformationExtraArgs:
    """Return what multiplies by the negative learning rate of the step that it is told, or else of its own count."""

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
    return schedule.rate(count.astype(jnp.float32), rates)


def _ready_made(optimizer: Optimizer, schedule: RateSchedule) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of optax, whose learning rate is set anew before each update.

    A count of its own would stand still while updates are skipped.
    """
    function = getattr(optax, optimizer.name)
    known = inspect.signature(function).parameters
    arguments = dict(optimizer.arguments)
    if optimizer.weight_decay:
        arguments |= {"weight_decay": optimizer.weight_decay, "mask": functools.partial(_decay_mask, optimizer)}
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(
            f"{optimizer.name} of optax takes {', '.join(known)}; got {', '.join(unknown)}. Leave it out, or choose "
            "another optimizer."
        )
    others = tuple(name for name in known if name != "learning_rate")
    inner = optax.inject_hyperparams(function, static_args=others)(learning_rate=0.0, **arguments)

    def init(params: PyTree) -> Any:
        return _ReadyState(jnp.zeros((), jnp.int32), inner.init(params))

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


@functools.cache
def _of_optax() -> tuple[str, ...]:
    """Return the names of optax's optimizers that this module does not describe itself: all that take a learning rate.

    Those that need the value of the loss with each update, or a random key, are not among them.
    """
    names = []
    for name in dir(optax):
        function = getattr(optax, name)
        if inspect.isfunction(function) and not name.startswith("scale_by") and name not in _SETTINGS:
            parameters = list(inspect.signature(function).parameters.values())
            takes_rate = bool(parameters) and parameters[0].name == "learning_rate"
            ready = all(each.default is not each.empty or each.kind is each.VAR_KEYWORD for each in parameters[1:])
            names += [name] if takes_rate and ready and name not in ("lbfgs", "noisy_sgd") else []
    return tuple(names)


class ParamSettings(NamedTuple):
    """What an optimizer does with one param: its path, whether it decays, and the factor of its learning rate."""

    path: str
    decays: bool
    learning_rate: float
    frozen: bool


def describe(optimizer: Optimizer, params: PyTree) -> list[ParamSettings]:
    """Return, for each param, whether it decays, the factor of its learning rate, and whether it is frozen.

    Args:
      optimizer: the description.
      params: arrays or ShapeDtypeStructs.

    Raises:
      ValueError: a group matches no param.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        group = _group_of(optimizer.groups, name)
        asked = optimizer.decay_mask == "all" or decays(name, len(leaf.shape))
        decayed = asked if group is None or group.decay is None else group.decay
        rate, frozen = (1.0, False) if group is None else (group.learning_rate, group.frozen)
        found.append(ParamSettings(name, decayed and bool(optimizer.weight_decay) and not frozen, rate, frozen))
    _check_groups(optimizer.groups, [each.path for each in found])
    return found


_OTHER_THAN_MATRICES = re.compile(
    r"^(b|bias(es)?|scale|gain|gamma|beta|offset|shift)\d*$|[_.](bias|scale|gain|gamma|beta)$"
)
_NORM = re.compile(r"norm", re.IGNORECASE)


def decays(path: str, num_dims: int) -> bool:
    """Return whether weight decay is meant for a param: matrices and embeddings, whatever their number of dims.

    A param is none of these if it has fewer than two dims, if it is called bias, scale, gain, gamma, beta, offset or
    shift (attention biases have two dims, and under `nn.scan` every param has one dim more), or if it belongs to a
    module with `norm` in its name.
    """
    *modules, name = path.split("/")
    in_norm = bool(modules) and _NORM.search(modules[-1]) is not None
    return num_dims >= 2 and not in_norm and not _OTHER_THAN_MATRICES.search(name.lower())


def _decay_mask(optimizer: Optimizer, params: PyTree) -> PyTree:
    settings = describe(optimizer, params)
    return jax.tree.unflatten(jax.tree.structure(params), [each.decays for each in settings])


def _add_decay(optimizer: Optimizer) -> optax.GradientTransformation:
    if optimizer.decay_mask == "all" and not optimizer.groups:
        return optax.add_decayed_weights(optimizer.weight_decay)
    return optax.add_decayed_weights(optimizer.weight_decay, functools.partial(_decay_mask, optimizer))


def _group_of(groups: Sequence[Group], path: str) -> Group | None:
    return next((group for group in groups if re.search(group.pattern, path)), None)


def _check_groups(groups: Sequence[Group], paths: Sequence[str]) -> None:
    for group in groups:
        if not any(re.search(group.pattern, path) for path in paths):
            nearest = difflib.get_close_matches(group.pattern, paths, n=1, cutoff=0.0)
            raise ValueError(
                f"Every group of optimizer.groups must match a param; nothing matches {group.pattern!r}. "
                f"The nearest param is {nearest[0] if nearest else 'none'}."
            )


def _freeze(groups: Sequence[Group]) -> optax.GradientTransformation:
    """Return what drops the gradients of frozen params, before a norm is taken of all gradients."""

    def init(params: PyTree) -> optax.EmptyState:
        _check_groups(groups, [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)])
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        del params
        return _map_groups(groups, updates, lambda group, leaf: jnp.zeros_like(leaf) if group.frozen else leaf), state

    return optax.GradientTransformation(init, update)


def _scale_by_group(groups: Sequence[Group]) -> optax.GradientTransformation:
    def scaled(group: Group, leaf: jax.Array) -> jax.Array:
        if group.frozen:
            return jnp.zeros_like(leaf)
        return leaf if group.learning_rate == 1 else leaf * group.learning_rate

    return optax.stateless(lambda updates, params: _map_groups(groups, updates, scaled))


def _map_groups(groups: Sequence[Group], tree: PyTree, function: Callable[[Group, jax.Array], jax.Array]) -> PyTree:
    def mapped(path: Any, leaf: jax.Array) -> jax.Array:
        group = _group_of(groups, path_name(path))
        return leaf if group is None else function(group, leaf)

    return jax.tree_util.tree_map_with_path(mapped, tree)


class EmaState(NamedTuple):
    """The average, at least float32 and shaped like the params, and how many updates it has seen (int32 scalar)."""

    num_updates: jax.Array
    params: PyTree


def ema(decay: float) -> optax.GradientTransformation:
    """Return a transformation, the last of a chain, that leaves updates alone and averages the params they lead to.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a short run's average is not its first params
    (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def init(params: PyTree) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(lambda param: jnp.array(param, _wide(param)), params))

    def update(updates: PyTree, state: EmaState, params: PyTree = None) -> tuple[PyTree, EmaState]:
        if params is None:
            raise ValueError("The average of params needs them: call optimizer.update(grads, opt_state, params).")
        count = optax.safe_increment(state.num_updates)
        new_weight = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
        average = jax.tree.map(
            lambda old, new: old + new_weight * (new.astype(old.dtype) - old),
            state.params,
            optax.apply_updates(params, updates),
        )
        return updates, EmaState(count, average)

    return optax.GradientTransformation(init, update)


def ema_params(opt_state: PyTree) -> PyTree | None:
    """Return the averaged params of `ema`, at least float32, wherever it stands in the optimizer; None if nowhere."""
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_ema) if _is_ema(node)]
    return found[0].params if found else None


def _wide(param: jax.Array) -> Any:
    return jnp.promote_types(jnp.result_type(param), jnp.float32)


def _is_ema(node: Any) -> bool:
    return isinstance(node, EmaState)


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


def _decay_end(schedule: Schedule, steps_per_unit: float, *, warmup: int, max_steps: int | None) -> int | None:
    if not schedule.ends:
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
    described = _SETTINGS.get(optimizer.name, {})
    if optimizer.arguments and optimizer.name in _SETTINGS:
        raise ValueError(
            f"optimizer.arguments belong to optimizers that are taken from optax by name; {optimizer.name} has its own "
            "settings. Use these."
        )
    for name in ("momentum", "beta1", "beta2", "epsilon"):
        if getattr(optimizer, name) is not None and name not in described:
            having = ", ".join(key for key, settings in _SETTINGS.items() if name in settings)
            raise ValueError(
                f"optimizer.{name} has no effect on {optimizer.name}; it belongs to {having}. Leave it out, or choose "
                "one of these."
            )
    if optimizer.name == "adam" and optimizer.weight_decay:
        raise ValueError("adam has no weight decay of its own (L2 in the gradient does not decay under it). Use adamw.")
    if optimizer.decay_mask != "matrices" and not optimizer.weight_decay:
        raise ValueError("optimizer.decay_mask has no effect without decay. Set optimizer.weight_decay.")
