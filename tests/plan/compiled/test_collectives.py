import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxdist.plan.compiled import collectives
from jaxdist.spmd.mesh import make_mesh

HLO = """
  %a = (f32[128]{0}, f32[]) all-reduce(%x, %y), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %b = bf16[8,16]{1,0} all-gather(%x), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %c = f32[16]{0} reduce-scatter(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %d = f32[10]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %e = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}
  %f = f32[16]{0} all-gather-done(%e)
  %g = f32[16]{0} all-reduce(%x), channel_id=6, replica_groups={{0},{1}}, to_apply=%add
"""


def test_collectives_are_read_with_their_bytes_and_devices():
    found = collectives.collectives(HLO)
    assert [(each.kind, each.num_bytes, each.num_devices) for each in found] == [
        ("all-reduce", 516, 4),
        ("all-gather", 256, 4),
        ("reduce-scatter", 256, 4),
        ("collective-permute", 40, 2),
        ("all-gather", 64, 4),
    ]
    assert [each.sent_bytes for each in found] == [774, 192, 192, 40, 48]
    assert collectives.summarize(found)["all-gather"] == (2, 240)
    assert [each.devices for each in found] == [(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1), (0, 1, 2, 3)]


@pytest.mark.parametrize("axes", [("data",), ("model",), ("data", "model")])
def test_the_axes_that_a_collective_crosses_are_those_it_sums_over(axes):
    mesh = make_mesh({"data": 2, "model": 4})
    mapped = jax.shard_map(
        lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=P(*axes), out_specs=P(), check_vma=False
    )
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    (found,) = collectives.collectives(program.as_text())
    assert found.axes({"data": 2, "model": 4}) == axes


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
    ],
)
def test_the_notations_of_groups(text, devices):
    line = f"  %a = f32[8]{{0}} all-reduce(%x), {text}, to_apply=%add"
    (found,) = collectives.collectives(line)
    assert found.devices == devices


@pytest.mark.parametrize(
    ("function", "out_spec", "sent"),
    [
        (lambda x: jax.lax.psum(x, "data"), P(), 2 * 7 / 8),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P("data"), 7 / 8),
        (lambda x: jax.lax.all_gather(x, "data", tiled=True), P(), 7),
    ],
)
def test_a_compiled_program_tells_the_bytes_of_a_ring(function, out_spec, sent):
    """Of 64 floats on each device."""
    mapped = jax.shard_map(function, mesh=make_mesh(), in_specs=P("data"), out_specs=out_spec, check_vma=False)
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((512,), jnp.float32)).compile()
    assert collectives.sent_bytes(collectives.collectives(program.as_text())) == sent * 64 * 4


def test_a_collective_in_a_loop_in_a_branch_counts_every_turn():
    def branched(x):
        def looped(x):
            return jax.lax.scan(lambda total, row: (total + jax.lax.psum(row, "data"), None), jnp.zeros(4), x)[0]

        return jax.lax.cond(x[0, 0] > 0, looped, lambda x: x[0], x)

    mapped = jax.shard_map(branched, mesh=make_mesh(), in_specs=P(None, None), out_specs=P(), check_vma=False)
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((5, 4), jnp.float32)).compile()
    (found,) = collectives.collectives(program.as_text())
    assert found.times == 5


@pytest.mark.parametrize("turns", [1, 5])
def test_a_collective_in_a_loop_counts_every_turn(turns):
    def looped(x):
        return jax.lax.scan(lambda total, row: (total + jax.lax.psum(row, "data"), None), jnp.zeros(4), x)[0]

    mapped = jax.shard_map(looped, mesh=make_mesh(), in_specs=P(None, None), out_specs=P(), check_vma=False)
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((turns, 4), jnp.float32)).compile()
    found = collectives.collectives(program.as_text())
    assert collectives.summarize(found) == {"all-reduce": (turns, turns * 2 * 16 * 7 / 8)}
