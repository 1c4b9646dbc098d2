"""The loss of the next token: one value per token, equal to the formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdist import losses
from jaxdist.spmd import metrics

LOGITS = st.floats(-50, 50, width=32)


def reference(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


@given(hnp.arrays(np.float32, (2, 4, 5), elements=LOGITS), hnp.arrays(np.int32, (2, 4), elements=st.integers(0, 4)))
def test_next_token_scores_each_position_against_the_token_after_it(logits, tokens):
    values, metrics = losses.next_token(jnp.asarray(logits), {"tokens": jnp.asarray(tokens)})
    np.testing.assert_allclose(values, reference(logits[:, :-1], tokens[:, 1:]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_byte"], values / math.log(2), rtol=1e-6)


def test_a_model_that_knows_nothing_of_bytes_needs_eight_bits():
    batch = {"tokens": jnp.arange(6, dtype=jnp.uint8).reshape(2, 3)}
    _, metrics = losses.next_token(jnp.zeros((2, 3, 256)), batch)
    np.testing.assert_allclose(metrics["bits_per_byte"], np.full((2, 2), 8.0), rtol=1e-6)


@pytest.mark.parametrize("segments", [None, [[1, 1, 2]]])
def test_bits_are_shared_among_the_bytes_of_a_token(segments):
    batch = {"tokens": jnp.array([[0, 1, 2]])} | ({} if segments is None else {"segment_ids": jnp.array(segments)})
    logits = jnp.zeros((1, 3, 1024))
    plain, _ = losses.next_token(logits, batch)
    values, found = losses.NextToken(bytes_per_token=2.5)(logits, batch)
    jax.tree.map(np.testing.assert_array_equal, values, plain)
    means = {name: float(metrics.masked_mean(each).value) for name, each in found.items()}
    assert means == {"bits_per_token": pytest.approx(10.0), "bits_per_byte": pytest.approx(4.0)}
    assert set(losses.NextToken()(logits, batch)[1]) == {"bits_per_token"}
    with pytest.raises(ValueError, match="bytes_per_token must be above 0; got 0"):
        losses.NextToken(bytes_per_token=0)


@pytest.mark.parametrize("label", [-1, -5, 5, 2**31 - 1])
def test_a_label_that_is_no_class_is_never_taken_for_one(label):
    values, _ = losses.next_token(jnp.zeros((1, 3, 5)), {"tokens": jnp.asarray([[0, label, 2]])})
    assert np.isnan(values).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("loss", "outputs", "batch", "message"),
    [
        (losses.next_token, jnp.zeros((2, 3, 5)), {"tokens": jnp.zeros((2, 4), jnp.int32)}, "shift by one"),
        (losses.next_token, jnp.zeros((2, 1, 5)), {"tokens": jnp.zeros((2, 1), jnp.int32)}, "T >= 2"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(loss, outputs, batch, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(loss, outputs, batch)


def test_next_token_counts_no_target_of_another_example_and_no_filling():
    random = np.random.default_rng(0)
    logits, tokens = random.normal(size=(2, 6, 5)).astype(np.float32), random.integers(0, 5, (2, 6)).astype(np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
    batch = {"tokens": tokens, "segment_ids": segments}
    values, found = losses.next_token(jnp.asarray(logits), jax.tree.map(jnp.asarray, batch))
    pairs = [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 2)]
    expected = np.mean([reference(logits[row : row + 1, at], tokens[row : row + 1, at + 1])[0] for row, at in pairs])
    np.testing.assert_allclose(metrics.masked_mean(values, jnp.ones(2)).value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.masked_mean(values).count, len(pairs))
    bits = metrics.masked_mean(found["bits_per_byte"], jnp.array([1, 0]))
    np.testing.assert_allclose((bits.count, bits.value), (3, expected_bits(logits, tokens)), rtol=1e-5)


def expected_bits(logits, tokens):
    return np.mean([reference(logits[:1, at], tokens[:1, at + 1])[0] for at in (0, 1, 3)]) / math.log(2)
