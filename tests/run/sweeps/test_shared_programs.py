"""Programs shared between runs: which experiments share them, and that a shared one gives the bits of its own run."""

import dataclasses

import jax
import optax
import pytest
import tiny_experiment

import jaxdist
from jaxdist.config.overrides import override
from jaxdist.run import attempt, components
from jaxdist.run.sweeps import shared_programs

BASE = tiny_experiment.get_config()


@pytest.mark.parametrize(
    ("assignments", "shared"),
    [
        (["optimizer.learning_rate=0.3"], True),
        (["seed=7"], True),
        (["seed=7", "optimizer.learning_rate=0"], True),
        ([], True),
        (["model.width=9"], False),
        (["optimizer.clip_norm=1"], False),
        (["global_batch_size=8"], False),
        (["optimizer.name=nesterov"], False),
        (["stop.max_steps=11"], False),  # a decay may end there
    ],
)
def test_experiments_share_programs_that_differ_in_numbers_given_to_them(assignments, shared):
    assert shared_programs.shares_programs(BASE, override(BASE, assignments)) is shared


def test_what_has_no_number_as_its_rate_shares_nothing():
    ready = dataclasses.replace(BASE, optimizer=optax.sgd(0.1))
    assert not shared_programs.shares_programs(ready, dataclasses.replace(BASE, optimizer=optax.sgd(0.1)))
    assert not shared_programs.shares_programs(ready, BASE)
    function = jaxdist.Optimizer(name="sgd", learning_rate=optax.constant_schedule(0.1))
    other = jaxdist.Optimizer(name="sgd", learning_rate=optax.constant_schedule(0.2))
    pair = [dataclasses.replace(BASE, optimizer=each) for each in (function, other)]
    assert not shared_programs.shares_programs(*pair)


@pytest.mark.usefixtures("shared_compilations")
@pytest.mark.parametrize("strategy", ["data-parallel", pytest.param("zero1", marks=pytest.mark.slow)])
def test_a_run_that_shares_its_program_has_the_bits_of_one_by_itself_and_compiles_nothing(tmp_path, strategy):
    programs = shared_programs.SharedPrograms()
    made = {}
    for name, assignments in {"a": [], "b": ["optimizer.learning_rate=0.02", "seed=5"]}.items():
        experiment = override(BASE, [f"strategy={strategy}", "stop.max_steps=3", *assignments])
        for how in ("shared", "alone")[: 1 if name == "a" else 2]:
            options = attempt.RunOptions(run_dir=tmp_path / name / how, silent=True)
            if how == "shared":
                options = dataclasses.replace(options, put_together=programs.put_together)
            made[name, how] = attempt.train(experiment, options, devices=jax.devices()[:2])
    alone, shared = made["b", "alone"], made["b", "shared"]
    assert (alone.params_sha256, alone.metrics) == (shared.params_sha256, shared.metrics)
    assert alone.extra["identity"] == shared.extra["identity"]
    assert made["a", "shared"].params_sha256 != shared.params_sha256
    assert [made[name, "shared"].compile_count for name in "ab"] == [1, 0]


def test_programs_are_not_shared_between_devices():
    programs = shared_programs.SharedPrograms()
    one, two = (programs.put_together(BASE, devices=jax.devices()[:count]) for count in (1, 2))
    assert one.step is not two.step
    again = programs.put_together(override(BASE, ["seed=1"]), devices=jax.devices()[:1])
    assert again.functions is one.functions
    assert again.identity == components.identity(override(BASE, ["seed=1"]))
