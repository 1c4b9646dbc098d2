"""A plain Flax loop: a jitted step on sharded batches, and the loss read every 20 steps as jaxdist does.

A loop that reads nothing dispatches without end, and on two fake devices has stopped forever after some thousand steps:
XLA lets no more than 32 programs be in flight.
"""

import functools
import itertools
from typing import Any

import flax_models
import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from turns import Turns
from works import LEARNING_RATE

OPTIMIZER = optax.adam(LEARNING_RATE)
READ_EVERY = 20


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    loss, grads = jax.value_and_grad(flax_models.mean_loss)(params, batch)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def main() -> None:
    mesh = Mesh(jax.devices(), "data")
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    arrays = flax_models.load("arrays.npz")
    params = jax.device_put(flax_models.first_params(), everywhere)
    opt_state = jax.jit(OPTIMIZER.init, out_shardings=everywhere)(params)
    turns, size = Turns(), flax_models.SIZES.batch_size
    starts = itertools.cycle(range(0, len(arrays[flax_models.INPUTS]), size))
    for count, start in enumerate(starts):
        batch = jax.device_put({name: array[start : start + size] for name, array in arrays.items()}, split)
        params, opt_state, loss = step(params, opt_state, batch)
        if count % READ_EVERY == 0:
            float(loss)
        if not turns.step(functools.partial(jax.block_until_ready, (params, loss))):
            turns.tell(flax_models.loss_of(params))
            return


if __name__ == "__main__":
    main()
