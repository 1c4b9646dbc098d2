"""NNX modules: how they are switched, and their random streams."""

import jax
import jax.numpy as jnp
from flax import nnx
from small_cnns import EXAMPLE, make_batch, random_variables

from jaxdist import adapters, losses


class _NNXByAttribute(nnx.Module):
    """An NNX module in the manner of its own documentation: no `train` argument, train() and eval() switch it."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, image):
        return self.head(self.dropout(image.reshape(-1, 64)))


class _NNXManyStreams(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs.split(3)
        self.scale = nnx.Param(jnp.ones(1))

    def __call__(self, image):
        draws = jax.vmap(jax.random.normal)(self.rngs.default.key.get_value())
        return jnp.broadcast_to(jnp.expand_dims(draws, 0), (image.shape[0], 3))


def test_an_nnx_module_without_a_train_argument_is_switched_by_train_and_eval():
    fns = adapters.nnx(_NNXByAttribute, losses.classification, EXAMPLE)
    params, batch = random_variables(fns), make_batch()
    assert fns.loss_fn(params, batch, jax.random.key(0)) != fns.loss_fn(params, batch, jax.random.key(1))
    assert fns.eval_fn(params, batch, jax.random.key(0)) == fns.eval_fn(params, batch, jax.random.key(1))


def test_nnx_streams_that_hold_several_keys_get_as_many_different_ones():
    fns = adapters.nnx(_NNXManyStreams, lambda outputs, batch: (outputs.std(axis=-1), {}), EXAMPLE)
    params, batch = fns.init_fn(jax.random.key(0)), make_batch()
    assert fns.loss_fn(params, batch, jax.random.key(0))[0].value > 0
    assert fns.loss_fn(params, batch, jax.random.key(0)) != fns.loss_fn(params, batch, jax.random.key(1))
