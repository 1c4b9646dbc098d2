"""The errors that the command line shows as a message and not as a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What a user can mend: the message names the rule, what was received and what to do."""


class RunFailedError(Exception):
    """What ended a run that was well begun, a full disk say: the message says all there is to say."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError or OSError into a UserError: for the stages that only check and build what was asked for."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
