"""The command line's entry point: parse, find the command's handler, run it, and exit as the contract says."""

import functools
import pathlib
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from jaxdist import extras
from jaxdist.cli import parser
from jaxdist.errors import ExitStatus, RunFailedError, UserError, say
from jaxdist.launch import viewer


def main(experiment: str | None = None) -> None:
    """Run the command line and exit; with `experiment`, that file's own `train` command."""
    arguments = sys.argv[1:] if experiment is None else ["train", experiment, *sys.argv[1:]]
    warnings.formatwarning = functools.partial(_format_warning, warnings.formatwarning)
    with viewer.Viewer():  # `| head -1` ends no command: what it has no reader for is dropped
        status = run(arguments)
    # A process that joined a job must leave it cleanly; a process that did not never imported this module.
    runtime = sys.modules.get("jaxdist.launch.joining.runtime")
    (runtime.leave if runtime else sys.exit)(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; see `errors.ExitStatus`."""
    options = parser.make_parser().parse_args(arguments)
    options.arguments = arguments
    options.command = shlex.join(["jaxdist", *arguments])
    try:
        return parser.find_handler(options.handler)(options)
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
