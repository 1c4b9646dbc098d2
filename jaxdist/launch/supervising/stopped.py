"""Whether a process is stopped: it does nothing, and takes no signal but SIGKILL."""

import pathlib


def is_stopped(process_id: int) -> bool:
    """Return whether a process was stopped by a signal."""
    try:
        status = pathlib.Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    # The name in parentheses may hold anything; the state is the first field after it.
    return status.rpartition(")")[2].split()[0] == "T"
