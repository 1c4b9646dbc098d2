"""What the jaxpr of a function tells without computing: which results depend on which arguments, and its size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdist.spmd import jax_private


def depends(function: Callable[..., Any], args: Sequence[Any], marked: Sequence[Any]) -> Any:
    """Return a tree like the result of `function(*args)`: whether each leaf depends on a marked leaf of the arguments.

    Args:
      function: traced once.
      args: arrays, or descriptions of arrays.
      marked: bools, in the tree structure of `args`.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    found = _follow(closed.jaxpr, jax.tree.leaves(list(marked)))
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _follow(jaxpr: Any, marked: Sequence[bool]) -> list[bool]:
    """Return whether each output depends on a marked input."""
    known = dict(zip(jaxpr.invars, marked, strict=True))

    def is_marked(atom: Any) -> bool:
        return not hasattr(atom, "val") and known.get(atom, False)

    for equation in jaxpr.eqns:
        inputs = [is_marked(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _through(equation, inputs), strict=True))
    return [is_marked(atom) for atom in jaxpr.outvars]


def _through(equation: Any, inputs: list[bool]) -> list[bool]:
    """Return whether each result of an equation depends on a marked operand; looks into the functions it calls."""
    everything = [any(inputs)] * len(equation.outvars)
    if not any(inputs):
        return everything
    if equation.primitive.name == "cond":
        inner = [branch.jaxpr for branch in equation.params["branches"]]
        return everything if inputs[0] else [any(each) for each in zip(*(_follow(j, inputs[1:]) for j in inner))]
    calls = [_plain(value) for value in equation.params.values() if hasattr(_plain(value), "eqns")]
    fits = len(calls) == 1 and len(calls[0].invars) == len(inputs) and len(calls[0].outvars) == len(everything)
    if not fits:
        return everything
    if equation.primitive.name != "scan":
        return _follow(calls[0], inputs)
    return _through_scan(calls[0], inputs, *jax_private.scan_counts(equation.params))


def _through_scan(body: Any, inputs: list[bool], num_consts: int, num_carry: int) -> list[bool]:
    """Return which results of a scan depend on a marked operand; marks spread through the carry."""
    while True:
        found = _follow(body, inputs)
        carry = slice(num_consts, num_consts + num_carry)
        joined = [a or b for a, b in zip(inputs[carry], found[:num_carry], strict=True)]
        if joined == inputs[carry]:
            return found
        inputs = [*inputs[:num_consts], *joined, *inputs[num_consts + num_carry :]]


def _plain(value: Any) -> Any:
    """Return the jaxpr of a closed jaxpr; return anything else unchanged."""
    return getattr(value, "jaxpr", value)
