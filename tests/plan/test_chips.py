"""The table of chips: units and orders of magnitude, so that a mistyped figure is noticed."""

import pytest

from jaxdist.plan import chips


@pytest.mark.parametrize("name", chips.GPUS)
def test_gpus_are_fast_within_a_host_and_slow_beyond(name):
    gpu = chips.GPUS[name]
    chip = gpu.chip
    assert chip.name == name
    assert 60 <= chip.memory_bytes / 2**30 <= 200
    assert 100 < chip.flops_per_second / chip.memory_bytes_per_second < 1000
    assert chip.bytes_per_second(tuple(range(8))) == chip.link_bytes_per_second < chip.memory_bytes_per_second
    assert chip.bytes_per_second((7, 8)) == chip.far_bytes_per_second < chip.link_bytes_per_second
    text = gpu.target_config()
    assert text.count("{") == text.count("}") == 3
    assert f"device_memory_size: {chip.memory_bytes}" in text


@pytest.mark.parametrize("name", chips.TPUS)
def test_the_figures_are_bytes_and_flops_a_second(name):
    chip = chips.TPUS[name]
    assert chip.name == name
    assert chip.dims in (2, 3)
    assert 16 <= chip.memory_bytes / 2**30 <= 192
    assert chip.memory_bytes % 2**30 == 0
    # A network is slower than memory, and memory than arithmetic: 100 to 1000 FLOPs a byte.
    assert chip.link_bytes_per_second < chip.memory_bytes_per_second
    assert 100 < chip.flops_per_second / chip.memory_bytes_per_second < 1000
    assert 100e9 < chip.link_bytes_per_second < 1e12
