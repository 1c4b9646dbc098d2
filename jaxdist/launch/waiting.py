"""Shows on a terminal what a command is doing before its first output."""

import contextlib
import sys
from collections.abc import Iterator

_ERASE = "\r\x1b[K"


@contextlib.contextmanager
def shown(what: str, *, silent: bool = False) -> Iterator[None]:
    """Show `what` on standard error while the context lasts; nothing if it is not a terminal, or if `silent`."""
    if silent or not sys.stderr.isatty():
        yield
        return
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(_ERASE, end="", file=sys.stderr, flush=True)
