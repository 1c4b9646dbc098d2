"""With real processes: a running job grows and shrinks, and ends with the bits of one device."""

import contextlib
import pathlib
import signal
import subprocess
import sys
import time

import changing_experiment
import held_experiment
import jax
import pytest

from jaxdist.launch.supervising import restart_events
from jaxdist.run import attempt
from jaxdist.rundir import ledger, record

EXPERIMENT = pathlib.Path(changing_experiment.__file__)
SECONDS = 600


def start(stack, log, *arguments):
    output = stack.enter_context(log.open("wb"))
    command = [sys.executable, "-m", "jaxdist.cli", *map(str, arguments)]
    process = stack.enter_context(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
    stack.callback(process.kill)
    return process


def await_processes(run_dir, count, job):
    """Wait until the job makes new steps on so many processes, after a change."""
    end = time.monotonic() + SECONDS
    while True:
        changes = restart_events.changes(restart_events.read_events(run_dir))
        if changes and changes[-1]["processes"] == count and changes[-1]["seconds_lost"]:
            return
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < end, f"not yet {count} processes: {changes}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_1_2_4_3_2_4_processes_makes_the_model_of_one_device(tmp_path, monkeypatch):
    run_dir, go = tmp_path / "run", tmp_path / "go"
    monkeypatch.setenv(held_experiment.GO, str(go))
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENT.parents[1]), prepend=":")
    with contextlib.ExitStack() as stack:
        job = start(stack, tmp_path / "job.log", "train", EXPERIMENT, "--processes", 1, "--run-dir", run_dir)
        while not (run_dir / restart_events.EVENTS_NAME).exists():
            assert job.poll() is None, (tmp_path / "job.log").read_text()
            time.sleep(0.05)
        stays = start(stack, tmp_path / "join-1.log", "join", run_dir, "--processes", 1)
        await_processes(run_dir, 2, job)
        lost = start(stack, tmp_path / "join-2.log", "join", run_dir, "--processes", 2)
        await_processes(run_dir, 4, job)
        leave = start(stack, tmp_path / "leave.log", "leave", run_dir, "--processes", 1)
        await_processes(run_dir, 3, job)
        lost.send_signal(signal.SIGKILL)
        await_processes(run_dir, 2, job)
        last = start(stack, tmp_path / "join-3.log", "join", run_dir, "--processes", 2)
        await_processes(run_dir, 4, job)
        go.touch()
        assert [each.wait(SECONDS) for each in (job, stays, leave, last)] == [0, 0, 0, 0]
    made = record.RunRecord.read(run_dir)
    changes = made.extra["changes"]
    assert [each["kind"] for each in changes] == ["join", "join", "leave", "leave", "join"]
    assert [each["processes"] for each in changes] == [2, 4, 3, 2, 4]
    assert all(each["seconds_lost"] > 0 for each in changes)
    ledger.check(ledger.read(run_dir), num_examples=52)
    assert [path.name for path in (run_dir / "checkpoints").glob("[0-9]*")] == [str(changing_experiment.STEPS)], (
        "no change needs the disk"
    )
    alone = attempt.train(
        changing_experiment.get_config(),
        attempt.RunOptions(run_dir=tmp_path / "alone", silent=True),
        devices=jax.devices()[:1],
    )
    assert made.params_sha256 == alone.params_sha256
