"""FLOPs against XLA's own count, where nothing loops, and against formulas."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxdist.run.diagnosis import flops
from jaxdist.spmd.mesh import make_mesh

A, B = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((32, 8), jnp.float32)
IMAGES, KERNEL = jax.ShapeDtypeStruct((2, 9, 9, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)


def of_call(function, *args):
    return flops.count(jax.make_jaxpr(function)(*args))


def convolve(images, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (jnp.matmul, (A, B)),
        (lambda a, b: jnp.einsum("ij,jk->ki", a, b), (A, B)),
        (convolve, (IMAGES, KERNEL)),
        (jax.grad(lambda a, b: jnp.sum(jnp.matmul(a, b) ** 2), argnums=(0, 1)), (A, B)),
    ],
)
def test_xla_counts_the_same_up_to_elementwise_operations(function, args):
    theirs = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
    assert of_call(function, *args) == pytest.approx(theirs, rel=0.05)


def test_a_grouped_convolution_multiplies_its_own_channels_alone():
    images, kernel = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32)
    assert of_call(lambda x, k: convolve(x, k, groups=4), images, kernel) == 2 * 6 * 6 * 4 * 9


def test_a_scan_counts_every_turn_and_a_branch_the_dearer_side():
    def looped(a, b):
        return jax.lax.scan(lambda carry, _: (carry + jnp.matmul(a, b).sum(), None), 0.0, None, length=7)[0]

    def branched(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: jnp.matmul(a, b), lambda: jnp.zeros((16, 8)))

    once = 2 * 16 * 32 * 8
    assert of_call(looped, A, B) == 7 * once
    assert of_call(branched, A, B) == once


def test_a_mapped_program_counts_for_all_its_devices():
    mapped = jax.shard_map(
        lambda a, b: jax.lax.psum(a @ b, "data"), mesh=make_mesh(), in_specs=(P(None, "data"), P("data")), out_specs=P()
    )
    assert of_call(mapped, A, B) == 2 * 16 * 32 * 8


def test_what_is_computed_again_counts_again():
    def loss(a, b):
        return jnp.sum(jnp.sin(a @ b) ** 2)

    plain, again = of_call(jax.grad(loss), A, B), of_call(jax.grad(jax.checkpoint(loss)), A, B)
    assert again == plain * 3 / 2
