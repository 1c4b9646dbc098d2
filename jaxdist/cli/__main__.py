"""`python -m jaxdist.cli`, and the program `jaxdist`: signals are heeded before the rest is imported."""

import importlib
import os
import signal

from jaxdist.launch import parent, signals


def main() -> None:
    """Run the command line and exit; see `jaxdist.cli.main`.

    A signal during the imports is one line. After them Ctrl-C raises KeyboardInterrupt again, so that a command can
    clean up; training has handlers of its own. The processes of a job leave it to their supervisor what to say.
    """
    if parent.PARENT_ID not in os.environ:
        signals.leave_at_signals()
    command_line = importlib.import_module("jaxdist.cli.main")
    if parent.PARENT_ID not in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command_line.main()


if __name__ == "__main__":
    main()
