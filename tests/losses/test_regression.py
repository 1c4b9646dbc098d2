"""Regression losses against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

import jaxdist
from jaxdist import losses

NUMBERS = st.floats(-100, 100, width=32)
CASES = {
    "squared": (losses.SquaredError, np.square, ["absolute_error"]),
    "absolute": (losses.AbsoluteError, np.abs, ["squared_error"]),
    "huber": (losses.Huber, lambda error: special.huber(1.0, error), ["squared_error", "absolute_error"]),
    "wide huber": (
        lambda **settings: losses.Huber(delta=7.5, **settings),
        lambda error: special.huber(7.5, error),
        ["squared_error", "absolute_error"],
    ),
}
ERRORS = {"squared_error": np.square, "absolute_error": np.abs}


def mean(values):
    return float(jaxdist.masked_mean(values).value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
@settings(max_examples=6)
@given(data=st.data())
def test_means_are_divided_by_the_sum_of_the_weights(case, shape, data):
    make, formula, names = CASES[case]
    outputs, targets = (data.draw(hnp.arrays(np.float32, shape, elements=NUMBERS)) for _ in range(2))
    each = data.draw(hnp.arrays(np.float32, 4, elements=st.floats(0.125, 4, width=32)))
    error = outputs.astype(np.float64) - targets
    batch = {"target": jnp.asarray(targets), "other": jnp.asarray(targets + 1), "each": jnp.asarray(each)}
    for settings_, weights in (({}, np.ones(4)), ({"weight": "each"}, each)):
        values, metrics = make(**settings_)(jnp.asarray(outputs), batch)
        assert sorted(metrics) == sorted(names)
        for found, function in ((values, formula), *((metrics[name], ERRORS[name]) for name in names)):
            each_mean = function(error).reshape(4, -1).mean(axis=1)
            assert mean(found) == pytest.approx(np.average(each_mean, weights=weights), rel=1e-4, abs=1e-4)
    other, _ = make(target="other")(jnp.asarray(outputs), batch)
    assert mean(other) == pytest.approx(formula(error - 1).mean(), rel=1e-3, abs=1e-3)


def test_whole_numbers_are_targets_too_and_shapes_that_would_broadcast_are_refused():
    values, _ = losses.SquaredError()(jnp.asarray([0.5, 2.0]), {"target": jnp.asarray([1, 2])})
    assert values.tolist() == [0.25, 0.0]
    for loss in (losses.SquaredError(), losses.AbsoluteError(), losses.Huber()):
        with pytest.raises(ValueError, match=r"\(B, 1\) and \(B,\).*\(4, 1\) and \(4,\)"):
            jax.eval_shape(loss, jnp.zeros((4, 1)), {"target": jnp.zeros(4)})
    with pytest.raises(ValueError, match="delta"):
        losses.Huber(delta=0.0)
