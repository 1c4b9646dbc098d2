"""`python -m jaxdist.cli`, and the program `jaxdist`: signals are heeded before the rest is imported."""

import atexit
import importlib
import os
import signal

from jaxdist.launch import parent, signals


def main() -> None:
    """Run the command line and exit; see `jaxdist.cli.main`.

    A signal during the imports, or once the command is done, is one line. Between the two Ctrl-C raises
    KeyboardInterrupt, so that a command can clean up; training has handlers of its own. The processes of a job leave it
    to their supervisor what to say.
    """
    if parent.PARENT_ID not in os.environ:
        signals.leave_at_signals()
        # Called last: Python then gives up its handlers, and Ctrl-C would end by the signal what has ended well.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    importlib.import_module("jaxdist.cli.main").main()


if __name__ == "__main__":
    main()
