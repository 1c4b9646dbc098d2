import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist import loop, record, stop
from jaxdist.step import NONFINITE_LEAF


@dataclasses.dataclass(frozen=True)
class Place:
    """A data position, as far as the loop looks at it."""

    epoch: int
    position: int
    num_examples: int


class FakeDevice:
    """Notes in `events` what is dispatched and what is read back; a step's values can be read once it was dispatched.

    The state is the number of updates made; a batch that is NaN makes none.
    """

    def __init__(self):
        self.events = []

    def step(self, state, batch):
        number = sum(kind == "dispatch" for kind, _ in self.events) + 1
        self.events.append(("dispatch", number))
        finite = math.isfinite(batch["x"])
        return FakeState(state.step + finite), {
            "loss": FakeScalar(self, number, batch["x"]),
            NONFINITE_LEAF: FakeScalar(self, number, -1 if finite else 2),
        }


class FakeScalar:
    def __init__(self, device, number, value):
        self.device, self.number, self.value = device, number, value

    def addressable_data(self, index):
        assert index == 0
        self.device.events.append(("read", self.number))
        return np.asarray(self.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeState:
    step: int


def make_batches(values, *, num_examples=6, batch_size=2):
    """Yield a batch for each value, the epochs `num_examples` long, the last batch of each perhaps smaller."""
    epoch, position = 0, 0
    for value in values:
        if position == num_examples:
            epoch, position = epoch + 1, 0
        position = min(position + batch_size, num_examples)
        yield {"x": value}, Place(epoch, position, num_examples)


def fit(device, values, *, stop=lambda progress: None, **options):
    return loop.fit(device.step, FakeState(0), make_batches(values), stop=stop, **options)


@given(num_steps=st.integers(1, 8))
def test_a_step_is_read_back_only_after_the_next_was_dispatched(num_steps):
    """Nothing else is: between two dispatches the loop waits for no more than the flag of the step before."""
    device = FakeDevice()
    fit(device, [0.0] * num_steps)
    expected = [("dispatch", 1)]
    for number in range(2, num_steps + 1):
        expected += [("dispatch", number), ("read", number - 1)]
    assert device.events == [*expected, ("read", num_steps)]


@given(num_steps=st.integers(1, 12), num_examples=st.integers(1, 7), batch_size=st.integers(1, 4))
def test_progress_follows_the_data(num_steps, num_examples, batch_size):
    seen = []
    batches = list(make_batches([0.0] * num_steps, num_examples=num_examples, batch_size=batch_size))
    loop.fit(
        FakeDevice().step,
        FakeState(0),
        batches,
        stop=lambda progress: None,
        hooks=[lambda info: seen.append(dataclasses.replace(info.progress, seconds=0.0))],
    )
    per_epoch = math.ceil(num_examples / batch_size)
    for number, progress in enumerate(seen, 1):
        epochs, steps = divmod(number, per_epoch)
        assert (progress.step, progress.epoch) == (number, epochs)
        assert progress.examples_seen == epochs * num_examples + min(steps * batch_size, num_examples)


def test_the_end_of_the_data_ends_the_run_with_the_last_state_and_position():
    result = fit(FakeDevice(), [0.0] * 4)
    assert (result.end_reason, result.state, result.position) == ("max_epochs", FakeState(4), Place(1, 2, 6))
    assert result.nonfinite is None


def test_no_data_at_all_is_an_end_too():
    result = fit(FakeDevice(), [])
    assert (result.end_reason, result.state, result.position) == ("max_epochs", FakeState(0), None)


@given(limit=st.integers(1, 6))
def test_the_stop_rule_is_asked_after_each_step_and_its_hooks(limit):
    order = []

    def rule(progress):
        order.append(("rule", progress.step))
        return "max_steps" if progress.step == limit else None

    result = fit(FakeDevice(), [0.0] * 9, stop=rule, hooks=[lambda info: order.append(("hook", info.step))])
    assert order == [(kind, step) for step in range(1, limit + 1) for kind in ("hook", "rule")]
    assert (result.end_reason, result.progress.step, result.state) == ("max_steps", limit, FakeState(limit))


def test_a_hook_that_evaluates_can_end_the_run_at_once():
    def evaluate(info):
        info.progress.record_evaluation({"eval/accuracy": info.step / 10})

    result = fit(FakeDevice(), [0.0] * 9, stop=stop.target("eval/accuracy", 0.3), hooks=[evaluate])
    assert (result.end_reason, result.progress.step) == ("target_reached", 3)


def test_hooks_see_the_state_the_metrics_and_the_position_of_their_step():
    seen = []
    fit(FakeDevice(), [1.0, 2.0], hooks=[seen.append])
    assert [(info.step, info.state, info.position.position) for info in seen] == [
        (1, FakeState(1), 2),
        (2, FakeState(2), 4),
    ]
    assert [info.metrics["loss"].value for info in seen] == [1.0, 2.0]


def test_a_requested_stop_ends_after_the_step_and_a_reached_end_goes_first():
    asked = []

    def requested(step):
        asked.append(step)
        return step == 3

    result = fit(FakeDevice(), [0.0] * 9, stop_requested=requested)
    assert (result.end_reason, result.progress.step, result.state) == ("preempted", 3, FakeState(3))
    assert asked == [1, 2, 3]
    both = fit(FakeDevice(), [0.0] * 9, stop=stop.max_steps(3), stop_requested=lambda step: step == 3)
    assert both.end_reason == "max_steps"


@given(bad=st.integers(1, 6))
def test_a_step_that_is_not_finite_ends_the_run_and_hands_back_its_batch(bad):
    values = [math.nan if number == bad else float(number) for number in range(1, 7)]
    seen = []
    result = fit(FakeDevice(), values, hooks=[lambda info: seen.append(info.step)])
    assert result.end_reason == "nonfinite"
    assert (result.nonfinite.step, result.nonfinite.leaf) == (bad, 2)
    assert math.isnan(result.nonfinite.batch["x"])
    # One step more was on its way already; no hook, and so no checkpoint, comes after it.
    assert seen == list(range(1, bad + 1))
    assert result.progress.step == bad
    assert result.position == Place((bad - 1) // 3, (bad - 1) % 3 * 2 + 2, 6)


def test_the_last_step_is_looked_at_before_its_end_is_called_good():
    result = fit(FakeDevice(), [0.0, math.nan], stop=stop.max_steps(2))
    assert (result.end_reason, result.nonfinite.step, result.state) == ("nonfinite", 2, FakeState(1))


def test_a_run_that_was_over_makes_no_further_step():
    device, done = FakeDevice(), stop.Progress(step=5, seconds=3.0)
    result = loop.fit(device.step, FakeState(5), make_batches([0.0]), stop=stop.max_steps(5), progress=done)
    assert (result.end_reason, result.state, result.position) == ("max_steps", FakeState(5), None)
    assert device.events == []


def test_a_resumed_run_counts_on():
    before = stop.Progress(step=5, seconds=100.0, metrics={"eval/accuracy": 0.5})
    result = loop.fit(FakeDevice().step, FakeState(5), make_batches([0.0] * 9), stop=stop.max_steps(7), progress=before)
    assert (result.progress.step, result.progress.metrics) == (7, {"eval/accuracy": 0.5})
    assert result.progress.seconds >= 100.0


def test_the_count_starts_at_the_state_where_no_progress_is_given():
    result = loop.fit(FakeDevice().step, FakeState(jnp.int32(5)), make_batches([0.0]), stop=lambda progress: None)
    assert result.progress.step == 6


def test_time_goes_to_its_accounts_and_the_compiling_step_is_not_timed():
    clock = Clock()
    stopwatch = record.Stopwatch(clock=lambda: clock.now)
    times = []

    def step(state, batch):
        clock.now += 10.0 if state.step == 0 else 1.0
        return FakeDevice().step(state, batch)

    def batches():
        for item in make_batches([0.0] * 3):
            clock.now += 0.5
            yield item

    loop.fit(step, FakeState(0), batches(), stop=lambda progress: None, stopwatch=stopwatch, step_times=Times(times))
    seconds = stopwatch.seconds()
    assert (seconds["compile"], seconds["compute"], seconds["input"]) == (10.0, 2.0, 1.5)
    assert len(times) == 2


@dataclasses.dataclass
class Clock:
    now: float = 0.0


@dataclasses.dataclass
class Times:
    seconds: list

    def add(self, seconds):
        self.seconds.append(seconds)


def test_an_error_in_the_data_reaches_the_caller():
    def batches():
        yield from make_batches([0.0])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        loop.fit(FakeDevice().step, FakeState(0), batches(), stop=lambda progress: None)
