"""Which adapter takes a model, and what none takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_cnns import EXAMPLE

from jaxdist import adapters, errors, losses
from jaxdist.models import cnn
from jaxdist.spmd.metrics import masked_mean


def test_plain_functions_compute_with_rounded_inputs_and_exact_targets():
    def loss_fn(params, batch, key):
        assert (params["w"].dtype, batch["x"].dtype, batch["target"].dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
        return masked_mean(batch["target"] - batch["x"] * params["w"]), {}

    functions = adapters.Functions(lambda key: {"w": jnp.zeros(())}, loss_fn, loss_fn)
    fns = adapters.from_model(functions, None, {}, inputs="x", precision="bfloat16")
    batch = {"x": np.ones(4, np.float32), "target": np.full(4, 257.0, np.float32)}
    assert fns.eval_fn({"w": jnp.zeros(())}, batch, jax.random.key(0))[0].value == 257.0


def plain(params, batch, key):
    return params


def test_functions_with_defaults_states_and_keywords_of_their_own_are_taken():
    adapters.check_model(adapters.Functions(dict, lambda p, b, k, s=None, *, t=0: p, lambda *args: args, max))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (cnn.CNN, r"takes a module, not its class. Call the class: CNN\(...\)"),
        (3, "an object of the class int"),
        (adapters.Functions(None, len, len), "needs three functions"),
        (adapters.Functions(lambda: 0, plain, plain), r"init_fn\(key\); <lambda> \(.*takes \(\)\. Change"),
        (adapters.Functions(dict, lambda p, b: p, plain), r"loss_fn\(params, batch, key\[, model_state\]\)"),
        (adapters.Functions(dict, plain, lambda p, b, k, s, t: p), r"eval_fn of .* takes \(p, b, k, s, t\)"),
        (adapters.Functions(dict, plain, plain, lambda p: p), r"predict_fn\(params, batch\[, model_state\]\)"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_write(model, message):
    with pytest.raises(errors.ConfigError, match=message):
        adapters.check_model(model)


def test_a_made_nnx_module_is_refused_with_the_line_to_write():
    with pytest.raises(errors.ConfigError, match=r"Write lambda rngs: Linear\(..., rngs=rngs\)"):
        adapters.check_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_a_module_needs_a_loss():
    with pytest.raises(ValueError, match=r"needs a loss\(outputs, batch\)"):
        adapters.from_model(cnn.CNN(10), None, EXAMPLE)
    with pytest.raises(ValueError, match="got int"):
        adapters.from_model(3, losses.classification, EXAMPLE)
