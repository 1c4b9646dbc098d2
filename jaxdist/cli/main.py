"""The command line's entry point: parse, find the command's handler, run it, and exit as the contract says."""

import functools
import os
import pathlib
import shlex
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence

from jaxdist import errors, extras
from jaxdist.cli import parser
from jaxdist.errors import ConfigError, ExitStatus, RunFailedError, UserError, say
from jaxdist.launch import signals, viewer


def main(experiment: str | None = None) -> None:
    """Run the command line and exit; with `experiment`, that file's own `train` command."""
    arguments = sys.argv[1:] if experiment is None else ["train", experiment, *sys.argv[1:]]
    warnings.formatwarning = functools.partial(_format_warning, warnings.formatwarning)
    with viewer.Viewer():  # `| head -1` ends no command: what it has no reader for is dropped
        status = run(arguments)
    told = threading.Timer(_EXIT_SECONDS, tell_what_holds)
    told.daemon = True
    told.start()
    # A process that joined a job must leave it cleanly; a process that did not never imported this module.
    runtime = sys.modules.get("jaxdist.launch.joining.runtime")
    (runtime.leave if runtime else sys.exit)(status)


_EXIT_SECONDS = 5.0
"""How long the end of a process may take before it is told why it takes so long."""


def tell_what_holds() -> None:
    """Name the threads that Python waits for before this process can end: some that an experiment has left behind."""
    held = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    if held:
        names = ", ".join(each.name for each in held)
        say(
            f"The command is done, and Python waits for threads that are still running: {names}. Ctrl-C ends them; "
            "start such threads with daemon=True."
        )


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            "A command reads the paths it is given from the working directory, and that cannot be found "
            f"({error.strerror}). It may have been removed meanwhile: change to another one."
        ) from error


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; see `errors.ExitStatus`."""
    options = parser.make_parser().parse_args(arguments)
    options.arguments = arguments
    options.command = shlex.join(["jaxdist", *arguments])
    try:
        _check_folder()
        handler = parser.find_handler(options.handler)
        with signals.interruptible():
            return handler(options)
    except (UserError, RunFailedError) as error:
        if options.traceback:
            traceback.print_exception(error)
        say(error)
        return error.exit_status
    except extras.MissingExtra as error:
        if options.traceback:
            traceback.print_exception(error)
        say(error)
        return ExitStatus.USER
    except SystemExit as error:  # of the user's code: a status of its own would say something else of the run
        say(f"sys.exit() was called in the middle of a command: {errors.describe(error)}. Raise an error instead.")
        return ExitStatus.USER
    except KeyboardInterrupt:
        say("Interrupted; nothing was left to save.")
        return ExitStatus.INTERRUPTED


def _format_warning(
    usual: Callable[..., str],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Return a warning as text: one of this package says what is the matter, and not which line of ours noticed."""
    if pathlib.Path(filename).is_relative_to(pathlib.Path(__file__).parents[1]):
        return f"jaxdist: Warning: {message}\n"
    return usual(message, category, filename, lineno, line)
