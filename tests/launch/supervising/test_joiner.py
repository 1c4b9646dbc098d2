"""What `jaxdist join` says where there is nothing to join; test_joined.py has processes that join."""

import json
import pathlib

import pytest

from jaxdist.errors import UserError
from jaxdist.launch.supervising import joiner, restart_events
from jaxdist.rundir import lock


def write_start(run_dir, memory):
    event = {"event": "start", "time": 1.0, "monotonic": 1.0, "attempt": 0, "process_ids": [1], "memory": str(memory)}
    (run_dir / restart_events.EVENTS_NAME).write_text(json.dumps(event) + "\n")


def test_a_directory_without_a_job_cannot_be_joined(tmp_path):
    with pytest.raises(UserError, match=r"has none\. Start it by"):
        joiner.connect(tmp_path)
    write_start(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"has none\. Start it by"):  # it has ended
        joiner.connect(tmp_path)


def test_a_job_of_another_machine_cannot_be_joined(tmp_path):
    write_start(tmp_path, pathlib.Path("/dev/shm/jaxdist-elsewhere"))
    with lock.locked(tmp_path, purpose="train"), pytest.raises(UserError, match="cannot be reached from here"):
        joiner.leave(tmp_path, 1)
