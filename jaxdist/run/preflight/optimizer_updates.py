"""Whether the optimizer has something to train, and takes gradients like the params."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdist import errors, optimizers
from jaxdist.errors import ConfigError
from jaxdist.run.preflight.repeated_traces import check_same_trace
from jaxdist.spmd import state, step


def check_groups(optimizer: optimizers.Optimizer, params: Any) -> None:
    """Raise ConfigError where the groups of a described optimizer leave no param to train."""
    settings = optimizers.describe(optimizer, params)
    if optimizer.groups and all(each.frozen or each.learning_rate == 0 for each in settings):
        raise ConfigError(
            "Training needs a param that changes, and optimizer.groups freeze every one, or give it the learning rate "
            "0. Narrow a pattern."
        )


def check_update(
    optimizer: optax.GradientTransformation,
    abstract: state.TrainState,
    *,
    same_bits: bool = False,
    gives_value: bool = True,
) -> None:
    """Trace an update with gradients like the params; warn where it is another each time, for example by a clock.

    `gives_value`: the step gives an optimizer the value of the loss.

    Raises:
      ConfigError: it fails; or it is another each time, and `same_bits`.
    """
    inputs = optimizer.inputs if isinstance(optimizer, state.WithInputs) else None
    loss = jax.ShapeDtypeStruct((), jnp.float32) if gives_value else None

    def update(grads: Any, opt_state: Any, params: Any, count: Any, inputs: Any, loss: Any) -> Any:
        return step.update_of(optimizer, count, inputs, loss)(grads, opt_state, params)

    try:
        args = [abstract.params, abstract.opt_state, abstract.params, abstract.step, inputs, loss]
        check_same_trace("The update of the optimizer", update, args, same_bits=same_bits)
    except ConfigError:
        raise
    except Exception as error:
        call = (
            "update(grads, opt_state, params, value=loss), without a function that computes the loss again"
            if gives_value
            else "update(grads, opt_state, params), without the value of the loss, which no server has"
        )
        raise ConfigError(
            f"An optimizer is called as {call}. "
            f"Called so, this one fails: {errors.describe(error)} Correct its arguments (optax.lbfgs takes "
            "linesearch=None), or choose another."
        ) from error
