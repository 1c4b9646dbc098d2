import contextlib
import gc
import json

import compile_cache
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from small_problem import counted_compiles, place
from two_processes import TwoProcesses

from jaxdist.guards import array_hash
from jaxdist.spmd import device_program
from jaxdist.spmd import state as states
from jaxdist.spmd.mesh import make_mesh

WHOLE, CUT = PartitionSpec(), PartitionSpec("data")


def product(tree, rows):
    return {"sum": rows @ tree["b"] + tree["i"], "pair": (rows[:1] * 2, None)}


def arguments(mesh):
    tree = {"b": np.arange(8, dtype=np.float32).reshape(4, 2), "i": np.int32(7)}
    rows = np.random.default_rng(0).normal(size=(3 * mesh.size, 4)).astype(np.float32)
    return place(tree, mesh), place(rows, mesh, "data")


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_one_compilation_runs_on_every_device(num_devices):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    program = device_program.PerDeviceProgram(product, mesh, in_specs=(WHOLE, CUT), out_spec=CUT)
    tree, rows = arguments(mesh)
    with counted_compiles() as compiles:
        result = program(tree, rows)
    assert len(compiles) == 1
    assert result["sum"].shape == (3 * num_devices, 2)
    assert result["sum"].sharding == NamedSharding(mesh, CUT)
    for place_, shard in enumerate(result["sum"].addressable_shards):
        expected = jax.jit(product)(jax.device_get(tree), np.asarray(rows)[3 * place_ : 3 * place_ + 3])
        assert shard.device == mesh.devices.flat[place_]
        np.testing.assert_array_equal(shard.data, expected["sum"])


def test_what_it_returns_feeds_it_and_other_programs():
    mesh = make_mesh(devices=jax.devices()[:4])
    program = device_program.PerDeviceProgram(lambda x: x + 1, mesh, in_specs=(CUT,), out_spec=CUT)
    x = place(np.zeros((8, 3), np.float32), mesh, "data")
    assert float(jax.jit(jnp.sum)(program(program(x)))) == 48.0
    # The way to the host: `np.asarray` of a result in shards raises on jax 0.12, and one that is replicated is whole.
    np.testing.assert_array_equal(jax.jit(lambda x: x)(program(x)), np.ones((8, 3)))
    total = device_program.PerDeviceProgram(lambda x: x * 2, mesh, in_specs=(WHOLE,), out_spec=WHOLE)
    np.testing.assert_array_equal(total(place(np.ones(3, np.float32), mesh)), 2 * np.ones(3))


@pytest.mark.parametrize("exchanges", [False, True])
def test_callbacks_are_called_for_every_device_and_live_as_long_as_the_program(exchanges):
    mesh, seen = make_mesh(devices=jax.devices()[:4]), []

    def function(x):
        jax.debug.callback(lambda value: seen.append(float(value)), x[0])
        moved = device_program.exchange(x, [(i, i ^ 1) for i in range(4)]) if exchanges else x
        return jax.pure_callback(np.negative, jax.ShapeDtypeStruct(x.shape, x.dtype), moved)

    program = device_program.PerDeviceProgram(function, mesh, in_specs=(CUT,), out_spec=CUT, exchanges=exchanges)
    x = place(np.arange(4, dtype=np.float32), mesh, "data")
    del function
    for _ in range(2):
        gc.collect()
        result = jax.jit(lambda x: x)(program(x))
        np.testing.assert_array_equal(result, [-1, -0, -3, -2] if exchanges else [-0, -1, -2, -3])
    jax.effects_barrier()
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_donation_holds_on_every_device():
    mesh = make_mesh(devices=jax.devices()[:2])
    program = device_program.PerDeviceProgram(
        jnp.add, mesh, in_specs=(WHOLE, WHOLE), out_spec=WHOLE, donate_argnums=(0,)
    )
    for _ in range(3):
        given, other = place((np.full(4, 2.0, np.float32), np.ones(4, np.float32)), mesh)
        np.testing.assert_array_equal(program(given, other), np.full(4, 3.0))
        assert given.is_deleted()
        assert not other.is_deleted()


def test_another_shape_is_refused():
    mesh = make_mesh(devices=jax.devices()[:2])
    program = device_program.PerDeviceProgram(jnp.sin, mesh, in_specs=(WHOLE,), out_spec=WHOLE)
    program(place(np.ones(4, np.float32), mesh))
    with pytest.raises(TypeError, match="compiled"):
        program(place(np.ones(5, np.float32), mesh))


def test_a_second_start_reads_the_program_from_the_cache_for_any_number_of_devices(tmp_path):
    """Each program object is new, as in a new process."""
    num_compiles, results = [], []
    with compile_cache.compile_once(tmp_path):
        for num_devices in (1, 8, 2, 1):
            mesh = make_mesh(devices=jax.devices()[:num_devices])
            program = device_program.PerDeviceProgram(product, mesh, in_specs=(WHOLE, CUT), out_spec=CUT)
            with counted_compiles() as compiles:
                results.append(np.asarray(program(*arguments(mesh))["sum"].addressable_data(0)))
            num_compiles.append(len(compiles))
    assert num_compiles == [1, 0, 0, 0]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_a_damaged_entry_of_the_cache_is_compiled_anew(tmp_path):
    mesh = make_mesh(devices=jax.devices()[:2])
    x = place(np.ones(4, np.float32), mesh)
    with compile_cache.compile_once(tmp_path):
        device_program.PerDeviceProgram(jnp.sin, mesh, in_specs=(WHOLE,), out_spec=WHOLE)(x)
        for file in tmp_path.glob("*-cache"):
            file.write_bytes(file.read_bytes()[:100])
        program = device_program.PerDeviceProgram(jnp.sin, mesh, in_specs=(WHOLE,), out_spec=WHOLE)
        with pytest.warns(UserWarning, match="compilation cache cannot be read"):
            np.testing.assert_allclose(program(x), np.sin(np.ones(4)), rtol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 3])
def test_devices_exchange_values(num_devices, tmp_path):
    mesh = make_mesh(devices=jax.devices()[num_devices - 1 :: -1])
    around = [(source, (source + 1) % num_devices) for source in range(num_devices)]
    x = place(np.arange(2.0 * num_devices, dtype=np.float32), mesh, "data")

    def make():
        return device_program.PerDeviceProgram(
            lambda x: device_program.exchange(2 * x, around), mesh, in_specs=(CUT,), out_spec=CUT, exchanges=True
        )

    with compile_cache.compile_once(tmp_path):
        found = make()(x)
        with counted_compiles() as compiles:
            again = make()(x)
    assert compiles == []
    expected = 2 * np.roll(np.arange(2.0 * num_devices), 2)
    for result in (found, again):
        for place_, shard in enumerate(result.addressable_shards):
            np.testing.assert_array_equal(shard.data, expected[2 * place_ : 2 * place_ + 2])


def test_what_is_computed_by_itself_is_a_call_on_cpu_devices_and_a_branch_elsewhere():
    def compute(x):
        apart = device_program.by_itself(lambda x: 3 * x, x[0] < 9, x)
        return apart + device_program.hashed(array_hash.of_array, x[0] < 9, x).astype(jnp.float32)

    traced = jax.jit(compute).trace(np.arange(4000, dtype=np.float32))
    compiled = traced.lower().compile()
    assert compiled.as_text().count(" call(") == 2
    assert compiled.as_text().count('xla_cpu_small_call="true"') >= 1
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    np.testing.assert_array_equal(compiled(x), 3 * x + np.float32(jax.jit(array_hash.of_array)(x)))
    elsewhere = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert elsewhere.count("stablehlo.case") == 2
    assert "inlineable" not in elsewhere


def scaled(factor, traced):
    def update(state, rows):
        traced.append(factor)
        new = jax.tree.map(lambda leaf: leaf * factor + rows.sum(), state)
        return new, {"norm": rows.sum(), "pair": (rows[0], [rows[1]])}

    return update


def results_of_two_programs(traced):
    """They differ in a number alone, as a step that is made again with another schedule may."""
    mesh = make_mesh(devices=jax.devices()[:2])
    state = states.TrainState(np.int32(3), {"w": np.ones(4, np.float32)}, None, optax.EmptyState(), None)
    args = place(state, mesh), place(np.arange(3, dtype=np.float32), mesh)
    programs = [
        device_program.PerDeviceProgram(scaled(factor, traced), mesh, in_specs=(WHOLE, WHOLE), out_spec=WHOLE)
        for factor in (2, 3)
    ]
    return [program(*args) for program in programs]


def test_process_0_traces_and_the_others_run_what_it_has_traced(monkeypatch):
    job, traced = TwoProcesses(monkeypatch), []
    with job.run(0):
        first = results_of_two_programs(traced)
    assert traced == [2, 3]
    with job.run(1):
        second = results_of_two_programs(traced)
    assert traced == [2, 3]
    assert jax.tree.structure(second) == jax.tree.structure(first)
    jax.tree.map(np.testing.assert_array_equal, second, first)
    assert float(second[1][0].params["w"][0]) == 6.0


def test_a_process_that_is_told_nothing_traces_by_itself(monkeypatch):
    job, traced = TwoProcesses(monkeypatch), []
    with job.run(1):
        results_of_two_programs(traced)
    assert traced == [2, 3]


def test_an_error_of_process_0_is_found_by_the_others_too(monkeypatch):
    job, mesh = TwoProcesses(monkeypatch), make_mesh(devices=jax.devices()[:1])

    def broken(x):
        raise ValueError("a mistake")

    for process in (0, 1):
        program = device_program.PerDeviceProgram(broken, mesh, in_specs=(WHOLE,), out_spec=WHOLE)
        with job.run(process), pytest.raises(ValueError, match="a mistake"):
            program(place(np.ones(3, np.float32), mesh))
    assert list(job.kept.values()) == [b"-"]


def test_a_program_that_calls_back_into_python_is_not_told(monkeypatch):
    """It has the address of the function in it."""
    job, mesh, called = TwoProcesses(monkeypatch), make_mesh(devices=jax.devices()[:1]), []

    def calls(x):
        jax.debug.callback(called.append, x)
        return x + 1

    for process in (0, 1):
        program = device_program.PerDeviceProgram(calls, mesh, in_specs=(WHOLE,), out_spec=WHOLE)
        with job.run(process):
            lowered = device_program._Lowered.of(program._function.lower(np.ones(3, np.float32)))
            assert lowered.to_bytes((np.ones(3, np.float32),)) is None


def structures(arguments):
    leaves = st.just(0) | st.sampled_from(arguments)
    return st.recursive(
        leaves,
        lambda parts: st.lists(parts) | st.lists(parts).map(tuple) | st.dictionaries(st.text(), parts),
        max_leaves=8,
    )


ARGUMENTS = [states.TrainState(0, {"a": 0}, None, optax.EmptyState(), None), None, {"b": (0, 0)}, optax.TraceState(0)]


@given(structures(ARGUMENTS))
def test_structures_of_results_are_told(tree):
    structure = jax.tree.structure(tree)
    described = json.loads(json.dumps(device_program._described(structure, tuple(ARGUMENTS))))
    assert jax.tree.structure(device_program._built(described, tuple(ARGUMENTS))) == structure


@pytest.mark.parametrize("tree", [optax.TraceState(0), {1: 0}, [None, 0], {"a": {"b": optax.EmptyState()}}])
def test_other_structures_are_traced_by_each_process(tree):
    assert device_program._described(jax.tree.structure(tree), ({"a": 0}, 0)) is None


def test_what_was_told_is_taken_over_where_it_is_kept_and_begun(monkeypatch):
    monkeypatch.setattr(device_program, "TOLD", device_program.Told())
    traced: list[int] = []

    def attempt(known, *, kept=True):
        job = TwoProcesses(monkeypatch)
        if known is not None:
            device_program.TOLD.begin(known)
        for process in (0, 1):
            with job.run(process), device_program.TOLD.kept() if kept else contextlib.nullcontext():
                found = results_of_two_programs(traced)
        left = device_program.TOLD.all()
        device_program.TOLD.end()
        told, traced[:] = list(traced), []
        return found, left, told

    assert attempt(None)[1:] == ({}, [2, 3])
    assert attempt({}, kept=False)[1:] == ({}, [2, 3])
    first, left, told = attempt({})
    assert len(left) == 2
    assert told == [2, 3]
    second, left_again, told = attempt(left)
    assert (left_again, told) == (left, [])
    jax.tree.map(np.testing.assert_array_equal, second, first)
    assert attempt(left, kept=False)[2] == [2, 3]
