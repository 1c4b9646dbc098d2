"""The reports of the processes of a run, in files that outlive them: counters, and one line per step."""

import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdist.paramserver.processes.process_world import try_report, write_report
from jaxdist.paramserver.processes.run_folder import STATISTICS_NAME, STEPS_NAME, Spec, silent_path
from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.wire import log_frames
from jaxdist.rundir import files, full_disk
from jaxdist.rundir import ledger as ledger_file

_STATISTICS_SECONDS = 0.5


class Statistics:
    """Keeps the counters of a process for run.json, in a file that outlives it."""

    def __init__(self, path: pathlib.Path, machine: Any) -> None:
        self.path, self.machine = path, machine
        self.staleness: dict[int, int] = {}
        self.updates = 0
        self.written_at = 0.0

    def observe(self, effect: effects.Effect) -> None:
        """Count an effect."""
        if isinstance(effect, effects.Applied) and getattr(self.machine, "primary", False):
            self.updates += 1
            self.staleness[effect.staleness] = self.staleness.get(effect.staleness, 0) + 1
        if isinstance(effect, effects.Exit) or time.monotonic() - self.written_at > _STATISTICS_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, if the disk takes it: the next one holds the counters, too."""
        self.written_at = time.monotonic()
        counters = {"updates": self.updates, **getattr(self.machine, "counters", {})}
        try_report(self.path, {"counters": counters, "staleness": self.staleness})


def statistics_of(name: str, spec: Spec, machine: Any) -> Statistics:
    """Return the counters of the process `name`."""
    file = f"{name.replace('/', '-')}-{os.getpid()}.json"
    return Statistics(pathlib.Path(spec.directory) / STATISTICS_NAME / file, machine)


class ReportFiles:
    """Writes the files of the scheduler for the observer and other readers: one line per step; and the ledger.

    On a full disk it waits for room, as the log of the scheduler does.

    `directory` is the folder of the run; `clock` that of its Spec; `ledger` is whether to record the examples of each
    step in the run directory.
    """

    def __init__(self, directory: pathlib.Path, clock: Callable[[], float], *, ledger: bool = False) -> None:
        self.directory, self._clock, self._keeps_ledger = directory, clock, ledger
        self._recorder: ledger_file.Recorder | None = None
        self._leases: Sequence[messages.Lease] = ()  # of the step whose record was logged last
        self._steps = (directory / STEPS_NAME).open("a+b", buffering=0)
        self._members: dict[int, int] | None = None  # worker -> incarnation
        self._restore_term = 0  # of the last rollback, from which on the steps count
        self._step = 0

    def catch_up(self, machine: Scheduler, records: Sequence[messages.Message]) -> None:
        """Write the line of a step committed before the restart but not yet reported; its metrics are lost.

        Raises:
          DamagedLogError: a step was reported that the log does not have.
        """
        if machine.state.membership is not None:
            self._note_membership(machine.state.membership)
        self._step = machine.state.step
        self._steps.seek(0)
        rows = [json.loads(line) for line in self._steps if line.endswith(b"\n")]
        self._check_log(rows)
        kinds = (journal.CommitRecord, journal.CompleteRecord, journal.MembershipRecord)
        last = next((record for record in reversed(records) if isinstance(record, kinds)), None)
        self._leases = _leases_of(last)
        if self._keeps_ledger:
            # The line of the last step may be missing; it is written again, which discards the first.
            step = machine.state.step - bool(self._leases)
            self._recorder = ledger_file.Recorder(self.directory.parent, step=step)
        if not self._leases:
            return
        reported = [row["step"] for row in rows if not {"workers", "warning"} & row.keys()]
        if reported[-1:] == [machine.state.step]:
            self._record(machine.state.step)
        else:
            examples = sum(lease.stop - lease.start for lease in self._leases)
            empty = machine.state.empty_step == machine.state.step
            self.observe(effects.Committed(machine.state.step, examples, (), empty))

    def observe(self, effect: effects.Effect) -> None:
        """Write a step, a change of the workers, a warning, or the name of a silent process."""
        if isinstance(effect, effects.Committed):
            self._step = effect.step
            self._record(effect.step)
            metrics = {m.name: m.total / m.count for m in effect.metrics if m.count}
            row = {"step": effect.step, "examples": effect.examples, "metrics": metrics, "time": self._clock()}
            row["restore_term"] = self._restore_term
            row |= {"empty": True} if effect.empty else {}
            self._add(row)
        elif isinstance(effect, effects.GradNorm):
            self._add({"step": effect.step, "grad_norm": effect.norm})
        elif isinstance(effect, effects.Append):
            self._leases = _leases_of(effect.record) or self._leases
            if isinstance(effect.record, journal.MembershipRecord):
                self._tell_members(effect.record.membership)
        elif isinstance(effect, effects.Warn):
            self._add({"step": self._step, "warning": effect.text})
        elif isinstance(effect, effects.Replace):
            path = silent_path(self.directory, effect.name)
            full_disk.until_written(lambda: write_report(path, [b""]), str(path))

    def _record(self, step: int) -> None:
        """Record the examples of a step: one line, as the slices of a step follow one another."""
        if self._recorder is not None:
            for epoch, start, stop in ranges(self._leases):
                self._recorder.add_range(step, epoch, start, stop)

    def _check_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise DamagedLogError if a step was reported, after the last rollback, that the log does not have."""
        reported = max(((row["restore_term"], row["step"]) for row in rows if "restore_term" in row), default=(0, 0))
        if reported > (self._restore_term, self._step):
            raise log_frames.DamagedLogError(f"It ends after step {self._step}, and step {reported[1]} was made.")

    def _note_membership(self, membership: messages.Membership) -> None:
        self._members = {member.worker: member.incarnation for member in membership.members}
        self._restore_term = membership.restore_term

    def _tell_members(self, membership: messages.Membership) -> None:
        before = self._members
        self._note_membership(membership)
        after = self._members
        if before is not None and before != after:
            returned = {"returned": True} if membership.restore_term == membership.term else {}
            self._add({"step": self._step, "workers": after, "time": self._clock(), **returned})

    def _add(self, row: Mapping[str, Any]) -> None:
        data = (json.dumps(row) + "\n").encode()
        full_disk.until_written(lambda: files.append(self._steps.fileno(), data), STEPS_NAME)


def _leases_of(record: messages.Message | None) -> list[messages.Lease]:
    """Return the leases of the step that a record of the log commits; [] for other records."""
    if isinstance(record, journal.CommitRecord):
        return [push.lease for push in record.contributors]
    return [record.contributor.lease] if isinstance(record, journal.CompleteRecord) else []


def ranges(leases: Sequence[messages.Lease]) -> list[tuple[int, int, int]]:
    """Return the epoch and the positions [start, stop) of leases; of leases that follow one another, one range."""
    found: list[tuple[int, int, int]] = []
    for lease in leases:
        follows = bool(found) and (found[-1][0], found[-1][2]) == (lease.epoch, lease.start)
        start = found.pop()[1] if follows else lease.start
        found.append((lease.epoch, start, lease.stop))
    return found
