import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from small_problem import (
    NUM_EXAMPLES,
    assert_close,
    example_losses,
    init_params,
    loss_fn,
    numpy_batch,
)

from jaxdist.spmd import metrics, reduce
from jaxdist.spmd.mesh import make_mesh

AXIS = "data"


def numpy_tree_sum(rows):
    """Neighbours first, then pairs of pairs; an odd one out waits for the next level."""
    while len(rows) > 1:
        last = rows[len(rows) - len(rows) % 2 :]
        rows = np.concatenate([rows[0 : len(rows) - len(last) : 2] + rows[1 : len(rows) : 2], last])
    return rows[0]


@functools.cache
def both_sums(num_devices):
    """Doubling and halving of the same rows, one row a device; every device's result comes back."""
    mesh = make_mesh(devices=jax.devices()[:num_devices])

    def sums(rows):
        with mock.patch.object(reduce, "HALVING_MIN_SIZE", rows.size + 1):
            doubling = reduce.tree_sum_over_axis(rows[0], AXIS, num_devices)
        with mock.patch.object(reduce, "HALVING_MIN_SIZE", 0):
            halving = reduce.tree_sum_over_axis(rows[0], AXIS, num_devices)
        return doubling[None], halving[None]

    spec = PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@settings(max_examples=12)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 40), st.integers(0, 10**6))
def test_doubling_halving_and_a_tree_in_numpy_agree_to_the_bit(num_devices, size, seed):
    """Of values so unequal that another order of additions gives other bits."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(num_devices, size)) * 10.0 ** random.integers(-6, 6, size=(num_devices, size))
    rows = rows.astype(np.float32)
    expected = np.broadcast_to(numpy_tree_sum(rows), rows.shape)
    for result in both_sums(num_devices)(rows):
        np.testing.assert_array_equal(result, expected)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 3, 5, 8]), st.integers(1, 3), st.integers(1, 40), st.randoms(use_true_random=False))
def test_any_vectors_on_any_devices_are_added_as_a_tree_in_numpy_adds_them(num_devices, each, size, random):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    slots = random.sample(range(num_devices * each), random.randint(1, num_devices * each))
    values = np.random.default_rng(random.randint(0, 10**6))
    rows = values.normal(size=(num_devices * each, size)) * 10.0 ** values.integers(-6, 6, (num_devices * each, size))
    rows = rows.astype(np.float32)
    total = jax.shard_map(
        lambda vectors: reduce.tree_sum_of_slots(vectors, AXIS, slots),
        mesh=mesh,
        in_specs=PartitionSpec(AXIS),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(total)(rows), numpy_tree_sum(rows[slots]))


def test_large_vectors_are_halved_and_small_ones_doubled():
    mesh = make_mesh()

    def program(size):
        tree_sum = functools.partial(reduce.tree_sum_over_axis, axis=AXIS, num_devices=8)
        mapped = jax.shard_map(
            lambda row: tree_sum(row[0]),
            mesh=mesh,
            in_specs=PartitionSpec(AXIS),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, size), jnp.float32)).as_text()

    assert "all_gather" not in program(reduce.HALVING_MIN_SIZE - 1)
    assert "all_gather" in program(reduce.HALVING_MIN_SIZE)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_the_mean_over_an_axis_is_that_of_each_leaf(num_devices):
    random = np.random.default_rng(0)

    def values(*shape):
        return random.normal(size=(num_devices, *shape)).astype(np.float32)

    means = {"error": metrics.Mean(values(), values())}
    grads = {"large": values(reduce.PACKED_MAX_SIZE + 1), "matrix": values(2, 3), "scalar": values()}
    sums = reduce.Sums(grads, metrics.Mean(values(), values()), means, {"mean": values(5)}, values())
    averaged = jax.shard_map(
        lambda sums: reduce.mean_over_axis(jax.tree.map(lambda leaf: leaf[0], sums), AXIS),
        mesh=make_mesh(devices=jax.devices()[:num_devices]),
        in_specs=PartitionSpec(AXIS),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    expected = jax.tree.map(lambda leaf: leaf.mean(axis=0), sums)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), jax.jit(averaged)(sums), expected)


@pytest.mark.parametrize(
    ("param_spec", "grad_spec"),
    [
        (PartitionSpec(), PartitionSpec()),
        (PartitionSpec(), PartitionSpec("a")),
        (PartitionSpec(), PartitionSpec(None, ("a", "b"))),
        (PartitionSpec("a"), PartitionSpec("a")),
        (PartitionSpec("a"), PartitionSpec("a", "b")),
        (PartitionSpec("b", "a"), PartitionSpec("b", "a")),
    ],
    ids=str,
)
def test_a_gathered_leaf_is_whole_and_its_gradient_is_summed_over_the_devices_that_have_examples(param_spec, grad_spec):
    """The last device holds padding alone, whose gradient is NaN."""
    mesh, random = make_mesh({"a": 4, "b": 2}), np.random.default_rng(0)
    leaf, factors = random.normal(size=(8, 16)).astype(np.float32), random.normal(size=(8, 8, 16)).astype(np.float32)
    factors[7] = np.nan

    def local(shard, factor):
        def loss(shard):
            whole = reduce.gather(shard, param_spec, ~jnp.isnan(factor).any())
            return (factor[0] * whole**2).sum(), whole

        grad, whole = jax.grad(loss, has_aux=True)(shard)
        return whole, reduce.sum_over_axes(grad, ("a", "b"), param_spec=param_spec, grad_spec=grad_spec)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(param_spec, PartitionSpec(("a", "b"))),
        out_specs=(PartitionSpec(), grad_spec),
        check_vma=False,
    )
    whole, grad = jax.jit(mapped)(leaf, factors)
    np.testing.assert_array_equal(whole, leaf)
    np.testing.assert_allclose(grad, 2 * factors[:7].sum(axis=0) * leaf, rtol=1e-4, atol=1e-5)


MASK = np.arange(NUM_EXAMPLES) % 3 > 0


def sums_of(batch, **options):
    return reduce.local_sums(loss_fn, init_params(jax.random.key(0)), None, batch, jax.random.key(1), **options)


def test_sums_of_parts_add_up_to_the_sums_of_the_whole():
    batch = numpy_batch(mask=MASK)
    cuts = (slice(0, 5), slice(5, 17), slice(17, None))
    parts = [sums_of({name: leaf[cut] for name, leaf in batch.items()}) for cut in cuts]
    assert_close(functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts), sums_of(batch), tolerance=1e-4)


FLATTENS = pytest.mark.parametrize("flatten", [jax.tree.flatten, reduce.packed])


@FLATTENS
def test_the_average_of_the_sums_is_the_gradient_of_the_mean(flatten):
    batch = numpy_batch(mask=MASK)
    averages = reduce.average(sums_of(batch, flatten=flatten), None, flatten)

    def mean(params):
        return example_losses(params, batch)[MASK].mean()

    params = init_params(jax.random.key(0))
    assert_close(averages.grads, jax.grad(mean)(params), tolerance=1e-5)
    assert_close(averages.loss, mean(params))


@FLATTENS
def test_padding_alone_gives_exact_zeros_though_its_loss_is_nan(flatten):
    batch = numpy_batch(mask=np.zeros(NUM_EXAMPLES))
    assert jnp.isnan(loss_fn(init_params(jax.random.key(0)), batch, None)[0])
    for leaf in jax.tree.leaves(sums_of(batch, flatten=flatten)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_packing_joins_the_small_leaves_of_a_dtype_and_loses_nothing():
    sizes = [3, reduce.PACKED_MAX_SIZE + 1, 0, reduce.PACKED_MAX_SIZE, 5, 1]
    dtypes = [jnp.float32, jnp.float32, jnp.float32, jnp.float32, jnp.bfloat16, jnp.complex64]
    tree = {f"leaf {place}": jnp.arange(size, dtype=dtype) for place, (size, dtype) in enumerate(zip(sizes, dtypes))}
    tree |= {"scalar": jnp.float32(7), "nothing": None, "matrix": (jnp.ones((2, 3), jnp.bfloat16),)}
    arrays, packing = reduce.packed(tree)
    assert sorted((str(array.dtype), array.size) for array in arrays) == [
        ("bfloat16", 11),
        ("complex64", 1),
        ("float32", reduce.PACKED_MAX_SIZE + 1),
        ("float32", reduce.PACKED_MAX_SIZE + 4),
    ]
    doubled = packing.unflatten([2 * array for array in arrays])
    jax.tree.map(np.testing.assert_array_equal, doubled, jax.tree.map(lambda leaf: 2 * leaf, tree))
    assert jax.tree.map(jnp.shape, doubled) == jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_microbatches_change_no_sum(num_microbatches):
    batch = {name: jnp.asarray(leaf) for name, leaf in numpy_batch(mask=MASK).items()}
    sums = reduce.accumulate_sums(
        loss_fn,
        init_params(jax.random.key(0)),
        None,
        batch,
        jax.random.key(1),
        num_microbatches=num_microbatches,
        first_index=0,
    )
    assert_close(sums, sums_of(batch), tolerance=1e-4)


def test_a_loss_scale_is_taken_out_of_the_gradients_again():
    batch = numpy_batch(mask=MASK)
    assert_close(sums_of(batch, loss_scale=jnp.float32(1024.0)), sums_of(batch))


def test_gradients_of_half_precision_params_are_added_up_in_float32():
    def half_loss(params, batch, key):
        del key
        return metrics.masked_mean(batch["x"] @ params["w"].astype(jnp.float32)), {}

    params = {"w": jnp.ones(8, jnp.bfloat16)}
    sums = reduce.local_sums(half_loss, params, None, numpy_batch(), jax.random.key(0))
    assert sums.grads["w"].dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "value"), [("int32", 2**31 - 7), ("int32", -5), ("uint32", 2**32 - 3), ("bool", 1)])
def test_a_counter_in_the_model_state_keeps_its_exact_value(dtype, value):
    """Float32 holds integers up to 2**24 only; the examples of the parts are as uneven as can be."""
    counter = {"calls": jnp.asarray(value, dtype)}

    def counting_loss(params, batch, key, model_state):
        return metrics.masked_mean(batch["x"] * params["w"], batch["mask"]), {}, model_state

    batch = numpy_batch(mask=np.arange(NUM_EXAMPLES) < 19)
    parts = [{name: leaf[rows] for name, leaf in batch.items()} for rows in (slice(3), slice(3, 16), slice(16, 32))]
    params, key = {"w": jnp.ones(())}, jax.random.key(0)
    each = [reduce.local_sums(counting_loss, params, counter, part, key) for part in parts]
    found = reduce.average(functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), each), counter).model_state
    assert found["calls"].dtype == dtype
    assert found["calls"] == counter["calls"]


@pytest.mark.parametrize("params", [{"table": {"w": jnp.arange(3)}}, {"table": {"w": jnp.ones(3, bool)}}])
def test_integers_among_the_params_are_refused_by_name(params):
    with pytest.raises(ValueError, match=r"Params must be floating or complex.*params/table/w is (int32|bool)"):
        reduce.local_sums(lambda params, batch, key: (0.0, {}), params, None, numpy_batch(), jax.random.key(0))


def test_the_gradient_of_a_complex_param_points_downhill():
    """JAX gives the conjugate of what descends; `optax` subtracts what it is given."""

    def complex_loss(params, batch, key):
        return metrics.masked_mean(jnp.abs(params["w"] * batch["x"][:, 0] - (1 + 2j) * batch["x"][:, 0]) ** 2), {}

    params = {"w": jnp.zeros((), jnp.complex64)}
    batch, losses = numpy_batch(), []
    for _ in range(60):
        averages = reduce.average(reduce.local_sums(complex_loss, params, None, batch, jax.random.key(0)), None)
        params = {"w": params["w"] - 0.1 * averages.grads["w"]}
        losses.append(float(averages.loss))
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(params["w"], 1 + 2j, atol=1e-2)


def awkward_loss(params, batch, key):
    """The direction of each row: its gradient at a row of zeros is 0/0, and NaN where the row is."""
    direction = batch["x"] / jnp.linalg.norm(batch["x"] * params["scale"][None], axis=1, keepdims=True)
    values = jnp.square((direction @ params["first"]).sum(axis=1))
    return metrics.masked_mean(values, batch.get("mask")), {"mean": metrics.masked_mean(values, batch.get("mask"))}


@pytest.mark.parametrize("padding", [0.0, np.nan, np.inf, 1e38])
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_row_that_does_not_count_changes_no_bit(padding, num_microbatches):
    """Forward and backward; the last microbatches hold padding alone."""
    params = {"first": jnp.ones((8, 2)), "scale": jnp.ones(8)}
    batch = numpy_batch(mask=np.arange(NUM_EXAMPLES) < 13)
    clean = reduce.average(
        reduce.local_sums(awkward_loss, params, None, {"x": batch["x"][:13]}, jax.random.key(0)), None
    )
    batch["x"][13:] = padding
    sums = reduce.accumulate_sums(
        awkward_loss,
        params,
        None,
        jax.tree.map(jnp.asarray, batch),
        jax.random.key(0),
        num_microbatches=num_microbatches,
        first_index=0,
    )
    assert_close(reduce.average(sums, None), clean, tolerance=1e-5)


def test_a_scalar_that_counts_padding_rows_is_refused_and_one_of_the_params_alone_is_not():
    def mean_of_all_rows(params, batch, key):
        return example_losses(params, batch).mean(), {}

    def with_weight_norm(params, batch, key):
        return loss_fn(params, batch, key)[0], {"norm": jnp.linalg.norm(params["first"])}

    batch, params = numpy_batch(mask=MASK), init_params(jax.random.key(0))
    with pytest.raises(ValueError, match="but the scalar 'loss' does not depend on it"):
        reduce.local_sums(mean_of_all_rows, params, None, batch, jax.random.key(0))
    unmasked = {name: leaf for name, leaf in batch.items() if name != "mask"}
    assert reduce.local_sums(mean_of_all_rows, params, None, unmasked, jax.random.key(0)).loss.count == NUM_EXAMPLES
    assert "norm" in reduce.local_sums(with_weight_norm, params, None, batch, jax.random.key(0)).metrics


@pytest.mark.parametrize(
    ("model_state", "results", "message"),
    [
        (None, (0.0, {}, {}), r"\(loss, metrics\) for a model without model_state; it returned 3 values"),
        ({"a": jnp.zeros(2)}, (0.0, {}), r"\(loss, metrics, model_state\).*it returned 2 values"),
        (None, [0.0, {}], "it returned list"),
        (None, (jnp.zeros(3), {}), r"'loss' has shape \(3,\)"),
        (None, (0, {}), "must be a real floating number; got int32"),
        (None, (1j, {}), "must be a real floating number; got complex64"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(model_state, results, message):
    with pytest.raises(ValueError, match=message):
        reduce.local_sums(lambda *args: results, {"w": jnp.ones(2)}, model_state, numpy_batch(), jax.random.key(0))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_a_state_of_long_integers_is_refused_by_name(dtype):
    with pytest.raises(ValueError, match=r"at most 32 bits; model_state/n/seen is u?int64\. Make it int32"):
        reduce.check_model_state({"n": {"seen": np.zeros((), dtype)}})
