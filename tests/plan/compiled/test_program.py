"""Optimized programs as objects."""

import jax
import jax.numpy as jnp
import pytest

from jaxdist.plan.compiled import program


def test_a_compiled_program_is_read_whole():
    compiled = jax.jit(lambda x: jnp.tanh(x @ x), donate_argnums=0).lower(jnp.ones((16, 16))).compile()
    found = program.parse(compiled.as_text())
    entry = found.computations[found.entry]
    assert [each.opcode for each in entry].count("parameter") == 1
    assert sum(each.is_root for each in entry) == 1
    names = {each.name for each in entry}
    assert all(set(each.operands) <= names for each in entry)
    assert found.outputs_in_arguments == {0}
    assert entry[-1].arrays[0].text == "f32[16,16]"


@pytest.mark.parametrize(
    ("shape", "num_bytes", "in_memory"),
    [
        ("f32[64,192]{1,0}", 64 * 192 * 4, True),
        ("pred[3]{0}", 3, True),
        ("f32[]", 4, True),
        ("bf16[5]{0:T(256)}", 512, True),
        ("f32[65,100]{1,0:T(8,128)}", 72 * 128 * 4, True),
        ("f32[65,100]{0,1:T(8,128)S(1)}", 104 * 128 * 4, False),
        ("s4[10]{0}", 5, True),
        ("token[]", 0, True),
    ],
)
def test_arrays_have_the_bytes_of_their_layout(shape, num_bytes, in_memory):
    text = f'ENTRY %main () -> f32[] {{\n  ROOT %a = {shape} custom-call(), custom_call_target="x"\n}}'
    ((instruction,),) = program.parse(text).computations.values()
    (array,) = instruction.arrays
    assert (array.num_bytes, array.in_memory) == (num_bytes, in_memory)


def test_tuples_operands_and_called_computations():
    shape = "(f32[2]{0}, /*index=1*/(s32[], u8[4]{0}))"
    line = f'  ROOT %w = {shape} while(%init), condition=%c.1, body=%b.2, metadata={{op_name="f(x)"}}'
    ((instruction,),) = program.parse(f"ENTRY %main (x: f32[2]) -> f32[] {{\n{line}\n}}").computations.values()
    assert [each.text for each in instruction.arrays] == ["f32[2]", "s32[]", "u8[4]"]
    assert (instruction.opcode, instruction.operands, instruction.is_root) == ("while", ("init",), True)
    assert set(instruction.called) == {"c.1", "b.2"}
