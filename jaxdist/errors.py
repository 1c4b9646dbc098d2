"""The errors that the command line shows as a message and not as a traceback, and the statuses it exits with."""

import enum
import functools
import inspect
import os
import pathlib
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class ExitStatus(enum.IntEnum):
    """What the exit status of a command says. A contract: see "Exit status" in docs/reference.md."""

    OK = 0
    """Done; of a run, its stop rule ended it."""
    FAILED = 1
    """Anything that is not one of the others."""
    USER = 2
    """The user's mistake: one message says what it is."""
    RETRY = 75
    """Start it again (EX_TEMPFAIL of sysexits.h): the run was preempted, hangs, or something was not ready yet."""
    INTERRUPTED = 130
    """Ctrl-C before there was anything to save, as the shell reports it."""


class UserError(ValueError):
    """What a user can correct: the message names the rule, what was received and what to do."""

    exit_status = ExitStatus.USER


class ConfigError(UserError):
    """An experiment, or an override of one, that cannot be used."""


class TryAgain(UserError):
    """What may be gone at the next attempt: a host that cannot be reached, a process that did not connect."""

    exit_status = ExitStatus.RETRY


class RunFailedError(Exception):
    """What ended a run that had started well, for example a full disk: the message says everything."""

    exit_status = ExitStatus.FAILED


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn what the user caused into a UserError: for the stages that only check and build what was asked for.

    That is every ValueError and OSError, and whatever the user's own code raised; the message then ends with its place.
    """
    try:
        yield
    except (UserError, RunFailedError):
        raise
    except Exception as error:
        if place_of(error) is None and not isinstance(error, ValueError | OSError):
            raise
        raise UserError(describe(error)) from error


@contextmanager
def reworded(words: Mapping[str, str]) -> Iterator[None]:
    """Replace words in the message of what the user can correct: those of another way in, or of another place."""
    try:
        yield
    except (UserError, RunFailedError) as error:
        if len(error.args) == 1:
            text = str(error)
            for word, instead in words.items():
                text = text.replace(word, instead)
            error.args = (text,)
        raise


def _show_uncaught(before: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Show a mistake that ends a script as the command line does, and exit with its status."""
    if not isinstance(error, UserError | RunFailedError):
        before(kind, error, trace)
        return
    say(describe(error))
    if not hasattr(sys, "ps1"):  # an interactive session continues
        raise SystemExit(int(error.exit_status))


sys.excepthook = functools.partial(_show_uncaught, sys.excepthook)


def say(message: object) -> None:
    """Show a line to the user."""
    print(f"jaxdist: {message}", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """Return the error in a line: what it says, and the line of the user's code that led to it, if there is one."""
    message, place = _said(error), place_of(error)
    raised_here = place is None or error.__cause__ is not None
    ours = isinstance(error, UserError | RunFailedError) or (raised_here and isinstance(error, ValueError | OSError))
    if not ours:
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message if place is None or place in message else f"{message} ({place})"


_TRACED = "A model and its loss are traced, so"
_ADVICE = {
    "TracerBoolConversionError": "a condition of Python cannot depend on a value: use jnp.where or jax.lax.cond.",
    "NonConcreteBooleanIndexError": "a shape cannot depend on a value: use jnp.where in place of a boolean index.",
    "TracerArrayConversionError": "NumPy cannot compute with their values: use jax.numpy.",
    "TracerIntegerConversionError": "a whole number of Python cannot come from a value: use jax.numpy.",
    "ConcretizationTypeError": "a number of Python cannot come from a value: use jax.numpy.",
    "UnexpectedTracerError": "a value that one call keeps in a variable outside has no meaning in the next: return it.",
}
"""What to do about the errors of JAX, by their class, whose own texts are long and mostly about the function traced."""


def _said(error: BaseException) -> str:
    """Return what an error says, in one line."""
    text, kind = str(error), type(error).__name__
    if kind == "InvalidRngError":  # of Flax: in training every stream that a module asks for is given
        text = f"{text.partition(' (http')[0]}. Evaluation and prediction draw nothing: draw where train is True."
    if kind in _ADVICE:
        text = f"{text.partition(_LEAK if kind == _LEAK_ERROR else _WHILE_TRACING)[0]} {_TRACED} {_ADVICE[kind]}"
    return " ".join(text.split())


_WHILE_TRACING = "The error occurred while tracing"
_LEAK_ERROR, _LEAK = "UnexpectedTracerError", "A function transformed by JAX"
_LEAK_FRAME = re.compile(r"^(.+):(\d+):\d+ \((.+)\)$", re.MULTILINE)
"""A line of JAX's text that says where a value was made: the error itself is raised elsewhere."""


def place_of(error: BaseException) -> str | None:
    """Return "FILE:LINE, in FUNCTION" of the innermost line of the user's own code; None if there is none.

    An error that the package raised from another has the place of that one. The models of this package count as the
    user's code: they are called with what the user gave.
    """
    if error.__cause__ is not None and (place := place_of(error.__cause__)):
        return place
    if type(error).__name__ == _LEAK_ERROR:
        made = [found.groups() for found in _LEAK_FRAME.finditer(str(error)) if _is_users(found[1])]
        if made:
            return f"{_shortest(made[-1][0])}:{made[-1][1]}, in {made[-1][2]}"
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return place_among((frame.filename, frame.lineno, frame.name) for frame in frames)


def place_among(lines: Iterable[tuple[str, int | None, str]]) -> str | None:
    """Return "FILE:LINE, in FUNCTION" of the first line of the user's own code; None if there is none."""
    for filename, line, function in lines:
        if _is_users(filename):
            return f"{_shortest(filename)}:{line}, in {function}"
    return None


_CALLBACK = "Callback error calling callback"
_TRACEBACK_LINE = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


def of_callback(error: BaseException) -> UserError | None:
    """Return what a callback of a compiled program raised (`jax.debug.callback` and the like); None for other errors.

    JAX hands it on as the text of a traceback, in an error of the program.
    """
    text = str(error)
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or _CALLBACK not in text:
        return None
    body = text.partition("Traceback (most recent call last):")[2].partition("\n-----")[0]
    frames = list(_TRACEBACK_LINE.finditer(body))
    places = [f"{_shortest(each[1])}:{each[2]}, in {each[3]}" for each in frames if _is_users(each[1])]
    said = " ".join((body[frames[-1].end() :] if frames else body).split())
    return UserError(f"A callback that the step calls failed: {said}{f' ({places[-1]})' if places else ''}")


def named(function: Any) -> str:
    """Return the name of a function, with the place of its definition where that is the user's own code."""
    name = getattr(function, "__name__", type(function).__name__)
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not _is_users(code.co_filename):
        return name
    return f"{name} ({_shortest(code.co_filename)}:{code.co_firstlineno})"


_PACKAGE = pathlib.Path(__file__).parent
_MODELS = _PACKAGE / "models"
_LIBRARIES = [
    *(pathlib.Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *map(pathlib.Path, [*site.getsitepackages(), site.getusersitepackages()]),
]


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = pathlib.Path(filename).absolute()
    if path.is_relative_to(_PACKAGE):
        return path.is_relative_to(_MODELS)
    return not any(path.is_relative_to(library) for library in _LIBRARIES)


def _shortest(filename: str) -> str:
    return min(filename, os.path.relpath(filename), key=len)
