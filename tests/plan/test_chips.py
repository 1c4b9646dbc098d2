"""The table of chips: units and orders of magnitude, so that a mistyped figure is noticed."""

import pytest

from jaxdist.plan import chips


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
