"""The observer: what it reads, what it answers, and what it leaves at the end of the run."""

import contextlib
import functools
import itertools
import json
import time
import types

import pytest
import tiny_experiment

from jaxdist import stop
from jaxdist.checkpoint import checkpoints
from jaxdist.config import overrides
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.errors import RunFailedError
from jaxdist.launch.supervising import job_memory
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.run import judge, observer, resume
from jaxdist.paramserver.run import shared_plan as plans
from jaxdist.run import bookkeeping, components, directory, rescue
from jaxdist.run.custom import user_hooks
from jaxdist.rundir import record


class Crew:
    """Does what the scheduler of a run would do, at its start: write rows of steps, and offer a cut after the last.

    As the wire, it has servers answer what is read of the cut; `reads` are the parts, `sent` all other messages. What
    is asked for again, as on a busy machine, counts once.
    """

    restarts = 0

    def __init__(self, watcher, steps, *, end_reason="", examples=16, loss=0.5, trained=None):
        self.world, self.plan, self.folder = watcher.world, watcher.plan, watcher.directory
        self.steps, self.end_reason = steps, end_reason
        self.examples, self.loss, self.trained = examples, loss, trained
        self.looks, self.progressed_ = 0, 0
        self.died, self.sent, self.reads, self.asked = {}, [], [], set()

    def send(self, to, message):
        if not isinstance(message, messages.Read):
            self.sent.append((to, message))
            return
        if message not in self.asked:
            self.reads.append(message.part)
        self.asked.add(message)
        state = shard_state(message.shard)
        arrays = state.params if message.part == messages.PARAMS else state.opt_state
        ends = message.term, message.shard, message.number, message.part, self.steps[-1], 7, arrays
        self.world.receive(messages.ReadAnswer(*ends))

    def offer(self, number=1):
        trained = self.trained or messages.Trained(self.steps[-1], ())
        primaries = tuple(f"server/{n}/a" for n in range(self.plan.settings.servers))
        offer = messages.Offer(1, number, self.steps[-1], self.end_reason, trained, primaries)
        self.world.receive(offer)

    def start(self):
        rows = [{"step": s, "examples": self.examples, "metrics": {"loss": self.loss}} for s in self.steps]
        rows = [row | {"time": self.time(row["step"])} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "torn'
        (self.folder / run_folder.STEPS_NAME).write_text(text)
        self.offer()

    def time(self, step):
        return step

    def look_after(self):
        self.looks += 1
        assert self.looks < 400, "the observer does not end"
        return self.died if self.looks == 1 else {}

    def progressed(self):
        self.progressed_ += 1

    def close(self, *, orderly):
        """End as servers do: they leave their last counters."""
        content = {"counters": {"updates": 11}, "staleness": {"0": 11}}
        (self.folder / run_folder.STATISTICS_NAME).mkdir()
        (self.folder / run_folder.STATISTICS_NAME / "server-0-a-9.json").write_text(json.dumps(content))


class Checkpoints:
    """A checkpointer in memory."""

    def __init__(self):
        self.saved = []
        self.sent, self.sent_before = [], []  # what the observer has sent, and how much of it before each save

    def latest_step(self):
        return self.saved[-1][0] if self.saved else None

    def save(self, step, state, data_state, metrics):
        assert int(state.step) == step
        self.sent_before.append(len(self.sent))
        self.saved.append((step, data_state))

    def wait(self):
        pass


@functools.cache
def make_plan(max_steps):
    experiment = overrides.override(tiny_experiment.get_config(), [f"stop.max_steps={max_steps}"])
    return plans.make_plan(experiment, ParameterServer(workers=2, servers=2), kind="elementwise")


@functools.cache
def shard_state(number):
    return plans.make_shard(make_plan(5), number).export()


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Return a function that makes the observer of a run of `max_steps` steps."""
    monkeypatch.setattr(judge.Judge, "evaluate", lambda self, state: {"accuracy": 0.75})

    def make(max_steps=5):
        (tmp_path / run_folder.DIRECTORY_NAME).mkdir()
        plan = make_plan(max_steps)
        start = resume.Start(stop.Progress())
        attempt = observer.facts_of(
            plan,
            tmp_path,
            start,
            None,
            identity=components.identity_of(plan.experiment, plan.loader.beginning.fingerprint),
            silent=True,
            command="jaxdist train x.py",
            num_devices=1,
            source=bookkeeping.ExperimentSource("x.py"),
        )
        return observer.Observer(plan, start, Checkpoints(), attempt)

    return make


def run(watcher, crew, *, stop_requested=lambda: False):
    made = watcher.run(crew, crew, stop_requested)
    return made, crew.sent


def test_a_run_to_its_last_step_is_evaluated_saved_and_recorded(tmp_path, watch):
    watcher = watch(5)
    crew = Crew(watcher, [1, 2, 3, 4, 5], end_reason="max_steps")
    crew.died = {"worker/0": 7}
    made, sent = run(watcher, crew)
    assert watcher.books.checkpointer.latest_step() == 5
    said = {messages.Died("worker/0", 7), messages.Verdict(1, 1, "max_steps")}
    assert set(sent) == {("scheduler", message) for message in said}
    assert crew.progressed_ == 1
    # The cut counts exactly: 52 examples of the first epoch and 16 of the second, whatever the rows added up to.
    assert (made.end_reason, made.step, made.examples_seen) == ("max_steps", 5, 52 + 16)
    assert made.params_sha256 == record.params_sha256(watcher.state.params)
    assert made.extra["ps"]["updates"] == 11
    assert set(made.metrics) >= {"train/loss", "eval/accuracy"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert record.RunRecord.read(tmp_path).end_reason == "max_steps"


def read_at_step_2(watcher, *, saves=False, evaluates=False):
    """Return what is read of a cut in the middle of a run, where this is due."""
    watcher.books.saves = types.SimpleNamespace(due=lambda: saves)
    watcher.books.evaluations = types.SimpleNamespace(due=lambda: evaluates)
    crew = Crew(watcher, [1, 2])
    watcher.books.checkpointer.sent = crew.sent
    look, verdict = crew.look_after, ("scheduler", messages.Verdict(1, 1, ""))

    def look_after():
        if verdict in crew.sent and not crew.end_reason:
            crew.at_two, crew.end_reason = list(crew.reads), "max_steps"
            crew.steps = [1, 2, 3, 4, 5]
            crew.offer(number=2)
        return look()

    crew.look_after = look_after
    run(watcher, crew)
    assert crew.sent == [verdict, ("scheduler", messages.Verdict(1, 2, "max_steps"))]
    return crew.at_two


def test_what_is_read_of_a_cut_is_what_is_due(watch):
    assert read_at_step_2(watch()) == []


def test_an_evaluation_reads_the_params_alone(watch):
    assert read_at_step_2(watch(), evaluates=True) == ["params", "params"]


def test_a_checkpoint_reads_the_state_of_the_optimizer_as_well(watch):
    assert read_at_step_2(watch(), saves=True) == ["params", "params", "opt_state", "opt_state"]


def test_a_checkpoint_that_would_take_too_much_of_the_time_is_left_out(watch, monkeypatch):
    watcher = watch()
    monkeypatch.setattr(watcher.books, "may_save", lambda: False)
    assert read_at_step_2(watcher, saves=True) == []
    assert [step for step, _ in watcher.books.checkpointer.saved] == [5]


def test_training_continues_before_a_checkpoint_is_saved_and_ends_after_it(watch):
    watcher = watch()
    read_at_step_2(watcher, saves=True)
    assert watcher.books.checkpointer.sent_before == [1, 1]


def test_a_hook_at_evaluations_may_ask_for_the_state_of_the_optimizer(watch):
    found = []
    watcher = watch()
    hook = types.SimpleNamespace(on_evaluation=lambda info: found.append(info.opt_state))
    watcher.books.hooks = user_hooks.UserHooks((hook,), True)
    assert sorted(read_at_step_2(watcher, evaluates=True)) == ["opt_state", "opt_state", "params", "params"]
    assert all(state is not None for state in found)


def test_the_best_evaluation_so_far_reads_the_rest_and_is_saved(watch, monkeypatch):
    watcher = watch()
    monkeypatch.setattr(watcher.books, "_is_best", lambda: watcher.progress.step == 2)
    assert read_at_step_2(watcher, evaluates=True) == ["params", "params", "opt_state", "opt_state"]
    assert [step for step, _ in watcher.books.checkpointer.saved] == [2, 5]


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_returned_to_a_saved_cut_and_is_stopped_there_is_saved_as_it_is(watch, saved):
    """A checkpoint of a later step, from before the return, is worth more and stays the newest."""
    watcher = watch(50)
    crew = Crew(watcher, [1, 2, 3, 4, 3], end_reason="preempted")
    if saved:
        watcher.books.checkpointer.saved.append((4, {}))
    made, sent = run(watcher, crew, stop_requested=lambda: not watcher.is_untouched)
    assert (made.step, made.end_reason) == (3, "preempted")
    assert watcher.books.checkpointer.latest_step() == (4 if saved else 3)
    assert ("scheduler", messages.Verdict(1, 1, "preempted")) in sent


def test_batches_done_out_of_order_are_counted_and_saved_as_they_are(tmp_path, watch):
    """Batches 0, 1 and 3 are trained: 16 + 16 + 4 examples."""
    watcher = watch(3)
    crew = Crew(watcher, [1, 2, 3], end_reason="max_steps", trained=messages.Trained(2, (3,)))
    made, _ = run(watcher, crew)
    assert made.examples_seen == 36
    ((step, data_state),) = watcher.books.checkpointer.saved
    assert (step, data_state["position"]["position"], data_state[resume.BEYOND]) == (3, 32, [3])


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(tmp_path, watch, capfd):
    watcher = watch(5)
    reports = watcher.directory / run_folder.NONFINITE_NAME
    reports.mkdir()
    (reports / "worker-0.txt").write_text("worker/0. Step 2: the loss is nan.")
    crew = Crew(watcher, [1, 2], loss=float("nan"))
    made, sent = run(watcher, crew)
    assert watcher.books.checkpointer.latest_step() is None
    assert made.end_reason == "nonfinite"
    assert set(sent) == {("scheduler", messages.Verdict(1, 1, "nonfinite"))}
    assert "worker/0. Step 2" in (tmp_path / directory.NONFINITE_NAME).read_text()


def test_a_request_to_stop_is_passed_on_and_repeated_and_ends_the_run_saved(tmp_path, watch, monkeypatch):
    monkeypatch.setattr(observer, "REPEAT_SECONDS", 0.0)
    watcher = watch(50)
    crew = Crew(watcher, [1, 2])
    start, looks = crew.start, []
    crew.start = lambda: None

    def look_after():
        looks.append(None)
        if len(looks) == 5:  # the scheduler has received the request, and shows its last cut
            crew.end_reason = "preempted"
            start()
        return {}

    crew.look_after = look_after
    watcher.is_untouched = False
    made, sent = run(watcher, crew, stop_requested=lambda: True)
    assert watcher.books.checkpointer.latest_step() == 2
    assert made.end_reason == "preempted"
    assert sent.count(("scheduler", messages.Halt("preempted"))) >= 2
    assert not [name for name in made.metrics if name.startswith("eval/")], "a run that is stopped has no time for it"


def test_an_evaluation_that_is_due_at_the_step_of_a_stop_is_made(tmp_path, watch):
    """A resume continues after that step: the row would be missing, and a rule of patience would see one less."""
    watcher = watch(50)
    crew = Crew(watcher, [1, 2, 3, 4], end_reason="preempted")  # the first epoch, after which one is due
    made, _ = run(watcher, crew, stop_requested=lambda: not watcher.is_untouched)
    assert (made.step, made.end_reason, made.metrics["eval/accuracy"]) == (4, "preempted", 0.75)
    assert watcher.progress.last_evaluation == watcher.books.checkpointer.latest_step() == 4


@pytest.mark.parametrize("looks", [0, 3])
def test_a_run_that_is_stopped_before_a_worker_has_joined_ends_at_once(watch, looks):
    """A start takes seconds: nothing is started any more, or what is starting is not waited for."""
    watcher = watch(50)
    crew = Crew(watcher, [])
    did = []
    crew.start, crew.close = lambda: did.append("start"), lambda *, orderly: did.append(orderly)
    made, sent = run(watcher, crew, stop_requested=lambda: crew.looks == looks)
    assert (made.end_reason, made.step, sent) == ("preempted", 0, [])
    assert did == (["start", False] if looks else [False])
    assert watcher.books.checkpointer.latest_step() is None


def test_steps_after_a_return_to_a_snapshot_are_counted_once(tmp_path, watch):
    watcher = watch(4)
    crew = Crew(watcher, [1, 2, 3, 2, 3, 4], end_reason="max_steps")
    made, _ = run(watcher, crew)
    assert (made.step, made.examples_seen) == (4, 52)
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]


def test_a_step_is_shown_with_its_own_gradient_norm(watch):
    """Which is told after the step."""
    watcher, shown = watch(4), []
    with watcher.books.shown():
        watcher.books.display = types.SimpleNamespace(
            update=lambda step, metrics, epoch: shown.append((step, metrics["train/grad_norm"]))
        )
        for step in (1, 2):
            watcher._take_step({"step": step, "examples": 16, "metrics": {"loss": 0.5}, "time": step})
            watcher._show_step()
            watcher._take_step({"step": step, "grad_norm": float(step)})
            watcher._show_step()
    assert shown == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_wall_clock_that_is_set_does_not_change_how_long_the_run_has_trained(tmp_path, watch, monkeypatch, jump):
    set_after = itertools.chain([0.0], itertools.repeat(jump))
    clock = types.SimpleNamespace(
        time=lambda: time.time() + next(set_after), monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr(observer, "time", clock)
    watcher = watch(5)
    crew = Crew(watcher, [1, 2, 3, 4, 5], end_reason="max_steps")
    crew.time = lambda step: time.time() + jump
    run(watcher, crew)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(seconds) == 5
    assert all(0.0 <= each < 1000.0 for each in seconds)


def test_a_last_state_that_does_not_fit_on_the_disk_is_kept_in_memory(tmp_path, watch, monkeypatch, capfd):
    """The run ends with a message that says where, and the next start of the run saves it."""
    root = tmp_path / "memory"
    root.mkdir()
    make_directory = functools.partial(job_memory.memory_directory, root=root)
    monkeypatch.setattr(job_memory, "memory_directory", make_directory)
    watcher = watch(5)
    crew = Crew(watcher, [1, 2, 3, 4, 5], end_reason="max_steps")

    def save(*args):
        raise checkpoints.NoRoomError("no room")

    monkeypatch.setattr(watcher.books.checkpointer, "save", save)
    with pytest.raises(RunFailedError, match=rf"checkpoint of step 5\. Its state stays in {root}/jaxdist-"):
        run(watcher, crew)
    assert capfd.readouterr().err.count("has no room for a checkpoint. The run continues") == 1
    left = rescue.Rescue.of(tmp_path, watcher.identity, directory.what_stays(watcher.plan.experiment))
    (memory,) = job_memory.left_behind(tmp_path, root=root)
    assert left.save(memory, "error") == 5
    with contextlib.closing(
        directory.open_checkpoints(watcher.plan.experiment, tmp_path, watcher.identity)
    ) as checkpointer:
        found, data_state = checkpointer.restore(watcher.state)
    assert record.params_sha256(found.params) == record.params_sha256(watcher.state.params)
    assert data_state["position"] == plans.position(watcher.plan, 5).to_json()


def test_a_record_that_a_full_disk_does_not_take_is_one_message(watch, monkeypatch):
    watcher = watch(5)
    crew = Crew(watcher, [1, 2, 3, 4, 5], end_reason="max_steps")
    full = OSError(28, "No space left on device", "run.json")

    def write_record(end_reason, params=None):
        if end_reason:
            raise full

    monkeypatch.setattr(watcher.books, "write_record", write_record)
    with pytest.raises(RunFailedError, match=r"No space left on device: 'run\.json'"):
        run(watcher, crew)


def test_hooks_see_each_step_once_and_the_state_at_evaluations(watch):
    seen = []

    class Recorder:
        def on_start(self, info):
            seen.append(("start", info.step))

        def on_step(self, info):
            seen.append((info.step, info.metrics))

        def on_evaluation(self, info):
            seen.append(("evaluation", info.step, info.metrics, record.params_sha256(info.params)))

        def on_end(self, info):
            seen.append((info.end_reason, info.step))

    watcher = watch(4)
    watcher.books.hooks = user_hooks.UserHooks((Recorder(),), True)
    made, _ = run(watcher, Crew(watcher, [1, 2, 3, 2, 3, 4], end_reason="max_steps"))
    steps = [(step, {"train/loss": 0.5}) for step in (1, 2, 3, 4)]
    evaluation = ("evaluation", 4, {"eval/accuracy": 0.75}, made.params_sha256)
    assert seen == [("start", 0), *steps, evaluation, ("max_steps", 4)]


def test_a_process_that_dies_leaves_the_record_of_an_error(tmp_path, watch):
    watcher = watch()
    crew = Crew(watcher, [1])
    crew.look_after = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(watcher, crew)
    assert record.RunRecord.read(tmp_path).end_reason == "error"


def test_counters_of_all_processes_are_added_those_that_died_too(tmp_path, watch):
    watcher = watch()
    folder = watcher.directory / run_folder.STATISTICS_NAME
    folder.mkdir()
    for number, (updates, staleness) in enumerate([(3, {"0": 2, "1": 1}), (4, {"1": 4})]):
        content = {"counters": {"updates": updates, "fenced": 1}, "staleness": staleness}
        (folder / f"server-0-a-{number}.json").write_text(json.dumps(content))
    (folder / "worker-0-7.json").write_text("{")
    found = watcher.statistics()
    watcher.counted_before = json.loads(json.dumps(found))  # as the record of an attempt that is resumed has it
    again = watcher.statistics()
    with watcher.books.shown():  # closes the metrics files
        pass
    assert (found["updates"], found["fenced"], found["failovers"]) == (7, 2, 0)
    assert found["staleness"] == {0: 2, 1: 5}
    assert (again["updates"], again["fenced"], again["failovers"]) == (14, 4, 0)
    assert again["staleness"] == {0: 4, 1: 10}
