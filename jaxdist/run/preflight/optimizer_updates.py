"""Whether the optimizer has something to train, and takes gradients like the params."""

from typing import Any

import optax

from jaxdist import errors, optimizers
from jaxdist.errors import ConfigError
from jaxdist.run.preflight.repeated_traces import check_same_trace
from jaxdist.spmd import state


def check_groups(optimizer: optimizers.Optimizer, params: Any) -> None:
    """Raise ConfigError where the groups of a described optimizer leave no param to train."""
    settings = optimizers.describe(optimizer, params)
    if optimizer.groups and all(each.frozen or each.learning_rate == 0 for each in settings):
        raise ConfigError(
            "Training needs a param that changes, and optimizer.groups freeze every one, or give it the learning rate "
            "0. Narrow a pattern."
        )


def check_update(
    optimizer: optax.GradientTransformation, abstract: state.TrainState, *, same_bits: bool = False
) -> None:
    """Trace an update with gradients like the params; warn where it is another each time, for example by a clock.

    Raises:
      ConfigError: it fails; or it is another each time, and `same_bits`.
    """
    extra = {"step": abstract.step, "inputs": optimizer.inputs} if isinstance(optimizer, state.WithInputs) else {}

    def update(grads: Any, opt_state: Any, params: Any, extra: Any) -> Any:
        return optax.with_extra_args_support(optimizer).update(grads, opt_state, params, **extra)

    try:
        args = [abstract.params, abstract.opt_state, abstract.params, extra]
        check_same_trace("The update of the optimizer", update, args, same_bits=same_bits)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "An optimizer is called as update(grads, opt_state, params), without the value of the loss. Called so, "
            f"this one fails: {errors.describe(error)} Correct its arguments, or choose another."
        ) from error
