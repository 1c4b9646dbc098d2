"""Processes that are started in advance, and wait for the word."""

import sys

from jaxdist.errors import ExitStatus
from jaxdist.launch.supervising import local_job
from jaxdist.launch.supervising.standby import standby_job

WAITS = """
import os, sys
from jaxdist.launch.joining import turn
waiting = turn.Turn.of_process()
waiting.wait()
print(os.environ["JAXDIST_WORD"])
"""


def start(tmp_path, code):
    job = standby_job.StandbyJob(tmp_path / "standby", local_job.ProcessGroup(tmp_path / "logs"))
    job.start([sys.executable, "-c", code], 2 * [local_job.start], {})
    return job


def wait_until_ready(job):
    while not job.is_ready():
        assert not job.group.has_ended()


def output(tmp_path):
    return [local_job.log_path(tmp_path / "logs", number).read_text() for number in range(2)]


def test_they_wait_for_the_word_and_are_then_a_job_like_any_other(tmp_path):
    job = start(tmp_path, WAITS)
    wait_until_ready(job)
    assert output(tmp_path) == ["", ""]
    with local_job.Signals() as signals:
        result = local_job.run_group(job.group, lambda: job.begin({"JAXDIST_WORD": "now"}), signals=signals)
    assert (result.exit_status, output(tmp_path)) == (ExitStatus.OK, ["now\n", "now\n"])
    assert not (tmp_path / "standby").exists()


def test_the_word_reaches_those_that_are_not_ready_yet(tmp_path):
    job = start(tmp_path, WAITS)
    assert not job.is_ready()
    with local_job.Signals() as signals:
        result = local_job.run_group(job.group, lambda: job.begin({"JAXDIST_WORD": "early"}), signals=signals)
    assert (result.exit_status, output(tmp_path)) == (ExitStatus.OK, ["early\n", "early\n"])


def test_closing_ends_them(tmp_path):
    job = start(tmp_path, WAITS)
    processes = list(job.group.processes)
    job.group.close()
    assert all(process.poll() is not None for process in processes)
    assert not (tmp_path / "standby").exists()
