"""Metrics that are no means, against scikit-learn on all examples at once."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from jaxdist import losses


def measured(metric, outputs, batch):
    rows = metric.collect(jnp.asarray(outputs), jax.tree.map(jnp.asarray, batch))
    found = metric.compute({name: np.asarray(values) for name, values in rows.items()})
    assert tuple(found) == metric.names
    return found


def drawn(seed, classes, size=30):
    random = np.random.default_rng(seed)
    # Rounded, so that scores are equal now and then.
    logits = random.normal(size=(size, classes)).round(1).astype(np.float32)
    return logits, random.integers(0, classes, size).astype(np.int32)


@settings(max_examples=10)
@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 40))
def test_confusion_f1_and_area_are_those_of_scikit_learn(seed, classes, size):
    logits, labels = drawn(seed, classes, size)
    predicted, batch = logits.argmax(-1), {"label": labels}
    matrix = measured(losses.ConfusionMatrix(num_classes=classes), logits, batch)
    wanted = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(classes))
    assert list(matrix.values()) == wanted.reshape(-1).tolist()
    assert matrix["confusion_1_0"] == np.sum((labels == 1) & (predicted == 0))
    for average in ("macro", "micro", "weighted"):
        wanted = sklearn_metrics.f1_score(labels, predicted, average=average, zero_division=0)
        assert measured(losses.F1(average=average), logits, batch)["f1"] == pytest.approx(wanted)


def test_the_area_of_several_classes_is_the_mean_of_each_against_the_rest():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(30, 4)).astype(np.float32), np.arange(30, dtype=np.int32) % 4
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    wanted = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
    assert measured(losses.RocAuc(), logits, {"label": labels})["roc_auc"] == pytest.approx(wanted)


@settings(max_examples=10)
@given(st.integers(0, 999), st.integers(1, 40))
def test_two_classes_by_one_logit_or_by_two(seed, size):
    logits, labels = drawn(seed, 2, size)
    one, batch = (logits[:, 1] - logits[:, 0]).round(1), {"label": labels}
    area = measured(losses.RocAuc(), one, batch)["roc_auc"]
    if len(set(labels)) == 2:
        assert area == pytest.approx(sklearn_metrics.roc_auc_score(labels, one))
        two = np.stack([np.zeros_like(one), one], axis=1)
        assert measured(losses.RocAuc(), two, batch)["roc_auc"] == area
    else:
        assert np.isnan(area)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = sklearn_metrics.f1_score(labels, one > 0, zero_division=0)
    assert measured(losses.F1(average="binary"), one, batch)["f1"] == pytest.approx(wanted)


@settings(max_examples=10)
@given(st.integers(0, 999), st.integers(2, 20), st.sampled_from([(), (3,)]), st.booleans())
def test_r2_is_that_of_scikit_learn(seed, size, shape, constant):
    random = np.random.default_rng(seed)
    targets = random.normal(size=(size, *shape)).astype(np.float32)
    targets = np.zeros_like(targets) if constant else targets
    outputs = targets if seed % 3 == 0 else random.normal(size=targets.shape).astype(np.float32)
    found = measured(losses.R2(), outputs, {"target": targets})["r2"]
    assert found == pytest.approx(sklearn_metrics.r2_score(targets, outputs), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens():
    random = np.random.default_rng(0)
    logits, tokens = random.normal(size=(4, 6, 5)).astype(np.float32), random.integers(0, 5, (4, 6)).astype(np.int32)
    segments = np.asarray([[1] * 6, [1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]], np.int32)
    logs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    single = -np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    counts = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    packed = measured(losses.Perplexity(), logits, {"tokens": tokens, "segment_ids": segments})["perplexity"]
    assert packed == pytest.approx(np.exp(single[counts].mean()), rel=1e-5)
    assert measured(losses.Perplexity(), logits, {"tokens": tokens})["perplexity"] == pytest.approx(
        np.exp(single.mean()), rel=1e-5
    )


def test_what_cannot_be_right_is_refused():
    logits, labels = drawn(0, 3)
    with pytest.raises(ValueError, match="a logit for each of two classes or more"):
        measured(losses.F1(), logits[:, :1], {"label": labels})
    with pytest.raises(ValueError, match="needs num_classes=3, as many as"):
        measured(losses.ConfusionMatrix(num_classes=2), logits, {"label": labels})
    with pytest.raises(ValueError, match=r"numbered from 0.*found -1"):
        measured(losses.F1(), logits, {"label": labels * 0 - 1})
    with pytest.raises(ValueError, match="two classes; found 3"):
        measured(losses.F1(average="binary"), logits, {"label": labels})
    with pytest.raises(ValueError, match="average must be"):
        losses.F1(average="mean")
