"""Where a run was made: the commit of the experiment's code, the host, and how much memory its devices needed."""

import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

_SECONDS = 10.0


def git(directory: pathlib.Path) -> dict[str, Any] | None:
    """Return {commit, dirty} of the Git repository that `directory` is in, None outside of one or without Git.

    A tree is dirty when a tracked file was changed; untracked files are ignored.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changed is None else {"commit": commit, "dirty": bool(changed)}


def _git(directory: pathlib.Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def peak_memory_bytes(devices: Sequence[Any]) -> dict[str, int] | None:
    """Return the peak memory of each device by its number; None if devices do not report it, as on CPU."""
    told = {str(device.id): device.memory_stats() for device in devices}
    peaks = {name: stats["peak_bytes_in_use"] for name, stats in told.items() if stats and "peak_bytes_in_use" in stats}
    return peaks or None
