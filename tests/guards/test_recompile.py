import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.guards import recompile
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.state import TrainState, create_state
from jaxdist.spmd.step import data_parallel_step

MESH = make_mesh()
MESH_2D = make_mesh({"data": 4, "model": 2})
P = PartitionSpec


def init(key):
    return {"dense": {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.zeros(2, jnp.bfloat16)}}


def plain_step(state, batch):
    return {"w": state["w"] * batch["x"].sum()}


@pytest.mark.parametrize("make_step", [jax.jit, lambda step: lambda *args: jax.jit(step)(*args)], ids=["jit", "plain"])
@pytest.mark.parametrize(
    ("size", "dtype", "spec", "change"),
    [
        (4, jnp.bfloat16, P(), "dtype: float32 -> bfloat16"),
        (8, jnp.float32, P(), "shape: (4,) -> (8,)"),
        (
            4,
            jnp.float32,
            P("data"),
            f"sharding: {P()} on mesh {{'data': 4, 'model': 2}} of devices 0 to 7 -> {P('data')} on",
        ),
        (4, jnp.float32, None, "-> uncommitted"),
    ],
)
def test_a_second_compile_names_the_argument_and_what_changed(make_step, size, dtype, spec, change):
    def batch_of(size, dtype, spec):
        x = jnp.ones(size, dtype)
        return {"x": x if spec is None else jax.device_put(x, NamedSharding(MESH_2D, spec))}

    step, sentinel = make_step(plain_step), recompile.RecompileSentinel()
    state = {"w": jax.device_put(jnp.ones(()), NamedSharding(MESH_2D, P()))}
    usual, unusual = batch_of(4, jnp.float32, P()), batch_of(size, dtype, spec)
    for _ in range(3):
        step(state, usual)
        assert sentinel.observe(step, (state, usual)) is None
    step(state, unusual)
    report = sentinel.observe(step, (state, unusual))
    assert report.count == sentinel.compile_count == 2
    assert [changed.path for changed in report.changes] == ["batch/x"]
    assert "compiled again (compile 2): batch/x changed " in str(report)
    assert change in str(report)
    for batch in (usual, unusual):
        step(state, batch)
        assert sentinel.observe(step, (state, batch)) is None


def test_weak_types_and_leaves_that_come_and_go_are_named():
    step, sentinel = jax.jit(lambda state, batch: jax.tree.leaves((state, batch))), recompile.RecompileSentinel()
    for args in (
        ({"w": jnp.float32(1)}, {}),
        ({"w": jnp.asarray(1.0)}, {}),
        ({"w": jnp.float32(1)}, {"x": jnp.ones(2)}),
    ):
        step(*args)
        report = sentinel.observe(step, args)
        if report and report.count == 2:
            assert [str(change) for change in report.changes] == ["state/w changed weak type: False -> True"]
    assert [str(change) for change in report.changes] == ["batch/x changed presence: not there -> there"]


def test_a_state_placed_by_hand_compiles_the_step_twice_and_a_created_one_does_not():
    optimizer = optax.sgd(0.1, momentum=0.9)
    batch = {"x": jax.device_put(jnp.ones((8, 3)), NamedSharding(MESH, P("data")))}

    def loss_fn(params, batch, key):
        return (batch["x"] @ params["dense"]["kernel"]).mean(), {}

    def reports(state):
        step, sentinel = data_parallel_step(loss_fn, optimizer, MESH), recompile.RecompileSentinel()
        found = []
        for _ in range(3):
            old, (state, _) = state, step(state, batch)
            found.append(sentinel.observe(step, (old, batch)))
        return [report for report in found if report]

    assert reports(create_state(init, optimizer, mesh=MESH, seed=0)) == []
    params = init(jax.random.key(0))
    by_hand = TrainState(jnp.zeros((), jnp.int32), params, None, optimizer.init(params), jax.random.key(0))
    (report,) = reports(by_hand)
    assert {change.what for change in report.changes} == {"sharding"}
    assert "state/params/dense/bias" in [change.path for change in report.changes]
