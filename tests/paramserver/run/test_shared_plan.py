"""What is refused before a process starts."""

import types

import pytest

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
