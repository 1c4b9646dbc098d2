"""The state of a cut is that of the shards, and its evaluation is the one of data-parallel training."""

import dataclasses
import functools

import jax
import numpy as np
import tiny_experiment

from jaxdist.config import overrides
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.run import judge
from jaxdist.paramserver.run import shared_plan as plans

STEP = 3


@functools.cache
def make_plan(*assignments):
    experiment = overrides.override(tiny_experiment.get_config(), assignments)
    return plans.make_plan(experiment, ParameterServer(workers=1, servers=2), kind="elementwise")


def cut_of(plan, state):
    """Return the cut in which the servers hold the arrays of `state`."""
    params = plan.sharding.split([np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.model_state))])
    opt_state = plan.optimizer_sharding().split([np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state)])
    offer = messages.Offer(1, 1, STEP, "", messages.Trained(STEP, ()), ("server/0/a", "server/1/a"))
    return effects.CutRead(offer, (7, 7), tuple(params), tuple(opt_state))


def some_state(plan, *, opt_scale=1.0):
    random = np.random.default_rng(0)
    leaves = [random.normal(size=shape).astype(np.float32) for shape in plan.sharding.shapes]
    shapes = jax.eval_shape(plan.optimizer.init, jax.tree.unflatten(plan.structure, leaves)[0])
    opt_leaves = [(opt_scale * random.normal(size=leaf.shape)).astype(leaf.dtype) for leaf in jax.tree.leaves(shapes)]
    return judge.train_state(plan, STEP, leaves, opt_leaves)


def test_the_state_of_a_cut_is_what_the_shards_hold():
    plan = make_plan()
    state = some_state(plan)
    got = judge.Judge(plan).state(cut_of(plan, state))
    assert int(got.step) == STEP
    assert jax.tree.structure(got) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves((got.params, got.opt_state)), jax.tree.leaves((state.params, state.opt_state)))
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert np.array_equal(jax.random.key_data(got.key), jax.random.key_data(plan.run_keys().train))


def test_an_evaluation_counts_each_held_out_example_once():
    plan = make_plan()
    state = some_state(plan)
    fields = tiny_experiment.make_source(tiny_experiment.NUM_HELD_OUT, 1).arrays
    logits = plan.experiment.model.apply({"params": state.params}, fields["image"], train=False)
    accuracy = (np.argmax(logits, axis=-1) == fields["label"]).mean()
    np.testing.assert_allclose(judge.Judge(plan).evaluate(state)["accuracy"], accuracy, rtol=1e-6)


def test_averaged_params_are_evaluated_where_the_optimizer_keeps_them():
    plan = make_plan("optimizer.ema_decay=0.9")
    found = judge.Judge(plan).evaluate(some_state(plan, opt_scale=0.0))
    np.testing.assert_allclose(found["loss"], np.log(2), rtol=1e-6)  # of logits that are zero, as averaged params are


def test_an_evaluation_needs_the_params_alone_unless_their_average_is_evaluated():
    plan = make_plan()
    state = some_state(plan)
    cut = dataclasses.replace(cut_of(plan, state), opt_state=())
    made = judge.Judge(plan)
    assert made.state(cut).opt_state is None
    assert made.evaluate(made.state(cut)) == made.evaluate(state)
    assert not made.needs_opt_state
    assert judge.Judge(make_plan("optimizer.ema_decay=0.9")).needs_opt_state
