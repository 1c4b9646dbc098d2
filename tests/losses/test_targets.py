"""What losses read of a batch: fields that are there, of the right kind and shape, and weights that multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdist
from jaxdist import losses
from jaxdist.losses import targets


def test_a_missing_field_is_named_with_those_that_are_there():
    with pytest.raises(ValueError, match=r"L needs the batch field 'label', but the batch has \['image', 'lable'\]"):
        targets.field_of({"lable": jnp.zeros(2), "image": jnp.zeros(2)}, "label", needed_by="L")
    assert targets.weights_of({}, None, needed_by="L") is None
    with pytest.raises(ValueError, match="'each'"):
        targets.weights_of({}, "each", needed_by="L")


def test_integers_are_not_made_of_floats():
    assert targets.integers({"label": jnp.arange(3)}, "label", needed_by="L").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="needs integers in batch\\['label'\\]; got float32"):
        targets.integers({"label": jnp.zeros(3)}, "label", needed_by="L")


def test_outputs_and_targets_have_one_shape_and_become_float32():
    outputs, values = targets.like_outputs(
        jnp.ones((2, 3), jnp.bfloat16), {"y": jnp.ones((2, 3), jnp.int32)}, "y", needed_by="L"
    )
    assert outputs.dtype == values.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"got \(4, 1\) and \(4,\)"):
        targets.like_outputs(jnp.zeros((4, 1)), {"y": jnp.zeros(4)}, "y", needed_by="L")


@pytest.mark.parametrize(
    ("loss", "outputs", "batch"),
    [
        (losses.SquaredError(), jnp.zeros(4, complex), {"target": jnp.zeros(4)}),
        (losses.Huber(), jnp.zeros(4), {"target": jnp.zeros(4, complex)}),
        (losses.classification, jnp.zeros((4, 3), complex), {"label": jnp.zeros(4, int)}),
        (losses.next_token, jnp.zeros((4, 2, 3), complex), {"tokens": jnp.zeros((4, 2), int)}),
        (losses.F1().collect, jnp.zeros((4, 3), complex), {"label": jnp.zeros(4, int)}),
    ],
)
def test_complex_numbers_are_refused_and_not_cut_to_their_real_part(loss, outputs, batch):
    with pytest.raises(ValueError, match=r"needs real numbers, but .* complex64"):
        loss(outputs, batch)


def test_weights_multiply_over_leading_dims_and_the_mean_is_divided_by_their_sum():
    values = jnp.arange(6.0).reshape(2, 3)
    rows, tokens = jnp.asarray([1.0, 3.0]), jnp.asarray([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])
    assert targets.counted(values) is values
    assert targets.counted(values, None) is values
    found = jaxdist.masked_mean(targets.counted(values, rows, None, tokens))
    weights = np.asarray(rows)[:, None] * np.asarray(tokens)
    assert float(found.value) == pytest.approx(np.average(np.asarray(values), weights=weights))


def test_a_negative_weight_is_not_a_silent_number():
    mean = jaxdist.masked_mean(targets.counted(jnp.ones(2), jnp.asarray([1.0, -1.0])))
    assert bool(jnp.isnan(jax.device_get(mean.value)))
