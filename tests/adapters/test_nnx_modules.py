"""NNX modules: how they are switched, and their random streams."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


class _Assigns(nnx.Module):
    """Does `what` to a param in each call."""

    def __init__(self, what, rngs):
        self.head, self.scale, self._what = nnx.Linear(64, 10, rngs=rngs), nnx.Param(jnp.ones(10)), what
        self.table = jnp.ones(10)

    def __call__(self, image):
        self._what(self)
        return self.head(image.reshape(-1, 64)) * self.scale[None]


def _shrink(module):
    module.scale[...] = module.scale * 0.9


def _set(module):
    module.scale[...] = jnp.zeros(10)


def _swap(module):
    module.scale[...], module.head.bias[...] = module.head.bias[...], module.scale[...]


def _make(module):
    module.late = nnx.Param(jnp.ones(10))


def _count(module):
    module.table = module.table + 1


def _replace(module):
    module.table = np.zeros(10)


@pytest.mark.parametrize("what", [_shrink, _set, _swap, _make, nnx.jit(_shrink), _count, _replace])
def test_a_param_or_constant_that_a_call_assigns_is_told(what):
    with pytest.warns(UserWarning, match=r"_Assigns.__call__ (assigns|makes) [a-z/]*, an nnx.Param"):
        adapters.nnx(functools.partial(_Assigns, what), losses.classification, EXAMPLE)


class _Usual(nnx.Module):
    """What NNX modules do with their params without changing them."""

    def __init__(self, rngs):
        self.blocks = nnx.vmap(lambda rngs: nnx.Linear(64, 64, rngs=rngs))(rngs.split(3))
        self.norm, self.dropout = nnx.BatchNorm(64, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs, kernel_metadata={"out_sharding": ("model", None)})
        self.tied, self.same, self.last, self.table = self.head, nnx.Param(jnp.ones(10)), None, np.ones(10)
        self.spectral = nnx.SpectralNorm(nnx.Linear(64, 64, rngs=rngs), rngs=rngs)
        self.weight = nnx.WeightNorm(nnx.Linear(64, 64, rngs=rngs), rngs=rngs)

    def __call__(self, image, mask):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, block):
            return jnp.tanh(block(x))

        x = self.weight(self.spectral(through(image.reshape(-1, 64), self.blocks)))
        x = self.dropout(self.norm(x, mask=mask[:, None] > 0))
        x = nnx.remat(lambda head, x: head(x))(self.head, x)
        x = nnx.jit(lambda head, x: x + head.bias[None])(self.tied, x)
        self.same[...], self.last, self.table = self.same[...], x, self.table
        return nnx.cond(x.sum() > 0, lambda head, x: x * 2, lambda head, x: x + head.bias[None], self.head, x)


def test_params_that_other_functions_are_given_are_not_said_to_be_assigned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.nnx(_Usual, losses.classification, EXAMPLE)
