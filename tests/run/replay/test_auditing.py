"""Audits in a run: when they are made, what a finding does, and what the run record says of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment

from jaxdist import errors
from jaxdist.config import overrides
from jaxdist.guards import shard_audit
from jaxdist.run import attempt, preflight
from jaxdist.run.replay import auditing
from jaxdist.spmd.step import STEP_HASHES

pytestmark = pytest.mark.usefixtures("shared_compilations")


class Audit:
    """Has all devices agree on the number of the shard, but for one device from a step on."""

    def __init__(self, bad_from=None, device=2):
        self.steps, self._bad_from, self._device = [], bad_from, device

    def votes(self, state, batch, shard):
        self.steps.append(state)
        votes = np.full((4, 2), shard, np.uint32)
        if self._bad_from is not None and state >= self._bad_from:
            votes[self._device, 1] += 1
        return votes

    def owner(self, shard):
        return shard // 2


def make(audit, *, ends=True, every=2, earlier=None):
    schedule = auditing.AuditSchedule(every, logical_shards=8, seed=0)
    return auditing.Auditor(audit, schedule, jax.devices()[:4], ends=ends, earlier=earlier)


def run(auditor, steps, *, wrong_step=None):
    """Make steps that hash each shard to its number, one of them with other hashes."""
    for step in steps:
        auditor.before(step, None, step)
        auditor.after({STEP_HASHES: jnp.arange(8, dtype=jnp.uint32) + (100 if step == wrong_step else 0)})
    auditor.settle()


def test_every_so_many_steps_are_audited_and_clean_ones_recorded():
    audit = Audit()
    auditor = make(audit, every=3)
    run(auditor, range(1, 11))
    assert audit.steps == [3, 6, 9]
    assert auditor.summary() == {"audits": 3, "last_clean_step": 9, "findings": []}


def test_a_finding_ends_the_run_and_says_from_where_to_continue():
    auditor = make(Audit(bad_from=6))
    with pytest.raises(auditing.FaultyDeviceError, match="The last clean audit was that of step 4") as caught:
        run(auditor, range(1, 9))
    assert f"{jax.devices()[2]} (process 0) computes wrongly" in str(caught.value)
    assert caught.value.exit_status == 1
    (found,) = auditor.summary()["findings"]
    assert (found["step"], found["suspects"], found["named"]) == (6, [str(jax.devices()[2])], True)


def test_a_step_that_its_audit_contradicts_names_the_device_of_the_shard():
    auditor = make(Audit())
    shard = auditor._schedule.shard(4)
    with pytest.raises(auditing.FaultyDeviceError, match="a fault that has passed"):
        run(auditor, range(1, 9), wrong_step=4)
    (found,) = auditor.summary()["findings"]
    assert (found["step"], found["suspects"]) == (4, [str(jax.devices()[shard // 2])])
    assert auditor.summary()["last_clean_step"] == 2


def test_a_finding_may_be_told_while_training_continues(capsys):
    auditor = make(
        Audit(bad_from=6), ends=False, earlier={"audits": 5, "last_clean_step": 1, "findings": [{"step": 1}]}
    )
    run(auditor, range(2, 9))
    assert capsys.readouterr().err.count("Training continues") == 2
    assert [found["step"] for found in auditor.summary()["findings"]] == [1, 6, 8]
    assert (auditor.summary()["audits"], auditor.summary()["last_clean_step"]) == (9, 4)


@pytest.mark.parametrize("settings", [["reduction=mean"], ["reduction=canonical", "guards.step_hashes=false"]])
def test_an_audit_needs_canonical_reduction_and_hashes(settings):
    experiment = overrides.override(tiny_experiment.get_config(), ["guards.audit_every=5", *settings])
    with pytest.raises(errors.ConfigError, match=r"guards\.audit_every=5"):
        preflight.check_settings(experiment)


def train(run_dir, monkeypatch, policy):
    """Train on four devices, the third of which computes wrongly from step 4 on."""
    honest = shard_audit.ShardAudit.votes

    def votes(self, state, batch, shard):
        found = honest(self, state, batch, shard).copy()
        found[2, 1] += int(state.step) >= 3
        return found

    monkeypatch.setattr(shard_audit.ShardAudit, "votes", votes)
    settings = ("reduction=canonical", "logical_shards=4", "data.eval=None", "guards.audit_every=2")
    experiment = overrides.override(
        tiny_experiment.get_config(), [*settings, "stop.max_steps=5", f"guards.on_faulty_device={policy}"]
    )
    options = attempt.RunOptions(run_dir=run_dir, silent=True)
    return attempt.train(experiment, options, devices=jax.devices()[:4])


def test_a_run_with_a_faulty_device_ends_and_its_record_names_the_device(tmp_path, monkeypatch):
    with pytest.raises(auditing.FaultyDeviceError, match="computes wrongly"):
        train(tmp_path / "run", monkeypatch, "end")
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (made["end_reason"], made["step"], made["audit"]["last_clean_step"]) == ("faulty_device", 3, 2)
    assert made["audit"]["findings"][0]["suspects"] == [str(jax.devices()[2])]


@pytest.mark.slow
def test_a_run_with_a_faulty_device_continues_where_it_is_told_to(tmp_path, monkeypatch):
    made = train(tmp_path / "run", monkeypatch, "continue")
    assert (made.end_reason, made.step, len(made.extra["audit"]["findings"])) == ("max_steps", 5, 1)
