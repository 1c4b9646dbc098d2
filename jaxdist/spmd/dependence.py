"""What the jaxpr of a function tells without computing: which results depend on which arguments. And a function whose
results are changed where they appear, and an order of two values that do not depend on each other.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxdist.spmd import jax_private


def depends(function: Callable[..., Any], args: Sequence[Any], marked: Sequence[Any]) -> Any:
    """Return a tree like the result of `function(*args)`: whether each leaf depends on a marked leaf of the arguments.

    The function is traced once. `marked` are bools, in the tree structure of `args`, which may be descriptions of
    arrays.
    """
    return jax.tree.map(bool, marks(function, args, marked))


Added: TypeAlias = Callable[[Any, Sequence[int]], int]
"""`added(equation, marks of its inputs) -> marks`: what its results get beside those of its inputs."""


def marks(
    function: Callable[..., Any], args: Sequence[Any], marked: Sequence[Any], added: Added = lambda equation, inputs: 0
) -> Any:
    """Return a tree like the result of `function(*args)`: the marks of all leaves that each leaf depends on, joined.

    `marked` are whole numbers whose bits are marks; `added` gives further marks of the results of an equation that has
    marked inputs. For the rest see `depends`.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    found = _follow(closed.jaxpr, [int(each) for each in jax.tree.leaves(list(marked))], added)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def with_results(function: Callable[..., Any], args: Sequence[Any], changes: Sequence[Callable[[Any], Any]]) -> Any:
    """Return `function(*args)`, a tree each of whose leaves went through its change.

    A leaf is changed as soon as it is computed, so that what is computed from it uses the changed one.

    The function is traced once; `changes` are one for each leaf of its result.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr, leaves = closed.jaxpr, jax.tree.leaves(list(args))
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *leaves), strict=True))
    computed = {variable for equation in jaxpr.eqns for variable in equation.outvars}
    results = [None if hasattr(atom, "val") else atom for atom in jaxpr.outvars]
    early = {atom: change for atom, change in zip(results, changes) if atom in computed and results.count(atom) == 1}

    def value_of(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        found = jax_private.results_of(equation, [value_of(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, found, strict=True))
        known.update((each, early[each](known[each])) for each in equation.outvars if each in early)
    is_early = [atom in early for atom in results]
    values = map(value_of, jaxpr.outvars)
    last = [value if done else change(value) for value, done, change in zip(values, is_early, changes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), last)


def false_after(value: jax.Array) -> jax.Array:
    """Return False; on CPU devices, what uses it is computed after `value`, an array that is not empty.

    A barrier would not do: XLA removes it before it compiles for the CPU. Other devices compute in one order anyway.
    """
    found: jax.Array = _false_after_p.bind(value.reshape(-1)[0])
    return found


def _lower_on_cpu(context: Any, value: Any) -> Any:
    def compute(value: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}")
        return (bits & 1) > 1  # which XLA does not see through

    return mlir.lower_fun(compute, multiple_results=False)(context, value)


def _lower_elsewhere(context: Any, value: Any) -> Any:
    return mlir.lower_fun(lambda value: jnp.zeros((), bool), multiple_results=False)(context, value)


_false_after_p = Primitive("false_after")
_false_after_p.def_abstract_eval(lambda value: value.update(dtype=jnp.dtype(bool), weak_type=False))
mlir.register_lowering(_false_after_p, _lower_elsewhere)
mlir.register_lowering(_false_after_p, _lower_on_cpu, platform="cpu")


def uses(jaxpr: Any, primitive: str) -> bool:
    """Return whether a jaxpr, or a function that it calls, has an equation of the primitive of that name."""
    inner = (_plain(value) for equation in _plain(jaxpr).eqns for value in _values(equation.params))
    return any(equation.primitive.name == primitive for equation in _plain(jaxpr).eqns) or any(
        uses(each, primitive) for each in inner if hasattr(each, "eqns")
    )


def _values(params: Any) -> list[Any]:
    return [each for value in params.values() for each in (value if isinstance(value, tuple | list) else [value])]


def _follow(jaxpr: Any, marked: Sequence[int], added: Added) -> list[int]:
    """Return the marks of each output."""
    known = dict(zip(jaxpr.invars, marked, strict=True))

    def marks_of(atom: Any) -> int:
        return 0 if hasattr(atom, "val") else known.get(atom, 0)

    for equation in jaxpr.eqns:
        inputs = [marks_of(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _through(equation, inputs, added), strict=True))
    return [marks_of(atom) for atom in jaxpr.outvars]


def _joined(marked: Iterable[int]) -> int:
    return functools.reduce(operator.or_, marked, 0)


def _through(equation: Any, inputs: list[int], added: Added) -> list[int]:
    """Return the marks of each result of an equation; looks into the functions it calls."""
    if equation.primitive is _false_after_p:
        return [0]
    everything = [_joined(inputs)] * len(equation.outvars)
    if not any(inputs):
        return everything
    more = added(equation, inputs)
    if equation.primitive.name == "cond":
        inner = [branch.jaxpr for branch in equation.params["branches"]]
        branches = zip(*(_follow(j, inputs[1:], added) for j in inner), strict=True)
        return [_joined([more, inputs[0], *each]) for each in branches]
    calls = [_plain(value) for value in equation.params.values() if hasattr(_plain(value), "eqns")]
    fits = len(calls) == 1 and len(calls[0].invars) == len(inputs) and len(calls[0].outvars) == len(everything)
    if not fits:
        return [each | more for each in everything]
    if equation.primitive.name != "scan":
        return _follow(calls[0], inputs, added)
    return _through_scan(calls[0], inputs, added, *jax_private.scan_counts(equation.params))


def _through_scan(body: Any, inputs: list[int], added: Added, num_consts: int, num_carry: int) -> list[int]:
    """Return the marks of each result of a scan; they spread through the carry."""
    while True:
        found = _follow(body, inputs, added)
        carry = slice(num_consts, num_consts + num_carry)
        joined = [a | b for a, b in zip(inputs[carry], found[:num_carry], strict=True)]
        if joined == inputs[carry]:
            return found
        inputs = [*inputs[:num_consts], *joined, *inputs[num_consts + num_carry :]]


def _plain(value: Any) -> Any:
    """Return the jaxpr of a closed jaxpr; return anything else unchanged."""
    return getattr(value, "jaxpr", value)
