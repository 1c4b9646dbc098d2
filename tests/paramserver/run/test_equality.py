"""The parameter server trains like one process: the same bits for the same order of sums, on any number of servers."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment

import jaxdist
from jaxdist import losses
from jaxdist.config import overrides
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.run import shared_plan as plans
from jaxdist.paramserver.run.island import Island
from jaxdist.paramserver.simulator import Faults, Roles, Simulation
from jaxdist.run import components
from jaxdist.spmd import keys

STEPS = 6
NO_DROPOUT = ["model.dropout_rate=0.0", f"stop.max_steps={STEPS}"]


def make_plan(workers, servers, assignments=(), **changes):
    experiment = overrides.override(tiny_experiment.get_config(), [*NO_DROPOUT, *assignments])
    plan = plans.make_plan(experiment, ParameterServer(workers=workers, servers=servers, **changes))
    # The experiment is tiny: small blocks spread it over the servers.
    return dataclasses.replace(
        plan,
        sharding=plans.make_sharding(
            jax.tree.unflatten(plan.structure, leaves_of(plan)), num_servers=servers, block_bytes=64
        ),
    )


@functools.cache
def _leaves():
    plan = plans.make_plan(overrides.override(tiny_experiment.get_config(), NO_DROPOUT), ParameterServer(workers=1))
    return plans.initial_leaves(plan)


def leaves_of(plan):
    return _leaves()


def serve(plan):
    """Train by the protocol, in this process; return the leaves at the end, and the optimizer's."""
    simulation = simulate(plan)
    cut = [event.what for event in simulation.events if isinstance(event.what, effects.CutRead)][-1]
    return plan.sharding.join(cut.params), plan.optimizer_sharding().join(cut.opt_state)


def simulate(plan, leaves=None):
    """Return the simulation of a run, from the leaves of the tiny experiment or from others."""
    island = Island(plan, jax.devices()[:1])

    def gradient(lease, params):
        return island.gradient(effects.Compute(0, 0, lease, params))

    return Simulation(
        seed=1,
        settings=plan.settings,
        faults=Faults(until=0.0),
        params=plan.sharding.split(leaves_of(plan) if leaves is None else leaves),
        gradient=gradient,
        make_updater=lambda: None,
        roles=Roles(shard=lambda *, shard, **rest: plans.make_shard(plan, shard)),
        compute_seconds=lambda rng, worker: rng.uniform(0.01, 0.1),
    ).run()


def one_process(plan):
    """Train on the union batch, slice by slice in ascending order, with the optimizer on whole leaves; return both."""
    slices, params = plan.settings.num_slices, tuple(leaves_of(plan))
    whole = dataclasses.replace(plan, sharding=plans.make_sharding(list(params), num_servers=1))
    island = Island(whole, jax.devices()[:1])
    state = plan.optimizer.init(params)

    @jax.jit
    def update(params, state, grads):
        updates, state = plan.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        pushes = []
        for slice_ in range(slices):
            lease = plans_lease(plan, step, slice_)
            split = whole.sharding.split([np.asarray(p) for p in params])
            pushes.append(island.gradient(effects.Compute(0, 0, lease, split)))
        sums = whole.sharding.join(pushes[0].pieces)
        for push in pushes[1:]:
            sums = [a + b for a, b in zip(sums, whole.sharding.join(push.pieces))]
        count = np.float32(sum(push.count for push in pushes))
        params, state = update(params, state, tuple(leaf / count for leaf in sums))
    return [np.asarray(leaf) for leaf in params], [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def plans_lease(plan, step, slice_):
    """Return slice `slice_` of a batch, counted here by hand: 52 examples in batches of 16 are 4 steps."""
    epoch, within = divmod(step, 4)
    start, stop = within * 16, min(within * 16 + 16, 52)
    cuts = [start + (stop - start) * i // plan.settings.num_slices for i in range(plan.settings.num_slices + 1)]
    return messages.Lease(step, slice_, epoch, cuts[slice_], cuts[slice_ + 1])


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.soak)]
)
def test_sync_is_one_process_on_the_union_batch_to_the_bit(workers):
    reference = one_process(make_plan(workers, 1))
    for servers in (1, 2, 3):
        served = serve(make_plan(workers, servers))
        for found, wanted in zip(served, reference):
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)), servers


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_sync_is_the_all_reduce_path(workers):
    experiment = overrides.override(tiny_experiment.get_config(), NO_DROPOUT)
    parts = components.put_together(experiment, devices=jax.devices()[:2])
    state = parts.create_state()
    for _, (batch, _) in zip(range(STEPS), parts.batches()):
        state, _ = parts.step(state, batch)
    served, _ = serve(make_plan(workers, 2))
    for got, want in zip(served, jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_norm_is_that_of_the_whole_gradient():
    """The same for any number of slices and servers, and of the parts pushed asynchronously by one worker."""
    experiment, fields = with_empty_batch()
    _, norms = by_hand(experiment, fields)
    for settings in ({"workers": 3, "servers": 2}, {"workers": 1, "servers": 2, "mode": "async"}):
        simulation = simulate(plans.make_plan(experiment, ParameterServer(**settings)))
        told = [event.what for event in simulation.events]
        found = {each.step: each.norm for each in told if isinstance(each, effects.GradNorm)}
        for each in told:
            if isinstance(each, effects.Committed):
                found.update((each.step, metric.total) for metric in each.metrics if metric.name == "grad_norm")
        assert found == pytest.approx(norms, rel=1e-5), settings


def test_clipping_by_the_global_norm_is_the_same_on_shards():
    clip = ["optimizer.clip_norm=0.05"]
    (served, _), (reference, _) = serve(make_plan(2, 3, clip)), one_process(make_plan(2, 1, clip))
    for got, want in zip(served, reference, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def weighted(outputs, batch):
    values, _ = losses.classification(outputs, batch)
    return jaxdist.Weighted(values, batch["weight"]), {}


def with_empty_batch():
    """Return the tiny experiment, whose second batch of each epoch counts nothing, and its 52 examples."""
    source = tiny_experiment.make_source(tiny_experiment.NUM_TRAIN, 0)
    fields = {name: np.stack([source[i][name] for i in range(len(source))]) for name in ("image", "label")}
    # The weights of a batch add up to less than 1, and nothing may depend on that.
    fields["weight"] = np.full(len(source), 2.0**-5, np.float32)
    fields["weight"][16:32] = 0.0
    falling = jaxdist.Schedule(name="linear", length=10)
    experiment = dataclasses.replace(
        overrides.override(tiny_experiment.get_config(), NO_DROPOUT),
        loss=weighted,
        data=jaxdist.Data(train=fields, shuffle=False, num_threads=0),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.5, schedule=falling),
    )
    return experiment, fields


def by_hand(experiment, fields):
    """Return params and norms by step of SGD on one device, with nothing of jaxdist's; an empty batch is left out."""
    params = experiment.model.init(keys.run_keys(keys.from_seed(0)).init, fields["image"][:1], train=False)

    def mean_loss(params, x, y, weights):
        logits = experiment.model.apply(params, x, train=False)
        return (optax.softmax_cross_entropy_with_integer_labels(logits, y) * weights).sum() / weights.sum()

    norms = {}
    for step in range(STEPS):
        rows = slice(step % 4 * 16, step % 4 * 16 + 16)
        if fields["weight"][rows].any():
            grads = jax.grad(mean_loss)(params, *(fields[name][rows] for name in ("image", "label", "weight")))
            norms[step + 1] = float(jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(grads))))
            rate = 0.5 * (1 - step / 10)
            params = jax.tree.map(lambda param, grad: param - rate * grad, params, grads)  # noqa: B023
    return params, norms


@pytest.mark.parametrize(
    "settings",
    [{"workers": 2}, {"mode": "bounded", "max_staleness": 1}, {"mode": "async"}],
    ids=["sync", "bounded", "async"],
)
def test_a_batch_of_which_nothing_counts_makes_no_update_and_training_continues(settings):
    experiment, fields = with_empty_batch()
    plan = plans.make_plan(experiment, ParameterServer(**{"workers": 1, "servers": 1, **settings}))
    (served, _), (params, _) = serve(plan), by_hand(experiment, fields)
    for got, want in zip(served, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("precision=float16", "does not scale losses"),
        ("reduction=canonical", r"its bits depend on ps\.workers; got reduction=canonical\. Use reduction=mean"),
        ("mesh={'data': 2}", "data-parallel; got mesh, for which"),
        ("layout.rules=(('.*', (None,)),)", r"data-parallel; got layout\.rules, for which"),
    ],
)
def test_what_a_parameter_server_would_ignore_is_refused(assignment, why):
    with pytest.raises(ValueError, match=why):
        make_plan(1, 1, [assignment])


OPTIMIZERS = {
    "sgd": (["optimizer.name=sgd", "optimizer.learning_rate=0.5"], optax.sgd(0.5)),
    "adamw, clipped, warmed up": (
        [
            "optimizer.name=adamw",
            "optimizer.learning_rate=0.03",
            "optimizer.weight_decay=0.1",
            "optimizer.clip_norm=0.3",
            "optimizer.schedule.warmup=4",
        ],
        optax.chain(
            optax.clip_by_global_norm(0.3),
            optax.adamw(
                lambda count: 0.03 * jnp.minimum((count + 1) / 4, 1.0),
                weight_decay=0.1,
                mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("workers", "servers"),
    [
        pytest.param(workers, servers, marks=() if (workers, servers) in ((3, 2), (1, 3)) else pytest.mark.soak)
        for workers in (1, 2, 3)
        for servers in (1, 2, 3)
    ],
)
def test_any_number_of_workers_and_servers_trains_as_a_loop_of_plain_jax(workers, servers, name):
    """Over shuffled examples, and the ragged last batch of an epoch: 4 examples, for up to 3 workers."""
    settings, optimizer = OPTIMIZERS[name]
    plan = make_plan(workers, servers, settings)
    params, _ = jax.tree.unflatten(plan.structure, leaves_of(plan))
    model, state = plan.experiment.model, optimizer.init(params)

    def mean_loss(params, images, labels):
        logits = model.apply({"params": params}, images, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    sizes = []
    for _, found in zip(range(STEPS), plan.loader):
        rows = found.batch["mask"] > 0
        sizes.append(int(rows.sum()))
        grads = jax.grad(mean_loss)(params, found.batch["image"][rows], found.batch["label"][rows])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert sizes == [16, 16, 16, 4, 16, 16]
    served, _ = serve(plan)
    for got, start, want in zip(served, leaves_of(plan), jax.tree.leaves(params), strict=True):
        assert np.abs(want - start).max() > 0.005
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)


class _Phases(nn.Module):
    """Two logits of one complex product."""

    @nn.compact
    def __call__(self, image, *, train):
        def init(key, shape):
            return jax.random.normal(key, shape, jnp.complex64)

        weights, bias = self.param("w", init, (image.shape[1], 3)), self.param("b", init, (1, 3))
        product = image.astype(jnp.complex64) @ weights + bias
        return jnp.stack([jnp.real(product).sum(axis=1), jnp.imag(product).sum(axis=1)], axis=1)


class _Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens, *, train):
        return nn.Dense(2)(nn.Embed(7, 4)(tokens).mean(axis=1))


@pytest.mark.parametrize("settings", [{"workers": 2, "servers": 2}, {"workers": 1, "servers": 1, "mode": "async"}])
@pytest.mark.parametrize(("model", "field"), [(_Phases(), "image"), (_Tokens(), "tokens")], ids=["complex", "integers"])
def test_complex_params_and_integer_inputs_train_as_in_plain_optax(model, field, settings):
    """Under Adam, which needs the real squares of complex gradients."""
    source = tiny_experiment.make_source(tiny_experiment.NUM_TRAIN, 0)
    fields = {name: np.stack([source[i][name] for i in range(len(source))]) for name in ("image", "label")}
    fields["tokens"] = np.random.default_rng(0).integers(0, 7, (len(source), 3))
    experiment = dataclasses.replace(
        overrides.override(tiny_experiment.get_config(), [f"stop.max_steps={STEPS}"]),
        model=model,
        inputs=field,
        data=jaxdist.Data(train=fields, num_threads=0),
        optimizer=jaxdist.Optimizer(name="adam", learning_rate=0.03),
    )
    plan = plans.make_plan(experiment, ParameterServer(**settings))
    before = plans.initial_leaves(plan)
    params, _ = jax.tree.unflatten(plan.structure, before)
    optimizer = optax.adam(0.03)
    state = optimizer.init(params)

    def loss(params, inputs, labels):
        logits = model.apply({"params": params}, inputs, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    for _, batch in zip(range(STEPS), plan.loader):
        rows = batch.batch["mask"] > 0
        grads = jax.grad(loss)(params, batch.batch[field][rows], batch.batch["label"][rows])
        updates, state = optimizer.update(jax.tree.map(jnp.conj, grads), state, params)
        params = optax.apply_updates(params, updates)
    simulation = simulate(plan, leaves=before)
    cut = [event.what for event in simulation.events if isinstance(event.what, effects.CutRead)][-1]
    served = plan.sharding.join(cut.params)
    for got, start, want in zip(served, before, jax.tree.leaves(params), strict=True):
        assert np.abs(got - start).max() > 0.01
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
