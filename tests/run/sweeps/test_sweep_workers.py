"""Trials in several processes: real ones, which do no more than answer. One that dies takes its own trial alone."""

import io
import json
import sys
import textwrap

import pytest
from reported_runs import write_run

from jaxdist.errors import ConfigError
from jaxdist.run.sweeps import conducting, sweep_record, sweep_workers, trial_runs

ANSWERING = textwrap.dedent("""
    import json, os, signal, sys, time
    for line in sys.stdin:
        trial = json.loads(line)
        print("working on", trial["number"], file=sys.stderr)
        what = trial["settings"]["do"]
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            sys.exit(3)
        end = "max_steps"
        if what == "wait":
            signal.sigwait({signal.SIGTERM})
            end = "preempted"
        print(json.dumps({"number": trial["number"], "end_reason": end}), flush=True)
""")


def make_sweep(*what):
    trials = [sweep_record.Trial.make(number, {"do": each}) for number, each in enumerate(what)]
    return sweep_record.Sweep("tiny", [], ["do=x"], "grid", len(what), 0, "eval/accuracy", "max", trials)


def run(sweep_dir, sweep, *, count, stopped=lambda: False):
    command = [
        sys.executable,
        "-c",
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})" + ANSWERING,
    ]
    workers = [sweep_workers.TrialWorker(command, {}, sweep_dir / "logs" / f"{n}.log") for n in range(count)]
    try:
        sweep_workers.run(conducting.Conductor(sweep, sweep_dir), workers, stopped)
    finally:
        for worker in workers:
            worker.close()
    return sweep_record.Sweep.read(sweep_dir).trials


def test_every_trial_is_done_and_a_death_is_that_of_one_trial(tmp_path, capsys):
    for trial in make_sweep("ok", "die", "ok", "exit", "ok").trials:
        if trial.settings["do"] == "ok":
            write_run(tmp_path / trial.name, end_reason=None)
    trials = run(tmp_path, make_sweep("ok", "die", "ok", "exit", "ok"), count=2)
    failed = [trial.failed for trial in trials]
    assert [each is None for each in failed] == [True, False, True, False, True]
    assert "was killed by signal 9" in failed[1]
    assert "ended with status 3" in failed[3]
    assert capsys.readouterr().err.count("max_steps") == 3
    logs = "".join((tmp_path / "logs" / f"{n}.log").read_text() for n in range(2))
    assert all(f"working on {number}" in logs for number in range(5))


def test_workers_that_train_are_told_to_stop_and_no_other_trial_begins(tmp_path, capsys):
    asked = iter([False, False, False])
    trials = run(tmp_path, make_sweep("wait", "wait", "ok"), count=2, stopped=lambda: next(asked, True))
    told = capsys.readouterr().err
    assert told.count("preempted") == 2
    assert "trial 3" not in told
    assert [trial.failed for trial in trials] == [None] * 3


def test_a_worker_reads_trials_and_writes_what_became_of_them_until_one_is_preempted():
    ends = iter(["max_steps", "preempted", "max_steps"])
    lines = "".join(f"{json.dumps(vars(trial))}\n" for trial in make_sweep("a", "b", "c").trials)
    answers = io.StringIO()
    sweep_workers.work(lambda trial: trial_runs.TrialOutcome(trial.number, next(ends)), io.StringIO(lines), answers)
    assert [json.loads(line)["end_reason"] for line in answers.getvalue().splitlines()] == ["max_steps", "preempted"]


def test_each_worker_has_gpus_of_its_own():
    shares = sweep_workers.shares_of_gpus(2, {"CUDA_VISIBLE_DEVICES": "0,2,5,7"})
    assert shares == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    assert sweep_workers.shares_of_gpus(3, {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}) == [{}] * 3
    assert sweep_workers.shares_of_gpus(3, {"CUDA_VISIBLE_DEVICES": ""}) == [{}] * 3
    with pytest.raises(ConfigError, match="got 3 at once, and there are 2"):
        sweep_workers.shares_of_gpus(3, {"CUDA_VISIBLE_DEVICES": "0,1"})
