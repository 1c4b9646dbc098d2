"""Ending a process when its parent dies: a process in a collective would otherwise wait forever."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

PARENT_ID = "JAXDIST_PARENT_ID"
"""Environment variable: process id of the process that started this one."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """Have the kernel kill this process when its parent dies; exit now if the parent named by PARENT_ID is dead."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if PARENT_ID in environment and os.getppid() != int(environment[PARENT_ID]):
        sys.exit("The process that started this one has ended already.")
