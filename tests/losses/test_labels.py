"""Binary classification of one label or several, against the formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxdist
from jaxdist import losses


def cross_entropy(logits, targets):
    logits = logits.astype(np.float64)
    return targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)


def mean(values):
    return float(jaxdist.masked_mean(values).value)


@settings(max_examples=15)
@given(st.sampled_from([(6,), (3, 2)]), st.data(), st.sampled_from([1.0, 3.0]))
def test_the_mean_is_over_all_labels_and_divided_by_the_sum_of_the_weights(shape, data, positive_weight):
    logits = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-30, 30, width=32)))
    targets = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 1)))
    each = np.arange(1, shape[0] + 1, dtype=np.float32)
    loss = losses.BinaryClassification(positive_weight=positive_weight, weight="each")
    values, metrics = loss(jnp.asarray(logits), {"label": jnp.asarray(targets), "each": jnp.asarray(each)})
    rows = np.broadcast_to(each.reshape(-1, *[1] * (len(shape) - 1)), shape)
    weights = rows * np.where(targets == 1, positive_weight, 1.0)
    assert mean(values) == pytest.approx(
        (cross_entropy(logits, targets) * weights).sum() / weights.sum(), rel=1e-4, abs=1e-5
    )
    right = (logits > 0) == (targets == 1)
    assert mean(metrics["accuracy"]) == pytest.approx((right * rows).sum() / rows.sum(), rel=1e-5)


def test_targets_may_be_probabilities():
    logits, targets = np.asarray([-1.0, 2.0], np.float32), np.asarray([0.25, 0.5], np.float32)
    values, _ = losses.BinaryClassification()(jnp.asarray(logits), {"label": jnp.asarray(targets)})
    np.testing.assert_allclose(values, cross_entropy(logits, targets), rtol=1e-6)


@pytest.mark.parametrize("target", [-1, 2])
def test_a_target_that_is_no_probability_is_nan_and_not_a_loss_below_zero(target):
    values, metrics = losses.BinaryClassification()(jnp.zeros(2), {"label": jnp.asarray([target, 1])})
    assert np.isnan(values).tolist() == np.isnan(metrics["accuracy"]).tolist() == [True, False]


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(2,\)"):
        jax.eval_shape(losses.BinaryClassification(), jnp.zeros((2, 1)), {"label": jnp.zeros(2)})
    with pytest.raises(ValueError, match="positive_weight"):
        losses.BinaryClassification(positive_weight=0.0)
