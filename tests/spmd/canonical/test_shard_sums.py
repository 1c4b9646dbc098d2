import jax
import pytest
from small_problem import OPTIMIZERS, loss_fn

from jaxdist.spmd.canonical import canonical_step
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
