"""Choosing the devices of a job, with accelerators that this machine does not have."""

import os
import subprocess
import sys
import types

import pytest

from jaxdist.errors import UserError
from jaxdist.launch.joining import runtime, same_on_all

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


def test_more_fake_devices_than_fit_are_refused_before_they_are_made(monkeypatch):
    set_to = []
    monkeypatch.setattr(runtime.jax.config, "update", lambda name, value: set_to.append(value))
    runtime._prepare(runtime.MOST_DEVICES)
    with pytest.raises(UserError, match="at most 4,096 devices; --devices asks for 100,000"):
        runtime._prepare(100_000)
    assert set_to == [runtime.MOST_DEVICES]


def test_the_start_bounds_gpu_collectives(monkeypatch):
    bounded = []
    monkeypatch.setattr(runtime, "_bound_gpu_collectives", bounded.append)
    monkeypatch.setattr(runtime.jax.config, "update", lambda name, value: None)
    runtime._prepare(1)
    assert bounded == [os.environ]


def test_processes_compare_what_their_cpus_compile_to(monkeypatch):
    """JAX calls every one of them "cpu", and SSE4.2 gives other bits than AVX2."""
    compared = {}
    monkeypatch.setattr(same_on_all, "compare", lambda name, facts: compared.update(facts))
    monkeypatch.setattr(runtime, "_meet", lambda: None)
    runtime._compare_and_meet(1, same_threads=True)
    assert compared["CPU instructions"] == same_on_all.instructions()
    assert compared["XLA_FLAGS"] == os.environ.get("XLA_FLAGS"), "--xla_cpu_max_isa is one of them"


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


APART = """
import os, sys
from jaxdist.launch.joining import runtime, same_on_all
runtime.keep_native_output_apart()
os.write(1, b"native 1;")
os.write(2, b"native 2;")
print("shown 1")
print("shown 2", file=sys.stderr)
runtime.print_for_developers(ValueError("trace"))
"""


@pytest.mark.parametrize("has_log", [True, False])
def test_native_output_goes_to_the_log_of_the_process_and_not_to_the_user(tmp_path, monkeypatch, has_log):
    monkeypatch.delenv(runtime.LOG, raising=False)
    if has_log:
        monkeypatch.setenv(runtime.LOG, str(tmp_path / "log"))
    done = subprocess.run([sys.executable, "-c", APART], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "shown 1\n"
    native = (tmp_path / "log").read_text() if has_log else done.stderr.replace("shown 2\n", "")
    assert done.stderr == "shown 2\n" or not has_log
    assert native == "native 1;native 2;ValueError: trace\n"


@pytest.mark.parametrize(("reduction", "same"), [("canonical", True), ("mean", False)])
def test_processes_of_a_canonical_job_compare_their_threads(reduction, same, monkeypatch):
    """Hosts with other numbers of cores may train with the mean, which promises no bits."""
    compared = {}
    monkeypatch.setattr(same_on_all, "compare", lambda name, facts: compared.update(facts))
    monkeypatch.setattr(runtime, "_meet", lambda: None)
    runtime._compare_and_meet(1, same_threads=same)
    assert ("XLA's threads (PJRT_NPROC)" in compared) == same


def test_cached_programs_belong_to_the_number_of_threads(monkeypatch):
    told = []
    monkeypatch.setattr(runtime.jax_private, "share_cache_keys", told.append)
    for threads in ("8", "16"):
        monkeypatch.setenv("PJRT_NPROC", threads)
        runtime.use_compilation_cache(1)
    assert len(set(told)) == 2
