import os
import signal
import subprocess
import sys

import pytest

from jaxdist.launch import parent

CHILD = """
import sys, threading
from jaxdist.launch import parent
parent.die_with_parent()
print("alive", flush=True)
threading.Event().wait()
"""
PARENT = """
import os, subprocess, sys
from jaxdist.launch import parent
environment = os.environ | {parent.PARENT_ID: str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment)
child.wait()
"""


def test_a_child_dies_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "alive\n"
        process.kill()
        # The child holds the output open: it ends with the child.
        assert process.stdout.read() == ""
        assert process.wait() == -signal.SIGKILL


def test_a_child_whose_parent_died_first_ends_with_a_message():
    environment = os.environ | {parent.PARENT_ID: str(os.getppid())}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "has ended already" in done.stderr


@pytest.mark.parametrize("environment", [{}, {parent.PARENT_ID: str(os.getppid())}])
def test_a_parent_that_is_alive_or_not_named_is_no_reason_to_end(environment, monkeypatch):
    monkeypatch.setattr(parent.ctypes, "CDLL", lambda *_, **__: _NoKernel())
    parent.die_with_parent(environment)


class _NoKernel:
    """Takes the call of prctl, so that the test itself does not die with its parent."""

    def prctl(self, *arguments: int) -> None:
        assert arguments == (1, signal.SIGKILL)
