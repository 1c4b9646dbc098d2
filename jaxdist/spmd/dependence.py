"""What the jaxpr of a function tells without computing: which results depend on which arguments, and which scalars make
them infinite or NaN. And a function whose results are changed where they appear, and an order of two values that do not
depend on each other.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxdist.spmd import jax_private

PyTree: TypeAlias = Any

_KEEPS = ("mul", "add", "add_any", "sub", "neg", "copy", "convert_element_type", "broadcast_in_dim", "reshape")
"""Operations whose result is not finite wherever an input is not."""
_SAME = ("copy", "convert_element_type", "neg", "reshape")


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
    results = [None if _is_literal(atom) else atom for atom in jaxpr.outvars]
    early = {atom: change for atom, change in zip(results, changes) if atom in computed and results.count(atom) == 1}

    def value_of(atom: Any) -> Any:
        return atom.val if _is_literal(atom) else known[atom]

    for equation in jaxpr.eqns:
        found = jax_private.results_of(equation, [value_of(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, found, strict=True))
        known.update((each, early[each](known[each])) for each in equation.outvars if each in early)
    is_early = [atom in early for atom in results]
    values = map(value_of, jaxpr.outvars)
    last = [value if done else change(value) for value, done, change in zip(values, is_early, changes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), last)


def factors(update: Callable[..., Any], grads: PyTree, opt_state: PyTree, params: PyTree) -> list[jax.Array]:
    """Return the scalars that make the updates infinite or NaN if they are, and that depend on no array.

    `update(grads, opt_state, params) -> (updates, opt_state)` is traced. What depends on gradients, params or arrays of
    the optimizer's state is left out: it would have to be computed first.
    """
    closed = jax.make_jaxpr(update)(grads, opt_state, params)
    jaxpr = closed.jaxpr
    of_state = jax.tree.leaves(opt_state)
    first = len(jax.tree.leaves(grads))
    state = zip(jaxpr.invars[first : first + len(of_state)], of_state, strict=True)
    known: dict[Any, Any] = {variable: value for variable, value in state if not jnp.shape(value)}
    known |= zip(jaxpr.constvars, closed.consts, strict=True)
    return _evaluated(jaxpr, known, _reached(jaxpr, _independent(jaxpr, known), first))


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
        return 0 if _is_literal(atom) else known.get(atom, 0)

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


def _independent(jaxpr: Any, known: Mapping[Any, Any]) -> set[Any]:
    """Return the variables that depend on nothing but known ones."""
    free = set(known)
    for equation in jaxpr.eqns:
        if all(_is_literal(atom) or atom in free for atom in equation.invars) and not equation.effects:
            free |= set(equation.outvars)
    return free


def _reached(jaxpr: Any, free: set[Any], num_updates: int) -> list[Any]:
    """Return the free scalars from which a value that is not finite reaches an update, in the order of the updates."""
    made_by = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    found: dict[Any, None] = {}
    seen: set[Any] = set()
    waiting = jaxpr.outvars[:num_updates][::-1]
    while waiting:
        atom = waiting.pop()
        if _is_literal(atom) or atom in seen or not jnp.issubdtype(atom.aval.dtype, jnp.inexact):
            continue
        seen.add(atom)
        equation = made_by.get(atom)
        name = equation.primitive.name if equation else ""
        if atom in free and not atom.aval.shape and name not in _SAME:
            found[atom] = None
        elif equation is not None:
            waiting += equation.invars[::-1] if name in _KEEPS else equation.invars[:1] if name == "div" else []
    return list(found)


def _evaluated(jaxpr: Any, known: Mapping[Any, Any], wanted: Sequence[Any]) -> list[jax.Array]:
    """Return the values of variables that depend on the known ones alone; nothing else is computed."""
    needed, equations = set(wanted), []
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            equations.append(equation)
            needed |= {atom for atom in equation.invars if not _is_literal(atom)}
    known = dict(known)
    for equation in reversed(equations):
        values = [atom.val if _is_literal(atom) else known[atom] for atom in equation.invars]
        known.update(zip(equation.outvars, jax_private.results_of(equation, values), strict=True))
    return [jnp.asarray(known[atom]) for atom in wanted]


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")
