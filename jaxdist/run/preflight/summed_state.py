"""Whether the state of a model is a mean over the examples: what the parts of a batch make of it is averaged.

The trace tells which leaves depend on the examples, and on the largest or the smallest of them. Two examples are then
given once, twice and four times: of a mean nothing changes, and a sum grows with their number.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import adapters, data
from jaxdist.run.preflight import drawn_params
from jaxdist.spmd import dependence, reduce, state
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.metrics import MASK

_OF_ROWS, _OF_MASK, _OF_KEY, _MORE, _EXTREME = 1, 2, 4, 8, 16
_EXTREMES = frozenset({"reduce_max", "reduce_min", "argmax", "argmin", "sort", "top_k"})
_TIMES, _DRAWS = (1, 2, 4), 3
_TOLERANCE, _SMALLEST = 1e-2, 1e-3


def check_state(
    functions: adapters.Functions, abstract: state.TrainState, loader: data.Loader, *, num_together: int
) -> None:
    """Warn where a leaf of model_state is no mean over the examples.

    It is a sum over them, depends on the largest or smallest of them, or is a whole number that depends on them.

    `num_together` is how many examples of a batch one call of the loss sees. Nothing is said of models of more than
    64 Mi values, and of functions that call back or fail on so few examples.
    """
    size = loader.global_batch_size
    if abstract.model_state is None or num_together >= size or not drawn_params.are_few(abstract):
        return
    for name, what in _no_means(functions.loss_fn, abstract, loader).items():
        warnings.warn(
            f"model_state/{name} is {what}. The states that the parts of a batch make are averaged, so this one is "
            f"that of {num_together} of the {size} examples of a batch here, and of another number on other devices. "
            "Keep a mean over the examples in it, or count steps; run.json counts the examples as examples_seen.",
            stacklevel=2,
        )


def _no_means(loss_fn: Any, abstract: state.TrainState, loader: data.Loader) -> dict[str, str]:
    """Return what the leaves of model_state are that are no means, by their paths."""
    whole = {
        name for name, leaf in _leaves(abstract.model_state).items() if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    try:
        for _, two in loader.samples(1, among=1):
            marks = _marks(loss_fn, abstract, two)
            by_rows = {name for name in whole if marks.get(name, 0) & _OF_ROWS}
            # Sums are linear, and of a whole number it is not asked what else they are.
            cleared = {name: _OF_KEY if name in whole else _OF_KEY | _MORE for name in marks}
            tried = [name for name, mark in marks.items() if mark and not mark & cleared[name] and name not in by_rows]
            grown = _grown(loss_fn, abstract, two, tried)
            found = dict.fromkeys(by_rows | grown & whole, "a whole number, or a bool, that depends on the examples")
            extremes = {name for name, mark in marks.items() if mark & _EXTREME} - by_rows
            found |= dict.fromkeys(extremes, "made of the largest, the smallest or the middle of the examples")
            return found | dict.fromkeys(grown - whole, "a sum over the examples")
    except Exception:
        return {}  # what is wrong with examples and functions is told by other checks
    return {}


def _marks(loss_fn: Any, abstract: state.TrainState, batch: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return, by path, what each new leaf depends on; nothing of a loss that calls back."""
    fields = drawn_params.described(batch)
    args = drawn_params.arguments(abstract.params, abstract.model_state, fields, abstract.key)
    if jax.make_jaxpr(loss_fn)(*args).effects:
        return {}
    marked: list[Any] = [jax.tree.map(lambda _: 0, arg) for arg in args]
    marked[1:3] = {name: _OF_MASK if name == MASK else _OF_ROWS for name in batch}, _OF_KEY
    return _leaves(dependence.marks(loss_fn, args, marked, _more_than_sum)[2])


def _more_than_sum(equation: Any, inputs: Sequence[int]) -> int:
    """Return the mark of what is not linear in numbers of all examples, such as the division of a mean."""
    name, results = equation.primitive.name, equation.outvars
    if name in _EXTREMES and inputs[0] & _OF_ROWS and _goes_over_examples(equation):
        return _MORE | _EXTREME
    if all(each.aval.dtype == bool for each in results) or name == "select_n":
        return 0  # whether any example counts, and what is kept where none does
    joined = [mark and not drawn_params.has_examples(atom) for atom, mark in zip(equation.invars, inputs, strict=True)]
    stays_joined = drawn_params.is_linear(name, inputs) and not any(map(drawn_params.has_examples, results))
    return _MORE if name in drawn_params.OPAQUE or (any(joined) and not stays_joined) else 0


def _goes_over_examples(equation: Any) -> bool:
    """Return whether an equation chooses among the examples, and not among the values of each."""
    dims = drawn_params.dims_of_examples(equation.invars[0])
    params = equation.params
    over = params.get("axes", (params.get("dimension", params.get("axis", -1)),))
    rank = len(equation.invars[0].aval.shape)
    return any(axis % rank in dims for axis in over)


def _leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _grown(loss_fn: Any, abstract: state.TrainState, two: Mapping[str, np.ndarray], names: Sequence[str]) -> set[str]:
    """Return those of the leaves that grow as two examples are given once, twice and four times, for some params."""

    @jax.jit
    def new_leaves(params: Any, model_state: Any, batch: Any) -> dict[str, jax.Array]:
        new_state = _leaves(reduce.evaluate_loss(loss_fn, params, model_state, batch, jax.random.key(0))[2])
        return {name: new_state[name] for name in names}  # and nothing else of the model is computed

    batches = [{name: np.concatenate([field] * times) for name, field in two.items()} for times in _TIMES]
    found: set[str] = set()
    for seed in range(_DRAWS if names else 0):
        variables = drawn_params.draw(abstract, seed)
        states = [jax.device_get(new_leaves(*variables, batch)) for batch in batches]
        found |= {name for name in names if _grows(*(each[name] for each in states))}
    return found


def _grows(once: np.ndarray, twice: np.ndarray, four_times: np.ndarray) -> bool:
    """Return whether a leaf grows with the number of examples, by as much for each; of a bool, whether it changes."""
    if once.dtype == bool:
        return bool((once != four_times).any())
    first, second = twice - once, four_times - twice
    least = _SMALLEST * max(float(np.abs(once).max(initial=0)), 1e-6)
    is_changed = np.isfinite(four_times).all() and np.abs(first).max(initial=0) > least
    return bool(is_changed and np.allclose(second, 2 * first, rtol=_TOLERANCE, atol=least / 10))
