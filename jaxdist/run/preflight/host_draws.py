"""Whether a function draws from Python's or NumPy's generator while it is traced: its numbers would be constants."""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxdist.errors import ConfigError


class _Generator(NamedTuple):
    """The generator of a module, which every function can draw from."""

    module: str
    seed: Callable[[int], None]
    state: Callable[[], Any]
    restore: Callable[[Any], None]


_GENERATORS = (
    _Generator("numpy.random", np.random.seed, np.random.get_state, np.random.set_state),
    _Generator("random", random.seed, random.getstate, random.setstate),
)


class Draws:
    """Notices draws while a function is traced again and again, each time with the generators in another state.

    A function that seeds a generator itself leaves the same state each time: its numbers are constants on purpose.
    """

    def __init__(self) -> None:
        self._left: list[dict[str, str]] = []
        self._untouched: list[dict[str, str]] = []

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice what is drawn while the context lasts; the generators have their state of before after it."""
        before = [each.state() for each in _GENERATORS]
        try:
            for each in _GENERATORS:
                each.seed(len(self._left))
            self._untouched.append(_states())
            yield
            self._left.append(_states())
        finally:
            for each, state in zip(_GENERATORS, before, strict=True):
                each.restore(state)

    def modules(self) -> list[str]:
        """Return the modules whose generators were drawn from in each of the contexts."""
        return [
            each.module
            for each in _GENERATORS
            if all(left[each.module] != start[each.module] for left, start in zip(self._left, self._untouched))
            and len({left[each.module] for left in self._left}) == len(self._left)
        ]

    def check(self, *, same_bits: bool) -> None:
        """Warn where a function has drawn.

        Raises:
          ConfigError: it has, and `same_bits`: the run promises the same bits anywhere.
        """
        modules = self.modules()
        if not modules:
            return
        message = (
            f"The model or its loss draws from {' and '.join(modules)}. That happens when the step is traced: the "
            "numbers are constants, the same in every step, and others in each process and after a restart. Draw "
            "with jax.random from the key that the loss gets; a module has make_rng or nnx.Rngs."
        )
        if same_bits:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=2)


def _states() -> dict[str, str]:
    return {each.module: _text(each.state()) for each in _GENERATORS}


def _text(state: tuple[Any, ...]) -> str:
    return repr([part.tobytes() if isinstance(part, np.ndarray) else part for part in state])
