import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_problem import OPTIMIZERS, fingerprint, init_params, loss_fn, numpy_batch, place

from jaxdist.spmd import layout as layouts
from jaxdist.spmd import state as states
from jaxdist.spmd import strategies


@pytest.mark.parametrize("name", ["pipeline", "zero-1", ""])
def test_an_unknown_strategy_is_answered_with_all_there_are_and_what_they_are_for(name):
    with pytest.raises(ValueError, match="no strategy") as raised:
        strategies.build(name)
    for known, purpose in {**strategies.PURPOSES, **strategies.ELSEWHERE}.items():
        assert f"{known}: {purpose}" in str(raised.value)


def test_the_parameter_server_is_no_layout():
    with pytest.raises(ValueError, match="not a layout of one mesh"):
        strategies.build("parameter-server")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"others for each size of another axis.* got the mesh None.*'model': 2"),
        ({"mesh_axes": {"data": 2, "model": -1}}, "others for each size of another axis"),
        ({"mesh_axes": {"model": 2, "data": -1}}, "needs a mesh that begins with 'data'"),
        ({"mesh_axes": {"data": 2, "fsdp": 2, "model": 2}}, "has no axis 'fsdp'"),
        ({"mesh_axes": {"data": 4, "model": 2}, "rules": [("w", P("data"))]}, "over which no param is sharded"),
        ({"mesh_axes": {"data": 4, "model": 2}, "logical_shards": 3}, "got 4 devices and 3 logical shards"),
    ],
)
def test_a_tensor_strategy_whose_bits_other_devices_would_change_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        strategies.build("tensor", reduction="canonical", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("data-parallel", {"reduction": "exact"}, "reduction must be one of mean, canonical; got 'exact'"),
        ("tensor", {"mesh_axes": {"data": 8}}, "needs the mesh axes data, model; got .*Add model"),
        ("hsdp", {"mesh_axes": {"data": 8}}, "needs the mesh axes data, fsdp"),
        ("data-parallel", {"mesh_axes": {"data": 2, "model": 4}}, "has no use for the mesh axes model"),
        ("fsdp", {"rules": []}, "rules belong to strategy 'tensor'"),
        ("tensor", {"rules": [("w", P("expert"))]}, "needs the mesh axes data, expert; got .*Add expert, or rename"),
        ("data-parallel", {"names": {"embed": "data"}}, "names have no use"),
    ],
)
def test_settings_that_do_not_fit_a_strategy_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        strategies.build(name, **options)


@pytest.mark.parametrize(
    ("name", "axes", "batch_axes", "param_spec", "opt_spec"),
    [
        ("data-parallel", None, ("data",), P(), P()),
        ("zero1", None, ("data",), P(), P(None, "data")),
        ("fsdp", None, ("data",), P(None, "data"), P(None, "data")),
        ("fsdp", {"data": 2, "fsdp": 4}, ("data", "fsdp"), P(None, "fsdp"), P(None, "fsdp")),
        ("hsdp", None, ("data", "fsdp"), P(None, "fsdp"), P(None, "fsdp")),
        ("tensor", {"data": 2, "model": 4}, ("data",), P(None, "model"), P(None, "model")),
    ],
)
def test_what_a_strategy_cuts_and_over_which_axes(name, axes, batch_axes, param_spec, opt_spec):
    strategy = strategies.build(name, mesh_axes=axes)
    leaf = jax.ShapeDtypeStruct((64, 256), np.float32)
    assert strategy.batch_axes == batch_axes
    assert strategy.layout("params/block_0/mlp_in/kernel", leaf) == param_spec
    assert strategy.layout("opt_state/0/mu/block_0/mlp_in/kernel", leaf) == opt_spec


def test_canonical_zero1_has_the_bits_of_canonical_data_parallel():
    hashes, held = [], []
    for name in ("data-parallel", "zero1"):
        strategy = strategies.build(name, reduction="canonical", devices=jax.devices()[:4])
        layout = layouts.zero1(strategy.mesh, min_size=8) if name == "zero1" else strategy.layout
        step = dataclasses.replace(strategy, layout=layout).make_step(loss_fn, OPTIMIZERS["adamw"])
        state = states.create_state(init_params, OPTIMIZERS["adamw"], mesh=strategy.mesh, seed=0, layout=layout)
        for seed in range(3):
            state, _ = step(state, place(numpy_batch(seed, np.arange(32) < 21), strategy.mesh, "data"))
        hashes.append(fingerprint(jax.device_get((state.params, state.opt_state))))
        held.append(sum(place.device_bytes for place in layouts.places(state.opt_state)))
    assert hashes[0] == hashes[1]
    assert held[1] < held[0] / 3
