"""The command line of this process, which `ps` shows to every user of the machine: what is secret in it is covered.

MySQL's clients do the same. Until then, and in the shell's history, the secret is readable.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable

_ARGUMENTS_START = 45
"""Place of the address of the arguments in /proc/self/stat, after the name of the program; see proc_pid_stat(5)."""


def cover(assignments: Iterable[str]) -> None:
    """Write asterisks over the value of each of the assignments NAME=VALUE that are arguments of this process."""
    with contextlib.suppress(OSError):  # /proc of another kind
        shown = pathlib.Path("/proc/self/cmdline").read_bytes()
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start = int(fields[_ARGUMENTS_START])
        stars = {
            os.fsencode(assignment): b"%b=%b" % (name, b"*" * len(value))
            for assignment in assignments
            for name, _, value in [os.fsencode(assignment).partition(b"=")]
        }
        covered = b"\0".join(stars.get(argument, argument) for argument in shown.split(b"\0"))
        if covered != shown:
            _write(start, shown, covered)


def _write(start: int, before: bytes, after: bytes) -> None:
    """Write to the memory of this process, where `before` must be; the file checks the address."""
    memory = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(memory, len(before), start) == before:
            os.pwrite(memory, after, start)
    finally:
        os.close(memory)
