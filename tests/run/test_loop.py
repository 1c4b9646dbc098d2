import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist import errors, stop
from jaxdist.run import loop, stopwatch
from jaxdist.spmd.step import EMPTY_BATCH, NONFINITE_LEAF


@dataclasses.dataclass(frozen=True)
class Place:
    """A data position, as far as the loop looks at it."""

    epoch: int
    position: int
    num_examples: int


class FakeDevice:
    """Notes in `events` what is dispatched and what is read back; a step's values can be read once it was dispatched.

    The state is the number of updates made; a batch that is NaN makes none and marks the state, as our steps do.
    """

    def __init__(self, flags=None):
        self.events, self.flags = [], flags or {}

    def step(self, state, batch):
        number = sum(kind == "dispatch" for kind, _ in self.events) + 1
        self.events.append(("dispatch", number))
        finite, marked = math.isfinite(batch["x"]), state.step < 0
        after = state.step if marked else state.step + 1 if finite else ~state.step
        return FakeState(after), {
            "loss": FakeScalar(self, number, batch["x"]),
            NONFINITE_LEAF: FakeScalar(self, number, 2 if not finite else 0 if marked else self.flags.get(number, -1)),
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


@given(num_steps=st.integers(1, 40))
def test_the_loop_waits_every_few_steps_only_and_for_a_step_dispatched_a_while_ago(num_steps):
    """The others continue meanwhile; at the end it waits for the last."""
    device = FakeDevice()
    fit(device, [0.0] * num_steps)
    during = device.events[: device.events.index(("read", num_steps))]
    assert ("dispatch", num_steps) in during
    dispatched, read = 0, 0
    for kind, number in during:
        if kind == "dispatch":
            dispatched = number
        elif number > read:  # the flags of the steps before it, which are read next, are there by then
            assert number == dispatched - loop.LOOK_EVERY == read + loop.LOOK_EVERY
            read = number
        assert dispatched - read <= 2 * loop.LOOK_EVERY


def test_batches_in_which_nothing_counted_are_counted_and_training_goes_on():
    device = FakeDevice(flags={2: EMPTY_BATCH, 3: EMPTY_BATCH, 11: EMPTY_BATCH})
    result = fit(device, [0.0] * 11)
    assert (result.end_reason, result.progress.step, result.progress.empty_batches) == ("max_epochs", 11, 3)
    assert result.progress.metrics["train/empty_batches"] == 3


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


@given(bad=st.integers(1, 30), more=st.lists(st.integers(1, 30)))
def test_a_step_that_is_not_finite_ends_the_run_where_it_stood_before_it(bad, more):
    """Whatever comes after it, and however late the loop looks."""
    values = [math.nan if number == bad or (number > bad and number in more) else number for number in range(1, 31)]
    seen = []
    result = fit(FakeDevice(), values, hooks=[lambda info: seen.append(info.step)])
    assert result.end_reason == "nonfinite"
    assert (result.nonfinite.step, result.nonfinite.leaf) == (bad, 2)
    assert math.isnan(result.nonfinite.batch["x"])
    # The state, the progress and the position agree on the updates made; a few later steps were started and dropped.
    assert int(result.state.step) == result.progress.step == bad - 1
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) < bad + 2 * loop.LOOK_EVERY
    done = [(number // 3 if number % 3 else number // 3 - 1, (number - 1) % 3 * 2 + 2) for number in range(1, bad)]
    assert result.position == (Place(*done[-1], 6) if done else None)
    assert result.progress.examples_seen == 2 * (bad - 1)
    assert result.progress.epoch == (bad - 1) // 3


def test_the_last_step_is_looked_at_before_its_end_is_called_good():
    result = fit(FakeDevice(), [0.0, math.nan], stop=stop.max_steps(2))
    assert (result.end_reason, result.nonfinite.step, int(result.state.step)) == ("nonfinite", 2, 1)


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
    watch = stopwatch.Stopwatch(clock=lambda: clock.now)
    times = []

    def step(state, batch):
        clock.now += 10.0 if state.step == 0 else 1.0
        return FakeDevice().step(state, batch)

    def batches():
        for item in make_batches([0.0] * 3):
            clock.now += 0.5
            yield item

    loop.fit(step, FakeState(0), batches(), stop=lambda progress: None, stopwatch=watch, step_times=Times(times))
    seconds = watch.seconds()
    assert (seconds["compile"], seconds["compute"], seconds["input"]) == (10.0, 2.0, 1.5)
    assert len(times) == 2


@given(num_steps=st.integers(1, 20))
def test_every_step_but_the_first_is_timed(num_steps):
    times = []
    fit(FakeDevice(), [0.0] * num_steps, step_times=Times(times))
    assert len(times) == num_steps - 1


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


def test_a_mistake_that_the_first_step_shows_is_told_with_the_users_line_and_a_later_error_as_it_is():
    def loss_of(step, batch):
        raise TypeError("no")

    def later(state, batch):
        return device.step(state, batch) if not device.events else loss_of(state, batch)

    with pytest.raises(errors.UserError, match=r"TypeError: no \(.*test_loop\.py:\d+, in loss_of\)"):
        loop.fit(loss_of, FakeState(0), make_batches([0.0]), stop=lambda progress: None)
    device = FakeDevice()
    with pytest.raises(TypeError, match=r"^no$"):
        loop.fit(later, FakeState(0), make_batches([0.0] * 2), stop=lambda progress: None)
