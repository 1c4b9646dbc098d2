"""The points of a run at which the hooks of an experiment are called, and whether an object is a hook."""

import inspect
from collections.abc import Sequence
from typing import Any

from jaxdist import errors
from jaxdist.errors import ConfigError
from jaxdist.setting_group import nearest, show

ON_STEP = "on_step"
POINTS = ("on_start", ON_STEP, "on_evaluation", "on_checkpoint", "on_end")
"""The methods a hook may have; a plain function is its own `on_step`."""


def check(hooks: Sequence[Any]) -> None:
    """Raise ConfigError if an object is not a hook, or has a method that would never be called."""
    for hook in hooks:
        if isinstance(hook, type):
            raise ConfigError(f"Experiment.hooks takes objects; got {show(hook)}. Write {hook.__name__}(...).")
        methods = [name for name in dir(hook) if name.startswith("on_") and callable(getattr(hook, name))]
        for name in methods:
            if name not in POINTS:
                raise ConfigError(
                    f"A hook is called at {', '.join(POINTS)}; {show(hook)} has {name}, which is never called."
                    f"{nearest(name, POINTS)} Rename it."
                )
        if not methods and not callable(hook):
            raise ConfigError(
                f"Experiment.hooks takes functions of a HookInfo, or objects with any of {', '.join(POINTS)}; got "
                f"{show(hook)}."
            )
        _check_called([getattr(hook, name) for name in methods] or [hook])
        every = getattr(hook, "every_steps", 1)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(f"every_steps of a hook is a positive whole number; {show(hook)} has {every!r}.")


def _check_called(functions: Sequence[Any]) -> None:
    """Raise ConfigError where a call runs nothing: it makes a coroutine or a generator, which nothing would run."""
    for each in functions:
        is_generator = inspect.isgeneratorfunction(each)
        if is_generator or inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            what = "has a yield" if is_generator else "is an async function"
            raise ConfigError(
                f"A hook is called as a plain function; {errors.named(each)} {what}, so that a call would run nothing "
                "of it. Make it a plain function."
            )


def method(hook: Any, point: str) -> Any | None:
    """Return what is called at a point, None where the hook has nothing for it."""
    found = getattr(hook, point, None)
    return hook if found is None and point == ON_STEP and callable(hook) else found
