"""A worker's gradient is the sum over the examples of its lease, on any number of devices, and nothing else."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist import data
from jaxdist.config import overrides
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.data import assembly
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.run import shared_plan as plans
from jaxdist.paramserver.run.island import Island

SETTINGS = ["model.dropout_rate=0.0", "data.shuffle=false"]


@functools.cache
def make_plan():
    experiment = overrides.override(tiny_experiment.get_config(), SETTINGS)
    return plans.make_plan(experiment, ParameterServer(workers=2, servers=2), kind="elementwise")


@functools.cache
def make_island(num_devices=1):
    plan = make_plan()
    return Island(plan, jax.devices()[:num_devices]), tuple(plans.initial_leaves(plan))


def gradient(lease, *, num_devices=1):
    island, leaves = make_island(num_devices)
    return island.gradient(effects.Compute(5, 6, lease, island.plan.sharding.split(leaves)))


def sums_by_hand(lease):
    """Return the summed gradient and loss of a lease in plain JAX; the order of the data is that of the source."""
    island, leaves = make_island()
    params, _ = jax.tree.unflatten(island.plan.structure, leaves)
    fields = tiny_experiment.make_source(tiny_experiment.NUM_TRAIN, 0).arrays
    images, labels = (fields[name][lease.start : lease.stop] for name in ("image", "label"))

    def loss(params):
        hidden = jnp.maximum(images @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None], 0)
        logits = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].sum()

    return jax.jit(jax.value_and_grad(loss))(params)


FIRST, SECOND_SLICE, RAGGED = (
    messages.Lease(0, 0, 0, 0, 8),
    messages.Lease(2, 1, 0, 40, 48),
    messages.Lease(3, 1, 0, 50, 52),
)


@pytest.mark.parametrize(("num_devices", "lease"), [(1, FIRST), (1, SECOND_SLICE), (1, RAGGED), (4, RAGGED)])
def test_a_gradient_is_the_sum_over_the_examples_of_the_lease(num_devices, lease):
    pushed, (loss, wanted) = gradient(lease, num_devices=num_devices), sums_by_hand(lease)
    for got, want in zip(make_plan().sharding.join(pushed.pieces), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert (pushed.incarnation, pushed.sequence, pushed.finite) == (5, 6, True)
    assert pushed.count == pushed.num_examples == lease.stop - lease.start
    squares = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(wanted)) / pushed.count**2
    np.testing.assert_allclose(pushed.norm_squared, squares, rtol=1e-4)
    total = next(metric for metric in pushed.metrics if metric.name == "loss")
    np.testing.assert_allclose([total.total, total.count], [loss, pushed.count], rtol=1e-5)


SHARDS = (13, 9, 20, 10)


@pytest.mark.parametrize("kind", ["stream", "endless stream", "dealt"])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_the_leases_of_an_epoch_hold_each_example_once_in_any_order(kind, slices):
    def open_shard(shard, start):
        return (
            {"image": np.full(6, 1000 * shard + i, np.float32), "label": np.int32(0)}
            for i in range(start, SHARDS[shard])
        )

    length = {"examples_per_epoch": 52} if kind == "endless stream" else {"sizes": SHARDS}
    source = data.StreamSource(open_shard, num_shards=4, seeks=True, window=8, **length)
    if kind == "dealt":
        fields = {"image": np.arange(52.0)[:, None].repeat(6, 1).astype(np.float32), "label": np.zeros(52, np.int32)}
        parts = np.split(np.arange(52), np.cumsum((13, 13, 13)))
        shards = [data.ArraySource({name: values[part] for name, values in fields.items()}) for part in parts]
        source = data.Sharded(dict(enumerate(shards)), data.ShardList.of(shards))
    experiment = dataclasses.replace(tiny_experiment.get_config(), data=jaxdist.Data(train=source))
    plan = plans.make_plan(experiment, ParameterServer(workers=slices, servers=1), kind="elementwise")
    island, seen = Island(plan, jax.devices()[:1]), []
    for step in range(4):
        bounds = np.linspace(16 * step, min(16 * step + 16, 52), slices + 1).astype(int).tolist()
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            batch = island._batch(messages.Lease(step, number, 0, start, stop))
            assert batch["mask"].sum() == stop - start
            seen += batch["image"][batch["mask"] == 1][:, 0].tolist()
    assert len(seen) == 52
    assert len(set(seen)) == 52 or kind == "endless stream"


def test_leases_that_follow_one_another_are_read_on_and_others_from_where_they_are():
    island = make_island()[0]
    order = [*range(4), 1, 2, 0, 3, 3, 2]  # the last one of an epoch is ragged
    for step in order:
        start, stop = 16 * step, min(16 * step + 8, 52)
        batch = Island(island.plan, jax.devices()[:1])._batch(messages.Lease(step, 0, 0, start, stop))
        read = island._batch(messages.Lease(step, 0, 0, start, stop))
        assert all(np.array_equal(read[name], batch[name]) for name in batch)


def test_an_example_that_cannot_be_read_is_named_each_time_it_is_asked_for():
    good = [True] * 8

    def broken(example, random):
        if not good:
            raise OSError("disk")
        good.pop()
        return example

    experiment = overrides.override(tiny_experiment.get_config(), SETTINGS)
    plan = make_plan()
    loader = data.Loader(experiment.data.train, global_batch_size=16, seed=0, shuffle=False, example_fn=broken)
    island = Island(dataclasses.replace(plan, loader=loader), jax.devices()[:1])
    island.prepare(FIRST)
    for _ in range(2):  # prepared early, and when it is needed
        with pytest.raises(assembly.ExampleError, match="OSError: disk"):
            island.prepare(messages.Lease(1, 0, 0, 16, 24))


@pytest.mark.parametrize("prepared", [SECOND_SLICE, FIRST])
def test_examples_that_were_read_early_are_used_for_their_own_lease_only(prepared):
    wanted = gradient(SECOND_SLICE)
    island, _ = make_island()
    island.prepare(prepared)
    got = gradient(SECOND_SLICE)
    assert all(np.array_equal(a, b) for a, b in zip(got.pieces[0], wanted.pieces[0], strict=True))


def test_an_empty_lease_pushes_zeros():
    pushed = gradient(messages.Lease(3, 3, 0, 52, 52))
    assert pushed.count == 0
    assert pushed.finite
    assert not any(piece.any() for shard in pushed.pieces for piece in shard)


def test_a_gradient_that_is_not_finite_says_so_and_names_rows_of_the_global_batch():
    source = tiny_experiment.make_source(tiny_experiment.NUM_TRAIN, 0)
    source.arrays["image"][45] = np.inf
    experiment = overrides.override(tiny_experiment.get_config(), SETTINGS)
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, train=source))
    plan = plans.make_plan(experiment, ParameterServer(workers=2), kind="elementwise")
    compute = effects.Compute(0, 0, SECOND_SLICE, plan.sharding.split(plans.initial_leaves(plan)))
    island = Island(plan, jax.devices()[:1])
    assert not island.gradient(compute).finite
    report = island.explain_nonfinite(compute)
    assert (report.step, report.positions) == (3, (45 - 2 * 16,))
