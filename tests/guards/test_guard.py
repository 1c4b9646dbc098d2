import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.guards import guard
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.metrics import masked_mean
from jaxdist.spmd.state import TrainState, create_state
from jaxdist.spmd.step import data_parallel_step

MESH = make_mesh()
MESH_2D = make_mesh({"data": 4, "model": 2})
P = PartitionSpec
REPLICATED = P()


def array_of_copies(copies, spec=REPLICATED, mesh=MESH):
    """Return an array that claims `spec`, made of what each device is said to hold, in the order of the mesh."""
    sharding = NamedSharding(mesh, spec)
    pieces = [jax.device_put(copy, device) for copy, device in zip(copies, mesh.devices.flat, strict=True)]
    shape = sharding_shape(np.shape(copies[0]), sharding)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def sharding_shape(piece_shape, sharding):
    parts = [1] * len(piece_shape)
    for dim, entry in enumerate(sharding.spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        parts[dim] = int(np.prod([sharding.mesh.shape[name] for name in names]))
    return tuple(size * part for size, part in zip(piece_shape, parts))


def init(key):
    return {"dense": {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.zeros(2, jnp.bfloat16)}}


def test_a_fresh_state_has_equal_replicas():
    guard.check_replicas(create_state(init, optax.adamw(0.1), mesh=MESH, seed=0), MESH)


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8", "uint32", "int32", "bool", "complex64"]),
    element=st.integers(0, 5),
    bit=st.integers(0, 63),
    device=st.integers(0, 7),
)
def test_one_flipped_bit_on_one_device_is_found_and_named(dtype, element, bit, device):
    good = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    bad = good.copy()
    if dtype == "bool":
        bad.flat[element] ^= True
    else:
        bits = bad.reshape(-1).view(np.uint8).reshape(6, -1)
        bits[element, bit // 8 % bits.shape[1]] ^= 1 << bit % 8
    drifted = array_of_copies([bad if i == device else good for i in range(8)])
    assert drifted.is_fully_replicated  # Which is why the check is needed.
    tree = {"fine": array_of_copies([good] * 8), "params": {"w": drifted}}
    with pytest.raises(guard.ReplicaDriftError, match="1 of 2 leaves") as error:
        guard.check_replicas(tree, MESH)
    assert f"['params']['w'] on {MESH.devices[device]} (process 0)" in str(error.value)


def test_replicas_that_hold_the_same_values_in_another_order_differ():
    first, second = np.float32([1, 2, 3]), np.float32([3, 2, 1])
    with pytest.raises(guard.ReplicaDriftError):
        guard.check_replicas(array_of_copies([first] * 7 + [second]), MESH)


def test_signed_zeros_differ_and_equal_nans_do_not():
    zero, nan = np.float32([0.0]), np.float32([np.nan])
    guard.check_replicas(array_of_copies([nan] * 8), MESH)
    with pytest.raises(guard.ReplicaDriftError):
        guard.check_replicas(array_of_copies([zero] * 7 + [-zero]), MESH)


def test_a_key_that_differs_is_found():
    data = array_of_copies([np.uint32([1, 2])] * 7 + [np.uint32([1, 3])])
    keys = jax.jit(jax.random.wrap_key_data, out_shardings=NamedSharding(MESH, P()))(data)
    with pytest.raises(guard.ReplicaDriftError, match=r"\['key'\] on"):
        guard.check_replicas({"key": keys}, MESH)


def test_all_holders_are_named_where_none_is_in_the_majority():
    copies = [np.float32([i // 4]) for i in range(8)]
    with pytest.raises(guard.ReplicaDriftError) as error:
        guard.check_replicas(array_of_copies(copies), MESH)
    assert all(str(device) in str(error.value) for device in MESH.devices)


@pytest.mark.parametrize(
    ("spec", "peers"),
    [(P("data"), 2), (P("model"), 4), (P(None, "model"), 4), (P(("data", "model")), 1), (P(), 8)],
)
def test_shards_are_compared_with_their_own_copies_only(spec, peers):
    """A leaf cut over some axes has different shards, each of them copied along the other axes."""
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    intact = jax.device_put(whole, NamedSharding(MESH_2D, spec))
    guard.check_replicas({"w": intact}, MESH_2D)
    pieces = [np.array(shard.data) for shard in sorted(intact.addressable_shards, key=lambda shard: shard.device.id)]
    pieces[5] = pieces[5] + 1
    drifted = {"w": array_of_copies(pieces, spec, MESH_2D)}
    if peers == 1:
        guard.check_replicas(drifted, MESH_2D)  # Nothing to compare with.
        return
    with pytest.raises(guard.ReplicaDriftError) as error:
        guard.check_replicas(drifted, MESH_2D)
    # Of two copies that differ, nobody knows which is right.
    assert str(error.value).count("process 0") == (1 if peers > 2 else 2)
    assert f"{MESH_2D.devices.flat[5]} (process 0)" in str(error.value)


def test_a_step_that_forgets_to_average_is_found_out():
    """Gradients of the local batch applied as they are: the replicas part, and nothing else says so."""

    def local_step(params, x):
        return params - jax.grad(lambda p: (p * x).sum())(params)

    step = jax.jit(jax.shard_map(local_step, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), check_vma=False))
    params = jax.device_put(jnp.ones(()), NamedSharding(MESH, P()))
    guard.check_replicas({"params": params}, MESH)
    params = step(params, jax.device_put(jnp.arange(8.0), NamedSharding(MESH, P("data"))))
    with pytest.raises(guard.ReplicaDriftError, match=r"\['params'\] on"):
        guard.check_replicas({"params": params}, MESH)


def test_a_leaf_that_is_not_on_the_mesh_is_refused():
    with pytest.raises(ValueError, match=r"\['w'\] has SingleDeviceSharding"):
        guard.check_replicas({"w": jnp.ones(3)}, MESH)


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

    step, sentinel = make_step(plain_step), guard.RecompileSentinel()
    state = {"w": jax.device_put(jnp.ones(()), NamedSharding(MESH_2D, P()))}
    usual, unusual = batch_of(4, jnp.float32, P()), batch_of(size, dtype, spec)
    for _ in range(3):
        step(state, usual)
        assert sentinel.observe(step, (state, usual)) is None
    step(state, unusual)
    report = sentinel.observe(step, (state, unusual))
    assert report.count == sentinel.compile_count == 2
    assert [changed.path for changed in report.changes] == ["batch['x']"]
    assert "compiled again (compile 2): batch['x'] changed " in str(report)
    assert change in str(report)
    for batch in (usual, unusual):
        step(state, batch)
        assert sentinel.observe(step, (state, batch)) is None


def test_weak_types_and_leaves_that_come_and_go_are_named():
    step, sentinel = jax.jit(lambda state, batch: jax.tree.leaves((state, batch))), guard.RecompileSentinel()
    for args in (
        ({"w": jnp.float32(1)}, {}),
        ({"w": jnp.asarray(1.0)}, {}),
        ({"w": jnp.float32(1)}, {"x": jnp.ones(2)}),
    ):
        step(*args)
        report = sentinel.observe(step, args)
        if report and report.count == 2:
            assert [str(change) for change in report.changes] == ["state['w'] changed weak type: False -> True"]
    assert [str(change) for change in report.changes] == ["batch['x'] changed presence: not there -> there"]


def test_a_state_placed_by_hand_compiles_the_step_twice_and_a_created_one_does_not():
    optimizer = optax.sgd(0.1, momentum=0.9)
    batch = {"x": jax.device_put(jnp.ones((8, 3)), NamedSharding(MESH, P("data")))}

    def loss_fn(params, batch, key):
        return (batch["x"] @ params["dense"]["kernel"]).mean(), {}

    def reports(state):
        step, sentinel = data_parallel_step(loss_fn, optimizer, MESH), guard.RecompileSentinel()
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
    assert "state.params['dense']['bias']" in [change.path for change in report.changes]


def make_state(params, model_state=None):
    state = TrainState(jnp.int32(6), params, model_state, (), jax.random.key(0))
    return jax.device_put(state, NamedSharding(MESH, P()))


def make_batch(x, mask=None, mesh=MESH):
    batch = {"x": np.asarray(x, np.float32)} | ({} if mask is None else {"mask": np.asarray(mask, np.float32)})
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


PARAMS = {"a": jnp.zeros(()), "b": jnp.ones(3), "c": jnp.ones(())}


def row_losses(params, batch):
    # The square root has an infinite slope at zero, so rows of zeros have finite losses and no finite gradient of b.
    return jnp.sqrt(jnp.square(batch["x"] @ params["b"])) + params["c"] + params["a"]


def scalar_loss(params, batch, key):
    values = row_losses(params, batch)
    return values.mean() if "mask" not in batch else masked_mean(values, batch["mask"]).value, {}


def mean_loss(params, batch, key):
    return masked_mean(row_losses(params, batch), batch.get("mask")), {}


def stateful_loss(params, batch, key, model_state):
    return scalar_loss(params, batch, key)[0] * model_state["scale"], {}, model_state


@pytest.mark.parametrize("rows_per_device", [1, 3])
@pytest.mark.parametrize("kind", ["scalar", "mean", "stateful"])
def test_the_rows_the_leaf_and_the_step_are_named(kind, rows_per_device):
    loss_fn = {"scalar": scalar_loss, "mean": mean_loss, "stateful": stateful_loss}[kind]
    state = make_state(PARAMS, {"scale": jnp.ones(())} if kind == "stateful" else None)
    x = np.ones((8 * rows_per_device, 3))
    x[[2, 7]] = 0.0
    report = guard.explain_nonfinite(loss_fn, state, make_batch(x))
    assert (report.step, report.leaf, report.positions) == (7, "params['b']", (2, 7))
    assert np.isfinite(report.loss)
    assert report.fields == {}
    text = str(report)
    assert "Step 7" in text
    assert "params['b']" in text
    assert "2, 7" in text


def test_a_value_of_the_input_that_is_not_finite_is_pointed_at():
    x = np.ones((8, 3))
    x[4, 1] = np.inf
    batch = make_batch(x) | {"label": jnp.arange(8) * 10, "text": jnp.zeros((8, 2), jnp.int32)}
    report = guard.explain_nonfinite(mean_loss, make_state(PARAMS), batch, step=12)
    assert (report.step, report.leaf, report.positions) == (12, "params['b']", (4,))
    assert report.fields == {"x": (4,)}
    assert report.integers == {"label": (40,)}
    assert "'x' holds values that are not finite in rows 4" in str(report)


def test_rows_that_are_masked_out_are_not_blamed():
    x = np.ones((8, 3))
    x[[1, 6]] = np.nan
    mask = np.ones(8)
    mask[6] = 0
    report = guard.explain_nonfinite(mean_loss, make_state(PARAMS), make_batch(x, mask))
    assert report.positions == (1,)
    assert report.fields == {"x": (1,)}


def test_rows_that_overflow_only_together_are_told_apart():
    def loss_fn(params, batch, key):
        return (batch["x"] @ params["w"]).sum(), {}

    report = guard.explain_nonfinite(loss_fn, make_state({"w": jnp.ones(3)}), make_batch(np.full((8, 3), 1e38)))
    assert report.positions == ()
    assert report.leaf == "params['w']"
    assert "overflow together" in str(report)


def test_params_that_were_not_finite_before_the_step_are_named():
    report = guard.explain_nonfinite(
        mean_loss, make_state(PARAMS | {"c": jnp.float32(jnp.nan)}), make_batch(np.ones((8, 3)))
    )
    assert report.params == ("params['c']",)
    assert "before the step already: params['c']" in str(report)


def test_a_fault_that_does_not_show_again_is_said_not_to():
    report = guard.explain_nonfinite(mean_loss, make_state(PARAMS), make_batch(np.ones((8, 3))))
    assert not report.found
    assert "computing it again gives finite" in str(report)


def test_a_batch_on_one_device_is_examined_too():
    state = TrainState(jnp.int32(0), PARAMS, None, (), jax.random.key(0))
    report = guard.explain_nonfinite(mean_loss, state, {"x": jnp.ones((4, 3)).at[3].set(0)})
    assert (report.step, report.positions) == (1, (3,))
