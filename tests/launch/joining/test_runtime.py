"""Choosing the devices of a job, with accelerators that this machine does not have."""

import types

import pytest

from jaxdist.errors import UserError
from jaxdist.launch.joining import runtime

FLAG = "xla_gpu_nccl_termination_timeout_seconds"
DEVICES = [
    types.SimpleNamespace(id=10 * process + place, process_index=process, device_kind="TPU v5e")
    for process in (0, 1)
    for place in range(4)
]


def test_each_process_gives_its_first_devices():
    chosen = runtime.first_of_each_process(3, DEVICES[:4], DEVICES[::-1][4:] + DEVICES[4:])
    assert [device.process_index for device in chosen] == [0, 0, 0, 1, 1, 1]
    assert len({device.id for device in chosen}) == 6


def test_more_devices_than_accelerators_are_refused():
    with pytest.raises(UserError, match=r"asks for 5 .* this machine has 4 \(TPU v5e\)\. Ask for at most 4"):
        runtime.first_of_each_process(5, DEVICES[:4], DEVICES)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"--{FLAG}=7200"),
        ("--xla_dump_to=x", f"--xla_dump_to=x --{FLAG}=7200"),
        (f"--{FLAG}=5", f"--{FLAG}=5"),
    ],
)
def test_a_gpu_collective_ends_at_last_unless_the_user_says_when(before, after):
    environment = {} if before is None else {"XLA_FLAGS": before}
    runtime._bound_gpu_collectives(environment)
    assert environment == {"XLA_FLAGS": after}
