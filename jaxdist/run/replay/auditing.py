"""Audits in a run: every so many steps, before the step, and what happens when one finds something."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdist.errors import RunFailedError, say
from jaxdist.guards import shard_audit
from jaxdist.run import components
from jaxdist.rundir import record
from jaxdist.spmd.metrics import Batch
from jaxdist.spmd.state import TrainState
from jaxdist.spmd.step import STEP_HASHES, Metrics

_MOST_RECORDED = 100


class FaultyDeviceError(RunFailedError):
    """A device computes wrongly; the message names it, or those that disagree."""


@dataclasses.dataclass(frozen=True)
class AuditSchedule:
    """When logical shards are audited, and which: every `every` steps, each shard in its turn."""

    every: int
    logical_shards: int
    seed: int

    def shard(self, step: int) -> int | None:
        """Return the logical shard that is audited in `step`; None in most steps."""
        number, rest = divmod(step, self.every)
        if rest:
            return None
        return shard_audit.chosen_shard(number, logical_shards=self.logical_shards, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class _Audited:
    """An audit in which the devices agreed, and the hashes of the step once it is dispatched."""

    step: int
    shard: int
    votes: np.ndarray
    hashes: jax.Array | None = None


class Auditor:
    """Audits the steps of a run.

    All processes call it at the same steps and come to the same result.

    Unless a finding `ends` the run, it is told and recorded, and training continues. `earlier` is what the run record
    of an earlier attempt says of audits.
    """

    def __init__(
        self,
        audit: shard_audit.ShardAudit,
        schedule: AuditSchedule,
        devices: Sequence[jax.Device],
        *,
        ends: bool,
        earlier: Mapping[str, Any] | None = None,
    ):
        self._audit, self._schedule, self._devices, self._ends = audit, schedule, list(devices), ends
        before = earlier or {}
        self._count, self._findings = before.get("audits", 0), list(before.get("findings", []))
        self._last_clean: int | None = before.get("last_clean_step")
        self._pending: _Audited | None = None

    def before(self, state: TrainState, batch: Batch, step: int) -> None:
        """Audit the step that is made next, if its turn has come; judge the audit before it.

        Raises:
          FaultyDeviceError: the devices do not agree, and a finding ends the run.
        """
        self.settle()
        shard = self._schedule.shard(step)
        if shard is None:
            return
        votes = self._audit.votes(state, batch, shard)
        self._count += 1
        found = shard_audit.judge(votes, step=step, shard=shard)
        if found:
            self._found(found)
        else:
            self._pending = _Audited(step, shard, votes)

    def after(self, metrics: Metrics) -> None:
        """Keep the hashes of the step that was just dispatched, if it was audited."""
        if self._pending is not None:
            self._pending = dataclasses.replace(self._pending, hashes=metrics[STEP_HASHES])

    def settle(self) -> None:
        """Compare the step that was audited last with its audit; waits for it.

        Raises:
          FaultyDeviceError: they do not agree, and a finding ends the run.
        """
        audited, self._pending = self._pending, None
        if audited is None or audited.hashes is None:
            return
        own = int(np.asarray(audited.hashes.addressable_data(0))[audited.shard])
        owner = self._audit.owner(audited.shard)
        found = shard_audit.judge_step(audited.votes, own, owner, step=audited.step, shard=audited.shard)
        if found:
            self._found(found)
        else:
            self._last_clean = audited.step

    def summary(self) -> dict[str, Any]:
        """Return what the run record says of the audits."""
        return {"audits": self._count, "last_clean_step": self._last_clean, "findings": self._findings}

    def _found(self, finding: shard_audit.Finding) -> None:
        named = [str(self._devices[each]) for each in finding.suspects]
        entry = {**dataclasses.asdict(finding), "suspects": named}
        self._findings = [*self._findings, entry][:_MOST_RECORDED]
        text = finding.tell(self._devices)
        if self._ends:
            raise FaultyDeviceError(f"{text} {self._advice()}")
        if jax.process_index() == 0:
            say(f"{text} Training continues (guards.on_faulty_device).")

    def _advice(self) -> str:
        clean = self._last_clean
        since = "No audit before it was clean" if clean is None else f"The last clean audit was that of step {clean}"
        return (
            f"{since}; what was saved after that may be wrong. Replace the device, and continue with --resume "
            "--checkpoint STEP from a step up to there; `jaxdist replay` computes single steps again."
        )


def auditor_of(parts: components.Parts, earlier: record.RunRecord | None) -> Auditor | None:
    """Return what audits the steps of a run; None where no step is audited."""
    experiment, strategy = parts.experiment, parts.strategy
    every, logical_shards = experiment.guards.audit_every, strategy.logical_shards
    if not every or logical_shards is None:
        return None
    audit = shard_audit.ShardAudit(
        parts.functions.loss_fn,
        strategy.mesh,
        logical_shards=logical_shards,
        num_microbatches=experiment.num_microbatches,
        batch_axes=strategy.batch_axes,
        layout=strategy.layout,
    )
    return Auditor(
        audit,
        AuditSchedule(every, logical_shards, experiment.seed),
        list(strategy.mesh.devices.flat),
        ends=experiment.guards.on_faulty_device == "end",
        earlier=earlier.extra.get("audit") if earlier else None,
    )
