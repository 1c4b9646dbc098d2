"""What is said of a loss when it is first called."""

import jax.numpy as jnp
import pytest
from flax import linen as nn
from small_cnns import EXAMPLE

from jaxdist import adapters, errors
from jaxdist.models import cnn
from jaxdist.spmd.metrics import Mean, masked_mean


def test_a_loss_that_averages_is_refused():
    with pytest.raises(ValueError, match="'loss' is a scalar"):
        adapters.linen(cnn.CNN(10, width=2), lambda outputs, batch: (outputs.mean(), {}), EXAMPLE)


@pytest.mark.parametrize(
    "mean",
    [masked_mean, lambda values: Mean(values.sum(), jnp.float32(values.size))],
    ids=["without a mask", "written out"],
)
@pytest.mark.parametrize("name", ["loss", "own"])
def test_a_mean_that_counts_padding_is_refused(name, mean):
    def loss(outputs, batch):
        values = outputs.sum(axis=1)
        found = {"loss": values, "own": values} | {name: mean(values)}
        return found.pop("loss"), found

    with pytest.raises(ValueError, match=rf"count of the Mean '{name}' does not depend on it.* The loss is loss \("):
        adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss, EXAMPLE)


def test_a_mean_whose_total_or_count_ignores_the_mask_is_refused_and_one_without_rows_is_not():
    def loss(total, count):
        def values(outputs, batch):
            each, mask = outputs.sum(axis=1), batch["mask"]
            parts = {"masked": (each * mask).sum(), "all": each.sum(), "count": mask.sum(), "size": 6.0, "none": 1.0}
            return each, {"own": Mean(jnp.float32(parts[total]), jnp.float32(parts[count]))}

        return values

    for total, count in (("masked", "size"), ("all", "count")):
        with pytest.raises(ValueError, match="total or count of the Mean 'own'"):
            adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss(total, count), EXAMPLE)
    for total, count in (("masked", "count"), ("none", "size")):
        adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss(total, count), EXAMPLE)


class _Calls(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(10)(image.reshape(image.shape[0], -1))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda values: values, r"A loss returns \(values, metrics\).*returns an array"),
        (lambda values: (values, {}, {}), r"A loss returns \(values, metrics\).*returns an array, "),
        (lambda values: (values, {1: values}), "names of metrics are strings; .* returns one named 1"),
        (lambda values: (values, {"seen": "all"}), "arrays with one value per example or token; 'seen' of"),
        (lambda values: (values.astype(jnp.int32), {}), "real floating numbers.*'loss' of .* is int32"),
        (lambda values: (values, {"phase": values + 1j}), "of a metric real numbers; 'phase' of .* is complex64"),
    ],
    ids=["no pair", "three values", "name", "text", "integers", "complex"],
)
def test_a_loss_that_returns_something_else_is_told_what_to_return(result, message):
    def loss(outputs, batch):
        return result(outputs.sum(axis=1))

    with pytest.raises(errors.ConfigError, match=message):
        adapters.linen(_Calls(), loss, EXAMPLE)


def test_an_error_of_a_call_says_how_the_function_is_called():
    rule = (
        "A loss is called as loss\\(outputs, batch\\): with what the model returns, here an array, and a dict of fields"
    )
    with pytest.raises(errors.ConfigError, match=f"{rule}. Called so, .* raises TypeError"):
        adapters.linen(_Calls(), lambda outputs: (outputs, {}), EXAMPLE)
