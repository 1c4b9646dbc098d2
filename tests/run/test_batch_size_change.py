"""A run that is stopped and resumed with another batch size: where it stands in its schedule."""

import dataclasses
import json
import math

import jax
import pytest
import tiny_experiment

import jaxdist
from jaxdist import stop
from jaxdist.run import attempt, components

EXAMPLES, EPOCHS = 48, 4


def experiment(size, **schedule):
    """A run of 4 epochs in batches of `size`."""
    config = tiny_experiment.get_config()
    optimizer = jaxdist.Optimizer(name="sgd", learning_rate=0.8, schedule=jaxdist.Schedule(name="cosine", **schedule))
    return dataclasses.replace(
        config,
        data=jaxdist.Data(train=tiny_experiment.make_source(EXAMPLES, 0), num_threads=0),
        optimizer=optimizer,
        global_batch_size=size,
        stop=jaxdist.Stop(max_epochs=EPOCHS),
        checkpoints=jaxdist.Checkpoints(every_steps=1000),
    )


def logged_rates(run_dir, config, *, resume=False, stop_at=None):
    """Train, and return the logged learning rate of each step in the run directory."""
    options = attempt.RunOptions(
        run_dir=run_dir, resume=resume, silent=True, stop_requested=lambda step: step == stop_at
    )
    attempt.train(config, options, devices=jax.devices()[:1])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/learning_rate"] for line in lines if "train/learning_rate" in line}


def cosine(epochs):
    return 0.8 * (0.5 + 0.5 * math.cos(math.pi * min(epochs / EPOCHS, 1.0)))


@pytest.mark.parametrize(
    ("before", "after", "schedule"),
    [pytest.param(4, 16, {}, marks=pytest.mark.slow), (16, 4, {"unit": "epochs", "length": 4})],
    ids=["larger, to the end", "smaller, in epochs"],
)
def test_a_schedule_follows_the_examples_when_the_batch_size_changes(tmp_path, before, after, schedule):
    steps = 2 * EXAMPLES // before
    first = logged_rates(tmp_path, experiment(before, **schedule), stop_at=steps)
    assert first[steps] == pytest.approx(cosine((steps - 1) * before / EXAMPLES), abs=1e-5)
    middle = steps + EXAMPLES // after // 3
    again = experiment(after, **schedule)
    logged_rates(tmp_path, again, resume=True, stop_at=middle)
    # Resumed once more, with the same batch size: nothing changes.
    rates = logged_rates(tmp_path, again, resume=True)
    assert max(rates) == steps + 2 * EXAMPLES // after
    for step in range(steps + 1, max(rates) + 1):
        assert rates[step] == pytest.approx(cosine(2 + (step - 1 - steps) * after / EXAMPLES), abs=1e-5), step


@pytest.mark.slow
def test_a_schedule_in_steps_stays_where_its_steps_are(tmp_path):
    first = experiment(4, length=100)
    logged_rates(tmp_path, first, stop_at=10)
    rates = logged_rates(tmp_path, experiment(16, length=100), resume=True)
    assert rates[11] == pytest.approx(0.8 * (0.5 + 0.5 * math.cos(math.pi * 0.1)), abs=1e-5)


def resumed(config, *, step, before):
    """Return the parts of a run that is resumed after `step` steps with batches of `before`."""
    progress = stop.Progress(step=step, examples_seen=step * before, global_batch_size=before)
    return components.put_together(config, devices=jax.devices()[:1]).continued(progress)


def test_the_warm_up_of_the_scaling_rule_follows_the_examples():
    config = experiment(16)
    optimizer = jaxdist.Optimizer(name="sgd", learning_rate=0.1, base_batch_size=4)
    config = dataclasses.replace(config, optimizer=optimizer, stop=jaxdist.Stop(max_epochs=9))
    rate = resumed(config, step=12, before=8).learning_rate  # after 2 of its 5 epochs, now of 3 steps
    for step in range(13, 25):
        epochs = 2 + (step - 12) * 16 / EXAMPLES
        assert rate(step) == pytest.approx(0.1 + 0.3 * min(epochs / 5, 1.0), abs=1e-6), step


def test_a_schedule_in_steps_and_epochs_is_refused_with_another_batch_size():
    with pytest.raises(ValueError, match="global_batch_size=8, got 16"):
        resumed(experiment(16, warmup=3), step=12, before=8)
    resumed(experiment(16, warmup=3, unit="epochs"), step=12, before=8)
    resumed(experiment(16, warmup=3), step=12, before=16)
