import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxdist.spmd.dependence import depends, factors, false_after, marks, uses, with_results

X = jnp.ones(3)


@jax.custom_vjp
def with_own_gradient(a, b):
    return a * 2, b


with_own_gradient.defvjp(lambda a, b: (with_own_gradient(a, b), None), lambda _, cotangents: cotangents)


def scanned(a, b):
    """The first result takes `b` in only in the second round, through the carry."""

    def body(carry, x):
        first, second, third = carry
        return (second, third, x.sum()), first

    return lax.scan(body, (a.sum(), a.sum(), a.sum()), jnp.stack([b] * 4))[1], a


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b: (a + 1, b + 1), (False, True)),
        (lambda a, b: (a + b, jnp.zeros(3)), (True, False)),
        (jax.jit(lambda a, b: (a + 1, b + 1)), (False, True)),
        (jax.checkpoint(lambda a, b: (jnp.sin(a), b * a)), (False, True)),
        (with_own_gradient, (False, True)),
        (lambda a, b: lax.cond(a[0] > 0, lambda: (a, b), lambda: (a + 1, b)), (False, True)),
        (lambda a, b: lax.cond(b[0] > 0, lambda: (a, a * 2), lambda: (a + 1, a)), (True, True)),
        (scanned, (True, False)),
        (lambda a, b: (b, a), (True, False)),
        (lambda a, b: lax.while_loop(lambda c: c[0][0] < 3, lambda c: (c[0] + 1, c[1] + b), (a, a)), (True, True)),
    ],
)
def test_what_depends_on_the_second_argument(function, expected):
    assert depends(function, (X, X), (False, True)) == expected


def test_descriptions_of_arrays_will_do_and_nothing_is_computed():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    found = depends(
        lambda a, tree: {"sum": a + tree["u"], "v": tree["v"]},
        (shape, {"u": shape, "v": shape}),
        (True, {"u": False, "v": False}),
    )
    assert found == {"sum": True, "v": False}


def test_marks_are_joined_where_results_meet():
    def function(a, b, c):
        return a + b, lax.cond(c > 0, lambda x: x, lambda x: 2 * x, b), jnp.zeros(3)

    args = [jax.ShapeDtypeStruct((), "float32")] * 3
    assert marks(function, args, [1, 2, 4]) == (3, 6, 0)


def test_a_primitive_is_found_in_functions_that_are_called():
    def inner(x):
        return lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)

    jaxpr = jax.make_jaxpr(jax.jit(inner))(jnp.ones((2, 2)))
    assert uses(jaxpr, "dot_general")
    assert not uses(jaxpr, "conv_general_dilated")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a: ((b := a + 1), b * 2), (20.0, 40.0)),  # the second is made from the changed first
        (lambda a: [(b := a * 2), b + 1], [20.0, 21.0]),
        (lambda a: (a, jnp.float32(3)), (10.0, 3.0)),  # an argument and a constant
        (lambda a: 2 * ((b := a + 1), b), (20.0, 20.0, 20.0, 20.0)),  # one value in several places
        (jax.jit(lambda a: (a + 1, jnp.sin(a) * 0)), (20.0, 0.0)),
        (lambda a: lax.cond(a > 0, lambda: (a + 1, a), lambda: (a, a)), (20.0, 1.0)),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_results_are_changed_where_they_appear(function, expected, jitted):
    def changed(a):
        count = len(jax.tree.leaves(expected))
        same = [lambda value: value] * count
        both = [lambda value: value * 10] * count if count > 2 else [lambda value: value * 10, same[0]]
        return with_results(function, (a,), both)

    found = (jax.jit(changed) if jitted else changed)(jnp.float32(1.0))
    assert jax.tree.map(float, found) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.uint32, jnp.int8])
def test_false_after_any_value_is_false(dtype):
    values = np.array([0, 1, 3, 100], dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        values = np.append(values, np.array([-1, np.nan, np.inf, -np.inf, 1e-7, 3.14159], dtype))
    assert not any(bool(jax.jit(false_after)(jnp.full(3, value))) for value in values)


def test_a_value_is_computed_before_what_is_false_after_it():
    text = jax.jit(lambda x: false_after(jnp.sort(x))).lower(X).compile().as_text()
    assert "sort(" in text


def test_what_is_false_after_a_value_does_not_depend_on_it():
    assert depends(lambda x, y: (y | false_after(x), x), (X, True), (True, False)) == (False, True)


def bad_at_three(count):
    return jnp.where(count == 3, jnp.nan, 0.1)


PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(bad_at_three),
        optax.adamw(bad_at_three),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(bad_at_three)),
        optax.inject_hyperparams(optax.adam)(learning_rate=bad_at_three),
        optax.multi_transform({"a": optax.sgd(bad_at_three), "b": optax.sgd(0.1)}, {"a": "a", "b": "b"}),
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(bad_at_three)),
    ],
)
def test_the_factors_of_an_update_tell_beforehand_that_it_cannot_be_finite(optimizer):
    state = optimizer.init(PARAMS)
    for count in range(5):
        found = jax.jit(lambda state: factors(optimizer.update, PARAMS, state, PARAMS))(state)
        updates, state = optimizer.update(PARAMS, state, PARAMS)
        finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))
        assert all(bool(jnp.isfinite(each)) for each in found) == finite == (count != 3)
        assert found
        assert len(found) <= 4


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.apply_if_finite(optax.sgd(bad_at_three), 10),
        optax.MultiSteps(optax.sgd(bad_at_three), 2).gradient_transformation(),
        optax.lamb(0.1),
        optax.chain(optax.scale(jnp.inf), optax.scale_by_sign(), optax.scale(0.1)),
        optax.clip_by_global_norm(1.0),
    ],
)
def test_nothing_is_said_of_scalars_that_may_be_chosen_away(optimizer):
    state = optimizer.init(PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(5):
        assert all(bool(jnp.isfinite(each)) for each in factors(optimizer.update, zeros, state, PARAMS))
        _, state = optimizer.update(zeros, state, PARAMS)
