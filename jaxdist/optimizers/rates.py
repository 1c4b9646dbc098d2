"""The learning rate of each step, from the description of an optimizer and what is known about the run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.optimizers import schedules
from jaxdist.optimizers.described import Optimizer
from jaxdist.optimizers.schedules import Schedule

SCALED_WARMUP_EPOCHS = 5
"""The warm-up of Goyal et al. (2017), taken where the learning rate is scaled up and no other warm-up is given."""


class RateSchedule(NamedTuple):
    """A learning rate as a function of the step, with its start and its peak as separate inputs.

    `inputs` (float32, 3 elements: where the warm-up starts, its rise per step, the peak) enter the compiled step as an
    argument, so that another learning rate needs no new compile. `offset` corrects the count after a change of the
    batch size: the difference in steps of the present size. `is_given`: a function of the user
    gives the rate, so it may be anything.
    """

    rate: Callable[[jax.Array, jax.Array], jax.Array]
    inputs: np.ndarray
    is_given: bool = False

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
        if callable(schedule) or callable(optimizer.learning_rate):
            return cls._of_function(optimizer, global_batch_size)
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
        # Reciprocals of constants are computed here, so that the compiler cannot choose between dividing and
        # multiplying.
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

    @classmethod
    def _of_function(cls, optimizer: Optimizer, global_batch_size: int) -> "RateSchedule":
        """Return the schedule where a function of the finished steps gives the rate, or its fraction of the peak."""
        function: Any = optimizer.schedule
        peak: Any = optimizer.learning_rate
        if callable(peak):
            if function != Schedule() or optimizer.base_batch_size:
                raise ValueError(
                    "A function as optimizer.learning_rate gives the rate of each step by itself. Leave schedule and "
                    "base_batch_size out, or give the function as optimizer.schedule: the fraction of the peak."
                )
            function, peak = peak, 1.0
        _check_function(function)
        peak *= global_batch_size / (optimizer.base_batch_size or global_batch_size)

        def rate(count: jax.Array, inputs: jax.Array) -> jax.Array:
            return inputs[2] * jnp.asarray(function(count.astype(jnp.int32)), jnp.float32)

        return cls(rate, np.array([0.0, 0.0, peak], np.float32), is_given=True)


make_schedule = RateSchedule.make


def units(optimizer: Optimizer, *, global_batch_size: int, ends_in_epochs: bool) -> frozenset[str]:
    """Return what the parts of the schedule are counted in: "steps", "epochs", both, or nothing for a constant rate.

    Where that is epochs, a run that is resumed with another batch size continues where the examples it was trained on
    have brought it. Where it is both, such a change would move the parts against each other.

    `global_batch_size` decides whether the learning rate is scaled up, and warms up for so many epochs;
    `ends_in_epochs` is whether a decay without a length ends after so many epochs.
    """
    schedule = optimizer.schedule
    if callable(schedule) or callable(optimizer.learning_rate):
        return frozenset({"steps"})
    scales_up = global_batch_size > (optimizer.base_batch_size or global_batch_size)
    found = {"epochs"} if schedule.warmup is None and scales_up else set()
    if schedule.warmup or schedule.boundaries or schedule.name == "inverse_sqrt":
        found.add(schedule.unit)
    if schedule.ends:
        found.add(schedule.unit if schedule.length is not None else "epochs" if ends_in_epochs else "steps")
    return frozenset(found)


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


def _check_function(function: Callable[[jax.Array], Any]) -> None:
    advice = "It is traced with the number of finished steps, an array: write jnp.where for a condition."
    try:
        found = jax.eval_shape(lambda count: jnp.asarray(function(count)), jax.ShapeDtypeStruct((), jnp.int32))
    except Exception as error:
        raise ValueError(f"The function given as a schedule fails: {str(error).splitlines()[0]} {advice}") from error
    if found.shape:
        raise ValueError(
            f"The function given as a schedule must return a number; got the shape {found.shape}. {advice}"
        )


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
    return max(max_steps, warmup + 1)  # A run that ends inside its warm-up never reaches the decay.


def _steps_per_unit(schedule: Schedule, steps_per_epoch: int | None) -> float:
    if schedule.unit == "steps":
        return 1
    if steps_per_epoch is None:
        raise ValueError(
            "A schedule in epochs needs the length of an epoch, which this data does not provide. "
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
