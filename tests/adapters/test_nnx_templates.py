"""NNX modules without their arrays: arrays among the attributes are kept, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_cnns import EXAMPLE

from jaxdist import adapters, errors, losses


class _Attribute(nnx.Module):
    """Adds an attribute that `make(rngs)` gives to its outputs: `read(attribute)`."""

    def __init__(self, make, read, rngs):
        self.head, self.table, self._read = nnx.Linear(64, 10, rngs=rngs), make(rngs), read

    def __call__(self, image):
        return self.head(image.reshape(-1, 64)) + self._read(self.table)[None]


TABLE = np.array([0, 1, -1, 2, 3e38, -np.inf, np.inf, np.finfo(np.float32).min, 1e-40, 0.1], np.float32)
ATTRIBUTES = {
    "numpy": (lambda rngs: TABLE, lambda table: table),
    "jax": (lambda rngs: jnp.asarray(TABLE) * 1, lambda table: table.at[0].set(0)),
    "bfloat16": (lambda rngs: jnp.ones(10, jnp.bfloat16), lambda table: table),
    "whole numbers": (lambda rngs: jnp.arange(10), lambda table: table),
    "a key": (lambda rngs: jax.random.key(3), lambda key: jax.random.normal(key, (10,))),
    "in nnx.List": (lambda rngs: nnx.List([jnp.ones(10), 3]), lambda each: each[0] * each[1]),
    "in nnx.Dict": (lambda rngs: nnx.Dict(a=jnp.ones(10)), lambda each: each.a),
    "in nnx.data": (lambda rngs: nnx.data({("a",): (jnp.ones(10), 2)}), lambda each: each["a",][0]),
    "a variable's": (lambda rngs: nnx.BatchStat(rngs.params.normal((10,))), lambda each: each[...]),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_arrays_among_a_modules_attributes_are_those_of_the_module_in_plain_nnx(name):
    make_module = functools.partial(_Attribute, *ATTRIBUTES[name])
    fns = adapters.nnx(make_module, losses.classification, EXAMPLE)
    begun = fns.init_fn(jax.random.key(1))
    params, model_state = begun if isinstance(begun, tuple) else (begun, None)
    plain = make_module(nnx.Rngs(jax.random.key(1)))
    batch = {"image": np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, params, nnx.to_pure_dict(nnx.state(plain, nnx.Param)))
    for call in (fns.predict_fn, jax.jit(fns.predict_fn)):
        outputs = call(params, batch) if model_state is None else call(params, batch, model_state)
        np.testing.assert_allclose(outputs, plain(batch["image"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda rngs: rngs.params.normal((10,)), "table of _Attribute is drawn from its rngs"),
        (lambda rngs: nnx.List([jnp.ones(10), rngs.params.normal((10,))]), "table/1 of _Attribute is drawn"),
        (lambda rngs: [jnp.ones(10)], "takes a list .* for a setting.*; table of _Attribute has some"),
        (lambda rngs: {"a": {"b": jnp.ones(10)}}, "takes a dict .* for a setting"),
    ],
)
def test_arrays_that_a_checkpoint_or_flax_would_lose_are_refused(make, rule):
    with pytest.raises(errors.ConfigError, match=rule):
        adapters.nnx(functools.partial(_Attribute, make, None), losses.classification, EXAMPLE)
