"""The errors that the command line shows as a message and not as a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER = 2
"""Exit status of a command that was the user's mistake."""


class UserError(ValueError):
    """What a user can mend: the message names the rule, what was received and what to do."""

    exit_status = 2


class TryAgain(UserError):
    """What may well be over at the next attempt: a host that cannot be reached, a process that did not come."""

    exit_status = 75  # EX_TEMPFAIL, see `signals`


class RunFailedError(Exception):
    """What ended a run that was well begun, a full disk say: the message says all there is to say."""

    exit_status = 1


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError or OSError into a UserError: for the stages that only check and build what was asked for."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
