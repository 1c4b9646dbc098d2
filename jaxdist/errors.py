"""The errors that the command line shows as a message and not as a traceback, and the statuses it exits with."""

import enum
from collections.abc import Iterator
from contextlib import contextmanager


class ExitStatus(enum.IntEnum):
    """What the exit status of a command says. A contract: see "Exit status" in docs/reference.md."""

    OK = 0
    """Done; of a run, its stop rule ended it."""
    FAILED = 1
    """Anything that is not one of the others."""
    USER = 2
    """The user's mistake: one message says what it is."""
    RETRY = 75
    """Start it again (EX_TEMPFAIL of sysexits.h): the run was preempted, hangs, or something was not there yet."""


class UserError(ValueError):
    """What a user can correct: the message names the rule, what was received and what to do."""

    exit_status = ExitStatus.USER


class ConfigError(UserError):
    """An experiment, or an override of one, that cannot be used as it is."""


class TryAgain(UserError):
    """What may well be over at the next attempt: a host that cannot be reached, a process that did not come."""

    exit_status = ExitStatus.RETRY


class RunFailedError(Exception):
    """What ended a run that had begun well, for example a full disk: the message says all there is to say."""

    exit_status = ExitStatus.FAILED


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError or OSError into a UserError: for the stages that only check and build what was asked for."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
