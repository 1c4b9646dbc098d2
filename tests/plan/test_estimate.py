"""Plans against the programs that training runs, against formulas, and against what users may get wrong."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_experiment
from plan_cases import eight_devices, plan

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
