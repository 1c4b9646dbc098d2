"""Classification: one value per example, equal to the formula in NumPy and to scikit-learn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sklearn_metrics

import jaxdist
from jaxdist import losses

LOGITS = hnp.arrays(np.float32, (4, 5), elements=st.floats(-50, 50, width=32))
LABELS = hnp.arrays(np.int32, 4, elements=st.integers(0, 4))


def log_probabilities(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean(values):
    return float(jaxdist.masked_mean(values).value)


@settings(max_examples=20)
@given(LOGITS, LABELS)
def test_classification_is_cross_entropy_and_accuracy_of_each_example(logits, labels):
    for loss in (jax.jit(losses.classification), jax.jit(losses.Classification())):
        values, metrics = loss(jnp.asarray(logits), {"label": jnp.asarray(labels)})
        np.testing.assert_allclose(values, -log_probabilities(logits)[np.arange(4), labels], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(metrics["accuracy"], (logits.argmax(-1) == labels).astype(np.float32))


@settings(max_examples=15)
@given(LOGITS, LABELS, hnp.arrays(np.float32, 4, elements=st.floats(0, 4, width=32)), st.floats(0, 0.9))
def test_smoothing_and_weights_are_the_formula_divided_by_the_sum_of_the_weights(logits, labels, each, smoothing):
    class_weights = (1.0, 0.5, 2.0, 4.0, 0.25)
    loss = losses.Classification(label_smoothing=smoothing, class_weights=class_weights, weight="each", top_k=(2,))
    batch = {"label": jnp.asarray(labels), "each": jnp.asarray(each)}
    values, metrics = loss(jnp.asarray(logits), batch)
    target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    single = -(target * log_probabilities(logits)).sum(-1)
    weights = each.astype(np.float64) * np.asarray(class_weights)[labels]
    if weights.sum() > 0:
        np.testing.assert_allclose(mean(values), (single * weights).sum() / weights.sum(), rtol=1e-4, atol=1e-4)
        right = (logits.argmax(-1) == labels) * each
        np.testing.assert_allclose(mean(metrics["accuracy"]), right.sum() / each.sum(), rtol=1e-5)
    else:
        assert math.isnan(mean(values))


def test_probabilities_as_labels_are_the_formula_and_certain_ones_are_the_class():
    random = np.random.default_rng(0)
    logits, soft = random.normal(size=(6, 5)).astype(np.float32), random.dirichlet(np.ones(5), 6).astype(np.float32)
    loss = losses.Classification(class_weights=(1.0, 0.5, 2.0, 4.0, 0.25), label_smoothing=0.1, top_k=(2,))
    values, metrics = loss(jnp.asarray(logits), {"label": jnp.asarray(soft)})
    targets = 0.9 * soft + 0.1 / 5
    np.testing.assert_allclose(values.values, -(targets * log_probabilities(logits)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(values.weights, soft @ np.asarray(loss.class_weights), rtol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], logits.argmax(-1) == soft.argmax(-1))
    labels = random.integers(0, 5, 6)
    certain, hard = (
        loss(jnp.asarray(logits), {"label": each}) for each in (jnp.eye(5)[labels], jnp.asarray(labels, jnp.int32))
    )
    for one, other in zip(jax.tree.leaves(certain), jax.tree.leaves(hard), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    wrong = jnp.asarray([[0.5, 0.4, 0, 0, 0], [1.2, -0.2, 0, 0, 0], [0, 1.0, 0, 0, 0]])
    values, _ = losses.classification(jnp.zeros((3, 5)), {"label": wrong})
    assert np.isnan(values).tolist() == [True, True, False]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_accuracy_is_that_of_scikit_learn(k):
    random = np.random.default_rng(k)
    logits, labels = random.normal(size=(40, 5)).astype(np.float32), random.integers(0, 5, 40).astype(np.int32)
    _, metrics = losses.Classification(top_k=(k,))(jnp.asarray(logits), {"label": jnp.asarray(labels)})
    wanted = sklearn_metrics.top_k_accuracy_score(labels, logits, k=k)
    assert mean(metrics[f"top_{k}_accuracy"]) == pytest.approx(wanted, abs=1e-6)


def test_among_equal_logits_the_first_classes_come_first_and_nan_is_never_right():
    logits = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [jnp.nan, 0.0, 0.0], [0.0, 1.0, 2.0]])
    _, metrics = losses.Classification(top_k=(1, 2))(logits, {"label": jnp.asarray([0, 2, 1, 3])})
    assert metrics["top_1_accuracy"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert metrics["top_2_accuracy"].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_the_softmax_of_bfloat16_logits_is_computed_in_float32():
    # 1000 equal classes: a bfloat16 sum stops growing at 256.
    logits, batch = jnp.zeros((1, 1000), jnp.bfloat16), {"label": jnp.zeros(1, jnp.int32)}
    for loss in (losses.classification, losses.Classification(label_smoothing=0.5)):
        values, _ = loss(logits, batch)
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, [math.log(1000)], rtol=1e-6)


@pytest.mark.parametrize("label", [-1, -5, 5, 2**31 - 1])
def test_a_label_that_is_no_class_is_never_taken_for_one(label):
    for loss in (losses.classification, losses.Classification(label_smoothing=0.1, top_k=(5,))):
        values, metrics = loss(jnp.zeros((2, 5)), {"label": jnp.asarray([label, 2])})
        assert np.isnan(values).tolist() == [True, False]
        assert float(metrics["accuracy"][0]) == 0
        assert float(metrics.get("top_5_accuracy", jnp.zeros(2))[0]) == 0


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (losses.classification, {"image": jnp.zeros(2)}, "'label'.*'image'"),
        (losses.classification, {"label": jnp.zeros(2)}, "integers.*float32"),
        (losses.classification, {"label": jnp.zeros((2, 3), jnp.int32)}, "one-hot"),
        (losses.Classification(class_weights=(1.0,)), {"label": jnp.zeros(2, jnp.int32)}, "1 for 3 classes"),
        (losses.Classification(weight="w"), {"label": jnp.zeros(2, jnp.int32)}, "field 'w'"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(loss, batch, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(loss, jnp.zeros((2, 3)), batch)


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"class_weights": (1.0, -1.0)}, {"top_k": (0,)}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        losses.Classification(**wrong)


def test_a_record_names_the_loss_as_users_import_it():
    """`jaxdist.load` compares the names with those of runs that were trained before."""
    assert (losses.classification.__module__, losses.next_token.__module__) == ("jaxdist.losses", "jaxdist.losses")
