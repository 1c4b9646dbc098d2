import jax
import numpy as np
import pytest
from small_problem import OPTIMIZERS, fingerprint, init_params, loss_fn, numpy_batch, place
from two_processes import TwoProcesses

from jaxdist.guards import step_hashes
from jaxdist.spmd import evaluate
from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd.canonical import adding, canonical_step, state_update
from jaxdist.spmd.mesh import make_mesh


@pytest.mark.parametrize(
    ("axes", "num_devices", "logical_shards", "message"),
    [
        ({"data": -1}, 8, 0, r"logical_shards must be at least 1; got 0"),
        ({"data": -1}, 8, 4, "got 8 devices and 4 logical shards. Use 4 devices or fewer, or raise logical_shards"),
        ({"data": 4, "model": 2}, 8, 8, "on a mesh of data; got .*Use reduction='mean'"),
    ],
)
def test_a_layout_that_cannot_keep_the_promise_is_refused(axes, num_devices, logical_shards, message):
    mesh = make_mesh(axes, devices=jax.devices()[:num_devices])
    with pytest.raises(ValueError, match=message):
        canonical_step.canonical_step(loss_fn, OPTIMIZERS["sgd"], mesh, logical_shards=logical_shards)


def trained_and_evaluated(loss, is_sharded):
    """Two steps and an evaluation, by programs that are made anew as in a new process."""
    mesh, optimizer = make_mesh(devices=jax.devices()[:2]), OPTIMIZERS["adamw"]
    layout = layouts.fsdp(mesh, min_size=8) if is_sharded else layouts.replicated
    state = states.create_state(init_params, optimizer, mesh=mesh, seed=0, layout=layout)
    step = canonical_step.canonical_step(loss, optimizer, mesh, layout=layout, hashing=step_hashes.StepHashing())
    batch = place(numpy_batch(), mesh, "data")
    for _ in range(2):
        state, metrics = step(state, batch)
    means = evaluate.canonical_eval_step(loss_fn, mesh, logical_shards=8)(state.params, None, batch)
    return fingerprint(jax.device_get((state.params, metrics))), jax.device_get(means)


@pytest.mark.parametrize(
    ("is_sharded", "small_size", "whole_bytes"),
    [
        (False, adding.SMALL_SIZE, state_update.WHOLE_BYTES),  # one program
        (True, 1, state_update.WHOLE_BYTES),  # several programs
        (True, 1, 64),  # the state is updated some leaves at a time
    ],
)
def test_processes_that_trace_nothing_of_the_loss_make_the_same_steps(monkeypatch, is_sharded, small_size, whole_bytes):
    monkeypatch.setattr(adding, "SMALL_SIZE", small_size)
    monkeypatch.setattr(adding, "BLOCK_SIZE", 96)
    monkeypatch.setattr(state_update, "WHOLE_BYTES", whole_bytes)
    job, calls, found = TwoProcesses(monkeypatch), {0: 0, 1: 0}, {}
    for process in (0, 1):

        def counted(params, batch, key, process=process):
            calls[process] += 1
            return loss_fn(params, batch, key)

        with job.run(process):
            found[process] = trained_and_evaluated(counted, is_sharded)
    assert found[1][0] == found[0][0]
    jax.tree.map(np.testing.assert_array_equal, found[1][1], found[0][1])
    # Updated in turns, a state has its update traced: what depends on what decides the turns.
    assert calls[0]
    assert bool(calls[1]) == (whole_bytes == 64)
