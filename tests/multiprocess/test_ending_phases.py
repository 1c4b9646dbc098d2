"""The table of docs/guide/endings.md in every phase of a job: signals, full disks, full memory.

python -m pytest -m 'soak or root' tests/multiprocess/test_ending_phases.py        # the whole matrix

The experiment waits in the phase until the signal was sent (see phased_experiment.py), so no case depends on time.
"""

import contextlib
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import ending_jobs
import phased_experiment
import pytest

from jaxdist.launch.supervising import fork_server, job_memory, restart_events
from jaxdist.rundir import record

EXPERIMENT = pathlib.Path(phased_experiment.__file__)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TARGETS = ("supervisor", "child", "group")
NEEDS_A_RUN = ("restoring", "between attempts")
BEFORE, STEPS = 8, 24
DEFAULT = {
    ("training", "group", signal.SIGTERM),
    ("restoring", "child", signal.SIGKILL),
}
CASES = [
    pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2].name}", marks=() if case in DEFAULT else pytest.mark.soak)
    for phase in phased_experiment.PHASES
    for target in TARGETS
    for number in (*STOPS, signal.SIGPIPE, signal.SIGKILL)
    for case in [(phase, target, number)]
    if (phase, target) != ("between attempts", "child")  # there is none
]


@pytest.fixture(scope="module")
def forks():
    """Return a fork server for the jobs themselves."""
    with contextlib.closing(fork_server.ForkServer(("jaxdist.cli.train_work",))) as server:
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory, forks):
    """Return the directory of a run that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    with ending_jobs.starting(folder) as start:
        job = start(processes=0, steps=BEFORE, experiment=EXPERIMENT, forks=forks)
        assert job.end() == 0, job.text()
    return folder / "run"


def expected(phase, target, number):
    """Return the exit status."""
    if number == signal.SIGPIPE:  # as if it had not come; the processes end in every attempt "between attempts"
        return 9 if phase == "between attempts" else 0
    if target == "child":
        return 0
    return -signal.SIGKILL if number == signal.SIGKILL else 75


@pytest.mark.parametrize(("phase", "target", "number"), CASES)
def test_a_signal_in_a_phase(tmp_path, trained, forks, phase, target, number):
    common = {"steps": STEPS, "save_every": BEFORE, "eval_every": BEFORE, "experiment": EXPERIMENT, "forks": forks}
    if phase in NEEDS_A_RUN:
        shutil.copytree(trained, tmp_path / "run")
    with ending_jobs.starting(tmp_path) as start:
        environment = {"PHASE": phase, "PHASE_DIR": str(tmp_path)}
        job = start("--restartable", processes=2, environment=environment, **common)
        if phase == "between attempts":
            job.wait_for(lambda: last_event(job) == "end", "the end of an attempt")
            receivers = [job.process.pid] + ([job.fork_server()] if target == "group" else [])
        else:
            job.wait_for((tmp_path / "reached").exists, phase)
            children = job.wait_for(job.start_event, "the start")["process_ids"]
            receivers = {"supervisor": [], "child": children[-1:], "group": [*children, job.fork_server()]}[target]
            receivers = receivers + ([] if target == "child" else [job.process.pid])
        ending_jobs.kill(number, *receivers)
        (tmp_path / "go").touch()
        assert job.end() == expected(phase, target, number), job.text()
        assert "Traceback" not in job.text()
        if expected(phase, target, number) == 75:
            check_kept(job, phase)
        if expected(phase, target, number):
            again = start("--restartable", processes=0, **common)
            assert again.end() == 0, again.text()
            assert "Traceback" not in again.text()
    made = record.RunRecord.read(tmp_path / "run")
    assert (made.end_reason, made.step) == ("max_steps", STEPS)
    assert not list(job_memory.left_behind(tmp_path / "run")), "nothing stays in memory"


def check_kept(job, phase):
    """Check that a job that was stopped has kept the step at hand."""
    if phase == "start-up":
        return
    least = BEFORE if phase != "training" else 5
    made = record.RunRecord.read(job.run_dir)
    assert made.step == job.saved_step() >= least, job.text()
    assert made.end_reason == "preempted" or phase == "between attempts"


def last_event(job):
    events = restart_events.read_events(job.run_dir)[job.earlier :]
    return events[-1]["event"] if events else None


FULL = [
    pytest.param(where, phase, processes, id=f"{where}-{phase}-{processes}", marks=[pytest.mark.root, pytest.mark.soak])
    for where in ("disk", "memory")
    for phase in phased_experiment.PHASES
    for processes in (1, 2)
]


@pytest.mark.parametrize(("where", "phase", "processes"), FULL)
def test_a_full_disk_or_memory_in_a_phase(tmp_path, trained, where, phase, processes):
    """On small file systems of their own, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    fill = "/dev/shm" if where == "memory" else disk
    train = f"{sys.executable} -m jaxdist.cli train {EXPERIMENT} --devices 1 --run-dir {disk}/run"
    rest = f"--set checkpoints.every_steps={BEFORE} eval.every_steps={BEFORE} recovery.snapshot_every=1 log_every=1000"
    first = f"cp -r {trained} {disk}/run; " if phase in NEEDS_A_RUN else ""
    script = (
        f"mount -t tmpfs -o size=8m tmpfs {disk} && mount -t tmpfs -o size=4m tmpfs /dev/shm && cd / && {first}"
        f"PHASE='{phase}' PHASE_DIR={tmp_path} PHASE_FILL={fill} "
        f"{train} --max-steps {STEPS} --processes {processes} --restartable {rest}; echo status $?; rm -f {fill}/fill; "
        f"{train} --max-steps {STEPS} --restartable {rest}; echo status $?; ls /dev/shm; "
        f"cp {disk}/run/run.json {tmp_path}"
    )
    done = ending_jobs.in_own_mounts(script, stderr=subprocess.STDOUT)
    assert "Traceback" not in done.stdout
    statuses = [int(each) for each in re.findall(r"^status (\d+)$", done.stdout, re.MULTILINE)]
    begun = where == "memory" or phase != "start-up"
    assert statuses == [0 if where == "memory" else 1 if begun else 2, 0], done.stdout
    made = record.RunRecord.read(tmp_path)
    assert (made.end_reason, made.step) == ("max_steps", STEPS)
    assert "jaxdist-" not in done.stdout[done.stdout.rfind("status") :], "nothing stays in memory"
    if where == "disk" and begun:
        assert f"Step {STEPS} was saved from memory" in done.stdout
