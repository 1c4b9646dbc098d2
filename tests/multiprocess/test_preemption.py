"""A signal in every phase of real runs: they stop at one step, save, end with 75, and continue to the same bits."""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import jax
import pytest

from jaxdist import testing
from jaxdist.checkpoint import checkpoints
from jaxdist.cli import train_work
from jaxdist.config import loading, overrides
from jaxdist.launch import signals
from jaxdist.launch.supervising import board, restart_events
from jaxdist.run import attempt, stopwatch
from jaxdist.rundir import record

EXPERIMENT = pathlib.Path(__file__).parents[1] / "tiny_experiment.py"
PHASES = ("compile", "input", "compute", "eval", "checkpoint", "writing")
STEPS = 24


def signalled_once(phase, number):
    """Send this process a signal when it next enters a phase: an account of the stopwatch, or the writing of files."""
    owner, name = (checkpoints.manifests, "write") if phase == "writing" else (stopwatch.Stopwatch, "enter")
    original, sent = getattr(owner, name), []

    def entered(*args):
        if not sent and (phase == "writing" or args[1] == phase):
            sent.append(phase)
            os.kill(os.getpid(), number)
        return original(*args)

    setattr(owner, name, entered)
    return lambda: setattr(owner, name, original) or bool(sent)


def run(run_dir, *, resume):
    """Run the experiment here, as `jaxdist train` does; return how it ended."""
    assignments = [f"stop.max_steps={STEPS}", "eval.every_steps=2", "checkpoints.every_steps=3", "reduction=canonical"]
    experiment = overrides.override(loading.load_experiment(str(EXPERIMENT)), assignments)
    with signals.stop_on_signal() as request:
        options = attempt.RunOptions(
            run_dir=pathlib.Path(run_dir),
            resume=resume,
            silent=True,
            stop_requested=lambda step: bool(request),
        )
        made = attempt.train(experiment, options, devices=jax.devices())
    return {
        "end": made.end_reason,
        "status": train_work.exit_status(made),
        "step": made.step,
        "hash": made.params_sha256,
    }


def signalled_in_every_phase(folder):
    """Return how the undisturbed run ended, how each part of the other did, and in which phases the signal came."""
    undisturbed = run(f"{folder}/undisturbed", resume=False)
    parts, sent = [], []
    for phase in PHASES:
        # The last process alone is told; all of them must stop.
        last = jax.process_index() == jax.process_count() - 1
        restore = signalled_once(phase, signal.SIGUSR1 if phase == "eval" else signal.SIGTERM) if last else None
        parts.append(run(f"{folder}/disturbed", resume=bool(parts)))
        sent += [restore()] if restore else []
    return undisturbed, [*parts, run(f"{folder}/disturbed", resume=True)], sent


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_in_any_phase_to_one_process_stops_all_at_one_step_and_loses_nothing(tmp_path, processes):
    results = testing.run_processes(signalled_in_every_phase, str(tmp_path), processes=processes, timeout_seconds=500.0)
    undisturbed, parts, _ = results[0]
    assert [result[:2] for result in results] == processes * [[undisturbed, parts]]
    assert results[-1][2] == len(PHASES) * [True]
    assert [(part["end"], part["status"]) for part in parts[:-1]] == len(PHASES) * [("preempted", 75)]
    steps = [part["step"] for part in parts]
    assert steps == sorted(set(steps))
    assert parts[-1] == undisturbed == {"end": "max_steps", "status": 0, "step": STEPS, "hash": undisturbed["hash"]}


def start_job(run_dir, *arguments):
    """Start a supervised job and wait until it trains; return it, and where its memory is and its processes are."""
    command = [sys.executable, "-m", "jaxdist.cli", "train", EXPERIMENT, "--run-dir", run_dir, "--max-steps", "1000000"]
    job = subprocess.Popen([*map(str, command), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200.0
    while time.monotonic() < deadline and job.poll() is None:
        for event in restart_events.read_events(run_dir):
            memory = pathlib.Path(event["memory"])
            report = board.read(memory, len(event["process_ids"]) - 1)
            if report and report.step >= 2:
                return job, memory, [os.pidfd_open(process_id) for process_id in event["process_ids"]]
    raise AssertionError(job.communicate()[0].decode())


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 75, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.soak),
    ],
)
def test_however_a_supervised_job_ends_it_leaves_nothing_behind(tmp_path, number, status):
    job, memory, processes = start_job(tmp_path, "--processes", "2", "--devices", "1")
    with job:
        job.send_signal(number)
        assert job.wait(timeout=200) == status
        # All hold its output open, the fork server too: its end is the end of them all.
        output = job.stdout.read().decode()
    for process in processes:
        assert select.select([process], [], [], 200)[0]
        os.close(process)
    assert not memory.exists()
    if status == 75:
        ended = record.RunRecord.read(tmp_path)
        assert (ended.end_reason, ended.restarts) == ("preempted", 0)
        assert f"{number.name}: Saving and stopping" in output
        with contextlib.closing(checkpoints.Checkpointer(tmp_path / "checkpoints", identity="x")) as checkpointer:
            assert checkpointer.latest_step() == ended.step


@pytest.mark.soak
def test_the_only_process_of_a_job_is_killed_when_it_was_stopped_too_long_and_the_job_goes_on(tmp_path):
    settings = ["--set", "recovery.hang_seconds=0.5"]
    job, _, processes = start_job(tmp_path, "--processes", "1", *settings)
    with job:
        signal.pidfd_send_signal(processes[0], signal.SIGSTOP)
        assert select.select(processes, [], [], 200)[0]
        while len([event for event in restart_events.read_events(tmp_path) if event["event"] == "start"]) < 2:
            assert job.poll() is None
        job.terminate()
        assert job.wait(timeout=200) == 75
        assert "The job hangs: process 0 was stopped" in job.stdout.read().decode()
    os.close(processes[0])


def test_a_deadline_is_a_signal_that_nobody_sends(tmp_path):
    command = [sys.executable, "-m", "jaxdist.cli", "train", str(EXPERIMENT), "--run-dir", str(tmp_path), "--json"]
    settings = ["--max-steps", "1000000", "--set", "recovery.deadline_seconds=0.5"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 75, done.stderr
    assert json.loads(done.stdout)["end_reason"] == "preempted"
