import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_problem import counted_compiles

from jaxdist import executable


def product(tree, index):
    return {"sum": tree["a"] @ tree["b"] + index, "pair": (tree["a"].sum(), None)}


def arguments(device):
    tree = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones((4, 2), np.float32)}
    return jax.device_put((tree, jnp.int32(7)), device)


def test_one_compilation_runs_on_every_device():
    devices = jax.devices()
    args = arguments(devices[0])
    with counted_compiles() as compiles:
        programs = executable.compile_on(jax.jit(product), args, devices)
    assert len(compiles) == 1
    expected = product(*args)
    for device, program in zip(devices, programs, strict=True):
        result = program(*arguments(device))
        assert result["sum"].devices() == {device}
        jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_a_single_device_needs_no_loading():
    device = jax.devices()[3]
    (program,) = executable.compile_on(jax.jit(product), arguments(device), [device])
    assert program(*arguments(device))["sum"].devices() == {device}


def test_donation_holds_on_every_device():
    devices = jax.devices()[:2]
    add = jax.jit(jnp.add, donate_argnums=0)
    programs = executable.compile_on(add, (jnp.ones(4), jnp.ones(4)), devices)
    for device, program in zip(devices, programs, strict=True):
        given, other = jax.device_put((jnp.full(4, 2.0), jnp.ones(4)), device)
        np.testing.assert_array_equal(program(given, other), np.full(4, 3.0))
        assert given.is_deleted()


def test_another_shape_is_refused():
    devices = jax.devices()[:2]
    programs = executable.compile_on(jax.jit(jnp.sin), (jnp.ones(4),), devices)
    for device, program in zip(devices, programs, strict=True):
        with pytest.raises(TypeError, match="compiled"):
            program(jax.device_put(jnp.ones(5), device))
