"""What ends a job, what is kept and what a resume does: each line of the table in docs/guide/endings.md.

python -m pytest -m soak tests/multiprocess/test_endings.py        # the lines that are not in the default suite
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxdist.checkpoint import checkpoints
from jaxdist.launch.supervising import board, supervisor
from jaxdist.rundir import record

EXPERIMENT = pathlib.Path(__file__).parents[1] / "tiny_experiment.py"
FOREVER = 10_000_000
WAIT_SECONDS = 100.0


class Job:
    """A run of `jaxdist train` in a session of its own; what it prints goes to a file."""

    def __init__(self, run_dir, *arguments, processes=1, steps=FOREVER, save_every=FOREVER, stdout=None):
        self.run_dir, self.output = run_dir, run_dir.with_suffix(".out")
        command = [sys.executable, "-m", "jaxdist.cli", "train", EXPERIMENT, "--run-dir", run_dir, "--devices", "1"]
        command += ["--processes", processes] if processes else []
        command += ["--max-steps", steps, *arguments, "--set", f"checkpoints.every_steps={save_every}"]
        command += ["eval.every_steps=1000000", "recovery.snapshot_every=1", "log_every=1000"]
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=stdout or output, stderr=output, start_new_session=True
            )

    def wait_for(self, condition, what=""):
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := condition()):
            assert self.process.poll() is None, f"it ended before: {self.text()}"
            assert time.monotonic() < deadline, f"{what} never came true: {self.text()}"
            time.sleep(0.01)
        return found

    def start_event(self):
        """Return the event of the attempt that runs, None between two."""
        events = supervisor.read_events(self.run_dir)
        return events[-1] if events and events[-1]["event"] == "start" else None

    def reported_step(self):
        event = self.start_event()
        report = event and board.read(pathlib.Path(event["memory"]), len(event["process_ids"]) - 1)
        return report.step if report else 0

    def train_to(self, step):
        """Wait until the last process has reported this step; return the start event."""
        self.wait_for(lambda: self.reported_step() >= step, f"step {step}")
        return self.start_event()

    def children(self):
        return self.start_event()["process_ids"]

    def fork_server(self):
        mine = pathlib.Path("/proc").glob("[0-9]*/stat")
        fields = {int(path.parent.name): fields for path in mine if (fields := stat(path))}
        (found,) = [
            number
            for number, (_, parent) in fields.items()
            if parent == self.process.pid and "fork_server" in words(number)
        ]
        return found

    def end(self, seconds=60.0):
        return self.process.wait(timeout=seconds)

    def text(self):
        return self.output.read_text()

    def saved_step(self):
        with contextlib.closing(checkpoints.Checkpointer(self.run_dir / "checkpoints", identity="x")) as checkpointer:
            return checkpointer.latest_step() or 0


def stat(path):
    with contextlib.suppress(OSError):
        fields = path.read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    return None


def words(number):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{number}/cmdline").read_text()
    return ""


def kill(number, *process_ids):
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)


@pytest.fixture
def start(tmp_path):
    """Start jobs that are ended with the test, their memory too."""
    jobs = []

    def make(*arguments, name="run", **settings):
        jobs.append(Job(tmp_path / name, *arguments, **settings))
        return jobs[-1]

    yield make
    for job in jobs:
        if job.process.poll() is None:
            job.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(timeout=30)
            job.process.kill()
            job.process.wait()
    for job in jobs:
        for memory in supervisor.left_behind(job.run_dir):
            for path in memory.iterdir():
                path.unlink()
            memory.rmdir()


def resumes_at(start, step, *, said=None, **settings):
    """Check that a resume continues from a step that is at least `step`, and makes further ones."""
    job = start("--resume", **settings)
    job.train_to(step + 2)
    if said:
        assert said in job.text()
    return job


def test_a_stop_and_the_death_of_a_process_lose_no_step(start):
    """SIGTERM, then a process dies: the supervisor saves what it has in memory, and says "try again"."""
    job = start()
    job.train_to(20)
    step = job.reported_step()
    kill(signal.SIGTERM, job.process.pid)
    kill(signal.SIGKILL, *job.children())
    assert job.end() == 75
    assert job.saved_step() >= step - 2
    made = record.RunRecord.read(job.run_dir)
    assert (made.end_reason, made.step) == ("preempted", job.saved_step())
    assert re.search(r"saved from memory|saving and stopping", job.text())


def test_a_supervisor_that_is_killed_leaves_a_checkpoint_and_a_resume_waits_for_it(start):
    job = start()
    job.train_to(20)
    step = job.reported_step()
    kill(signal.SIGKILL, job.process.pid)
    again = start("--resume", steps=step + 50)
    assert again.end() == 0, again.text()
    assert int(re.search(r"continues from the checkpoint of step (\d+)", again.text())[1]) >= step - 2
    assert record.RunRecord.read(job.run_dir).step == step + 50
