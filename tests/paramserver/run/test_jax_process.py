"""A worker or server process is built from its name and the Spec; what it needs beyond those is in the experiment."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import tiny_experiment

from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.settings import Settings
from jaxdist.paramserver.run import jax_process


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setattr(jax_process.runtime, "start_by_itself", lambda count, threads: jax.devices()[:count])
    experiment = tiny_experiment.get_config()
    settings = Settings.of(experiment.ps, num_examples=52, global_batch_size=16, max_steps=7, read_every=(4,))
    return run_folder.Spec(
        attempt="a",
        experiment=tiny_experiment.__file__,
        assignments=["optimizer.learning_rate=0.5"],
        settings=dataclasses.asdict(settings),
        peers={},
        directory=str(tmp_path),
        resume="",
        devices=2,
        kind="elementwise",
    )


def test_a_server_starts_over_from_the_initial_params_under_a_higher_boot_number(spec):
    driver, _, _ = jax_process.make("server/0/a", spec)
    server = driver.machine.machine
    assert (server.name, server.settings.max_steps) == ("server/0/a", 7)
    before = server.shard.export()
    assert all(np.isfinite(block).all() for block in before.params)
    server.shard.adopt(dataclasses.replace(before, version=4, params=tuple(block + 1 for block in before.params)))
    again = server.make_shard().export()
    assert again.version == 0
    assert all(np.array_equal(a, b) for a, b in zip(again.params, before.params, strict=True))
    assert jax_process.next_boot(pathlib.Path(spec.directory), "server/0/a") > server.boot > 0


class Island:
    """Computes nothing: a gradient is finite if its lease is of an even step."""

    def __init__(self, plan, devices):
        assert len(devices) == 2

    def prepare(self, lease):
        self.prepared = lease

    def gradient(self, compute):
        finite = compute.lease.step % 2 == 0
        return messages.Computed(compute.incarnation, compute.sequence, 1.0, 1.0, finite, 1.0, (), ())

    def explain_nonfinite(self, compute):
        return f"Step {compute.lease.step + 1}: the loss is nan."


def test_a_worker_reports_why_a_gradient_is_not_finite(spec, monkeypatch):
    monkeypatch.setattr(jax_process, "Island", Island)
    driver, world, _ = jax_process.make("worker/1", spec)
    assert driver.machine.machine.worker == 1
    world._prepare(lease := messages.Lease(0, 0, 0, 0, 4))
    assert world._prepare.__self__.prepared == lease
    folder = pathlib.Path(spec.directory) / run_folder.NONFINITE_NAME
    for step in (0, 1):
        compute = effects.Compute(1, step, messages.Lease(step, 0, 0, 0, 4), ())
        assert world._gradient(compute).sequence == step
        assert folder.exists() == bool(step)
    (report,) = folder.iterdir()
    assert report.read_text() == "worker/1. Step 2: the loss is nan."
