"""Where a run resumes: checkpoints and snapshots hold one state, for any strategy and number of servers."""

import contextlib
import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny_experiment

from jaxdist import errors, stop
from jaxdist.config import overrides
from jaxdist.paramserver.run import resume
from jaxdist.paramserver.run import shared_plan as plans
from jaxdist.run import components
from jaxdist.run import directory as run_directory

EVERYTHING = ["optimizer.name=adamw", "optimizer.weight_decay=0.01", "optimizer.clip_norm=1", "optimizer.ema_decay=0.9"]


def experiment_of(*assignments):
    return overrides.override(tiny_experiment.get_config(), [*EVERYTHING, "ps.servers=3", *assignments])


def plan_of(*assignments):
    experiment = experiment_of(*assignments)
    return plans.make_plan(experiment, experiment.ps, kind="global_norm")  # as trying the optimizer would find


def same(some, others):
    return len(some) == len(others) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(some, others, strict=True)
    )


@contextlib.contextmanager
def trained(tmp_path, experiment, *, num_updates=0):
    """Yield the state and the checkpoints of a data-parallel run that saved after 5 steps (so many of them made)."""
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    state = parts.create_state()
    batches = list(itertools.islice(parts.batches(), 5))
    for batch, _ in batches[:num_updates]:
        state, _ = parts.step(state, batch)
    progress = stop.Progress(step=5, epoch=1, examples_seen=68)
    with contextlib.closing(run_directory.open_checkpoints(experiment, tmp_path, parts.identity)) as checkpointer:
        data_state = {"position": batches[-1][1].to_json(), "progress": progress.to_json()}
        checkpointer.save(5, state, data_state, {})
        checkpointer.wait()
        yield state, checkpointer


def test_a_checkpoint_of_any_strategy_is_dealt_to_servers_and_read_by_others(tmp_path):
    directory = tmp_path / "ps"
    with trained(tmp_path, experiment_of(), num_updates=2) as (state, checkpointer):
        plan = plan_of()
        start = resume.begin(plan, checkpointer, directory)
    assert same(jax.tree.leaves(start.state.opt_state), jax.tree.leaves(state.opt_state))
    assert same(jax.tree.leaves(start.state.params), jax.tree.leaves(state.params))
    assert (start.progress.step, int(start.state.step)) == (5, 5)
    assert [path.name for path in resume.saved_cuts(directory)] == [start.saved_cut]
    identity = components.identity(experiment_of())
    with contextlib.closing(run_directory.open_checkpoints(experiment_of(), tmp_path / "elsewhere", identity)) as none:
        two = plan_of("ps.servers=2")
        again = resume.begin(two, none, directory)
    assert again.saved_cut != start.saved_cut
    assert (again.progress.step, again.progress.epoch, again.progress.examples_seen) == (5, 1, 52 + 16)
    assert same(jax.tree.leaves(again.state.opt_state), jax.tree.leaves(state.opt_state))
    assert same(jax.tree.leaves(again.state.params), jax.tree.leaves(state.params))


def test_a_snapshot_counts_only_when_it_is_newer_and_intact(tmp_path):
    directory = tmp_path / "ps"
    with trained(tmp_path, experiment_of()) as (_, checkpointer):
        plan = plan_of()
        leaves = [np.zeros(shape, dtype) for shape, dtype in zip(plan.sharding.shapes, plan.sharding.dtypes)]
        opt_leaves = [np.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(opt_shapes(plan))]
        for step in (4, 8, 9):
            found = resume._Found(resume.messages.Trained(step, ()), leaves, opt_leaves, stop.Progress())
            name = resume._write(plan, found, directory)
        with pytest.raises(errors.ConfigError, match=r"9 steps of 12 examples.*Resume with global_batch_size=12"):
            resume.begin(plan, checkpointer, directory, trained_with=12)
        damaged = directory / name / "shard-1"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        start = resume.begin(plan, checkpointer, directory, trained_with=16)
    assert (start.progress.step, start.progress.epoch, start.progress.examples_seen) == (8, 2, 104)
    assert not any(leaf.any() for leaf in jax.tree.leaves(start.state.params))


def opt_shapes(plan):
    params, _ = jax.tree.unflatten(plan.structure, [jax.ShapeDtypeStruct(s, np.float32) for s in plan.sharding.shapes])
    return jax.eval_shape(plan.optimizer.init, params)


def test_another_batch_size_is_refused_where_it_cuts_a_batch(tmp_path):
    refused = pytest.raises(errors.ConfigError, match="Resume with the global_batch_size")
    with trained(tmp_path, experiment_of()) as (_, checkpointer), refused:
        resume.begin(plan_of("global_batch_size=12"), checkpointer, tmp_path / "ps")


def test_only_the_newest_snapshots_are_kept(tmp_path):
    for name in ("0000000002-1-1", "0000000004-1-2", "0000000006-2-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest").touch()
    (tmp_path / "0000000008-2-2").mkdir()  # under way
    resume.remove_saved_cuts(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000004-1-2", "0000000006-2-1", "0000000008-2-2"]


def test_the_data_stand_at_the_end_of_an_epoch_not_before_the_next():
    plan = plan_of()
    places = [(place.epoch, place.position) for place in (plans.position(plan, step) for step in (0, 3, 4, 5, 8))]
    assert places == [(0, 0), (0, 48), (0, 52), (1, 16), (1, 52)]
    assert dataclasses.replace(plans.position(plan, 3), position=0) == plan.loader.beginning


def test_what_a_dead_process_left_half_written_is_removed(tmp_path):
    whole, half, older = (tmp_path / name for name in ("0000000008-1-1", "0000000010-1-2", "0000000006-1-3"))
    for path in (whole, half, older):
        path.mkdir()
        (path / "shard-0").write_bytes(b"x")
    (whole / "manifest").write_bytes(b"x")
    (tmp_path / "cut.77.tmp").write_bytes(b"x")
    resume.remove_saved_cuts(tmp_path, keep=2)
    assert half.exists()  # it may be completed yet
    assert not older.exists()
    resume.remove_remnants(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_a_run_begins_with_weights_as_with_a_saved_cut_and_finds_it_again(tmp_path):
    plan = plan_of()
    leaves = [np.full(shape, 0.5, dtype) for shape, dtype in zip(plan.sharding.shapes, plan.sharding.dtypes)]
    start = resume.begin_with(plan, leaves, tmp_path)
    assert same(jax.tree.leaves((start.state.params, start.state.model_state)), leaves)
    params, _ = jax.tree.unflatten(plan.structure, leaves)
    assert same(jax.tree.leaves(start.state.opt_state), jax.tree.leaves(plan.optimizer.init(params)))
    assert (start.progress.step, int(start.state.step)) == (0, 0)
    # Its processes died before they saved anything: the weights are not read again.
    identity = components.identity(experiment_of())
    with contextlib.closing(run_directory.open_checkpoints(experiment_of(), tmp_path / "none", identity)) as none:
        again = resume.begin(plan, none, tmp_path)
    assert same(jax.tree.leaves(again.state.params), jax.tree.leaves(start.state.params))


def test_a_new_run_does_not_begin_with_the_saved_cuts_of_another(tmp_path):
    """Its record, which would say what they are of, is gone."""
    plan = plan_of()
    leaves = [np.zeros(shape, dtype) for shape, dtype in zip(plan.sharding.shapes, plan.sharding.dtypes)]
    resume.begin_with(plan, leaves, tmp_path)  # a start that was killed
    resume.clear(tmp_path)
    assert resume.saved_cuts(tmp_path) == []
    opt_leaves = [np.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(opt_shapes(plan))]
    resume._write(plan, resume._Found(resume.messages.Trained(4, ()), leaves, opt_leaves, stop.Progress()), tmp_path)
    with pytest.raises(errors.ConfigError, match="holds saved cuts"):
        resume.clear(tmp_path)
    assert len(resume.saved_cuts(tmp_path)) == 1
