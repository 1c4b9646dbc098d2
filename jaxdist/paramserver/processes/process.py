"""A process of a parameter-server run.

`python -m jaxdist.paramserver.processes.process scheduler SPEC` is the one without JAX.

SPEC is a JSON file (see `run`) that names the experiment, the settings and everybody's address. The process plays the
part its name says until the run ends, and dies with the process that started it.
"""

import dataclasses
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxdist.launch import parent
from jaxdist.paramserver.processes import faults
from jaxdist.paramserver.processes.driver import Log, Node, write_file
from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.settings import Settings, Timers
from jaxdist.paramserver.wire import encoding
from jaxdist.paramserver.wire.streams import Security, Wire, reuse_freed_memory

OBSERVER = "observer"
DIRECTORY_NAME, STATISTICS_NAME = "ps", "statistics"
"""The run's own folder in a run directory; the counters in it."""
NONFINITE_NAME = "nonfinite"
"""The folder with what workers found out about gradients that are not finite."""
STEPS_NAME, CUT_NAME, LOG_NAME, SPEC_NAME = "steps.jsonl", "cut", "scheduler.log", "spec.json"
_STATISTICS_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Spec:
    """What every process of a run knows.

    Attributes:
      experiment: path of the experiment file.
      assignments: overrides of it, as on the command line.
      settings: all settings of the protocol.
      peers: process name -> `host:port`.
      directory: the run's own folder for logs, snapshots and cuts.
      resume: name of the snapshot to go on from; empty for a fresh run.
      devices: devices of each worker.
      kind: how the optimizer runs on shards (see `optimizer.classify`).
    """

    experiment: str
    assignments: list[str]
    settings: dict[str, Any]
    peers: dict[str, str]
    directory: str
    resume: str
    devices: int
    kind: Literal["elementwise", "global_norm"]

    def write(self, path: pathlib.Path) -> None:
        """Write the file that `read` reads."""
        write_file(path, [json.dumps(dataclasses.asdict(self)).encode()])

    @classmethod
    def read(cls, path: pathlib.Path) -> "Spec":
        """Return the Spec in a file."""
        return cls(**json.loads(path.read_text()))

    def make_settings(self) -> Settings:
        """Return the protocol's settings."""
        fields = dict(self.settings)
        fields["timers"] = Timers(**fields["timers"])
        fields["read_every"] = tuple(fields["read_every"])
        return Settings(**fields)


class Statistics:
    """Counts what run.json tells of a process, in a file that outlives it."""

    def __init__(self, path: pathlib.Path, machine: Any) -> None:
        self.path, self.machine = path, machine
        self.staleness: dict[int, int] = {}
        self.updates = 0
        self.written_at = 0.0

    def observe(self, effect: effects.Effect) -> None:
        """Take in an effect."""
        if isinstance(effect, effects.Applied) and getattr(self.machine, "primary", False):
            self.updates += 1
            self.staleness[effect.staleness] = self.staleness.get(effect.staleness, 0) + 1
        if isinstance(effect, effects.Exit) or time.monotonic() - self.written_at > _STATISTICS_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file."""
        self.written_at = time.monotonic()
        counters = {"updates": self.updates, **getattr(self.machine, "counters", {})}
        content = {"counters": counters, "staleness": self.staleness}
        write_file(self.path, [json.dumps(content).encode()])


class Report:
    """What the scheduler's process leaves for whoever watches the run: a line a step, and the params of a cut."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self._steps = (directory / STEPS_NAME).open("a+", buffering=1)

    def catch_up(self, machine: Scheduler, records: Sequence[messages.Message]) -> None:
        """Write the line of a step that the last life decided and had no time to tell of; its metrics are lost."""
        kinds = (journal.CommitRecord, journal.CompleteRecord, journal.ViewRecord)
        last = next((record for record in reversed(records) if isinstance(record, kinds)), None)
        if isinstance(last, journal.CommitRecord):
            leases = [push.lease for push in last.contributors]
        elif isinstance(last, journal.CompleteRecord):
            leases = [last.contributor.lease]
        else:
            return
        self._steps.seek(0)
        told = [json.loads(line)["step"] for line in self._steps if line.endswith("\n")]
        if told[-1:] != [machine.state.step]:
            examples = sum(lease.stop - lease.start for lease in leases)
            self.observe(effects.Committed(machine.state.step, examples, ()))

    def observe(self, effect: effects.Effect) -> None:
        """Write down a step or a cut."""
        if isinstance(effect, effects.Committed):
            metrics = {m.name: m.total / m.count for m in effect.metrics if m.count}
            row = {"step": effect.step, "examples": effect.examples, "metrics": metrics, "time": time.time()}
            self._steps.write(json.dumps(row) + "\n")
        elif isinstance(effect, effects.Cut):
            content = journal.CutFile(effect.step, effect.end_reason, effect.ledger, effect.shards)
            write_file(self.directory / CUT_NAME, encoding.encode(content))


Make = Callable[[str, Spec], tuple[Node, Statistics]]


def main(arguments: list[str], make: Make) -> int:
    """Play the part that `make` makes; return the exit status."""
    name, path = arguments
    reuse_freed_memory()
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    spec = Spec.read(pathlib.Path(path))
    node, statistics = make(name, spec)
    logger = logging.getLogger(__name__)
    try:
        wire = Wire(
            listen=spec.peers[name],
            peers=spec.peers,
            receive=node.receive,
            security=Security.read(os.environ),
        )
    except OSError as error:
        logger.error(str(error))
        return 1
    end = node.run(wire)
    statistics.write()
    wire.flush(5.0)
    wire.close()
    if end.step < 0:
        logger.error(end.reason)
    return 0 if end.step >= 0 else 1


def statistics_of(name: str, spec: Spec, machine: Any) -> Statistics:
    """Return the counters of the process `name`."""
    file = f"{name.replace('/', '-')}-{os.getpid()}.json"
    return Statistics(pathlib.Path(spec.directory) / STATISTICS_NAME / file, machine)


def make_scheduler(name: str, spec: Spec) -> tuple[Node, Statistics]:
    """Return the scheduler and its counters, with what its log says."""
    directory = pathlib.Path(spec.directory)
    log = Log(directory / LOG_NAME)
    resume = None
    if spec.resume and not log.records:
        resume = encoding.decode((directory / spec.resume / "manifest").read_bytes())
    machine = Scheduler(settings=spec.make_settings(), records=log.records, resume=resume)
    statistics, report = statistics_of(name, spec, machine), Report(directory)

    report.catch_up(machine, log.records)

    def observe(effect: effects.Effect) -> None:
        statistics.observe(effect)
        report.observe(effect)

    point = faults.faults_of(name, directory)
    return Node(machine, directory=directory, log=log, observe=observe, point=point), statistics


if __name__ == "__main__":
    parent.die_with_parent()
    sys.exit(main(sys.argv[1:], make_scheduler))
