"""Operations of real programs, against arithmetic done by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxdist.plan.compiled import operations


def compiled(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return operations.operations(jax.jit(function).lower(*arrays).compile().as_text())


def only(found, kind):
    (one,) = [each for each in found if each.kind == kind]
    return one


def test_a_matrix_product_has_its_faces_and_flops():
    one = only(compiled(lambda a, b: a @ b, (64, 48), (48, 80)), operations.MATMUL)
    assert (one.rows, one.columns, one.depth, one.products) == (64, 80, 48, 1)
    assert one.flops == 2 * 64 * 80 * 48
    assert one.num_bytes == 4 * (64 * 48 + 48 * 80 + 64 * 80)


def test_a_batched_product_is_several():
    one = only(compiled(lambda a, b: a @ b, (6, 16, 32), (6, 32, 8)), operations.MATMUL)
    assert (one.products, one.flops) == (6, 2 * 6 * 16 * 32 * 8)


def test_what_a_loop_runs_counts_once_per_iteration():
    def loop(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=7)[0]

    one = only(compiled(loop, (32, 32)), operations.MATMUL)
    assert one.times * one.flops == 7 * 2 * 32**3


def test_an_array_of_which_a_loop_writes_one_row_is_not_all_written_each_time():
    def loop(x):
        return jax.lax.scan(lambda carry, row: (carry, jnp.tanh(row)), 0.0, x)[1]

    found = [each for each in compiled(loop, (512, 256)) if each.times == 512]
    assert found
    assert max(each.num_bytes for each in found) <= 2 * 4 * 256
    assert max(each.computed + each.costly for each in found) <= 2 * 256


def test_the_arithmetic_of_a_convolution():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = compiled(convolve, (2, 8, 8, 3), (3, 3, 3, 16))
    (one,) = [each for each in found if each.flops]
    assert one.flops == 2 * 2 * 8 * 8 * 16 * 3 * 3 * 3
    assert (one.rows, one.columns, one.depth) == (2 * 8 * 8, 16, 3 * 3 * 3)


@pytest.mark.parametrize(("axis", "rows"), [(1, 64), (0, 0), ((0, 1), 1)])
def test_a_reduction_has_rows_where_it_adds_up_neighbours_in_memory(axis, rows):
    found = compiled(lambda x: (x * x).sum(axis=axis), (64, 32))
    assert max(each.rows for each in found if each.kind == operations.REDUCTION) == rows


def test_a_fusion_is_one_operation_with_the_traffic_of_its_ends():
    (one,) = compiled(lambda x: jnp.exp(x) * 2 + 1, (1000,))
    assert (one.kind, one.num_bytes, one.costly) == (operations.ELEMENTWISE, 8000, 1000)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x.sum(axis=1), operations.REDUCTION),
        (lambda x: jnp.sort(x), operations.INDEXING),
        (lambda x: x.T + 1, operations.TRANSPOSE),
    ],
)
def test_kinds(function, kind):
    assert kind in {each.kind for each in compiled(function, (64, 32))}


def test_equal_operations_are_counted_together():
    one = operations.Operation("a", operations.MATMUL, flops=2.0, times=3)
    other = operations.Operation("b", operations.MATMUL, flops=2.0)
    different = operations.Operation("c", operations.MATMUL, flops=4.0)
    grouped = operations.grouped([one, different, other])
    assert [(each.flops, each.times) for each in grouped] == [(2.0, 4), (4.0, 1)]
