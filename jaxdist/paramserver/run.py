"""A parameter-server run on this machine: starts its processes, restarts those that die, watches, evaluates, records.

The process that calls `train` is the run's observer: it holds what decides the end (evaluation, stop rule, clock), and
nothing of the protocol, so any of the processes it started may die at any moment.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxdist import progress, record, stop, training, writers
from jaxdist.config import ConfigError, load_experiment, override
from jaxdist.launch import local
from jaxdist.paramserver import encoding, membership, messages, wire
from jaxdist.paramserver import process as processes
from jaxdist.paramserver import training as plans
from jaxdist.paramserver.settings import SCHEDULER, ParameterServer, worker_name
from jaxdist.train import prepare_run_dir

DIRECTORY_NAME = "ps"
POLL_SECONDS = 0.05
MOST_RESTARTS = 5
"""A process that dies so often without a step in between will not do better the next time."""


class RunFailed(RuntimeError):
    """A run that could not go on; the message says which process, and ends with its log."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides.

    Attributes:
      experiment: path of the experiment file.
      chosen: the settings under `ps.`.
      run_dir: where everything goes.
      assignments: the experiment's overrides, `ps.` ones not included.
      resume: go on from the newest snapshot in `run_dir`.
      devices: devices of each worker.
      silent: show nothing.
      command: for the run record.
      stop_requested: asked often; True ends the run as preempted.
    """

    experiment: str
    chosen: ParameterServer
    run_dir: pathlib.Path
    assignments: Sequence[str] = ()
    resume: bool = False
    devices: int = 1
    silent: bool = False
    command: str = ""
    stop_requested: Callable[[], bool] = lambda: False


def train(options: Options) -> record.RunRecord:
    """Train by parameter server until the stop rule ends it; return the run record, which is written too.

    Raises:
      ConfigError: settings that cannot work, or a run directory that cannot be used.
      RunFailed: a process that dies again and again, or a loss that the chosen durability cannot make good.
    """
    experiment = override(load_experiment(options.experiment), options.assignments)
    plan = plans.make_plan(experiment, options.chosen)
    rule = experiment.stop.rule()
    earlier = prepare_run_dir(experiment, options.run_dir, resume=options.resume)
    directory = options.run_dir / DIRECTORY_NAME
    resume = newest_snapshot(directory) if options.resume else ""
    _clear(directory)
    with _ports(plan) as peers:
        spec = processes.Spec(
            experiment=str(pathlib.Path(options.experiment).absolute()),
            assignments=list(options.assignments),
            chosen=dataclasses.asdict(options.chosen),
            settings=dataclasses.asdict(plan.settings),
            peers=peers,
            directory=str(directory.absolute()),
            resume=resume,
            devices=options.devices,
        )
        spec.write(directory / "spec.json")
    return Run(options, plan, spec, rule, earlier).execute()


def newest_snapshot(directory: pathlib.Path) -> str:
    """Return the name of the newest complete snapshot in `directory`; empty when there is none."""
    found = sorted(path.parent.name for path in directory.glob("*/manifest"))
    return found[-1] if found else ""


def _clear(directory: pathlib.Path) -> None:
    """Remove what belongs to one attempt only; snapshots stay."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (processes.LOG_NAME, processes.CUT_NAME, processes.STEPS_NAME, "spec.json"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "statistics", ignore_errors=True)


@contextlib.contextmanager
def _ports(plan: plans.Plan) -> Iterator[dict[str, str]]:
    names = [SCHEDULER, processes.OBSERVER, *membership.server_nodes(plan.settings)]
    names += [worker_name(number) for number in range(plan.settings.workers)]
    with contextlib.ExitStack() as stack:
        yield {name: f"{local.LOOPBACK}:{stack.enter_context(local.reserved_port())}" for name in names}


class Run:
    """One attempt: the processes, what was heard of them, and what is written about them."""

    def __init__(
        self,
        options: Options,
        plan: plans.Plan,
        spec: processes.Spec,
        rule: stop.StopRule,
        earlier: record.RunRecord | None,
    ) -> None:
        self.options, self.plan, self.spec, self.rule, self.earlier = options, plan, spec, rule, earlier
        self.directory = pathlib.Path(spec.directory)
        self.token = wire.new_token()
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.deaths: Counter[str] = Counter()
        self.restarts = 0
        self.judge = plans.Judge(plan)
        self.progress = stop.Progress()
        self.stopwatch = record.Stopwatch(earlier.time_seconds if earlier else None)
        self.step_times = record.StepTimes()
        self.last_time: float | None = None
        self.cut: messages.CutFile | None = None
        self.cut_stamp = 0
        self.end_reason: str | None = None
        self.asked_to_stop = ""

    def execute(self) -> record.RunRecord:
        """Run to the end and write the record."""
        self.write_record(None)
        security = wire.Security(token=self.token)
        resumed = None if self.earlier is None else 0
        self.writers = writers.make_writers(self.options.run_dir, self.plan.experiment.writers, resumed_step=resumed)
        self.wire = wire.Wire(
            listen=self.spec.peers[processes.OBSERVER],
            peers=self.spec.peers,
            receive=lambda message: None,
            security=security,
        )
        try:
            with self._display() as display:
                for name in self.spec.peers:
                    if name != processes.OBSERVER:
                        self._start(name)
                with (self.directory / processes.STEPS_NAME).open("a+") as steps:
                    self._watch(steps, display)
        finally:
            self._end_children()
            self.wire.close()
            for writer in self.writers:
                writer.close()
        return self.write_record(self.end_reason, final=True)

    def _display(self) -> Any:
        limits = self.plan.experiment.stop
        bounds = progress.Bounds(
            max_steps=limits.max_steps,
            max_epochs=limits.max_epochs,
            max_seconds=limits.max_seconds,
            steps_per_epoch=self.plan.settings.steps_per_epoch,
        )
        return progress.make_progress(
            bounds, global_batch_size=self.plan.experiment.global_batch_size, silent=self.options.silent
        )

    # Processes.

    def _start(self, name: str) -> None:
        log = self.directory / "logs" / f"{name.replace('/', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            wire.TOKEN: self.token,
            processes.PARENT_ID: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        module = "process" if name == SCHEDULER else "member"
        command = [sys.executable, "-m", f"jaxdist.paramserver.{module}", name, str(self.directory / "spec.json")]
        with log.open("ab") as output:
            self.children[name] = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def _look_after(self) -> None:
        """Restart what died; give up on what dies again and again."""
        for name, child in list(self.children.items()):
            status = child.poll()
            if status is None or (status == 0 and self.end_reason):
                continue
            if status == 0:
                continue  # it heard of the end before we did
            self.deaths[name] += 1
            if self.deaths[name] > MOST_RESTARTS:
                raise RunFailed(f"{name} died {self.deaths[name]} times without a step in between.\n{self._tail(name)}")
            self.restarts += 1
            self._start(name)

    def _tail(self, name: str) -> str:
        log = self.directory / "logs" / f"{name.replace('/', '-')}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-20:])

    def _end_children(self) -> None:
        deadline = time.monotonic() + 5.0
        while self.end_reason and time.monotonic() < deadline:
            if all(child.poll() is not None for child in self.children.values()):
                return
            time.sleep(POLL_SECONDS)
        for child in self.children.values():
            if child.poll() is None:
                child.kill()
            child.wait()

    # Watching.

    def _watch(self, steps: Any, display: Any) -> None:
        started = time.monotonic()
        while self.end_reason is None:
            self._look_after()
            before = self.progress.step
            self._read_steps(steps)
            if self.progress.step != before:
                self.deaths.clear()
                display.update(self.progress.step, self.progress.metrics)
            self.progress.seconds = time.monotonic() - started
            self._judge_cut()
            self._maybe_halt()
            if self.children[SCHEDULER].poll() == 0 and self.end_reason is None:
                raise RunFailed(f"the scheduler ended the run.\n{self._tail(SCHEDULER)}")
            time.sleep(POLL_SECONDS)
        self._read_steps(steps)

    def _read_steps(self, steps: Any) -> None:
        while True:
            at = steps.tell()
            line = steps.readline()
            if not line.endswith("\n"):
                steps.seek(at)
                return
            self._take_step(json.loads(line))

    def _take_step(self, row: dict[str, Any]) -> None:
        step = row["step"]
        named = {f"train/{name}": value for name, value in row["metrics"].items()}
        if self.last_time is not None:
            self.step_times.add(max(row["time"] - self.last_time, 0.0))
        self.last_time = row["time"]
        # A return to a snapshot counts steps again; files of metrics hold each once.
        if step <= self.progress.step:
            return
        self.progress.step = step
        self.progress.examples_seen += row["examples"]
        self.progress.epoch = step // self.plan.settings.steps_per_epoch
        self.progress.metrics.update(named)
        if step == 1 or step % self.plan.experiment.log_every == 0:
            self._write_metrics(step, named)

    def _write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        for writer in self.writers:
            writer.write(step, metrics)

    def _judge_cut(self) -> None:
        path = self.directory / processes.CUT_NAME
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        if stamp == self.cut_stamp:
            return
        self.cut_stamp = stamp
        cut = encoding.decode(path.read_bytes())
        assert isinstance(cut, messages.CutFile)
        known = self.cut is not None and self.cut.step == cut.step
        self.cut = cut
        if not known:
            self._evaluate(cut)
        reason = self.rule(self.progress) or self.asked_to_stop
        if cut.last:
            self.end_reason = reason or "max_steps"
        self.answer = messages.Verdict(cut.step, reason or "")
        self.end_reason = reason or self.end_reason
        self._send_verdict()

    def _evaluate(self, cut: messages.CutFile) -> None:
        with self.stopwatch.account("eval"):
            found = self.judge.evaluate(cut)
        self.progress.step = max(self.progress.step, cut.step)
        if found:
            self.progress.record_evaluation(found)
            self._write_metrics(cut.step, found)
        self.write_record(None)

    def _send_verdict(self) -> None:
        """Answer until it is heard: the scheduler may have died in between, and asks again when it is back."""
        self.wire.send(SCHEDULER, self.answer)

    def _maybe_halt(self) -> None:
        if self.end_reason or self.asked_to_stop:
            return
        limit = self.plan.experiment.stop.max_seconds
        if self.options.stop_requested():
            self.asked_to_stop = "preempted"
        elif limit is not None and self.progress.seconds >= limit:
            self.asked_to_stop = "max_seconds"
        if self.asked_to_stop:
            self.wire.send(SCHEDULER, messages.Halt(self.asked_to_stop))

    # The record.

    def statistics(self) -> dict[str, Any]:
        """Return the `ps` entry of run.json: what all processes counted, dead ones included."""
        counters: Counter[str] = Counter()
        staleness: Counter[int] = Counter()
        for path in (self.directory / "statistics").glob("*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                content = json.loads(path.read_text())
                counters.update(content["counters"])
                staleness.update({int(key): count for key, count in content["staleness"].items()})
        names = ("updates", "duplicates_refused", "fenced", "torn_pushes", "failovers", "rollbacks", "refused")
        return {name: counters[name] for name in names} | {"staleness": dict(sorted(staleness.items()))}

    def write_record(self, end_reason: str | None, *, final: bool = False) -> record.RunRecord:
        """Write run.json."""
        params = None
        if final and self.cut is not None:
            params = record.params_sha256(self.judge.trees(self.cut)[0])
        seconds = self.stopwatch.seconds()
        made = record.RunRecord(
            end_reason=end_reason,
            step=self.progress.step,
            examples_seen=self.progress.examples_seen,
            params_sha256=params,
            metrics=self.progress.metrics,
            strategy="parameter-server",
            reduction=self.plan.experiment.reduction,
            num_devices=self.plan.settings.workers * self.options.devices,
            num_processes=len(self.children),
            examples_per_second=self.progress.examples_seen / max(self.progress.seconds, 1e-9),
            step_seconds=self.step_times.summary(),
            time_seconds=seconds,
            compile_count=0,
            restarts=self.restarts + (self.earlier.restarts + 1 if self.earlier else 0),
            config=self.plan.experiment,
            versions=record.versions(),
            command=self.options.command,
            extra={"identity": training.identity(self.plan.experiment), "ps": self.statistics()},
        )
        made.write(self.options.run_dir)
        return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from the command line: `EXPERIMENT [--run-dir DIR] [--resume] [--set ps.workers=4 NAME=VALUE ...]`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--run-dir", type=pathlib.Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--set", dest="assignments", nargs="+", action="extend", default=[])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    others = [text for text in given.assignments if not text.startswith("ps.")]
    chosen = choose([text[3:] for text in given.assignments if text.startswith("ps.")])
    jax.config.update("jax_num_cpu_devices", 1)
    made = train(
        Options(
            experiment=given.experiment,
            assignments=others,
            chosen=chosen,
            run_dir=given.run_dir,
            resume=given.resume,
            devices=given.devices,
            silent=given.json,
        )
    )
    print(json.dumps(made.to_json()) if given.json else made.end_reason)
    return 0


def choose(assignments: Sequence[str]) -> ParameterServer:
    """Return the settings under `ps.` after assignments like `workers=4`; raises ConfigError for unknown names."""
    chosen = ParameterServer()
    for text in assignments:
        name, _, value = text.partition("=")
        if not hasattr(chosen, name):
            known = ", ".join(field.name for field in dataclasses.fields(chosen))
            raise ConfigError(f"There is no setting ps.{name}; there are {known}.")
        kind = type(getattr(chosen, name))
        parsed: Any = value.lower() in ("true", "1") if kind is bool else kind(value)
        chosen = dataclasses.replace(chosen, **{name: parsed})
    return chosen


if __name__ == "__main__":
    sys.exit(main())
