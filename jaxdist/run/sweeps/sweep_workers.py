"""The trials of a sweep in several processes at once.

Each worker is a process that reads trials as lines from its standard input and writes what became of them to its
standard output. One that dies takes its trial with it, no other: the trial has failed, and a new worker takes its
place. Workers end with the process that started them.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from jaxdist.errors import ConfigError
from jaxdist.run.sweeps import conducting, sweep_record, trial_runs

_GPUS = "CUDA_VISIBLE_DEVICES"
_LOOK_SECONDS = 0.5
"""How often a request to stop is looked for while all workers train."""


def shares_of_gpus(count: int, environment: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Return for each of `count` workers the environment variables that give it GPUs of its own, none without GPUs.

    Raises:
      ConfigError: there are fewer GPUs than workers.
    """
    if _GPUS in environment:
        gpus = [each for each in environment[_GPUS].split(",") if each]
    else:
        gpus = [str(number) for number in range(len(list(pathlib.Path("/dev").glob("nvidia[0-9]*"))))]
    if environment.get("JAX_PLATFORMS", "") == "cpu" or not gpus:
        return [{} for _ in range(count)]
    if len(gpus) < count:
        raise ConfigError(
            f"--parallel gives each trial GPUs of its own; got {count} at once, and there are {len(gpus)}. Lower it."
        )
    each = len(gpus) // count
    return [{_GPUS: ",".join(gpus[number * each : (number + 1) * each])} for number in range(count)]


class TrialWorker:
    """A process that trains trials, at most one at a time; its messages go to a log file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: pathlib.Path) -> None:
        self._command, self._environment, self._log = command, environment, log
        self.trial: sweep_record.Trial | None = None
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "a") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self._environment},
                start_new_session=True,  # Ctrl-C is for the process that started it, which passes it on
            )

    def give(self, trial: sweep_record.Trial) -> None:
        """Have the worker train a trial; one that died since is started again."""
        if self.process.poll() is not None:
            self.close()
            self.process = self._start()
        self.trial = trial
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is noticed where its answer is read
            self.process.stdin.write(json.dumps(dataclasses.asdict(trial)) + "\n")
            self.process.stdin.flush()

    def take(self) -> trial_runs.TrialOutcome:
        """Return what became of its trial, once its output can be read: a line, or the end of it."""
        assert self.process.stdout is not None
        assert self.trial is not None
        number, self.trial = self.trial.number, None
        line = self.process.stdout.readline()
        if line.endswith("\n"):
            return trial_runs.TrialOutcome(**json.loads(line))
        status = self.process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return trial_runs.TrialOutcome(
            number, failed=f"The process of the trial {how}; {self._log} has its last words."
        )

    def close(self) -> None:
        """End the process: with its input closed it ends by itself, unless it trains."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if self.trial is not None:
            self.process.kill()
        self.process.wait()


def run(conductor: conducting.Conductor, workers: Sequence[TrialWorker], stopped: Callable[[], bool]) -> None:
    """Run the trials that are left, one in each worker at a time, until `stopped`; then the workers save and stop."""
    idle, told = list(workers), False
    with selectors.DefaultSelector() as ready:
        while True:
            while idle and not stopped() and (trial := conductor.next()) is not None:
                worker = idle.pop()
                worker.give(trial)
                assert worker.process.stdout is not None
                ready.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if not ready.get_map():
                return
            if stopped() and not told:
                told = True
                for key in ready.get_map().values():
                    key.data.process.send_signal(signal.SIGTERM)
            for key, _ in ready.select(_LOOK_SECONDS):
                ready.unregister(key.fileobj)
                conductor.note(key.data.take())
                idle.append(key.data)


def work(train: Callable[[sweep_record.Trial], trial_runs.TrialOutcome], trials: TextIO, answers: TextIO) -> None:
    """Train the trials that `trials` names, a line each, and write what became of each to `answers`."""
    for line in trials:
        outcome = train(sweep_record.Trial(**json.loads(line)))
        print(json.dumps(dataclasses.asdict(outcome)), file=answers, flush=True)
        if outcome.end_reason == trial_runs.PREEMPTED:
            return


def command(arguments: Sequence[str], sweep_dir: pathlib.Path) -> list[str]:
    """Return the command line of a worker: that of the sweep, as a worker of the directory."""
    return [sys.executable, "-m", "jaxdist.cli", *arguments, "--worker-of", str(sweep_dir)]
