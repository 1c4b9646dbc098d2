"""Which parts of the params an optimizer can update independently, determined from its traced program.

A server updates only its own blocks. This gives the right result if the update of an element depends only on that
element (`elementwise`), or also on the global norm of the gradients, which servers exchange (`global_norm`); or if the
update of a leaf depends only on that leaf (`leafwise`) and servers hold whole leaves. Running an optimizer cannot prove
this, because a warm-up or a branch may hide a dependence. So `init` and `update` are traced, on the tree of params, on
the whole params as servers have them (see `Marked`) and on the blocks of every server, and each value gets a digest of
how it was computed. Equal digests mean equal computations.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.extend import core

from jaxdist.spmd import keys
from jaxdist.spmd.layout import path_name

Kind = Literal["elementwise", "global_norm", "leafwise", "leafwise_global_norm"]

KINDS: tuple[Kind, ...] = ("elementwise", "global_norm", "leafwise", "leafwise_global_norm")
GHOST_SHAPE = (1,)

_ONLY_A_LIST = (
    "This optimizer cannot run on a parameter server, which gives it only gradients and params, as a list with the "
    "paths of the leaves"
)
_MASKS = (
    "Use one that needs nothing else. Masks and labels must be functions, which may look at the rank of a leaf and at "
    "the text of its path: 'kernel' in jax.tree_util.keystr(path)."
)
_GHOST = jax.ShapeDtypeStruct(GHOST_SHAPE, np.float32)
_EVERYWHERE, _SEVERAL = -1, -2
"""Owners of a value that is the same for all leaves, and of one that depends on several leaves."""
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


@jax.tree_util.register_pytree_with_keys_class
class Marked:
    """The params as a server gives them to its optimizer: a list, each under the whole path of its leaf (`a/kernel`).

    Two blocks of a leaf have the same path. In the state of an optimizer it can be distinguished from all other lists.
    """

    def __init__(self, items: Sequence[Any], names: Sequence[str]) -> None:
        self.items, self.names = tuple(items), tuple(names)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[str, ...]]:
        """Return the params with their paths."""
        return tuple(zip(map(jax.tree_util.DictKey, self.names), self.items, strict=True)), self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], items: Sequence[Any]) -> "Marked":
        """Return a Marked that holds these params."""
        return cls(items, names)


def path_names(params: Any) -> tuple[str, ...]:
    """Return the paths of the leaves of a tree."""
    return tuple(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def with_ghost(params: Marked, value: Any = _GHOST) -> Marked:
    """Return the params of a shard and its ghost; see `shard_optimizer`."""
    return Marked([*params.items, value], [*params.names, "ghost"])


def needs_norm(kind: Kind) -> bool:
    """Return whether a shard needs the global norm of the gradients."""
    return kind.endswith("global_norm")


def needs_whole_leaves(kind: Kind) -> bool:
    """Return whether a leaf has to be stored on one server."""
    return kind.startswith("leafwise")


def choose_kind(
    optimizer: optax.GradientTransformation, params: Any, shards_of: Callable[[bool], Sequence[Sequence[Any]]]
) -> Kind:
    """Return how `optimizer` runs on shards.

    Args:
      optimizer: the optax optimizer.
      params: shapes and dtypes of the params, in their tree.
      shards_of: called with whether leaves stay whole; returns the blocks of each server as (leaf, shape) pairs.

    Raises:
      ValueError: an update on shards would differ from one on the whole params, or cannot be shown to be equal.
    """
    listed = Marked(jax.tree.leaves(params), path_names(params))
    try:
        whole = _Program(optimizer, listed)
    except Exception as error:  # an optimizer may raise anything for a list
        raise ValueError(f"{_ONLY_A_LIST}: {error}. {_MASKS}") from error
    if any(map(keys.is_key, jax.tree.leaves(jax.eval_shape(optimizer.init, listed)))):
        raise ValueError(
            "This optimizer cannot run on a parameter server: its state holds a random key, and each shard would draw "
            "other noise than the whole. Use one without noise, or another strategy."
        )
    _check_same_in_tree(optimizer, params, whole)
    reason = ""
    for kind in KINDS:
        try:
            _check(optimizer, listed, whole, shards_of(needs_whole_leaves(kind)), kind)
        except _DiffersError as error:
            reason = str(error)
        else:
            return kind
    raise ValueError(
        f"This optimizer cannot run on the shards of a parameter server: {reason}. Use one that updates each element "
        "(SGD, momentum, Adam, AdamW, Lion) or each leaf (LAMB, LARS) independently; it may first clip by the global "
        "norm of the gradients."
    )


class _DiffersError(Exception):
    """The program on a shard differs from the one on the whole params, or may differ."""


def _check_same_in_tree(optimizer: optax.GradientTransformation, params: Any, listed: "_Program") -> None:
    """Raise ValueError unless the optimizer does the same with the tree of params as with their list."""
    in_tree = _Program(optimizer, params, like=listed)
    strongest = KINDS[-1]
    if in_tree.outcome(strongest) != listed.outcome(strongest):
        raise ValueError(f"{_ONLY_A_LIST}: it treats these params otherwise than the same in their tree. {_MASKS}")


def _check(
    optimizer: optax.GradientTransformation,
    whole_params: Marked,
    whole: "_Program",
    shards: Sequence[Sequence[tuple[int, tuple[int, ...]]]],
    kind: Kind,
) -> None:
    leaves, names = whole_params.items, whole_params.names
    wanted = whole.digests(range(len(leaves)), kind)
    for blocks in shards:
        shapes = [jax.ShapeDtypeStruct(shape, leaves[leaf].dtype) for leaf, shape in blocks]
        given = Marked(shapes, [names[leaf] for leaf, _ in blocks])
        try:
            found = _Program(optimizer, with_ghost(given) if needs_norm(kind) else given).digests(
                range(len(blocks)), kind
            )
        except Exception as error:
            if isinstance(error, _DiffersError):
                raise
            raise _DiffersError(f"it fails on a shard ({error})") from error
        if found["shared"] != wanted["shared"]:
            raise _DiffersError("the state that it keeps for all leaves together differs on a shard")
        for number, (leaf, _) in enumerate(blocks):
            if found[number] != wanted[leaf]:
                raise _DiffersError(f"the update of {names[leaf]} differs on a shard")


# Values of a program.


@dataclass(frozen=True)
class _Value:
    """What is known of a value: which leaf it belongs to, whether elementwise, and a digest of its computation.

    `norm` names the leaves whose squared gradients it sums.
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

    def __init__(self, optimizer: optax.GradientTransformation, params: Any, like: "_Program | None" = None) -> None:
        self.num_leaves = len(jax.tree.leaves(params))
        self.init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
        self.update, (updates, after) = jax.make_jaxpr(optimizer.update, return_shape=True)(params, state, params)
        if str(jax.tree.structure(after)) != str(jax.tree.structure(state)):
            raise ValueError("the structure of its state changes in an update")
        self.num_states = len(jax.tree.leaves(state))
        self.states: list[_Part] = like.states if like else _parts_of(state, "state")
        self.updates: list[_Part] = like.updates if like else _parts_of(updates, "update")

    def outcome(self, kind: Kind) -> Any:
        """Return the digests of everything, or why there are none."""
        if self.num_states != len(self.states):
            return "its state has other leaves"
        try:
            return self.digests(range(self.num_leaves), kind)
        except _DiffersError as error:
            return str(error)

    def digests(self, leaves: Sequence[int], kind: Kind) -> dict[Any, list[str]]:
        """Return digests of everything computed for each leaf and, under `shared`, for all leaves together."""
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
        whom = "leaves together" if owner == _EVERYWHERE else part.path
        raise _DiffersError(
            f"what it computes for {whom} depends on other leaves, and not only through the global norm"
        )
    if owner != _EVERYWHERE and not value.elementwise and not whole_leaves:
        raise _DiffersError(f"the update of an element of {part.path} depends on other elements")
    return _digest(name, value.digest)


class _Interpreter:
    """Runs a program on abstract values (`_Value`). Recognises the norm over `num_leaves` gradients."""

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
        """Return the result if it is zero, or if zero is added, as at the start of a sum; else None."""
        if equation.primitive.name in _KEEPS_ZERO and values[0].digest == _ZERO and len(values) == 1:
            return values[0]
        if equation.primitive.name in ("add", "add_any"):
            for value, other, variable in zip(values, values[::-1], equation.invars):
                if other.digest == _ZERO and variable.aval.shape == equation.outvars[0].aval.shape:
                    return value
        return None

    def _norm(self, equation: Any, values: list[_Value]) -> _Value | None:
        """Return the result if it sums squared gradients, which is shared once it covers all leaves; else None."""
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
        """Return the result if it broadcasts one shared number to an array of any shape; else None."""
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
            # A scalar that depends on no leaf is the same for all of them; an array need not be.
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
    """One array of a state or an update; arrays with equal names have the same role for different leaves."""

    name: str
    owner: int
    uniform: bool
    path: str = ""


def _parts_of(tree: Any, kind: str) -> list[_Part]:
    found, nodes = [], jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Marked))
    for number, node in enumerate(nodes):
        if not isinstance(node, Marked):
            found.append(_Part(f"{kind} {number}", _EVERYWHERE, node.shape == ()))
            continue
        for owner, (kept, path) in enumerate(zip(node.items, node.names, strict=True)):
            places = range(len(jax.tree.leaves(kept)))
            found += [_Part(f"{kind} {number} {place}", owner, True, path) for place in places]
    return found
