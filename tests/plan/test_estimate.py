"""Plans against the programs that training runs, against formulas, and against what users may get wrong."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_experiment
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import CHIP, eight_devices, plan

from jaxdist import errors, losses
from jaxdist.config.experiment import Data
from jaxdist.config.overrides import override
from jaxdist.data import ArraySource
from jaxdist.models import gpt
from jaxdist.plan import estimate, search
from jaxdist.run import components


def test_bytes_are_those_of_the_program_that_trains():
    check_bytes(*plan(strategy="fsdp"))


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("num_microbatches", "remat"), [(1, False), (2, True)])
@pytest.mark.parametrize("settings", search.ways(8, 4), ids=" ".join)
def test_bytes_are_those_of_the_program_that_trains_in_every_way(settings, num_microbatches, remat):
    model = gpt.GPT(32, 8, num_layers=1, num_heads=2, width=16, remat=remat)
    fields = {"tokens": np.arange(16 * 8, dtype=np.int32).reshape(16, 8) % 32}
    experiment = dataclasses.replace(
        tiny_experiment.get_config(), model=model, loss=losses.next_token, inputs="tokens",
        data=Data(train=ArraySource(fields), num_threads=0), global_batch_size=16, num_microbatches=num_microbatches,
    )  # fmt: skip
    experiment = override(experiment, settings)
    check_bytes(experiment, estimate.estimate(experiment, eight_devices()))


def check_bytes(experiment, made):
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


def test_each_bound_is_work_over_rate_and_what_is_sent_is_sorted_by_axis_and_line():
    _, made = plan()
    sent = sum(num_bytes for _, num_bytes in made.collectives.values())
    assert made.bound_seconds == pytest.approx(
        {
            "compute": made.flops_per_step / 8 / CHIP.flops_per_second,
            "memory": made.bytes.moved / CHIP.memory_bytes_per_second,
            "network": sent / CHIP.link_bytes_per_second,
        }
    )
    assert made.collective_axes == pytest.approx({"data": sent})
    assert sum(made.collective_lines.values()) == pytest.approx(sent)
    assert list(made.collective_lines.values()) == sorted(made.collective_lines.values(), reverse=True)
    fields = 4 * tiny_experiment.NUM_FEATURES + 4 + 4  # image, label and mask of an example
    assert made.batch_bytes == 16 * fields == 8 * made.bytes.batch
    assert made.bytes.gradients == 4 * made.num_params
    assert (made.steps, made.num_devices, made.global_batch_size) == (10, 8, 16)


def test_what_follows_from_the_time_of_a_step():
    held = estimate.DeviceBytes(
        params=1, opt_state=20, model_state=300, batch=4_000, gradients=50_000, activations=600_000, padding=7_000_000,
        program=80_000_000,
    )  # fmt: skip
    assert held.total == 87_654_321
    assert held.moved == 7_654_321 + 21, "params and optimizer are read and written, the code is neither"
    made = dataclasses.replace(
        plan()[1], bytes=held, steps=None, num_devices=4, global_batch_size=64, batch_bytes=2048, tokens_per_example=16,
        bound_seconds={"compute": 0.25, "memory": 0.5, "network": 0.125}, flops_per_step=3e12,
        peak_flops_per_second=2e12,
    )  # fmt: skip
    assert (made.bound_by, made.step_seconds, made.examples_per_second, made.tokens_per_second) == (
        "memory",
        0.5,
        128,
        2048,
    )
    assert (made.input_bytes_per_second, made.model_flops_utilization) == (4096, 0.75)
    assert made.cost(2.0) == {}
    assert dataclasses.replace(made, tokens_per_example=None).tokens_per_second is None
    measured = dataclasses.replace(made, predicted_seconds=0.25)
    assert (measured.step_seconds, measured.examples_per_second, measured.model_flops_utilization) == (0.25, 256, 1.5)
    content = dataclasses.replace(measured, steps=14_400).to_json()
    assert (content["hours"], content["bytes_per_device"], content["rates"]) == (1, 87_654_321, "measured")
    assert "price" not in content


@given(st.integers(1, 60), st.sampled_from([1, 2, 3]))
def test_a_batch_that_does_not_divide_is_raised_to_the_next_that_does(size, num_microbatches):
    experiment = dataclasses.replace(
        tiny_experiment.get_config(), global_batch_size=size, num_microbatches=num_microbatches
    )
    planned = estimate.with_dividing_batch(experiment, eight_devices())
    assert planned == dataclasses.replace(experiment, global_batch_size=planned.global_batch_size)
    assert planned.global_batch_size == next(
        larger for larger in range(size, 100) if larger % (8 * num_microbatches) == 0
    )


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
