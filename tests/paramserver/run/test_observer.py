"""The observer: what it makes of the scheduler's files, what it answers, and what it leaves when the run has ended."""

import contextlib
import json

import numpy as np
import pytest
import tiny_experiment

from jaxdist import stop
from jaxdist.config import overrides
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.run import observer, resume
from jaxdist.paramserver.run import shared_plan as plans
from jaxdist.paramserver.wire import encoding
from jaxdist.run import bookkeeping, components
from jaxdist.run import directory as run_directory
from jaxdist.rundir import record


class Crew:
    """Writes what the scheduler of a run would write, at its start: `rows` of steps, and a cut after the last."""

    restarts = 0

    def __init__(self, plan, folder, steps, *, end_reason="", examples=16, loss=0.5, trained=None):
        self.plan, self.folder, self.steps, self.end_reason = plan, folder, steps, end_reason
        self.examples, self.loss, self.trained = examples, loss, trained
        self.looks, self.progressed_ = 0, 0

    def start(self):
        rows = [{"step": s, "examples": self.examples, "metrics": {"loss": self.loss}, "time": s} for s in self.steps]
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "torn'
        (self.folder / run_folder.STEPS_NAME).write_text(text)
        shards = []
        for number in range(self.plan.settings.servers):
            state = plans.make_shard(self.plan, number).export()
            shards.append(messages.ReadAnswer(1, number, 1, self.steps[-1], 7, state.params, state.opt_state))
        trained = self.trained or journal.Trained(self.steps[-1], ())
        cut = journal.Cut(self.steps[-1], self.end_reason, trained, tuple(shards))
        (self.folder / run_folder.CUT_NAME).write_bytes(encoding.to_bytes(cut))

    def look_after(self):
        self.looks += 1
        assert self.looks < 400, "the observer does not end"

    def progressed(self):
        self.progressed_ += 1


@contextlib.contextmanager
def watching(tmp_path, *assignments, progress=None):
    experiment = overrides.override(tiny_experiment.get_config(), assignments)
    plan = plans.make_plan(experiment, ParameterServer(workers=2, servers=2), kind="elementwise")
    identity = components.identity_of(experiment, plan.loader.beginning.fingerprint)
    (tmp_path / run_folder.DIRECTORY_NAME).mkdir()
    with contextlib.closing(run_directory.open_checkpoints(experiment, tmp_path, identity)) as checkpointer:
        yield observer.Observer(
            plan,
            tmp_path,
            resume.Start(progress or stop.Progress()),
            None,
            checkpointer,
            identity=identity,
            silent=True,
            command="jaxdist train x.py",
            num_devices=1,
            source=bookkeeping.ExperimentSource("x.py"),
        )


def run(watcher, crew, *, stop_requested=lambda: False):
    sent = []
    made = watcher.run(crew, lambda to, message: sent.append((to, message)), stop_requested)
    return made, sent


def test_a_run_to_its_last_step_is_evaluated_saved_and_recorded(tmp_path):
    with watching(tmp_path, "stop.max_steps=5") as watcher:
        crew = Crew(watcher.plan, watcher.directory, [1, 2, 3, 4, 5], end_reason="max_steps")
        made, sent = run(watcher, crew)
        assert watcher.books.checkpointer.latest_step() == 5
    assert set(sent) == {("scheduler", messages.Verdict(5, "max_steps"))}
    assert crew.progressed_ == 1
    # The cut counts exactly: 52 examples of the first epoch and 16 of the second, whatever the rows added up to.
    assert (made.end_reason, made.step, made.examples_seen) == ("max_steps", 5, 52 + 16)
    assert made.params_sha256 == record.params_sha256(watcher.state.params)
    assert set(made.metrics) >= {"train/loss", "eval/accuracy"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert record.RunRecord.read(tmp_path).end_reason == "max_steps"


def test_batches_done_out_of_order_are_counted_and_saved_as_they_are(tmp_path):
    """Batches 0, 1 and 3 are trained: 16 + 16 + 4 examples."""
    with watching(tmp_path, "stop.max_steps=3") as watcher:
        crew = Crew(
            watcher.plan, watcher.directory, [1, 2, 3], end_reason="max_steps", trained=journal.Trained(2, (3,))
        )
        made, _ = run(watcher, crew)
        found = resume._from_checkpoint(watcher.plan, watcher.books.checkpointer)
    assert made.examples_seen == 36
    assert found.trained == journal.Trained(2, (3,))


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(tmp_path, capfd):
    with watching(tmp_path, "stop.max_steps=5") as watcher:
        reports = watcher.directory / run_folder.NONFINITE_NAME
        reports.mkdir()
        (reports / "worker-0.txt").write_text("worker/0. Step 2: the loss is nan.")
        crew = Crew(watcher.plan, watcher.directory, [1, 2], loss=float("nan"))
        made, sent = run(watcher, crew)
        assert watcher.books.checkpointer.latest_step() is None
    assert made.end_reason == "nonfinite"
    assert set(sent) == {("scheduler", messages.Verdict(2, "nonfinite"))}
    assert "worker/0. Step 2" in (tmp_path / bookkeeping.NONFINITE_NAME).read_text()


def test_a_request_to_stop_is_passed_on_and_repeated_and_ends_the_run_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(observer, "REPEAT_SECONDS", 0.0)
    with watching(tmp_path, "stop.max_steps=50") as watcher:
        crew = Crew(watcher.plan, watcher.directory, [1, 2])
        start, asked = crew.start, []
        monkeypatch.setattr(crew, "start", lambda: None)

        def stop_requested():
            asked.append(None)
            if len(asked) == 3:  # the scheduler has heard of it, and shows its last cut
                crew.end_reason = "preempted"
                start()
            return True

        monkeypatch.setattr(observer, "POLL_SECONDS", 0.0)
        watcher._maybe_halt = lambda _, halt=watcher._maybe_halt: (halt(stop_requested), stop_requested())
        made, sent = run(watcher, crew)
        assert watcher.books.checkpointer.latest_step() == 2
    assert made.end_reason == "preempted"
    assert sent.count(("scheduler", messages.Halt("preempted"))) >= 1
    assert not [name for name in made.metrics if name.startswith("eval/")], "a run that is stopped has no time for it"


def test_steps_after_a_return_to_a_snapshot_are_counted_once(tmp_path):
    with watching(tmp_path, "stop.max_steps=4") as watcher:
        crew = Crew(watcher.plan, watcher.directory, [1, 2, 3, 2, 3, 4], end_reason="max_steps")
        made, _ = run(watcher, crew)
    assert (made.step, made.examples_seen) == (4, 52)
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]


def test_a_process_that_dies_leaves_the_record_of_an_error(tmp_path):
    with watching(tmp_path) as watcher:
        crew = Crew(watcher.plan, watcher.directory, [1])
        crew.look_after = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run(watcher, crew)
    assert record.RunRecord.read(tmp_path).end_reason == "error"


def test_counters_of_all_processes_are_added_those_that_died_too(tmp_path):
    with watching(tmp_path) as watcher:
        folder = watcher.directory / run_folder.STATISTICS_NAME
        folder.mkdir()
        for number, (updates, staleness) in enumerate([(3, {"0": 2, "1": 1}), (4, {"1": 4})]):
            content = {"counters": {"updates": updates, "fenced": 1}, "staleness": staleness}
            (folder / f"server-0-a-{number}.json").write_text(json.dumps(content))
        (folder / "worker-0-7.json").write_text("{")
        found = watcher.statistics()
        watcher.books.finish("error", None)
    assert (found["updates"], found["fenced"], found["failovers"]) == (7, 2, 0)
    assert found["staleness"] == {0: 2, 1: 5}
    assert np.all(np.diff(list(found["staleness"])) > 0)
