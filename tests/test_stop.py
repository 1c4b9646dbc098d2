import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist import stop
from jaxdist.stop import Progress, Stop

VALUES = st.one_of(st.integers(-3, 3).map(float), st.just(math.nan))
LIMITS = [("max_steps", "step"), ("max_epochs", "epoch"), ("max_seconds", "seconds")]


@pytest.mark.parametrize(("name", "field"), LIMITS)
@given(limit=st.integers(1, 1000))
def test_a_limit_ends_when_it_is_reached_and_not_before(name, field, limit):
    rule = getattr(stop, name)(limit)
    assert [rule(Progress(**{field: limit + off})) for off in (-1, 0, 1)] == [None, name, name]


@given(value=st.floats(-10, 10), target=st.floats(-10, 10))
def test_target_is_reached_from_the_better_side(value, target):
    progress = Progress(metrics={"m": value})
    assert (stop.target("m", target)(progress) == "target_reached") == (value >= target)
    assert (stop.target("m", target, mode="min")(progress) == "target_reached") == (value <= target)


def test_target_waits_for_its_metric_and_nan_does_not_reach_it():
    rule = stop.target("eval/accuracy", 0.5)
    assert rule(Progress()) is None
    assert rule(Progress(metrics={"train/accuracy": 1.0})) is None
    assert rule(Progress(metrics={"eval/accuracy": math.nan})) is None
    assert rule(Progress(metrics={"eval/accuracy": 0.5})) == "target_reached"


@given(values=st.lists(VALUES, max_size=12), evaluations=st.integers(1, 5), mode=st.sampled_from(["max", "min"]))
def test_patience_counts_evaluations_without_a_better_value(values, evaluations, mode):
    best, stale = None, 0
    for value in values:
        if best is None or (not math.isnan(value) and (value > best if mode == "max" else value < best)):
            best, stale = (-math.inf if mode == "max" else math.inf) if math.isnan(value) else value, 0
        else:
            stale += 1
    rule = stop.patience("m", evaluations, mode=mode)
    assert (rule(Progress(history={"m": values})) == "patience") == (stale >= evaluations)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_ends_on_every_kind_of_it(value):
    rule = stop.nonfinite()
    assert rule(Progress(metrics={"train/loss": value})) == "nonfinite"
    assert rule(Progress(metrics={"train/loss": 1e30})) is None
    assert rule(Progress()) is None


@given(reasons=st.lists(st.sampled_from([None, "max_steps", "patience", "target_reached"]), max_size=5))
def test_first_of_gives_the_first_reason_in_order(reasons):
    rule = stop.first_of(*[lambda progress, reason=reason: reason for reason in reasons])
    assert rule(Progress()) == next((reason for reason in reasons if reason), None)


@given(
    step=st.integers(0, 50),
    epoch=st.integers(0, 9),
    seconds=st.floats(0, 100),
    evaluations=st.lists(st.floats(0, 1), max_size=6),
)
def test_every_rule_says_the_same_after_a_checkpoint(step, epoch, seconds, evaluations):
    """Rules keep nothing themselves: a progress that was stored and read again ends the same way."""
    progress = Progress(step=step, epoch=epoch, seconds=seconds)
    for value in evaluations:
        progress.record_evaluation({"eval/accuracy": value})
    restored = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert restored == progress
    limits = {"max_steps": 30, "max_epochs": 6, "max_seconds": 60.0, "target": 0.9, "patience": 2}
    for name, limit in limits.items():
        rule = Stop(**{name: limit}).rule()
        assert rule(progress) == rule(restored)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 11))
def test_rules_see_training_metrics_one_step_late_whenever_they_were_read(early, stored_at):
    """Read at once, or by the next step; and across a checkpoint."""
    progress, pending = Progress(), None
    for step, at_once in enumerate(early, 1):
        progress.advance(step, step, 100)
        if pending:
            progress.record_training(pending, {"train/loss": float(pending)})
        pending = step
        if at_once:
            progress.record_training(step, {"train/loss": float(step)})
            pending = None
            assert progress.newest_metrics() == {"train/loss": float(step)}
        if stored_at == step and at_once:
            progress = Progress.from_json(json.loads(json.dumps(progress.to_json())))
        assert progress.metrics == ({"train/loss": step - 1.0} if step > 1 else {})


def test_recording_an_evaluation_keeps_the_last_value_the_history_and_the_step():
    progress = Progress(step=7)
    progress.record_evaluation({"eval/a": 1.0, "eval/b": 2.0})
    progress.step = 9
    progress.record_evaluation({"eval/a": 3.0})
    assert progress.metrics == {"eval/a": 3.0, "eval/b": 2.0}
    assert progress.history == {"eval/a": [1.0, 3.0], "eval/b": [2.0]}
    assert progress.last_evaluation == 9


def test_all_the_limits_that_are_set_count_and_a_reached_target_goes_first():
    rule = Stop(max_steps=10, max_epochs=2, max_seconds=5.0, target=0.9, patience=1).rule()
    assert rule(Progress(step=9, epoch=1, seconds=4.9, metrics={"eval/accuracy": 0.8})) is None
    assert rule(Progress(step=10, metrics={"eval/accuracy": 0.95})) == "target_reached"
    assert rule(Progress(step=10)) == "max_steps"
    assert rule(Progress(epoch=2)) == "max_epochs"
    assert rule(Progress(seconds=5.0)) == "max_seconds"
    assert rule(Progress(history={"eval/accuracy": [0.5, 0.4]})) == "patience"
    assert rule(Progress(step=10, metrics={"train/loss": math.nan})) == "nonfinite"


def test_target_and_patience_look_at_the_named_metric_in_its_mode():
    rule = Stop(target_metric="eval/loss", mode="min", target=0.1, patience=2).rule()
    assert rule(Progress(metrics={"eval/loss": 0.05})) == "target_reached"
    assert rule(Progress(history={"eval/loss": [0.5, 0.4, 0.3]})) is None
    assert rule(Progress(history={"eval/loss": [0.3, 0.4, 0.5]})) == "patience"


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"needs a rule that ends it.*stop\.max_steps"):
        Stop().rule()


@pytest.mark.parametrize("name", ["max_steps", "max_epochs", "max_seconds", "patience"])
@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_must_be_positive(name, limit):
    with pytest.raises(ValueError, match=rf"stop\.{name} must be positive; got {limit}"):
        Stop(**{name: limit}).rule()


@pytest.mark.parametrize(
    ("limits", "offset", "step"),
    [
        ({"max_steps": 7}, 0, 7),
        ({"max_epochs": 3}, 0, 12),
        ({"max_steps": 20, "max_epochs": 3}, 0, 12),
        ({"max_steps": 11, "max_epochs": 3}, 2, 10),
        ({"max_steps": 7}, 2, 7),
        ({"max_seconds": 9.0}, 0, None),
    ],
)
def test_the_last_step_is_the_earliest_limit_that_is_known(limits, offset, step):
    assert Stop(**limits).last_step(4, step_offset=offset) == step


@given(values=st.lists(VALUES, min_size=1, max_size=12), mode=st.sampled_from(["max", "min"]))
def test_the_best_value_is_the_first_that_no_later_one_exceeds(values, mode):
    progress, better = Progress(), max if mode == "max" else min
    for step, value in enumerate(values, start=1):
        progress.step = step
        is_best = progress.record_best("m", value, mode)
        best = better((each for each in values[:step] if not math.isnan(each)), default=None)
        first = None if best is None else values.index(best) + 1
        assert progress.best == (None if best is None else {"metric": "m", "value": best, "step": first})
        assert is_best == (first == step)
    assert progress.record_best("another", 0.0, mode)
    assert progress.best == {"metric": "another", "value": 0.0, "step": len(values)}


@given(
    num_examples=st.integers(1, 40),
    earlier=st.integers(1, 12),
    present=st.integers(1, 12),
    steps=st.integers(0, 30),
    offset=st.integers(-9, 9),
)
def test_steps_of_another_batch_size_count_as_those_that_use_as_many_examples(
    num_examples, earlier, present, steps, offset
):
    def used(size):
        """Yield the examples used after 0, 1, 2, ... steps; the last batch of an epoch is smaller."""
        total = 0
        while True:
            yield total
            total += min(size, num_examples - total % num_examples)

    seen = next(itertools.islice(used(earlier), steps, None))
    progress = Progress(step=steps, examples_seen=seen, global_batch_size=earlier, schedule_offset=offset)
    expected = next(number for number, total in enumerate(used(present)) if total >= seen) - steps
    steps_per_epoch = -(-num_examples // present)
    found = stop.schedule_offset(
        progress, global_batch_size=present, num_examples=num_examples, steps_per_epoch=steps_per_epoch
    )
    assert found == (offset if present == earlier else expected)


def test_an_epoch_is_finished_with_its_last_example():
    progress = Progress()
    for seen, epoch in ((51, 0), (52, 1), (103, 1), (104, 2)):
        progress.advance(7, seen, 52)
        assert (progress.step, progress.examples_seen, progress.epoch) == (7, seen, epoch)


def test_empty_batches_are_a_metric_once_there_are_some():
    progress = Progress()
    progress.count_empty(0)
    assert progress.metrics == {}
    progress.count_empty(2)
    progress.count_empty(1)
    assert progress.empty_batches == progress.metrics["train/empty_batches"] == 3


def test_a_target_that_no_metric_reaches_is_refused():
    with pytest.raises(ValueError, match=r"stop\.target must be a number that a metric can reach; got nan"):
        Stop(target=math.nan).rule()


def test_a_new_run_has_made_nothing():
    new = Progress()
    assert (new.step, new.epoch, new.examples_seen, new.seconds, new.last_evaluation) == (0, 0, 0, 0.0, 0)
    assert (new.empty_batches, new.schedule_offset, new.best, new.metrics, new.history) == (0, 0, None, {}, {})
