import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.spmd import metrics
from jaxdist.spmd.metrics import Mean

ROWS = st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=12)


@given(ROWS, st.integers(0, 12))
def test_the_means_of_unequal_parts_add_up_to_the_mean_of_the_whole(rows, cut):
    values, mask = (jnp.array(column, jnp.float32) for column in zip(*rows, strict=True))
    parts = [metrics.masked_mean(values[piece], mask[piece]) for piece in (slice(cut), slice(cut, None))]
    whole = metrics.masked_mean(values, mask)
    np.testing.assert_allclose(parts[0].total + parts[1].total, whole.total, rtol=1e-5, atol=1e-3)
    assert parts[0].count + parts[1].count == whole.count == sum(kept for _, kept in rows)


def test_padding_may_hold_anything():
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    mean = metrics.masked_mean(values, jnp.array([1, 0, 1, 0]))
    assert (float(mean.total), float(mean.count), float(mean.value)) == (4.0, 2.0, 2.0)


def test_a_mask_over_examples_counts_every_token_of_them():
    mean = metrics.masked_mean(jnp.ones((3, 5)), jnp.array([1, 0, 1]))
    assert (float(mean.total), float(mean.count)) == (10.0, 10.0)
    assert float(metrics.masked_mean(jnp.ones((3, 5))).count) == 15.0
    assert metrics.masked_mean(jnp.ones(3, jnp.bfloat16)).total.dtype == jnp.float32


def test_a_mean_over_nothing_is_nan():
    assert jnp.isnan(metrics.masked_mean(jnp.ones(2), jnp.zeros(2)).value)


@pytest.mark.parametrize(
    ("batch", "count"), [({"x": np.ones((6, 2))}, 6), ({"x": np.ones(3), "mask": np.eye(3)[0]}, 1)]
)
def test_examples_are_counted_by_the_mask_or_all(batch, count):
    assert float(metrics.num_examples({name: jnp.asarray(leaf) for name, leaf in batch.items()})) == count


def test_a_plain_scalar_stands_for_the_true_examples():
    batch = {"mask": jnp.array([1.0, 1.0, 0.0])}
    mean = metrics.as_mean(jnp.float32(5.0), batch)
    assert (float(mean.total), float(mean.count)) == (10.0, 2.0)
    assert metrics.as_mean(mean, batch) == mean
    empty = metrics.as_mean(jnp.float32(jnp.nan), {"mask": jnp.zeros(3)})
    assert (float(empty.total), float(empty.count)) == (0.0, 0.0)


def test_values_with_a_second_dim_of_examples_are_refused_where_the_number_of_examples_is_symbolic():
    (examples,) = jax.export.symbolic_shape("B")

    def mean(*shape):
        values = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(metrics.masked_mean, values, jax.ShapeDtypeStruct((examples,), jnp.float32))

    assert mean(examples, 5).total.shape == ()
    with pytest.raises(metrics.ShapeError, match=r"got the shape \(B, B\), where B is the number of examples"):
        mean(examples, examples)


def test_a_mean_of_python_numbers_is_one_of_arrays():
    mean = metrics.as_mean(metrics.Mean(3, 2.0), {})
    assert isinstance(mean.total, jax.Array)
    assert mean.value == 1.5


def test_a_mean_whose_total_counts_rows_and_whose_count_does_not_is_refused():
    def loss_fn(params, batch):
        return metrics.Mean(batch[metrics.MASK].sum(), 1.0), {}

    with pytest.raises(ValueError, match="the Mean 'loss' does not depend on it"):
        metrics.check_rows_left_out(
            {"loss": metrics.Mean(jnp.ones(()), 1.0)}, loss_fn, [(), {metrics.MASK: jnp.ones(4)}]
        )


def test_what_is_written_into_an_unshared_tree_is_not_seen_in_the_tree():
    tree = {"b": [1, (2, {"c": 3})], "a": Mean(4, 5)}
    own = metrics.unshared(tree)
    assert own == tree
    assert list(own) == ["b", "a"]
    own["b"][1][1]["c"] = 0
    own["b"].append(0)
    del own["a"]
    assert tree == {"b": [1, (2, {"c": 3})], "a": Mean(4, 5)}
