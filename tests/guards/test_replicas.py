import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.guards import replicas
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.state import create_state

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
    replicas.check_replicas(create_state(init, optax.adamw(0.1), mesh=MESH, seed=0), MESH)


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
    with pytest.raises(replicas.ReplicaDriftError, match="1 of 2 leaves") as error:
        replicas.check_replicas(tree, MESH)
    assert f"params/w on {MESH.devices[device]} (process 0)" in str(error.value)


def test_replicas_that_hold_the_same_values_in_another_order_differ():
    first, second = np.float32([1, 2, 3]), np.float32([3, 2, 1])
    with pytest.raises(replicas.ReplicaDriftError):
        replicas.check_replicas(array_of_copies([first] * 7 + [second]), MESH)


def test_signed_zeros_differ_and_equal_nans_do_not():
    zero, nan = np.float32([0.0]), np.float32([np.nan])
    replicas.check_replicas(array_of_copies([nan] * 8), MESH)
    with pytest.raises(replicas.ReplicaDriftError):
        replicas.check_replicas(array_of_copies([zero] * 7 + [-zero]), MESH)


def test_a_key_that_differs_is_found():
    data = array_of_copies([np.uint32([1, 2])] * 7 + [np.uint32([1, 3])])
    keys = jax.jit(jax.random.wrap_key_data, out_shardings=NamedSharding(MESH, P()))(data)
    with pytest.raises(replicas.ReplicaDriftError, match=r"key on"):
        replicas.check_replicas({"key": keys}, MESH)


def test_all_holders_are_named_where_none_is_in_the_majority():
    copies = [np.float32([i // 4]) for i in range(8)]
    with pytest.raises(replicas.ReplicaDriftError) as error:
        replicas.check_replicas(array_of_copies(copies), MESH)
    assert all(str(device) in str(error.value) for device in MESH.devices)


@pytest.mark.parametrize(
    ("spec", "peers"),
    [(P("data"), 2), (P("model"), 4), (P(None, "model"), 4), (P(("data", "model")), 1), (P(), 8)],
)
def test_shards_are_compared_with_their_own_copies_only(spec, peers):
    """A leaf sharded over some axes has different shards, each of them copied along the other axes."""
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    intact = jax.device_put(whole, NamedSharding(MESH_2D, spec))
    replicas.check_replicas({"w": intact}, MESH_2D)
    pieces = [np.array(shard.data) for shard in sorted(intact.addressable_shards, key=lambda shard: shard.device.id)]
    pieces[5] = pieces[5] + 1
    drifted = {"w": array_of_copies(pieces, spec, MESH_2D)}
    if peers == 1:
        replicas.check_replicas(drifted, MESH_2D)  # Nothing to compare with.
        return
    with pytest.raises(replicas.ReplicaDriftError) as error:
        replicas.check_replicas(drifted, MESH_2D)
    # Of two copies that differ, it is unknown which one is right.
    assert str(error.value).count("process 0") == (1 if peers > 2 else 2)
    assert f"{MESH_2D.devices.flat[5]} (process 0)" in str(error.value)


def test_a_step_that_forgets_to_average_is_found_out():
    """Gradients of the local batch are applied without averaging: the replicas drift apart, without any other sign."""

    def local_step(params, x):
        return params - jax.grad(lambda p: (p * x).sum())(params)

    step = jax.jit(jax.shard_map(local_step, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), check_vma=False))
    params = jax.device_put(jnp.ones(()), NamedSharding(MESH, P()))
    replicas.check_replicas({"params": params}, MESH)
    params = step(params, jax.device_put(jnp.arange(8.0), NamedSharding(MESH, P("data"))))
    with pytest.raises(replicas.ReplicaDriftError, match=r"params on"):
        replicas.check_replicas({"params": params}, MESH)


def test_a_leaf_that_is_not_on_the_mesh_is_refused():
    with pytest.raises(ValueError, match=r"w has SingleDeviceSharding"):
        replicas.check_replicas({"w": jnp.ones(3)}, MESH)
