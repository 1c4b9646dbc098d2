"""Plans against the programs that training runs, against formulas, and against what users may get wrong."""

import dataclasses

import jax
import pytest
from plan_cases import plan

from jaxdist import errors
from jaxdist.run import components


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("data-parallel", marks=pytest.mark.slow), pytest.param("zero1", marks=pytest.mark.slow), "fsdp"],
)
def test_bytes_are_those_of_the_program_that_trains(strategy):
    experiment, made = plan(strategy=strategy)
    parts = components.put_together(experiment, devices=jax.devices()[:8])
    state, (batch, _) = parts.create_state(), next(iter(parts.batches()))
    program = parts.step.trace(state, batch).lower().compile().memory_analysis()
    used = program.argument_size_in_bytes + program.output_size_in_bytes - program.alias_size_in_bytes
    assert made.bytes.total == used + program.temp_size_in_bytes + program.generated_code_size_in_bytes
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))
    assert made.bytes.params == held
    parts.step(state, batch)


def test_gradients_are_sent_once_around_the_ring():
    _, made = plan()
    num_bytes = 4 * made.num_params
    assert made.collectives["all-reduce"][1] == pytest.approx(2 * num_bytes * 7 / 8, rel=0.1)


def test_microbatches_leave_the_flops_alone():
    one, two = plan()[1], plan(num_microbatches=2)[1]
    assert one.flops_per_step == two.flops_per_step > 0


def test_the_largest_bound_is_the_step():
    _, made = plan()
    assert made.step_seconds == max(made.bound_seconds.values()) == made.bound_seconds[made.bound_by]
    assert 0 < made.model_flops_utilization <= 1
    content = dataclasses.replace(made, steps=3600).to_json(price_per_hour=2.0)
    assert content["hours"] == pytest.approx(made.step_seconds)
    assert content["price"] == pytest.approx(2 * made.step_seconds)
    required = {"num_devices", "bytes_per_device", "fits", "flops_per_step", "collectives", "step_seconds"}
    assert required <= set(content)


def test_a_device_that_is_too_small_is_said():
    _, made = plan()
    assert made.fits
    assert dataclasses.replace(made, device_memory=made.bytes.total).fits
    assert dataclasses.replace(made, device_memory=made.bytes.total - 1).fits is False
    assert dataclasses.replace(made, device_memory=None).fits is None


def test_a_canonical_step_is_refused_with_the_way_out():
    with pytest.raises(errors.UserError, match="--reduction mean"):
        plan(reduction="canonical")


def test_what_does_not_divide_is_the_message_of_training():
    with pytest.raises(errors.UserError, match="Nearest valid"):
        plan(global_batch_size=7)
