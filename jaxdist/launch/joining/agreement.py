"""Agreeing on the step to stop at: signals and clocks differ from process to process, but all must stop at one step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def agreed_stop(requested: Callable[[], bool]) -> Callable[[int], bool]:
    """Return `stop_requested(step)` for `loop.fit`: true on every process at the same step, soon after any wants it.

    In a job of several processes each step casts a vote, and the vote of the step before decides: it was counted on
    the devices meanwhile, so nobody waits for it.
    """
    if jax.process_count() == 1:
        return lambda step: requested()
    count = _sum_a_call_late()

    def stop_requested(step: int) -> bool:
        del step
        votes = count(float(requested()))
        return votes is not None and votes > 0

    return stop_requested


def agreed_number(start: float) -> Callable[[float], float]:
    """Return `agreed(number)`, to be called at the same steps everywhere: one number (float32) on every process.

    In a job of several processes it is what process 0 said a call ago, and `start` at the first call. So whatever
    follows from a clock, which each process reads for itself, can be the same for all.
    """
    if jax.process_count() == 1:
        return lambda number: number
    share = _sum_a_call_late()

    def agreed(number: float) -> float:
        shared = share(number if jax.process_index() == 0 else 0.0)
        return start if shared is None else shared

    return agreed


def _sum_a_call_late() -> Callable[[float], float | None]:
    """Return a function whose calls give the sum, over the processes, of what they passed a call ago; None at first.

    That sum was made on the devices meanwhile, so nobody waits for it.
    """
    devices = [next(d for d in jax.devices() if d.process_index == p) for p in range(jax.process_count())]
    mesh = Mesh(np.asarray(devices), ("process",), axis_types=(AxisType.Auto,))
    values_lie, result_lies = NamedSharding(mesh, PartitionSpec("process")), NamedSharding(mesh, PartitionSpec())
    add = jax.jit(jnp.sum, out_shardings=result_lies)
    pending: list[jax.Array] = []

    def exchange(value: float) -> float | None:
        pending.append(add(jax.make_array_from_process_local_data(values_lie, np.array([value], np.float32))))
        return float(pending.pop(0).addressable_data(0)) if len(pending) > 1 else None

    return exchange
