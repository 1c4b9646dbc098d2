"""Optimizers described: frozen dataclasses that the command line can override. `building` builds what they say."""

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from jaxdist.optimizers.schedules import Schedule, check_choice, check_range
from jaxdist.setting_group import setting_group


@setting_group
class Group:
    """Settings of some of the params. The first group whose pattern is found in a param's path is its own."""

    pattern: str
    """A regular expression, found in paths such as `block_0/attention/qkv/kernel`. It must match a param."""
    learning_rate: float = 1.0
    """What the learning rate is multiplied by."""
    decay: bool | None = None
    """Whether the weight decay of the optimizer holds; None: as `decay_mask` says."""
    frozen: bool = False
    """Whether the params are not trained. Their gradients then count in no norm."""

    def __post_init__(self) -> None:
        check_range("optimizer.groups.learning_rate", self.learning_rate, at_least=0)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"optimizer.groups.pattern must be a regular expression; {self.pattern!r} is not one: {error}."
            ) from error


@setting_group
class Optimizer:
    """What `build` builds. A setting left at None takes its optimizer's usual value, or is not used."""

    name: str
    """sgd, momentum, nesterov, adam, adamw, lion; or any optimizer of optax by its name there, such as adafactor."""
    learning_rate: float | Callable[[jax.Array], Any]
    """The peak of the schedule; with `base_batch_size`, that peak at a batch of this size. Or a function of the number
    of finished steps, such as a schedule of optax, that gives the rate by itself."""
    schedule: Schedule | Callable[[jax.Array], Any] = dataclasses.field(default_factory=Schedule)
    """How the rate moves; or a function of the number of finished steps that gives its fraction of the peak."""
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
        if self.name not in SETTINGS and self.name not in of_optax():
            known = (*SETTINGS, *of_optax())
            nearest = difflib.get_close_matches(self.name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"optimizer.name must be one of {', '.join(SETTINGS)}, or an optimizer of optax ("
                f"{', '.join(of_optax())}); got {self.name!r}. Did you mean {nearest!r}?"
            )
        check_choice("optimizer.decay_mask", self.decay_mask, ("matrices", "all"))
        if not callable(self.learning_rate):
            check_range("optimizer.learning_rate", self.learning_rate, at_least=0)
        check_range("optimizer.base_batch_size", self.base_batch_size, above=0)
        check_range("optimizer.clip_norm", self.clip_norm, above=0)
        check_range("optimizer.weight_decay", self.weight_decay, at_least=0)
        check_range("optimizer.epsilon", self.epsilon, above=0)
        for name in ("ema_decay", "momentum", "beta1", "beta2"):
            check_range(f"optimizer.{name}", getattr(self, name), at_least=0, below=1)


SETTINGS: dict[str, dict[str, float]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9},
    "adam": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "lion": {"beta1": 0.9, "beta2": 0.99},
}
"""Which settings each optimizer has, and their usual values."""


STEPS_GIVE_NONE: dict[str, dict[str, Any]] = {"lbfgs": {"linesearch": None}, "noisy_sgd": {"key": 0}}
"""Arguments of optax's optimizers for what a training step does not have: the value of the loss for a line search, in
place of which the learning rate counts, and a key of the optimizer's own. `arguments` may name others."""


@functools.cache
def of_optax() -> tuple[str, ...]:
    """Return the names of optax's optimizers that take a learning rate, except those that SETTINGS describes."""
    names = []
    for name in dir(optax):
        function = getattr(optax, name)
        if inspect.isfunction(function) and not name.startswith("scale_by") and name not in SETTINGS:
            parameters = list(inspect.signature(function).parameters.values())
            takes_rate = bool(parameters) and parameters[0].name == "learning_rate"
            ready = all(each.default is not each.empty or each.kind is each.VAR_KEYWORD for each in parameters[1:])
            names += [name] if takes_rate and ready else []
    return tuple(names)


def check_settings(optimizer: Optimizer) -> None:
    """Raise ValueError where a setting has no effect on the optimizer that is named."""
    described = SETTINGS.get(optimizer.name, {})
    if optimizer.arguments and optimizer.name in SETTINGS:
        raise ValueError(
            f"optimizer.arguments belong to optimizers that are taken from optax by name; {optimizer.name} has its own "
            "settings. Use these."
        )
    for name in ("momentum", "beta1", "beta2", "epsilon"):
        if getattr(optimizer, name) is not None and name not in described:
            having = ", ".join(key for key, settings in SETTINGS.items() if name in settings)
            raise ValueError(
                f"optimizer.{name} has no effect on {optimizer.name}; it belongs to {having}. Leave it out, or choose "
                "one of these."
            )
    if optimizer.name == "adam" and optimizer.weight_decay:
        raise ValueError("adam has no weight decay of its own (L2 in the gradient does not decay under it). Use adamw.")
    if optimizer.name == "rprop" and (optimizer.schedule != Schedule() or callable(optimizer.learning_rate)):
        raise ValueError(
            "rprop begins with steps of the learning rate and then finds their size itself, so a schedule has "
            "no effect. Set optimizer.learning_rate to a number, and leave optimizer.schedule out."
        )
    if optimizer.decay_mask != "matrices" and not optimizer.weight_decay:
        raise ValueError("optimizer.decay_mask has no effect without decay. Set optimizer.weight_decay.")
