"""Which of the ways to train is chosen, before anything heavy is imported."""

import argparse
import contextlib
import subprocess
import sys

import pytest

from jaxdist.cli.commands import train_command


@pytest.mark.parametrize(
    ("processes", "strategy", "in_job", "way"),
    [
        (None, None, False, "train"),
        (2, None, False, "supervise"),
        (1, "fsdp", False, "supervise"),
        (2, None, True, "train"),
        (2, "parameter-server", False, "train"),
        (None, "parameter-server", False, "train"),
    ],
)
def test_processes_are_supervised_unless_this_is_one_of_them(monkeypatch, processes, strategy, in_job, way):
    monkeypatch.delenv("JAXDIST_NUM_PROCESSES", raising=False)
    if in_job:
        monkeypatch.setenv("JAXDIST_NUM_PROCESSES", "2")
    monkeypatch.setattr(train_command.parser, "find_handler", lambda name: lambda *arguments: name)
    monkeypatch.setattr(train_command.fork_server, "ForkServer", lambda *_, **__: contextlib.ExitStack())
    chosen = {"processes": processes, "strategy": strategy, "experiment": "x.py", "run_dir": None}
    options = argparse.Namespace(**chosen, json=True, dry_run=False, fast_dev_run=False)
    assert train_command.train(options) == f"{train_command.WORK}:{way}"


def test_the_choice_needs_no_jax():
    """A signal during the imports is heard, and the fork server imports meanwhile."""
    code = "import sys; from jaxdist.cli.commands import train_command; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
