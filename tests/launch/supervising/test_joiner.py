"""What `jaxdist join` and `leave` say of a directory without a job; test_joined.py has processes that join."""

import json
import pathlib

import pytest

from jaxdist.errors import UserError
from jaxdist.launch.supervising import joiner, restart_events
from jaxdist.rundir import lock


def write_start(run_dir, memory):
    event = {"event": "start", "time": 1.0, "monotonic": 1.0, "attempt": 0, "process_ids": [1], "memory": str(memory)}
    (run_dir / restart_events.EVENTS_NAME).write_text(json.dumps(event) + "\n")


@pytest.mark.parametrize("attempt", [lambda path: joiner.join(path, 1, ()), lambda path: joiner.leave(path, 1)])
def test_a_directory_without_a_job_cannot_be_joined_or_left(tmp_path, attempt):
    with pytest.raises(UserError, match=r"can be joined or left; .* has none\. Start it by"):
        attempt(tmp_path)
    write_start(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"can be joined or left; .* has none\. Start it by"):  # it has ended
        attempt(tmp_path)


def test_a_job_of_another_machine_cannot_be_joined(tmp_path):
    write_start(tmp_path, pathlib.Path("/dev/shm/jaxdist-elsewhere"))
    with lock.locked(tmp_path, purpose="train"), pytest.raises(UserError, match="Join or leave it on the machine"):
        joiner.leave(tmp_path, 1)
