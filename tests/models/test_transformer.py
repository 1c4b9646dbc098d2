"""The transformer block's attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

from jaxdist.models.transformer import Attention

INIT = initializers.normal(0.5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_published_formula(causal):
    attention = Attention(num_heads=2, causal=causal, kernel_init=INIT, residual_init=INIT)
    x = jax.random.normal(jax.random.key(0), (3, 4, 6))
    actual, variables = jax.jit(attention.init_with_output)(jax.random.key(1), x)
    kernel, out = (np.asarray(variables["params"][name]["kernel"], np.float64) for name in ("qkv", "out"))
    heads = []
    for columns in np.split(kernel, 2, axis=-1):
        query, key, value = np.split(np.asarray(x, np.float64) @ columns, 3, axis=-1)
        scores = query @ key.swapaxes(1, 2) / np.sqrt(3)
        weights = np.exp(scores) * (np.tri(4) if causal else 1.0)
        heads.append(weights / weights.sum(-1, keepdims=True) @ value)
    np.testing.assert_allclose(actual, np.concatenate(heads, axis=-1) @ out, rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
    attention = Attention(num_heads=4, causal=False, kernel_init=INIT, residual_init=INIT)
    with pytest.raises(ValueError, match="4 heads and width 6"):
        attention.init(jax.random.key(0), jnp.zeros((1, 2, 6)))
