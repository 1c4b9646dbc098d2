"""What ends a job, what is kept and what a resume does: each line of the table in docs/guide/endings.md.

python -m pytest -m soak tests/multiprocess/test_endings.py        # the lines that are not in the default suite
"""

import ast
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import ending_jobs
import pytest
from ending_jobs import kill

from jaxdist.launch.supervising import restart_events
from jaxdist.rundir import record

EXPERIMENT = ending_jobs.EXPERIMENT
IN_PHASES, FULL = "test_a_signal_in_a_phase", "test_a_full_disk_or_memory_in_a_phase"
LINES = {
    "the stop rule ends the run": ["test_a_run_that_had_ended_is_done_whatever_is_killed_after_that", FULL],
    "a process is killed after that": ["test_a_run_that_had_ended_is_done_whatever_is_killed_after_that"],
    "SIGINT, SIGTERM, SIGUSR1, SIGHUP, or the deadline": [
        "test_a_stop_signal_saves_the_step_at_hand",
        "test_a_deadline_is_a_signal_that_nobody_sends",
        "test_however_a_supervised_job_ends_it_leaves_nothing_behind",
        IN_PHASES,
    ],
    "the same to the supervisor and all its processes at once, several times": [
        "test_a_signal_to_every_process_of_a_job_is_one_request",
        IN_PHASES,
    ],
    "a second signal, a second or more after the first": [
        "test_a_second_signal_leaves_at_once_and_the_state_is_saved_all_the_same"
    ],
    "a signal before the first step": [
        "test_a_signal_in_start_up_begins_nothing",
        "test_a_signal_while_the_supervisor_imports_is_one_line",
    ],
    "the same without `--processes`, once JAX is imported": [
        "test_a_signal_in_start_up_of_a_lone_process_saves_the_first_step"
    ],
    "an example, a transform or a hook of the experiment raises an error": ["test_an_error_of_a_hook_loses_no_step"],
    "SIGPIPE": [IN_PHASES],
    "a signal to one process of the job": [
        "test_a_signal_to_one_process_has_the_job_restarted_where_it_stopped",
        IN_PHASES,
    ],
    "a process dies, even while it imports or restores": [
        "test_fifteen_kills_in_a_row_while_restoring_too",
        IN_PHASES,
    ],
    "a signal, and a process dies before it has saved": ["test_a_stop_and_the_death_of_a_process_lose_no_step"],
    "a process dies, then a signal, between two attempts": ["test_a_process_that_dies_and_then_a_stop", IN_PHASES],
    "attempts in a row that save no new step": ["test_three_starts_that_fail_keep_what_the_first_attempt_made"],
    "the supervisor is killed": [
        "test_a_supervisor_that_is_killed_leaves_a_checkpoint_and_a_resume_waits_for_it",
        IN_PHASES,
    ],
    "everything is killed at once": ["test_when_everything_is_killed_a_resume_continues_from_memory", IN_PHASES],
    "the machine fails": [],
    "the viewer closes (`| head -1`, a closed log)": ["test_a_viewer_that_closes_its_end_ends_nothing"],
    "the terminal closes (SIGHUP)": [
        "test_a_stop_signal_saves_the_step_at_hand",
        "test_under_nohup_the_end_of_the_terminal_ends_nothing",
    ],
    "the fork server is killed or stopped": ["test_a_fork_server_that_is_killed_or_stopped_costs_a_slower_restart"],
    "`run.json` is emptied or removed": ["test_a_run_directory_that_is_damaged_meanwhile_is_no_traceback"],
    "the run directory is moved away": ["test_a_run_directory_that_is_damaged_meanwhile_is_no_traceback"],
    "`restarts.jsonl` cannot be written": ["test_a_run_directory_that_is_damaged_meanwhile_is_no_traceback"],
    "`/dev/shm` is full or small, from the start or later": ["test_a_full_memory_costs_the_snapshots_alone", FULL],
    "a process hangs, or is stopped": [
        "test_a_hang_is_one_message_that_names_the_process",
        "test_the_only_process_of_a_job_is_killed_when_it_was_stopped_too_long_and_the_job_goes_on",
    ],
    "a file of the run cannot be written for another reason: its directory becomes read-only, the file may not grow": [
        "test_a_file_that_cannot_be_written_is_one_message_and_loses_no_step"
    ],
    "a file of such a run cannot be written for another reason": [
        "test_a_file_of_a_server_that_cannot_be_written_is_one_message"
    ],
    "one of [several hosts](clusters.md) fails": [
        "test_a_host_that_is_lost_takes_nothing_along_and_the_other_goes_on",
        "test_of_three_hosts_two_are_lost_one_after_the_other_and_one_comes_back",
    ],
    "processes [join, leave or are lost](changing_processes.md)": [
        "test_a_job_on_1_2_4_3_2_4_processes_makes_the_model_of_one_device"
    ],
    "the disk is full": [FULL, "test_a_full_disk"],
    "the disk is full at the end": [
        FULL,
        "test_a_lone_process_keeps_a_last_state_that_does_not_fit_on_the_disk_in_memory",
    ],
    "the disk is full before the run begins": [
        FULL,
        "test_a_full_disk",
        "test_a_lone_process_keeps_a_last_state_that_does_not_fit_on_the_disk_in_memory",
    ],
    "a stop signal, to the program or to all its processes": ["test_a_stop_signal"],
    "a stop signal before a worker has joined": ["test_a_stop_signal_before_a_worker_has_joined"],
    "a process of the server is killed": [
        "test_a_role_that_is_killed_is_restarted_and_a_killed_program_continues_from_its_checkpoint"
    ],
    "the program is killed": [
        "test_a_role_that_is_killed_is_restarted_and_a_killed_program_continues_from_its_checkpoint"
    ],
    "a hook of such a run raises an error": ["test_an_error_of_a_hook_of_a_server_loses_no_step"],
    "the viewer of such a run closes": ["test_a_viewer_that_closes_its_end_ends_nothing_of_a_server"],
    "a stop signal, and the disk stays full for ten seconds": ["test_a_full_disk"],
    "the disk has no room for a checkpoint": ["test_a_full_disk"],
}
"""The lines of the tables in docs/guide/endings.md, and the tests of each."""


def test_every_line_of_the_guide_has_its_test():
    here = pathlib.Path(__file__)
    text = (here.parents[2] / "docs" / "guide" / "endings.md").read_text()
    cells = [re.split(r"(?<!\\)\|", row)[1].strip() for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    lines = {cell.replace("\\|", "|") for cell in cells} - {"what happens", "---"}
    assert lines == set(LINES)
    trees = [ast.parse(path.read_text()) for path in here.parent.glob("test_*.py")]
    tests = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for names in LINES.values() for name in names} <= tests


@pytest.fixture
def start(tmp_path):
    with ending_jobs.starting(tmp_path) as make:
        yield make


def resumes_at(start, step, *, said=None, **settings):
    """Check that a resume continues from a step that is at least `step`, and makes further ones."""
    job = start("--resume", **settings)
    job.train_to(step + 2)
    if said:
        assert said in job.text()
    return job


BROKEN = """
import dataclasses, jaxdist, tiny_experiment

def hook(info):
    if info.step == 9:
        raise KeyError("mine")

def get_config():
    return dataclasses.replace(tiny_experiment.get_config(), hooks=(hook,))
"""


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_of_a_hook_loses_no_step(start, tmp_path, processes):
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN)
    path = {"PYTHONPATH": os.pathsep.join([str(ending_jobs.EXPERIMENT.parent), os.environ.get("PYTHONPATH", "")])}
    job = start(processes=processes, experiment=broken, environment=path)
    assert job.end() == 2, job.text()
    assert "mine" in job.text()
    assert job.saved_step() == 9 if not processes else job.saved_step() >= 7
    broken.write_text(BROKEN.replace("== 9", "== 0"))
    again = start("--resume", processes=processes, experiment=broken, environment=path, steps=12)
    assert again.end() == 0, again.text()
    assert record.RunRecord.read(job.run_dir).step == 12


def test_a_stop_and_the_death_of_a_process_lose_no_step(start):
    """SIGTERM, then a process dies: the supervisor saves what it has in memory, and says "try again"."""
    job = start()
    job.train_to(6)
    step = job.reported_step()
    kill(signal.SIGTERM, job.process.pid)
    kill(signal.SIGKILL, *job.children())
    assert job.end() == 75
    assert job.saved_step() >= step - 2
    made = record.RunRecord.read(job.run_dir)
    assert (made.end_reason, made.step) == ("preempted", job.saved_step())
    assert re.search(r"saved from memory|Saving and stopping", job.text())


def test_a_supervisor_that_is_killed_leaves_a_checkpoint_and_a_resume_waits_for_it(start):
    job = start()
    job.train_to(6)
    kill(signal.SIGSTOP, *job.children())  # makes no further step, of which the resume needs fifty
    step = job.reported_step()
    kill(signal.SIGKILL, job.process.pid)
    again = start("--resume", steps=step + 50)
    assert again.end() == 0, again.text()
    assert int(re.search(r"continues from the checkpoint of step (\d+)", again.text())[1]) >= step - 2
    assert record.RunRecord.read(job.run_dir).step == step + 50


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_hang_is_one_message_that_names_the_process(start, stopped):
    """Nothing of Gloo, no stacks: these are in the logs."""
    job = start("--set", "recovery.hang_seconds=6", processes=2)
    event = job.train_to(6)
    kill(signal.SIGSTOP, event["process_ids"][stopped])
    job.wait_for(lambda: job.start_event() not in (None, event), "the next attempt")
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    ends = [each for each in restart_events.read_events(job.run_dir) if each["event"] == "end"]
    assert ends[0]["status"] == 75
    assert job.text().count("The job hangs") == 1
    assert f"The job hangs: process {stopped} is in" in job.text()
    assert f"log in {job.run_dir / 'logs' / 'attempt-0'}." in job.text()
    assert not re.search("Gloo|Traceback|Thread 0x", job.text(), re.IGNORECASE)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("processes", [0, 2])
def test_a_stop_signal_saves_the_step_at_hand(start, number, processes):
    job = start(processes=processes)
    if processes:
        job.train_to(6)
    else:
        job.wait_for(lambda: (job.run_dir / "metrics.jsonl").exists() and job.text(), "a step")
    kill(number, job.process.pid)
    assert job.end() == 75, job.text()
    made = record.RunRecord.read(job.run_dir)
    assert (made.end_reason, made.step) == ("preempted", job.saved_step())
    assert f"{number.name}: Saving and stopping" in job.text()


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_every_process_of_a_job_is_one_request(start, number):
    """As systemd and container engines send it: to the supervisor, the fork server and the processes."""
    job = start(processes=2)
    job.train_to(6)
    everyone = [*job.children(), job.process.pid, job.fork_server()]
    for _ in range(3):
        kill(number, *everyone)
    assert job.end() == 75, job.text()
    made = record.RunRecord.read(job.run_dir)
    assert (made.end_reason, made.step) == ("preempted", job.saved_step())
    assert made.step >= 6


@pytest.mark.soak
def test_a_second_signal_leaves_at_once_and_the_state_is_saved_all_the_same(start):
    job = start()
    job.train_to(6)
    kill(signal.SIGSTOP, *job.children())  # it would never save
    kill(signal.SIGTERM, job.process.pid)
    time.sleep(1.5)
    kill(signal.SIGINT, job.process.pid)
    assert job.end() == 128 + signal.SIGINT, job.text()
    assert job.saved_step() >= 4


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.soak)]
)
def test_a_signal_while_the_supervisor_imports_is_one_line(start, number, status):
    job = start()
    job.wait_for(lambda: ending_jobs.fork_servers(job), "the fork server")
    kill(number, job.process.pid)
    assert job.end() == status, job.text()
    assert job.text() == "jaxdist: Interrupted; nothing was left to save.\n"
    assert not (job.run_dir / record.FILE_NAME).exists()


@pytest.mark.soak
def test_a_signal_in_start_up_begins_nothing(start):
    job = start(processes=2)
    job.wait_for(job.start_event, "a start")
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    assert "Traceback" not in job.text()


@pytest.mark.soak
def test_a_signal_in_start_up_of_a_lone_process_saves_the_first_step(start):
    job = start(processes=0)
    job.wait_for(job.imports_jax, "the imports")
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    assert record.RunRecord.read(job.run_dir).step == job.saved_step() == 1
    assert "Traceback" not in job.text()


@pytest.mark.soak
@pytest.mark.parametrize("processes", [0, 1])
def test_under_nohup_the_end_of_the_terminal_ends_nothing(start, processes):
    job = start(processes=processes, before=["nohup"])
    metrics = job.run_dir / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and metrics.read_text(), "a step")
    everyone = [job.process.pid, *(job.children() if processes else ())]
    kill(signal.SIGHUP, *everyone)
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    assert "SIGTERM: Saving and stopping" in job.text()
    assert "SIGHUP" not in job.text()


@pytest.mark.soak
def test_a_process_that_dies_and_then_a_stop(start):
    """Between two attempts: what is in memory is saved."""
    job = start()
    job.train_to(6)
    step = job.reported_step()
    kill(signal.SIGKILL, *job.children())
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    assert job.saved_step() >= step - 2
    resumes_at(start, job.saved_step(), said=f"continues from the checkpoint of step {job.saved_step()}")


@pytest.mark.soak
def test_a_signal_to_one_process_has_the_job_restarted_where_it_stopped(start):
    job = start(processes=2)
    job.train_to(6)
    first = job.start_event()["attempt"]
    kill(signal.SIGTERM, job.children()[0])
    job.wait_for(lambda: (event := job.start_event()) and event["attempt"] > first, "a restart")
    job.train_to(job.saved_step() + 2)
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_fifteen_kills_in_a_row_while_restoring_too(start):
    job = start("--set", "recovery.max_fruitless=1000")
    reached = job.reported_step()
    for strike in range(15):
        event = job.wait_for(job.start_event, "an attempt")
        if strike % 3:  # made a new step; else it is importing or restoring
            job.wait_for(lambda before=reached: job.reported_step() > before + 1, "a new step")
            reached = job.reported_step()
        kill(signal.SIGKILL, *event["process_ids"])
        job.wait_for(lambda before=event: job.start_event() not in (None, before), "the next attempt")
    job.wait_for(lambda: job.reported_step() > reached + 1, "a new step")
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    assert record.RunRecord.read(job.run_dir).step == job.saved_step() > reached


@pytest.mark.soak
def test_three_starts_that_fail_keep_what_the_first_attempt_made(start, tmp_path):
    broken = tmp_path / "broken_experiment.py"
    broken.write_text(
        f"import os, sys\nsys.path.insert(0, {str(EXPERIMENT.parent)!r})\nimport tiny_experiment\n"
        f"def get_config():\n"
        f"    if os.path.exists({str(tmp_path / 'break')!r}) and 'JAXDIST_PROCESS_ID' in os.environ: os._exit(9)\n"
        f"    return tiny_experiment.get_config()\n"
    )
    job = start("--set", "recovery.max_fruitless=2", experiment=broken)
    job.train_to(6)
    step = job.reported_step()
    (tmp_path / "break").touch()
    kill(signal.SIGKILL, *job.children())
    assert job.end() == 9, job.text()
    assert "attempts in a row failed" in job.text()
    assert job.saved_step() >= step - 2
    assert f"Step {job.saved_step()} was saved from memory" in job.text()


@pytest.mark.soak
def test_when_everything_is_killed_a_resume_continues_from_memory(start):
    job = start()
    job.train_to(6)
    step = job.reported_step()
    kill(signal.SIGKILL, job.fork_server(), job.process.pid)
    job.end()
    assert job.saved_step() == 0
    again = resumes_at(start, step - 2)
    assert re.search(r"Step \d+ was saved from memory, as a checkpoint", again.text())


@pytest.mark.soak
@pytest.mark.parametrize("processes", [0, 1])
def test_a_viewer_that_closes_its_end_ends_nothing(start, processes):
    told, tell = os.pipe()
    settings = ["--set", "writers=('console','jsonl')", "log_every=1"]
    job = start(*settings, steps=300, save_every=100, processes=processes, output=tell)
    os.close(tell)
    os.close(told)
    assert job.end() == 0, job.text()
    assert record.RunRecord.read(job.run_dir).end_reason == "max_steps"
    assert "end reason" in (job.run_dir / "logs" / "process-0.log").read_text(), "what no one could read"


@pytest.mark.soak
def test_a_fork_server_that_is_killed_or_stopped_costs_a_slower_restart(start):
    job = start()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        event = job.train_to(6)
        if number == signal.SIGSTOP:
            kill(number, job.fork_server())
        kill(signal.SIGKILL, *event["process_ids"])
        job.wait_for(lambda before=event: job.start_event() not in (None, before), "the next attempt")
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()


@pytest.mark.soak
@pytest.mark.parametrize("damage", ["emptied", "removed", "vanished", "events"])
def test_a_run_directory_that_is_damaged_meanwhile_is_no_traceback(start, damage):
    job = start()
    event = job.train_to(6)
    time.sleep(1.0)  # the supervisor looks at the record twice a second
    path = job.run_dir / record.FILE_NAME
    if damage == "emptied":
        path.write_bytes(b"")
    elif damage == "removed":
        path.unlink()
    elif damage == "vanished":
        job.run_dir.rename(job.run_dir.with_name("moved"))
    else:
        events = job.run_dir / restart_events.EVENTS_NAME
        events.unlink()
        events.mkdir()
    kill(signal.SIGKILL, *event["process_ids"])
    time.sleep(8.0)
    kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    assert "Traceback" not in job.text()
    assert record.RunRecord.read(job.run_dir).step == job.saved_step() >= 4


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_one_message_and_loses_no_step(start):
    """No file may grow beyond 200 kB, which the ledger is about to do."""
    job = start("--set", "recovery.ledger=true", processes=0, before=("prlimit", "--fsize=200000"))
    path = job.run_dir / "ledger.txt"
    job.wait_for(lambda: path.exists() and path.read_text().count("\n") > 5, "some steps")
    with path.open("a") as file:
        file.write("\n" * 199_900)
    assert job.end() == 1, job.text()
    assert "A run needs to write its files, and ledger.txt cannot be written: File too large" in job.text()
    assert "Traceback" not in job.text()
    (step,) = re.findall(r"The state of step (\d+) stays in /dev/shm", job.text())
    again = start("--resume", processes=0, steps=int(step) + 10)
    assert again.end() == 0, again.text()
    assert f"Step {step} was saved from memory" in again.text()


@pytest.mark.soak
def test_a_run_that_had_ended_is_done_whatever_is_killed_after_that(start):
    job = start("--set", "recovery.snapshot_every=0", steps=40, processes=2)
    job.wait_for(lambda: (job.run_dir / record.FILE_NAME).exists() and ended(job.run_dir), "the end")
    kill(signal.SIGKILL, *[each for each in all_children(job) if each])
    assert job.end() == 0, job.text()


def ended(run_dir):
    with contextlib.suppress(ValueError):
        return record.RunRecord.read(run_dir).end_reason
    return None


def all_children(job):
    return [event["process_ids"] for event in restart_events.read_events(job.run_dir) if event["event"] == "start"][-1]


@pytest.mark.root
def test_a_lone_process_keeps_a_last_state_that_does_not_fit_on_the_disk_in_memory(tmp_path):
    """On small file systems of their own; metrics wait for room meanwhile, and none is lost."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train = f"{sys.executable} -m jaxdist.cli train {EXPERIMENT} --devices 1 --run-dir {disk}/run --max-steps 30 "
    train += "--restartable --set checkpoints.every_steps=10 log_every=1"
    script = (
        f"mount -t tmpfs -o size=8m tmpfs {disk} && mount -t tmpfs -o size=4m tmpfs /dev/shm && cd / && "
        f"dd if=/dev/zero of={disk}/fill bs=512; {train}; echo status $?; rm {disk}/*; "
        f"dd if=/dev/zero of={disk}/fill bs=1024 count=7600; {train}; echo status $?; rm {disk}/fill; "
        f"{train}; echo status $?; ls /dev/shm; cp {disk}/run/run.json {disk}/run/metrics.jsonl {tmp_path}"
    )
    done = ending_jobs.in_own_mounts(script, stderr=subprocess.STDOUT)
    assert re.findall(r"^status (\d+)$", done.stdout, re.MULTILINE) == ["2", "1", "0"], done.stdout
    assert "Traceback" not in done.stdout
    assert f"jaxdist: A run needs room on its disk; that of {disk}/run is full. Free space" in done.stdout
    assert done.stdout.count("has no room for a checkpoint. The run continues") == 1
    assert "has no room for the checkpoint of step 30. Its state stays in /dev/shm/jaxdist-" in done.stdout
    assert "Step 30 was saved from memory" in done.stdout
    assert "jaxdist-" not in done.stdout[done.stdout.rfind("status") :], "nothing stays in memory"
    assert record.RunRecord.read(tmp_path).end_reason == "max_steps"
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 31))


@pytest.mark.root
@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_a_full_memory_costs_the_snapshots_alone(start, tmp_path, when):
    """In a mount namespace of its own, so that this machine's /dev/shm stays as it is."""
    fill = "dd if=/dev/zero of=/dev/shm/fill bs=4k 2>/dev/null; "
    script = "mount -t tmpfs -o size=600k tmpfs /dev/shm && " + (fill if when == "at the start" else "")
    later = f"(until ls /dev/shm/*/*.snapshot; do sleep 0.1; done; {fill}) & " if when == "in the middle" else ""
    command = f"{script}{later}exec {sys.executable} -m jaxdist.cli train {EXPERIMENT} --processes 1 --devices 1 "
    command += f"--run-dir {tmp_path / 'run'} --max-steps 60 --set checkpoints.every_steps=20 recovery.snapshot_every=1"
    done = ending_jobs.in_own_mounts(command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if when == "at the start":
        assert done.stderr.count("could not be written") <= 2
    assert record.RunRecord.read(tmp_path / "run").step == 60
