"""The report of `jaxdist doctor`, and each of its warnings where it applies and nowhere else."""

import shutil
import types

import jax
import pytest

from jaxdist.cli.commands import doctor_command

CPU = [types.SimpleNamespace(platform="cpu", device_kind="cpu")]
GPU = [types.SimpleNamespace(platform="gpu", device_kind="H100")]
LARGE, SMALL = 1 << 40, 1 << 30


@pytest.mark.parametrize(
    ("devices", "cores", "free", "flags", "words"),
    [
        (CPU, 2, LARGE, "", None),
        (CPU, 1, LARGE, "", "One usable core"),
        (GPU, 1, LARGE, "", "xla_gpu_deterministic_ops"),
        (CPU, 2, SMALL, "", "Only 1.0 GiB are free"),
        (CPU, 2, LARGE, "--xla_force_host_platform_device_count=8", "XLA_FLAGS sets the number"),
    ],
)
def test_what_is_likely_to_cause_trouble_is_named(monkeypatch, devices, cores, free, flags, words):
    monkeypatch.setattr(doctor_command.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    monkeypatch.setenv("XLA_FLAGS", flags)
    warnings = doctor_command.list_warnings(devices)
    assert [words in warning for warning in warnings] == ([] if words is None else [True])


def test_the_report_names_versions_devices_and_extras(monkeypatch):
    monkeypatch.setitem(doctor_command.EXTRAS, "ray", ("ray_that_is_not_there",))
    report = doctor_command.examine(jax.devices()[:3])
    assert jax.__version__ in report
    assert "3 x cpu" in report
    assert "lacks ray_that_is_not_there" in report
    assert all(name in report for name in doctor_command.EXTRAS)
