"""What `ps` shows of a process that covers the secrets in its own command line."""

import subprocess
import sys

from jaxdist.launch import own_command_line

COVERS = """
import pathlib, sys
from jaxdist.launch import own_command_line
own_command_line.cover(["key=top secret", "other=x", "key=tóp=2"])
print(sys.argv[1:])
print(pathlib.Path("/proc/self/cmdline").read_text().split("\\0")[3:-1])
print(pathlib.Path("/proc/self/environ").read_text().count("top secret"))
"""


def test_a_secret_is_covered_and_nothing_else_changes():
    given = ["--set", "key=top secret", "key=top secret", "name=top secret", "key=tóp=2", "xkey=top secret", "last=1"]
    done = subprocess.run(
        [sys.executable, "-c", COVERS, *given], capture_output=True, text=True, check=True, timeout=200
    )
    arguments, shown, environment = done.stdout.splitlines()
    assert arguments == str(given), "the program itself still has them"
    covered = [
        "--set",
        "key=**********",
        "key=**********",
        "name=top secret",
        "key=******",
        "xkey=top secret",
        "last=1",
    ]
    assert shown == str(covered)
    assert environment == "0"


def test_without_a_secret_nothing_is_written(monkeypatch):
    monkeypatch.setattr(own_command_line, "_write", None)
    own_command_line.cover(["no=argument of this process"])
