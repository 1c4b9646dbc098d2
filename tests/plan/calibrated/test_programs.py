import pytest

from jaxdist.plan.calibrated import programs


@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_batches_divide_over_the_devices_and_every_program_is_another(num_devices):
    found = programs.experiments(num_devices)
    assert all(each.global_batch_size % num_devices == 0 for each in found)
    assert len({each.name for each in found}) == len(found)
    assert len({each.strategy for each in found}) == (1 if num_devices == 1 else 3)
