"""`jaxdist plan`: what training an experiment needs on hardware that is not present."""

import argparse
import atexit
import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from jaxdist.cli import selected_experiment
from jaxdist.config.experiment import Experiment
from jaxdist.data import inspect as inspection
from jaxdist.errors import ExitStatus, UserError, say
from jaxdist.plan import device_sweep, estimate, search, topology
from jaxdist.plan.compiled import facts, source_lines
from jaxdist.plan.showing import plan_page, plan_text
from jaxdist.run import components

_BAR = 24
_INPUT_BATCHES = 5


@dataclasses.dataclass(frozen=True)
class _Result:
    """What a plan prints: as text, as JSON and as a page; and with which status the command ends."""

    text: str
    content: Any
    page: plan_page.Page | None
    status: int = ExitStatus.OK


def plan(options: argparse.Namespace) -> int:
    """Print the plan of the experiment as it is, of a search, or of a sweep over numbers of devices."""
    _check(options)
    counts = _counts(options.sweep_devices)
    where = topology.find(options.topology)
    experiment = selected_experiment.load(options)
    planned = estimate.with_dividing_batch(experiment, where)
    if planned.global_batch_size != experiment.global_batch_size:
        say(
            f"A batch of {experiment.global_batch_size} does not divide over {len(where.devices)} devices; "
            f"planned with global_batch_size={planned.global_batch_size}."
        )
    with selected_experiment.record_alone_on_stdout(options), source_lines.kept():
        if options.calibrate:
            where = _calibrated(where)
        if counts:
            result = _sweep(planned, where, counts)
        elif options.search:
            result = _search(planned, where, _train_command(options, planned, experiment), options.price_per_hour)
        else:
            result = _plan(planned, where, options.price_per_hour)
    print(json.dumps(result.content) if options.json else result.text)
    if options.out and result.page:
        size = plan_page.write(result.page, options.out)
        say(f"Wrote {options.out} ({size / 1e3:.0f} kB).")
    return result.status


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options of which one would have no effect, and for values that can be refused at once."""
    if options.devices:
        raise UserError("The topology says how many devices there are. Leave --devices out.")
    price = options.price_per_hour
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price-per-hour takes a number of 0 or more; got {price:g}.")
    alone = {"--search": options.search, "--calibrate": options.calibrate, "--price-per-hour": price is not None}
    beside = [name for name, is_given in alone.items() if is_given]
    if options.sweep_devices and beside:
        raise UserError(f"{beside[0]} is for one number of devices, --sweep-devices plans for several. Leave one out.")
    if options.out:
        plan_page.check_output(options.out)


def _plan(experiment: Experiment, where: topology.Topology, price: float | None) -> _Result:
    made = estimate.estimate(experiment, where)
    made = dataclasses.replace(made, delivered_examples_per_second=_delivered(experiment))
    text = plan_text.render(made, price_per_hour=price)
    return _Result(text, made.to_json(price_per_hour=price), plan_page.of_plan(made, text, price_per_hour=price))


def _calibrated(where: topology.Topology) -> topology.Topology:
    with _Bar() as bar:
        return topology.calibrated(where, show=bar.show)


def _delivered(experiment: Experiment) -> float:
    """Return the examples a second that this machine reads, as `data inspect` measures them."""
    loader = components.make_loader(experiment, fingerprint="")
    return inspection.inspect(loader, num_shown=0, num_batches=_INPUT_BATCHES).examples_per_second


def _train_command(options: argparse.Namespace, planned: Experiment, given: Experiment) -> list[str]:
    """Return the command that trains what is planned, values of secret settings replaced by `***`."""
    settings = selected_experiment.shown_assignments(options, given)
    if planned.global_batch_size != given.global_batch_size:
        settings.append(f"global_batch_size={planned.global_batch_size}")
    return ["jaxdist", "train", str(options.experiment), *(["--set", *settings] if settings else [])]


def _search(experiment: Experiment, where: topology.Topology, command: Sequence[str], price: float | None) -> _Result:
    with _Bar() as bar:
        found = search.search(experiment, where, show=bar.show)
    content = [
        {"set": list(each.assignments), "works": each.works, "refused": each.refused}
        | (each.estimate.to_json(price_per_hour=price) if each.estimate else {})
        for each in found.candidates
    ]
    text = plan_text.render_search(found.candidates, command)
    page = plan_page.of_search(found.candidates, text, price_per_hour=price)
    if not found.interrupted:
        return _Result(text, content, page)
    # Compilations in threads cannot be stopped, and Python aborts where it ends under them: the process ends itself.
    atexit.register(_exit_at_once)
    say(
        f"The search was interrupted after {len(found.candidates)} of the ways to train; only those are ranked. "
        "The same command continues: what was compiled is cached."
    )
    return _Result(text, content, page, ExitStatus.INTERRUPTED)


def _exit_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ExitStatus.INTERRUPTED)


def _sweep(experiment: Experiment, where: topology.Topology, counts: Sequence[int]) -> _Result:
    """Plan on each number of devices, each device with the same number of examples."""
    each_batch = experiment.global_batch_size // len(where.devices)
    made: list[estimate.Estimate] = []
    extrapolated: dict[int, str] = {}
    with _Bar() as bar:
        for done, count in enumerate(counts):
            bar.show(done, len(counts), f"{count} devices")
            changed = dataclasses.replace(experiment, global_batch_size=each_batch * count)
            try:
                made.append(_compiled(changed, where, count))
            except _NotCompiledError as error:
                if not made:
                    raise error.reason from None
                extrapolated[count] = f"{str(error.reason).partition('. ')[0]}."
                made.append(device_sweep.extrapolate(made[-1], count))
    rows = device_sweep.rows(made, extrapolated)
    text = plan_text.render_sweep(rows)
    content = [
        row.made.to_json() | {"efficiency": row.efficiency, "relief": row.relief, "extrapolated": row.extrapolated}
        for row in rows
    ]
    return _Result(text, content, plan_page.of_sweep(rows, text))


class _NotCompiledError(Exception):
    """No compiler here can compile for so many devices, and why."""

    def __init__(self, reason: UserError):
        super().__init__(reason)
        self.reason = reason


def _compiled(experiment: Experiment, where: topology.Topology, count: int) -> estimate.Estimate:
    """Return the plan on `count` devices; mistakes in the experiment are those of any plan."""
    try:
        there = topology.with_devices(where, count)
    except UserError as error:
        raise _NotCompiledError(error) from error
    try:
        return estimate.estimate(experiment, there)
    except facts.UnreadableProgramError as error:
        raise _NotCompiledError(error) from error


def _counts(text: str | None) -> list[int]:
    counts = [] if text is None else text.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f"--sweep-devices takes numbers of devices, for example 8,64,256; got {text!r}.")
    return sorted({int(count) for count in counts})


class _Bar:
    """A progress bar on standard error; in a file, a line for each step."""

    def __enter__(self) -> "_Bar":
        return self

    def show(self, done: int, total: int, what: str) -> None:
        """Show that `done` of `total` are done, and what was or is being compiled."""
        if sys.stderr.isatty():
            full = _BAR * done // total
            bar = "#" * full + "-" * (_BAR - full)
            shown = f"[{bar}] {done}/{total} {what}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{shown}", end="", file=sys.stderr, flush=True)
        else:
            say(f"{done} of {total} done; compiled for {what}")

    def __exit__(self, *error: object) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
