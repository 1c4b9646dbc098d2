"""What is refused before a process starts."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

import jaxdist
from jaxdist.config import overrides
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.paramserver.protocol.settings import Settings
from jaxdist.paramserver.run import shared_plan


def plan(num_microbatches, **chosen):
    settings = Settings.of(ParameterServer(**chosen), num_examples=64, global_batch_size=16, max_steps=1, read_every=())
    experiment = types.SimpleNamespace(global_batch_size=16, num_microbatches=num_microbatches)
    return types.SimpleNamespace(experiment=experiment, settings=settings)


@pytest.mark.parametrize(("parts", "devices", "rows"), [(1, 1, 6), (2, 1, 6), (4, 2, None), (4, 4, 8), (5, 1, None)])
def test_microbatches_must_divide_the_rows_of_a_slice(parts, devices, rows):
    made = plan(parts, workers=3)
    if rows is None:
        with pytest.raises(ValueError, match="num_microbatches must divide"):
            shared_plan.check_microbatches(made, devices)
    else:
        shared_plan.check_microbatches(made, devices)
        assert shared_plan.rows_of_a_slice(made, devices) == rows


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["stop.target=0.9", "stop.target_metric=eval/acuracy"], r"Did you mean 'eval/accuracy'\?"),
        (["checkpoints.best_metric=eval/f1"], "checkpoints.best_metric is 'eval/f1', which this experiment does not"),
        (["stop.max_steps=none", "stop.max_epochs=0"], "stop.max_epochs must be positive"),
    ],
)
def test_what_every_strategy_checks_before_the_first_step_is_checked_here_too(assignments, message):
    experiment = overrides.override(tiny_experiment.get_config(), assignments)
    with pytest.raises(ValueError, match=message):
        shared_plan.check_early(shared_plan.make_plan(experiment, ParameterServer(workers=1)))


def test_a_schedule_that_gives_no_rate_is_refused_here_too():
    """A server cannot tell a rate that is not finite from gradients that are not."""
    optimizer = jaxdist.Optimizer(name="sgd", learning_rate=0.1, schedule=lambda step: 1 / (step - 3.0))
    stop = jaxdist.Stop(max_steps=8)
    experiment = dataclasses.replace(tiny_experiment.get_config(), optimizer=optimizer, stop=stop)
    with pytest.raises(ValueError, match=r"optimizer\.schedule must give a finite rate of at least 0"):
        shared_plan.check_early(shared_plan.make_plan(experiment, ParameterServer(workers=1)))


def test_a_ledger_needs_the_order_of_sync_mode():
    experiment = overrides.override(tiny_experiment.get_config(), ["recovery.ledger=true"])
    shared_plan.make_plan(experiment, ParameterServer(mode="bounded", max_staleness=0))
    with pytest.raises(ValueError, match=r"got recovery\.ledger=true with ps\.mode=async"):
        shared_plan.make_plan(experiment, ParameterServer(mode="async"))


def test_held_out_examples_and_the_gradient_are_checked_here_too():
    tiny = tiny_experiment.get_config()
    narrow = {"image": np.zeros((5, 3), np.float32), "label": np.zeros(5, np.int32)}
    data = dataclasses.replace(tiny.data, eval=narrow)

    def rounded(outputs, batch):
        return jnp.round(outputs).sum(axis=1), {}

    for changes, message in (({"data": data}, "The evaluation fails"), ({"loss": rounded}, "of every param is 0")):
        plan = shared_plan.make_plan(dataclasses.replace(tiny, **changes), ParameterServer(workers=1))
        with pytest.raises(ValueError, match=message):
            shared_plan.check_early(plan)
    shared_plan.check_early(shared_plan.make_plan(tiny, ParameterServer(workers=1)))


@pytest.mark.parametrize(
    ("pattern", "frozen", "message"),
    [("Dense_9", True, "nothing matches 'Dense_9'"), ("", True, "freeze every one"), ("Dense_0", True, None)],
)
def test_groups_have_to_match_and_to_leave_something(pattern, frozen, message):
    groups = (jaxdist.Group(pattern=pattern, frozen=frozen),)
    optimizer = jaxdist.Optimizer(name="sgd", learning_rate=0.1, groups=groups)
    experiment = dataclasses.replace(tiny_experiment.get_config(), optimizer=optimizer)
    if message is None:
        assert shared_plan.make_plan(experiment, ParameterServer()).kind == "elementwise"
        return
    with pytest.raises(ValueError, match=message):
        shared_plan.make_plan(experiment, ParameterServer())


@pytest.mark.parametrize(("batch", "threads"), [(16, 1), (32, 8)])
def test_the_experiment_alone_decides_how_many_threads_a_gradient_has(batch, threads, monkeypatch):
    experiment = dataclasses.replace(tiny_experiment.get_config(), global_batch_size=batch)
    made = shared_plan.make_plan(experiment, ParameterServer(workers=2), kind="elementwise")
    size = sum(np.prod(shape) for shape in made.sharding.shapes)
    monkeypatch.setattr(shared_plan, "SMALL_GRADIENT", 8 * 6 * size)  # of 8 examples of 6 numbers
    assert shared_plan.num_threads(made) == threads


@pytest.mark.parametrize(("asked", "num_devices", "threads"), [(None, 1, 1), (None, 4, 4), ("16", 1, 16)])
def test_the_threads_that_are_recorded_are_those_of_servers_and_workers(monkeypatch, asked, num_devices, threads):
    for name, value in {"PJRT_NPROC": asked, "NPROC": "5", "JAXDIST_PJRT_NPROC": None}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    made = shared_plan.make_plan(tiny_experiment.get_config(), ParameterServer(workers=2), kind="elementwise")
    assert shared_plan.threads_in_use(made, num_devices) == threads
