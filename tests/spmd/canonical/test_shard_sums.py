import contextlib
import os
from unittest import mock

import jax
import pytest
from small_problem import OPTIMIZERS, loss_fn

from jaxdist.spmd.canonical import canonical_step, shard_sums
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


@pytest.mark.parametrize(
    ("cores", "environment", "threads"),
    [
        (1, {}, 1),
        (4, {}, 4),
        (1, {"NPROC": "2"}, 2),
        (4, {"NPROC": "1"}, 1),
        (4, {"NPROC": "2", "PJRT_NPROC": "1"}, 1),
        (1, {"NPROC": "1", "PJRT_NPROC": "3"}, 3),
        (4, {"NPROC": "many"}, 4),
    ],
)
def test_a_thread_pool_of_one_is_refused(cores, environment, threads):
    """XLA then generates other code, and the bits would not be those of other machines."""
    cleared = {name: value for name, value in os.environ.items() if "NPROC" not in name}
    with (
        mock.patch.object(os, "sched_getaffinity", return_value=set(range(cores))),
        mock.patch.dict(os.environ, cleared | environment, clear=True),
    ):
        assert shard_sums.thread_pool_size(os.environ) == threads
        refused = pytest.raises(ValueError, match="Set PJRT_NPROC=8") if threads == 1 else contextlib.nullcontext()
        with refused:
            shard_sums.check_layout(make_mesh(), logical_shards=8)
