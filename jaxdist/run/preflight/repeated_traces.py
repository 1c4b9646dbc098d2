"""Whether a function is the same at each trace. What Python draws, counts or reads from a clock there is a constant."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import xla_metadata

from jaxdist import errors
from jaxdist.errors import ConfigError
from jaxdist.spmd import jax_private

_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)
"""What is compared of an equation's settings: functions and names may be others each time and mean the same."""


def check_same_trace(what: str, function: Callable[..., Any], args: Sequence[Any], *, same_bits: bool) -> Any:
    """Return shapes and dtypes of what a function returns; warn where it is another when it is traced a second time.

    Args:
      what: the function, in words.
      function: traced and not called otherwise.
      args: arrays, or descriptions of arrays.
      same_bits: whether the run promises the same bits anywhere.

    Raises:
      ConfigError: it is another, and `same_bits`; or it uses a value that another trace has left.
    """
    # JAX keeps the jaxprs of functions that it has seen, and those of functions under jit within them, by context.
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    with xla_metadata.set_xla_metadata(traced="again"):
        again = jax.make_jaxpr(lambda *args: function(*args))(*args)
    _check_nothing_kept(what, again)
    contents = [_contents(each.jaxpr, each.consts) for each in (traced, again)]
    pairs = itertools.zip_longest(*contents, fillvalue=(None, None))
    differing = [one or other for (content, one), (same, other) in pairs if content != same]
    if not differing:
        return shapes
    message = (
        f"{what} is another each time that it is traced{_first_place(differing)}. What Python or NumPy draws, counts "
        "or reads from a clock there is a constant: the same in every step, and another in each process and after a "
        "restart. Draw with jax.random from the key that is passed (a module has make_rng or nnx.Rngs), and pass what "
        "changes as a field of the batch."
    )
    if same_bits:
        raise ConfigError(message)
    warnings.warn(message, stacklevel=2)
    return shapes


def _check_nothing_kept(what: str, traced: Any) -> None:
    kept = [
        variable
        for variable, value in zip(traced.jaxpr.constvars, traced.consts, strict=True)
        if isinstance(value, jax.core.Tracer)
    ]
    if kept:
        users = [
            equation for equation in traced.jaxpr.eqns if any(atom is each for atom in equation.invars for each in kept)
        ]
        raise ConfigError(
            f"{what} uses a value that was kept in a variable outside when it was traced before{_first_place(users)}. "
            "That has no meaning in another call: return what the next one needs, or compute it again."
        )


def _first_place(equations: Sequence[Any]) -> str:
    found = (errors.place_among(jax_private.lines_of(each)) for each in equations if each is not None)
    return next((f", first at {place}" for place in found if place), "")


class _Constant:
    """A number or an array in a jaxpr, equal to one of the same bytes."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and (self._value is other._value or self._content() == other._content())

    __hash__ = None  # type: ignore[assignment]

    def _content(self) -> Any:
        """Return shape, dtype and bytes; only shape and dtype of a value that cannot be read here, such as keys."""
        try:
            array = np.asarray(self._value)
            return array.shape, str(array.dtype), array.tobytes()
        except Exception:
            return str(jax.typeof(self._value))


def _contents(jaxpr: Any, consts: Sequence[Any] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield what each equation of a jaxpr computes and the equation, those of the functions it calls after its own."""
    names: dict[Any, Any] = dict(zip(jaxpr.constvars, map(_Constant, consts)))
    names |= {
        variable: number for number, variable in enumerate([*jaxpr.constvars, *jaxpr.invars]) if variable not in names
    }

    def name(atom: Any) -> Any:
        return _Constant(atom.val) if hasattr(atom, "val") else names[atom]

    for equation in jaxpr.eqns:
        names |= {variable: len(names) + number for number, variable in enumerate(equation.outvars)}
        settings = [(key, each) for key, value in equation.params.items() for each in _flat(value)]
        numbers = [(key, _Constant(each)) for key, each in settings if isinstance(each, _NUMBERS)]
        results = [str(variable.aval) for variable in equation.outvars]
        yield (equation.primitive.name, [name(atom) for atom in equation.invars], results, numbers), equation
        for _, each in settings:
            if hasattr(each, "eqns"):
                yield from _contents(getattr(each, "jaxpr", each), getattr(each, "consts", ()))
    yield [name(atom) for atom in jaxpr.outvars], None


def _flat(value: Any) -> Iterator[Any]:
    """Yield the parts of a setting of an equation."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _flat(each)
    else:
        yield value
