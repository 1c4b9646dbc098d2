"""A parameter-server run under fire (`jaxdist chaos`): what is done to it, and how it is observed from outside.

Processes that are stopped or denied the disk are so for HOLD_SECONDS: they lose their place meanwhile, and come back.
"""

import contextlib
import functools
import json
import os
import pathlib
import resource
import signal
import time
from collections.abc import Generator, Iterator, Sequence

from jaxdist.config.experiment import Experiment
from jaxdist.errors import UserError, as_user_error
from jaxdist.launch.supervising.chaos import striker, strikes
from jaxdist.paramserver.processes import run_folder
from jaxdist.paramserver.protocol.settings import SCHEDULER, worker_number
from jaxdist.paramserver.run import shared_plan, start

HOLD_SECONDS = 4.0
SETTINGS = {"ps.durability": "replicated", "ps.snapshot_every": "25", "ps.dead_after_seconds": "2"}
"""What a run needs to survive the death of any of its processes, also of both copies of a shard."""


def names_of(experiment: Experiment) -> list[str]:
    """Return the names of the processes of a run under fire.

    Raises:
      UserError: two runs of this experiment would differ without any fault, or it could not survive one.
    """
    chosen = experiment.ps
    if chosen.hosts or chosen.engine != "processes":
        raise UserError(
            f"Chaos kills processes of this machine; got ps.hosts={chosen.hosts} and ps.engine={chosen.engine}. Leave "
            "both out."
        )
    with as_user_error():
        plan = shared_plan.make_plan(experiment, chosen)
    if not plan.settings.synchronous:
        raise UserError(
            f"Chaos compares the bits of two runs, which only sync mode keeps; got ps.mode={chosen.mode}. Set "
            "ps.mode=sync."
        )
    if not plan.settings.snapshot_every:
        raise UserError(
            "Chaos may kill both copies of a shard; a run survives that with ps.snapshot_every, got "
            f"ps.snapshot_every={chosen.snapshot_every} and ps.durability={chosen.durability}. Leave both out, or save "
            "cuts."
        )
    return start.process_names(plan)


class ServedJob:
    """See `striker.JobUnderFire`; the processes that join and leave are the workers.

    `names` are the processes of the run at its start.
    """

    def __init__(self, run_dir: pathlib.Path, names: Sequence[str]) -> None:
        self._folder, self._names = run_dir / run_folder.DIRECTORY_NAME, names
        self._steps, self._workers, self._at = 0, 0, 0
        self._struck_at: float | None = None

    def target(self, strike: strikes.Strike) -> striker.Target | None:
        """See `striker.JobUnderFire`."""
        self._read()
        if not self._steps:
            return None
        self._struck_at = self._struck_at or time.monotonic()
        early = strike.early_seconds is not None and time.monotonic() - self._struck_at >= strike.early_seconds
        is_due = early or self._steps >= strike.step  # a short run would end before the seconds have passed
        found = self._find(strike.process) if is_due else None
        if found is None:
            return None
        self._struck_at = time.monotonic()
        return striker.Target(found[1], functools.partial(self._follow, strike, *found))

    def has_size(self, num_processes: int) -> bool:
        """See `striker.JobUnderFire`."""
        self._read()
        return self._workers == num_processes

    def hold(self, num_processes: int) -> Generator[bool, None, None]:
        """See `striker.JobUnderFire`: the scheduler is stopped, so all others wait."""
        running = self._running()
        schedulers = [running[SCHEDULER]] if SCHEDULER in running else []  # none: it was killed just now
        _send(signal.SIGSTOP, schedulers)
        try:
            while True:
                yield self._is_ready(num_processes)
        finally:
            _send(signal.SIGCONT, schedulers)

    def _is_ready(self, num_processes: int) -> bool:
        """Return whether so many workers have started; each takes its boot number when it is about to join."""
        workers = [name for name in self._running() if worker_number(name) is not None]
        return sum(run_folder.last_boot(self._folder, name) > 0 for name in workers) >= num_processes

    def _follow(self, strike: strikes.Strike, name: str, process_id: int) -> Iterator[strikes.Hit | None]:
        """Yield None until the run has made a step that began after the strike, then what that took."""
        struck, before = time.monotonic(), self._steps
        lasts, seconds = strike.kind != "kill", 0.0
        while lasts or not seconds:
            self._read()
            passed = time.monotonic() - struck
            if lasts and passed >= HOLD_SECONDS:
                lasts = False
                _release(strike, process_id)
            if not seconds and self._steps > before + 1:  # one may have been on its way
                seconds = passed
            yield None
        yield strikes.Hit(strike, seconds, struck=name)

    def _read(self) -> None:
        """Read what the scheduler wrote since the last time."""
        path = self._folder / run_folder.STEPS_NAME
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._at)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith(b"\n"):
                self._at += len(line)
                row = json.loads(line)
                self._steps = max(self._steps, row["step"])
                self._workers = len(row["workers"]) if "workers" in row else self._workers

    def _find(self, number: int) -> tuple[str, int] | None:
        """Return name and id of a process of the run: of `number`, or of the next that runs."""
        running = self._running()
        order = [self._names[(number + more) % len(self._names)] for more in range(len(self._names))]
        return next(((name, running[name]) for name in order if name in running), None)

    def _running(self) -> dict[str, int]:
        """Return the ids of the processes by their names."""
        spec, found = str((self._folder / run_folder.SPEC_NAME).absolute()), {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text().split("\0")
            except OSError:  # it has just ended
                continue
            if spec in words:
                found[words[words.index(spec) - 1]] = int(folder.name)
        return found


def _send(number: int, process_ids: Sequence[int]) -> None:
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):  # its crew has replaced it, after waiting for long
            os.kill(process_id, number)


def _release(strike: strikes.Strike, process_id: int) -> None:
    """Let a process that was stopped, or denied the disk, continue."""
    try:
        if strike.kind == "stop":
            os.kill(process_id, signal.SIGCONT)
        else:
            _, hard = resource.prlimit(process_id, resource.RLIMIT_FSIZE)
            resource.prlimit(process_id, resource.RLIMIT_FSIZE, (hard, hard))
    except ProcessLookupError:  # its crew has replaced it
        return
