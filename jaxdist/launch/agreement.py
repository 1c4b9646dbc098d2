"""Agreeing on the step to stop at: a signal reaches processes at different moments, but all must stop at one step."""

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
    devices = [next(d for d in jax.devices() if d.process_index == p) for p in range(jax.process_count())]
    mesh = Mesh(np.asarray(devices), ("process",), axis_types=(AxisType.Auto,))
    votes_lie, result_lies = NamedSharding(mesh, PartitionSpec("process")), NamedSharding(mesh, PartitionSpec())
    count = jax.jit(jnp.sum, out_shardings=result_lies)
    pending: list[jax.Array] = []

    def stop_requested(step: int) -> bool:
        del step
        vote = jax.make_array_from_process_local_data(votes_lie, np.array([requested()], np.int32))
        pending.append(count(vote))
        return len(pending) > 1 and int(pending.pop(0).addressable_data(0)) > 0

    return stop_requested
