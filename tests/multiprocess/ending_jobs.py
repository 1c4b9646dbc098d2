"""Jobs that the tests of endings start, watch and kill: real processes of the command line."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

from jaxdist.checkpoint import checkpoints
from jaxdist.launch.supervising import board, job_memory, restart_events

EXPERIMENT = pathlib.Path(__file__).parents[1] / "tiny_experiment.py"
FOREVER = 10_000_000
WAIT_SECONDS = 230.0


class Job:
    """A run of `jaxdist train` in a session of its own; what it prints goes to a file.

    With `forks`, a fork server, it needs no imports, which take three seconds of processor time. `before` is a command
    that runs it, such as nohup.
    """

    def __init__(
        self,
        run_dir,
        *arguments,
        processes=1,
        steps=FOREVER,
        save_every=FOREVER,
        eval_every=FOREVER,
        output=None,
        experiment=EXPERIMENT,
        environment=None,
        forks=None,
        before=(),
    ):
        self.run_dir, self.output = run_dir, run_dir.with_suffix(".out")
        self.earlier = len(restart_events.read_events(run_dir))
        command = [sys.executable, "-m", "jaxdist.cli", "train", experiment, "--run-dir", run_dir, "--devices", "1"]
        command += ["--processes", processes] if processes else []
        command += ["--max-steps", steps, *arguments, "--set", f"checkpoints.every_steps={save_every}"]
        command += [f"eval.every_steps={eval_every}", "recovery.snapshot_every=1", "log_every=1000"]
        with open(self.output, "ab") as file:
            command, environment = list(map(str, [*before, *command])), os.environ | (environment or {})
            if forks:  # in a session of its own, too
                self.process = forks.start(command, environment, file)
            else:
                shown = file if output is None else output
                self.process = subprocess.Popen(
                    command, stdout=shown, stderr=shown, start_new_session=True, env=environment
                )

    def wait_for(self, condition, what=""):
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := condition()):
            assert self.process.poll() is None, f"it ended before: {self.text()}"
            assert time.monotonic() < deadline, f"{what} never came true: {self.text()}"
            time.sleep(0.03)
        return found

    def start_event(self):
        """Return the event of the attempt that runs, None between two."""
        events = restart_events.read_events(self.run_dir)[self.earlier :]
        attempts = [event for event in events if event["event"] in ("start", "end")]  # and "recovered" is neither
        return attempts[-1] if attempts and attempts[-1]["event"] == "start" else None

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
        # The processes that it forked have its command line, and the same parent.
        forked = {each for event in restart_events.read_events(self.run_dir) for each in event.get("process_ids", ())}
        (found,) = fork_servers(self) - forked
        return found

    def imports_jax(self):
        """Return whether the job has begun to import JAX."""
        return "jaxlib" in pathlib.Path(f"/proc/{self.process.pid}/maps").read_text()

    def end(self, seconds=WAIT_SECONDS):
        return self.process.wait(timeout=seconds)

    def text(self):
        return self.output.read_text()

    def saved_step(self):
        with contextlib.closing(checkpoints.Checkpointer(self.run_dir / "checkpoints", identity="x")) as checkpointer:
            return checkpointer.latest_step() or 0


def fork_servers(job):
    """Return the processes that look like the fork server of a job."""
    fields = {int(path.parent.name): stat(path) for path in pathlib.Path("/proc").glob("[0-9]*/stat")}
    ours = {number for number, found in fields.items() if found and found[1] == job.process.pid}
    return {number for number in ours if "fork_server" in words(number)}


def descendants(number):
    """Return the processes that descend from one, and that one."""
    fields = {int(path.parent.name): stat(path) for path in pathlib.Path("/proc").glob("[0-9]*/stat")}
    ours = {number}
    for _ in range(4):
        ours |= {each for each, found in fields.items() if found and found[1] in ours}
    return ours


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


@contextlib.contextmanager
def starting(folder):
    """Yield a function that starts jobs with run directories in `folder`; end them after that, their memory too."""
    jobs = []

    def make(*arguments, name="run", **settings):
        jobs.append(Job(folder / name, *arguments, **settings))
        return jobs[-1]

    try:
        yield make
    finally:
        _end(jobs)


def _end(jobs):
    for job in jobs:
        if job.process.poll() is None:
            job.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(timeout=30)
            job.process.kill()
            job.process.wait()
    for job in jobs:
        for memory in job_memory.left_behind(job.run_dir):
            for path in memory.iterdir():
                path.unlink()
            memory.rmdir()


def in_own_mounts(script, *, stderr=subprocess.PIPE):
    """Run a shell script, as root, in a mount namespace of its own: what it mounts, this machine does not see."""
    command = ["unshare", "-m", "sh", "-c", script]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=200, check=False)
