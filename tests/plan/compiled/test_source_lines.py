import inspect

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxdist.plan.compiled import collectives
from jaxdist.plan.compiled.source_lines import SourceLines
from jaxdist.spmd.mesh import make_mesh


def summed(x):
    return jax.lax.psum(x, "data")


def test_a_collective_names_the_line_that_caused_it():
    mapped = jax.shard_map(summed, mesh=make_mesh(), in_specs=P("data"), out_specs=P(), check_vma=False)
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((16,), jnp.float32)).compile()
    (found,) = collectives.collectives(program.as_text())
    assert found.caused_by == f"{__file__}:{inspect.getsourcelines(summed)[1] + 1}"


def test_a_line_written_beside_the_instruction_is_taken():
    instruction = 'x = f32[] add(a, b), metadata={op_name="add" source_file="model.py" source_line=12}'
    assert SourceLines("HloModule m\n").of(instruction) == "model.py:12"


def test_an_instruction_without_a_line_has_none():
    assert SourceLines("HloModule m\n").of("x = f32[] add(a, b)") == ""
