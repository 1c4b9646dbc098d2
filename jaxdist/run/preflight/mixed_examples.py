"""Whether the loss of an example depends on those beside it, through the model or in plain functions.

The trace tells where it cannot. Where it may, the loss is tried on two examples: its total is the sum of theirs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import adapters, data
from jaxdist.run.preflight import drawn_params
from jaxdist.spmd import dependence, reduce, state
from jaxdist.spmd.metrics import MASK, Batch, Mean, as_mean

_OF_ROWS, _OF_KEY, _MIXED = 1, 2, 4
_DRAWS, _TOLERANCE = 3, 1e-3
_ACROSS = frozenset({"sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev"})
"""What keeps the shape of an array and combines or moves its elements along a dim."""


class Mixing(NamedTuple):
    """What the loss of an example depends on: the examples beside it; rows of padding."""

    of_examples: bool
    of_padding: bool


def find_mixing(functions: adapters.Functions, abstract: state.TrainState, loader: data.Loader) -> Mixing:
    """Return whether examples and padding enter the losses of other examples.

    Nothing is said of models with statistics of the batch, of those with more than 64 Mi values, of functions that call
    back or fail on two examples; of padding nothing where the loss is random.
    """
    none = Mixing(of_examples=False, of_padding=False)
    if not drawn_params.are_few(abstract):
        return none
    try:
        for _, two in loader.samples(1, among=1):
            found = _marks(functions.loss_fn, abstract, two)
            if found & _MIXED:
                return _tried(functions.loss_fn, abstract, two, is_random=bool(found & _OF_KEY))
    except Exception:
        return none  # what is wrong with examples and functions is told by other checks
    return none


def mixing_results(function: Any, abstract: state.TrainState, loader: data.Loader) -> list[str]:
    """Return which results of an eval_fn, "loss" and metrics, let the examples of a batch enter those of others.

    The results of two examples together, times their counts, are then not the sum of those of each alone. For what is
    left out see `find_mixing`.
    """
    if not drawn_params.are_few(abstract):
        return []
    try:
        for _, two in loader.samples(1, among=1):
            fields = drawn_params.described(two)
            args = drawn_params.arguments(abstract.params, abstract.model_state, fields, abstract.key)
            marked: list[Any] = [jax.tree.map(lambda _: 0, arg) for arg in args]
            marked[1:3] = {name: 0 if name == MASK else _OF_ROWS for name in two}, _OF_KEY
            loss, metrics, *_ = dependence.marks(function, args, marked, _mixed_by)
            totals = {name: each.total if isinstance(each, Mean) else each for name, each in _named(loss, metrics)}
            names = [name for name, mark in totals.items() if mark & _MIXED and not mark & _OF_KEY]
            if names and not jax.make_jaxpr(function)(*args).effects:
                return _mixing_of(function, abstract, two, names)
    except Exception:
        return []  # what is wrong with examples and functions is told by other checks
    return []


def _named(loss: Any, metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [("loss", loss), *metrics.items()]


def _mixing_of(
    function: Any, abstract: state.TrainState, two: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[str]:
    """Return those of the results that two examples together and alone show to be mixed, for some params."""

    @jax.jit
    def totals(params: Any, model_state: Any, batch: Batch) -> dict[str, jax.Array]:
        loss, metrics, *_ = function(*drawn_params.arguments(params, model_state, batch, jax.random.key(0)))
        found = {name: as_mean(each, batch) for name, each in _named(loss, metrics) if name in names}
        return {name: jnp.stack(each) for name, each in found.items()}

    mixed: set[str] = set()
    for seed in range(_DRAWS):
        variables = drawn_params.draw(abstract, seed)
        first, second, both = (
            totals(*variables, drawn_params.counting(two, which)) for which in ((1, 0), (0, 1), (1, 1))
        )
        mixed |= {name for name in names if _differ(both[name], first[name] + second[name])}
    return [name for name in names if name in mixed]


def _marks(loss_fn: Any, abstract: state.TrainState, batch: Mapping[str, np.ndarray]) -> int:
    """Return the marks of the loss; 0 where the model keeps statistics of the batch, or calls back."""
    fields = drawn_params.described(batch)
    args = drawn_params.arguments(abstract.params, abstract.model_state, fields, abstract.key)
    marked: list[Any] = [jax.tree.map(lambda _: 0, arg) for arg in args]
    marked[1:3] = {name: 0 if name == MASK else _OF_ROWS for name in batch}, _OF_KEY
    marks: Any = dependence.marks(loss_fn, args, marked, _mixed_by)
    loss, _, *new_state = marks
    if any(mark & _OF_ROWS for mark in jax.tree.leaves(new_state)):
        return 0
    found: Any = loss.total if isinstance(loss, Mean) else loss
    return int(found) if found & _MIXED and not jax.make_jaxpr(loss_fn)(*args).effects else 0


def _mixed_by(equation: Any, inputs: Sequence[int]) -> int:
    """Return the mark of an equation that may let an example depend on others, other than by adding their values."""
    rows = [bool(mark & _OF_ROWS) for mark in inputs]
    name, results = equation.primitive.name, equation.outvars
    if not any(rows):
        return 0
    if name in drawn_params.OPAQUE or any(len(drawn_params.dims_of_examples(each)) > 1 for each in results):
        return _MIXED
    joined = [row and not drawn_params.has_examples(atom) for atom, row in zip(equation.invars, rows, strict=True)]
    if any(joined):
        is_sum = drawn_params.is_linear(name, rows) and not any(map(drawn_params.has_examples, results))
        return 0 if is_sum else _MIXED
    return _MIXED if rows[0] and _along(equation) & drawn_params.dims_of_examples(equation.invars[0]) else 0


def _along(equation: Any) -> set[int]:
    """Return the dims of the first operand along which its elements are combined, moved or chosen."""
    name, params = equation.primitive.name, equation.params
    if name in _ACROSS:
        dims = params.get("axis", params.get("dimension", params.get("dimensions")))
        return set(dims) if isinstance(dims, tuple | list) else {dims}
    shape = equation.invars[0].aval.shape
    if name in ("gather", "dynamic_slice"):
        apart = params["dimension_numbers"].operand_batching_dims if name == "gather" else ()
        sizes = params["slice_sizes"]
        return {dim for dim, size in enumerate(sizes) if size != shape[dim] and dim not in apart}
    return set(range(len(shape))) if name.startswith("scatter") else set()


def _tried(loss_fn: Any, abstract: state.TrainState, two: Mapping[str, np.ndarray], *, is_random: bool) -> Mixing:
    """Return what computing the loss of two examples, together and alone, shows for some params."""

    @jax.jit
    def totals(params: Any, model_state: Any, batch: Batch) -> jax.Array:
        return jnp.stack(reduce.evaluate_loss(loss_fn, params, model_state, batch, jax.random.key(0))[0])

    padded = drawn_params.counting({name: np.concatenate([field, field]) for name, field in two.items()}, (1, 1, 0, 0))
    of_examples = of_padding = False
    for seed in range(_DRAWS):
        variables = drawn_params.draw(abstract, seed)
        first, second, both = (
            totals(*variables, drawn_params.counting(two, which)) for which in ((1, 0), (0, 1), (1, 1))
        )
        of_examples |= _differ(both, first + second)
        of_padding |= not is_random and _differ(both, totals(*variables, padded))
    return Mixing(of_examples, of_padding)


def _differ(one: jax.Array, other: jax.Array) -> bool:
    is_finite = bool(jnp.isfinite(one).all() & jnp.isfinite(other).all())
    return is_finite and not np.allclose(one, other, rtol=_TOLERANCE, atol=1e-6)
