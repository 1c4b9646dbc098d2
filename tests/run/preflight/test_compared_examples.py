import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_experiment

import jaxdist
from jaxdist import losses
from jaxdist.errors import ConfigError
from jaxdist.run import components


def compares_examples(outputs, batch):
    return jnp.square(outputs - outputs.mean(axis=0, keepdims=True)).sum(axis=1), {}


@pytest.mark.parametrize(
    ("changes", "num_devices", "together"),
    [({}, 1, None), ({}, 2, 8), ({"num_microbatches": 2}, 1, 8), ({"reduction": "canonical"}, 1, 2)],
)
def test_a_loss_that_compares_the_examples_of_a_part_is_told(changes, num_devices, together):
    experiment = dataclasses.replace(
        tiny_experiment.get_config(), loss=compares_examples, stop=jaxdist.Stop(max_steps=1)
    )
    experiment = dataclasses.replace(experiment, global_batch_size=16, **changes)
    end = r"on other devices\.$" if changes else r"losses\.WholeBatch\(loss\) compares those of all devices\.$"
    expected = contextlib.nullcontext() if together is None else pytest.warns(
        UserWarning, match=rf"by compares_examples \(.*\), depends on .* These are {together} of the 16 .* {end}"
    )  # fmt: skip
    with expected:
        components.put_together(experiment, devices=jax.devices()[:num_devices])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"num_microbatches": 2}, "num_microbatches=2"), ({"reduction": "canonical"}, "reduction=canonical")],
)
def test_a_loss_of_the_whole_batch_is_refused_where_only_parts_are_together(changes, named):
    experiment = tiny_experiment.get_config()
    experiment = dataclasses.replace(experiment, loss=losses.WholeBatch(experiment.loss), **changes)
    with pytest.raises(ConfigError, match=rf"WholeBatch needs the whole batch at the same time, and {named}"):
        components.put_together(experiment, devices=jax.devices()[:2])
