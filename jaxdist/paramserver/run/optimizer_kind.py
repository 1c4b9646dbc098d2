"""Which pieces of the params an optimizer can update by themselves, read off its traced program.

A server updates its own blocks only. That is right where an element's update depends on nothing but that element
(`elementwise`), or besides on the global norm of the gradients, which servers exchange (`global_norm`); or where a
leaf's update depends on that leaf (`leafwise`), if servers hold whole leaves. Trying an optimizer proves none of this:
a warm-up or a branch hides what it does. So `init` and `update` are traced, on the whole params and on every server's
blocks, and each value gets a digest of how it was computed. Equal digests are equal computations.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.extend import core

Kind = Literal["elementwise", "global_norm", "leafwise", "leafwise_global_norm"]
Shapes = Sequence[jax.ShapeDtypeStruct]

KINDS: tuple[Kind, ...] = ("elementwise", "global_norm", "leafwise", "leafwise_global_norm")
GHOST_SHAPE = (1,)

_EVERYWHERE, _SEVERAL = -1, -2
"""Owners: a value that is the same for all leaves, one that depends on several leaves."""
_ELEMENTWISE = frozenset(
    """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv exp exp2 expm1
    floor ge gt imag integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow real
    reduce_precision rem round rsqrt select_n sign sin sqrt square sub tan tanh xor
    """.split()  # noqa: SIM905
)
_INLINED = ("call_jaxpr", "fun_jaxpr", "jaxpr")
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_KEEPS_ZERO = {"square", "copy", "copy_p", "convert_element_type", "broadcast_in_dim", "neg", "sqrt"}
_ZERO, _GRAD = "zero", "grad"


@jax.tree_util.register_pytree_node_class
class Marked:
    """A tuple of params that can be told from every other tuple in an optimizer's state."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = tuple(items)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Return the params."""
        return self.items, None

    @classmethod
    def tree_unflatten(cls, _: None, items: Sequence[Any]) -> "Marked":
        """Return what held these params."""
        return cls(items)


def needs_norm(kind: Kind) -> bool:
    """Return whether a shard needs the global norm of the gradients."""
    return kind.endswith("global_norm")


def needs_whole_leaves(kind: Kind) -> bool:
    """Return whether a leaf has to be stored on one server."""
    return kind.startswith("leafwise")


def choose_kind(
    optimizer: optax.GradientTransformation, leaves: Shapes, shards_of: Callable[[bool], Sequence[Sequence[Any]]]
) -> Kind:
    """Return how `optimizer` runs on shards.

    Args:
      optimizer: optax.
      leaves: the params.
      shards_of: called with whether leaves stay whole; returns each server's blocks as (leaf, shape) pairs.

    Raises:
      ValueError: an update on shards would differ from one on the whole params, or cannot be shown to be the same.
    """
    try:
        whole = _Program(optimizer, leaves)
    except Exception as error:  # whatever an optimizer raises on params without names
        raise ValueError(
            "This optimizer cannot run on a parameter server, whose shards know of no names and have nothing but "
            f"gradients and params for it: {error}. Use one that needs no more; masks may look at a leaf's rank."
        ) from error
    reason = ""
    for kind in KINDS:
        try:
            _check(optimizer, leaves, whole, shards_of(needs_whole_leaves(kind)), kind)
        except _DiffersError as error:
            reason = str(error)
        else:
            return kind
    raise ValueError(
        f"This optimizer cannot run on the shards of a parameter server: {reason}. Use one that updates each element "
        "(SGD, momentum, Adam, AdamW, Lion) or each leaf (LAMB, LARS) by itself; clipping by the global norm of the "
        "gradients may come first."
    )


class _DiffersError(Exception):
    """A shard's program is not the whole's, or it is unclear whether it is."""


def _check(
    optimizer: optax.GradientTransformation,
    leaves: Shapes,
    whole: "_Program",
    shards: Sequence[Sequence[tuple[int, tuple[int, ...]]]],
    kind: Kind,
) -> None:
    wanted = whole.digests(range(len(leaves)), kind)
    for blocks in shards:
        shapes = [jax.ShapeDtypeStruct(shape, leaves[leaf].dtype) for leaf, shape in blocks]
        if needs_norm(kind):
            shapes.append(jax.ShapeDtypeStruct(GHOST_SHAPE, np.float32))
        try:
            found = _Program(optimizer, shapes).digests(range(len(blocks)), kind)
        except Exception as error:
            if isinstance(error, _DiffersError):
                raise
            raise _DiffersError(f"it fails on a shard ({error})") from error
        if found["shared"] != wanted["shared"]:
            raise _DiffersError("what it keeps for all leaves together differs on a shard")
        for number, (leaf, _) in enumerate(blocks):
            if found[number] != wanted[leaf]:
                raise _DiffersError(f"the update of leaf {leaf} differs on a shard")


# Values of a program.


@dataclass(frozen=True)
class _Value:
    """What is known of a value: whose it is, whether element by element, and a digest of how it was computed.

    `norm` names the leaves whose squared gradients it is the sum of.
    """

    owner: int
    elementwise: bool
    digest: str
    norm: frozenset[int] = frozenset()


def _digest(*parts: object) -> str:
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _join(values: Sequence[_Value]) -> int:
    owners = {value.owner for value in values} - {_EVERYWHERE}
    return _EVERYWHERE if not owners else owners.pop() if len(owners) == 1 else _SEVERAL


def _constant(value: Any) -> _Value:
    array = np.asarray(value)
    if array.ndim == 0 and array == 0:
        return _Value(_EVERYWHERE, True, _ZERO)
    return _Value(_EVERYWHERE, array.ndim == 0, _digest("constant", array.dtype, array.shape, array.tobytes()))


class _Program:
    """The traced `init` and `update` of an optimizer."""

    def __init__(self, optimizer: optax.GradientTransformation, leaves: Shapes) -> None:
        params = Marked(leaves)
        self.num_leaves = len(leaves)
        self.init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
        self.update, (updates, after) = jax.make_jaxpr(optimizer.update, return_shape=True)(params, state, params)
        if str(jax.tree.structure(after)) != str(jax.tree.structure(state)):
            raise ValueError("its state changes its structure in an update")
        self.states, self.updates = _parts_of(state, "state"), _parts_of(updates, "update")

    def digests(self, leaves: Sequence[int], kind: Kind) -> dict[Any, list[str]]:
        """Return a digest of all that is computed for each leaf, and, under `shared`, for all of them together."""
        reader = _Interpreter(self.num_leaves if needs_norm(kind) else None)
        params, grads = ([_Value(n, True, name) for n in range(self.num_leaves)] for name in ("param", _GRAD))
        states = [_Value(each.owner, each.uniform, each.name) for each in self.states]
        made = reader.run(self.init, params)
        done = reader.run(self.update, [*grads, *states, *params])
        found: dict[Any, list[str]] = {leaf: [] for leaf in leaves} | {"shared": []}
        for part, value in [*zip(self.states, made), *zip([*self.updates, *self.states], done)]:
            place = "shared" if part.owner == _EVERYWHERE else part.owner
            if place in found:
                found[place].append(_accepted(part, value, whole_leaves=needs_whole_leaves(kind)))
        return found


def _accepted(part: "_Part", value: _Value, *, whole_leaves: bool) -> str:
    name, owner = part.name, part.owner
    if value.owner not in (owner, _EVERYWHERE):
        whom = "leaves together" if owner == _EVERYWHERE else f"leaf {owner}"
        raise _DiffersError(f"what it computes for {whom} depends on other leaves, otherwise than by the global norm")
    if owner != _EVERYWHERE and not value.elementwise and not whole_leaves:
        raise _DiffersError(f"the update of an element of leaf {owner} depends on other elements")
    return _digest(name, value.digest)


class _Interpreter:
    """Runs a program on values of which only the above is known. Recognises the norm over `num_leaves` gradients."""

    def __init__(self, num_leaves: int | None) -> None:
        self._everyone = frozenset(range(num_leaves)) if num_leaves is not None else None

    def run(self, closed: Any, arguments: Sequence[_Value]) -> list[_Value]:
        """Return the outputs of a closed jaxpr."""
        jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
        known = dict(zip(jaxpr.constvars, map(_constant, getattr(closed, "consts", ())), strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> _Value:
            return _constant(variable.val) if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            known.update(zip(equation.outvars, self._equation(equation, [read(v) for v in equation.invars])))
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, values: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        inner = next((params[key] for key in _INLINED if key in params), None)
        if name in _CALLS and inner is not None:
            return self.run(inner, values)
        if name == "cond":
            return self._branches(params["branches"], values)
        if name == "optimization_barrier":
            return values
        value = self._zero(equation, values) or self._norm(equation, values) or self._uniform(equation, values)
        if value is not None:
            return [value]
        if name in _ELEMENTWISE and all(value.elementwise for value in values):
            made = _digest(name, _text(params), *(value.digest for value in values))
            return [_Value(_join(values), True, made)]
        return self._mixing(equation, values)

    def _branches(self, branches: Sequence[Any], values: list[_Value]) -> list[_Value]:
        index, rest = values[0], values[1:]
        made = []
        for results in zip(*(self.run(branch, rest) for branch in branches), strict=True):
            known = [index, *results]
            elementwise = all(value.elementwise for value in known) and index.owner == _EVERYWHERE
            made.append(_Value(_join(known), elementwise, _digest("cond", *(value.digest for value in known))))
        return made

    def _zero(self, equation: Any, values: list[_Value]) -> _Value | None:
        """Return the result where it is zero, or where zero is added: norms begin so."""
        if equation.primitive.name in _KEEPS_ZERO and values[0].digest == _ZERO and len(values) == 1:
            return values[0]
        if equation.primitive.name in ("add", "add_any"):
            for value, other, variable in zip(values, values[::-1], equation.invars):
                if other.digest == _ZERO and variable.aval.shape == equation.outvars[0].aval.shape:
                    return value
        return None

    def _norm(self, equation: Any, values: list[_Value]) -> _Value | None:
        """Return a sum of squared gradients; once it holds all leaves it is the same for all."""
        name = equation.primitive.name
        if self._everyone is None or name not in ("reduce_sum", "square", "integer_pow", "mul", "add"):
            return None
        if name == "add":
            parts = [
                value.norm if variable.aval.shape == () else frozenset()
                for value, variable in zip(values, equation.invars)
            ]
            if not all(parts) or parts[0] & parts[1]:
                return None
            return self._sum_of_squares(parts[0] | parts[1])
        squared = all(value.digest == _GRAD for value in values) and (
            name == "square" or (name == "integer_pow" and equation.params["y"] == 2) or len(values) == 2
        )
        shape = equation.invars[0].aval.shape
        if squared and name != "reduce_sum":
            norm = frozenset([values[0].owner]) if shape == () else frozenset()
            return _Value(values[0].owner, True, "squared gradient", norm)
        axes = equation.params.get("axes", ())
        if name == "reduce_sum" and values[0].digest == "squared gradient" and len(axes) == len(shape):
            return self._sum_of_squares(frozenset([values[0].owner]))
        return None

    def _sum_of_squares(self, leaves: frozenset[int]) -> _Value:
        if leaves == self._everyone:
            return _Value(_EVERYWHERE, True, "squared global norm")
        owner = next(iter(leaves)) if len(leaves) == 1 else _SEVERAL
        return _Value(owner, False, "squared norm", leaves)

    def _uniform(self, equation: Any, values: list[_Value]) -> _Value | None:
        """Return the result of spreading one number over an array: the same everywhere, whatever the shape."""
        if equation.primitive.name == "broadcast_in_dim" and equation.invars[0].aval.shape == ():
            value = replace(values[0], norm=frozenset())
            return value if value.owner == _EVERYWHERE else None
        return None

    def _mixing(self, equation: Any, values: list[_Value]) -> list[_Value]:
        owner, inputs = _join(values), [value.digest for value in values]
        avals = [(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
        made = []
        for number, variable in enumerate(equation.outvars):
            digest = _digest(equation.primitive.name, _text(equation.params), avals, inputs, number)
            # One number that no leaf went into is the same for all; an array of such need not be.
            made.append(_Value(owner, owner == _EVERYWHERE and variable.aval.shape == (), digest))
        return made


def _text(params: Any) -> str:
    """Return the static arguments of a primitive as text, constants of inner programs by value."""
    parts = [f"{name}={value}" for name, value in sorted(params.items())]
    for inner in jax.tree.leaves(list(params.values()), is_leaf=lambda node: isinstance(node, core.ClosedJaxpr)):
        if isinstance(inner, core.ClosedJaxpr):
            parts += [_constant(value).digest for value in inner.consts]
    return ";".join(parts)


@dataclass(frozen=True)
class _Part:
    """One array of a state or an update: equal names are the same thing of different leaves."""

    name: str
    owner: int
    uniform: bool


def _parts_of(tree: Any, kind: str) -> list[_Part]:
    found, nodes = [], jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Marked))
    for number, node in enumerate(nodes):
        if not isinstance(node, Marked):
            found.append(_Part(f"{kind} {number}", _EVERYWHERE, node.shape == ()))
            continue
        for owner, kept in enumerate(node.items):
            found += [_Part(f"{kind} {number} {place}", owner, True) for place in range(len(jax.tree.leaves(kept)))]
    return found
