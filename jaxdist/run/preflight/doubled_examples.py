"""Whether the loss or a metric of plain functions is a sum over the examples, or counts rows of padding as examples."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxdist import adapters, data, errors
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ConfigError
from jaxdist.run.preflight import drawn_params
from jaxdist.spmd import dependence, state
from jaxdist.spmd.metrics import MASK, Mean

_Evaluate: TypeAlias = Callable[[Sequence[int], int], dict[str, float]]
"""`evaluate(counting, seed)`: results by name, where these of the examples count and params are drawn from the seed."""

_OF_MASK, _OF_ROWS, _OF_KEY, _MORE = 1, 2, 4, 8
_DRAWS, _AGREEING = 16, 3
"""How often params are drawn, and how many draws have to show a sum: what only counts right answers is often 0."""
_TOLERANCE, _SMALLEST = 1e-3, 1e-4


def check_no_sums(
    experiment: Experiment,
    functions: adapters.Functions,
    abstract: state.TrainState,
    loader: data.Loader,
    eval_loaders: Mapping[str, data.Loader],
) -> None:
    """Try plain functions on two examples, and on the same two twice: a mean stays what it is, and a sum doubles.

    Of modules the package itself averages the values. Nothing is said of results that depend on the key, or in any way
    but a linear one on a number of all examples; of models of more than 64 Mi values; of functions that fail on so few.

    Raises:
      ConfigError: the loss or a metric is a sum.
    """
    plain = experiment.model
    if not isinstance(plain, adapters.Functions):
        return
    tried = [(plain.loss_fn, functions.loss_fn, loader)]
    if plain.eval_fn is not plain.loss_fn:
        tried += [(plain.eval_fn, functions.eval_fn, each) for each in [*eval_loaders.values()][:1]]
    for named, function, own_loader in tried:
        for name, what in _sums(function, abstract, own_loader):
            raise ConfigError(
                "The loss and the metrics of plain functions are means over the examples that count, because those of "
                f"several devices are averaged, but {name!r} of {errors.named(named)} is a {what}. Return "
                "jaxdist.masked_mean(values, batch['mask'])."
            )


def _sums(function: Callable[..., Any], abstract: state.TrainState, loader: data.Loader) -> list[tuple[str, str]]:
    """Return the results that are no means of the examples that count: their names, and what they are."""
    if not drawn_params.are_few(abstract):
        return []
    try:
        for _, two in loader.samples(1, among=1):
            four = {name: np.concatenate([field, field]) for name, field in two.items()}
            suspects = _suspects(function, abstract, four)
            of_two, of_four = (_evaluation(function, suspects, abstract, batch) for batch in (two, four))
            return _doubled(of_two, of_four, suspects) if suspects else []
    except Exception:
        return []  # what is wrong with examples and functions is told by other checks
    return []


def _suspects(function: Callable[..., Any], abstract: state.TrainState, batch: Mapping[str, np.ndarray]) -> list[str]:
    """Return the results that may be sums: linear in the mask, with no count that depends on it, and not random."""
    fields = drawn_params.described(batch)
    args = drawn_params.arguments(abstract.params, abstract.model_state, fields, abstract.key)
    marked: list[Any] = [jax.tree.map(lambda _: 0, arg) for arg in args]
    marked[1:3] = {name: _OF_MASK if name == MASK else _OF_ROWS for name in batch}, _OF_KEY
    loss, found, *_ = dependence.marks(function, args, marked, _more_than_sum)

    def may_be_sum(each: Any) -> bool:
        total, count = each if isinstance(each, Mean) else (each, 0)
        return bool(total & _OF_MASK and not total & (_OF_KEY | _MORE) and not count)

    suspects = [name for name, each in {"loss": loss, **found}.items() if may_be_sum(each)]
    # What prints or calls back is called by the run alone.
    return [] if suspects and jax.make_jaxpr(function)(*args).effects else suspects


def _more_than_sum(equation: Any, inputs: Sequence[int]) -> int:
    """Return the mark of what is not linear in numbers of all examples, such as a division by how many count.

    A division by the number of right answers, or by 1 if there are none, is a sum for examples that have none.
    """
    has_examples, name = drawn_params.has_examples, equation.primitive.name
    joined = [mark and not has_examples(atom) for atom, mark in zip(equation.invars, inputs, strict=True)]
    stays_joined = drawn_params.is_linear(name, inputs) and not any(map(has_examples, equation.outvars))
    return _MORE if name in drawn_params.OPAQUE or (any(joined) and not stays_joined) else 0


def _evaluation(
    function: Callable[..., Any], names: Sequence[str], abstract: state.TrainState, batch: Mapping[str, np.ndarray]
) -> _Evaluate:
    """Return what computes the results of these names for the batch."""

    @jax.jit
    def results_of(params: Any, model_state: Any, batch: Any) -> dict[str, jax.Array]:
        loss, found, *_ = function(*drawn_params.arguments(params, model_state, batch, jax.random.key(0)))
        results = {"loss": loss, **found}
        return {name: each.value if isinstance(each := results[name], Mean) else each for name in names}

    def evaluate(counting: Sequence[int], seed: int) -> dict[str, float]:
        found = results_of(*drawn_params.draw(abstract, seed), drawn_params.counting(batch, counting))
        return {name: float(each) for name, each in found.items()}

    return evaluate


def _doubled(of_two: _Evaluate, of_four: _Evaluate, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the first of the results that is no mean, for any params that are drawn, and what it is.

    It doubles where the copies of the examples count, too, and is what the two examples give one by one. Where there
    are no copies, a sum is the same, and a mean of all rows twice as much.
    """
    left, agreeing = list(names), collections.Counter[tuple[str, bool]]()
    for seed in range(_DRAWS):
        once, twice = of_four((1, 1, 0, 0), seed), of_four((1, 1, 1, 1), seed)
        left = [name for name in left if _are_close(twice[name], 2 * once[name])]
        if not left:
            break
        if all(once[name] == 0 for name in left):
            continue
        first, second, both = (of_two(counting, seed) for counting in ((1, 0), (0, 1), (1, 1)))
        left = [name for name in left if _are_close(both[name], first[name] + second[name])]
        sums = [name for name in left if _are_close(both[name], once[name])]
        padded = [name for name in left if _are_close(both[name], 2 * once[name]) and name not in sums]
        left = [*sums, *padded]
        agreeing.update((name, name in sums) for name in left if abs(once[name]) >= _SMALLEST)
        for name in left:
            if agreeing[name, True] == _AGREEING:
                return [(name, f"sum: {once[name]:.6g} for two examples, and {twice[name]:.6g} for the same two twice")]
            if agreeing[name, False] == _AGREEING:
                of_all = "mean that counts the rows of padding, which the mask marks"
                values = f"{both[name]:.6g} for two examples, and {once[name]:.6g} for them and two rows of padding"
                return [(name, f"{of_all}: {values}")]
    return []


def _are_close(one: float, other: float) -> bool:
    return math.isfinite(one) and math.isclose(one, other, rel_tol=_TOLERANCE)
