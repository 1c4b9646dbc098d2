"""`jaxdist plan`: what training an experiment needs on hardware that is not present."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from jaxdist.cli import selected_experiment
from jaxdist.config.experiment import Experiment
from jaxdist.errors import ExitStatus, UserError
from jaxdist.plan import estimate, report, search, topology


def plan(options: argparse.Namespace) -> int:
    """Print the plan of the experiment as it is, of a search, or of a sweep over numbers of devices."""
    if options.devices:
        raise UserError("The topology says how many devices there are. Leave --devices out.")
    counts = _counts(options.sweep_devices)
    where = topology.find(options.topology)
    experiment = selected_experiment.load(options)
    planned = estimate.with_dividing_batch(experiment, where)
    if planned.global_batch_size != experiment.global_batch_size:
        _say(
            f"A batch of {experiment.global_batch_size} does not divide over {len(where.devices)} devices; "
            f"planned with global_batch_size={planned.global_batch_size}."
        )
    with selected_experiment.record_alone_on_stdout(options):
        if counts:
            text, content = _sweep(planned, where, counts)
        elif options.search:
            text, content = _search(planned, where)
        else:
            text, content = _plan(planned, where, options.price_per_hour)
    print(json.dumps(content) if options.json else text)
    return ExitStatus.OK


def _plan(experiment: Experiment, where: topology.Topology, price: float | None) -> tuple[str, Any]:
    made = estimate.estimate(experiment, where)
    return report.render(made, price_per_hour=price), made.to_json(price_per_hour=price)


def _search(experiment: Experiment, where: topology.Topology) -> tuple[str, Any]:
    found = search.search(experiment, where, show=lambda text: _say(f"compiling {text}"))
    content = [
        {"set": list(each.assignments), "works": each.works, "refused": each.refused}
        | (each.estimate.to_json() if each.estimate else {})
        for each in found
    ]
    return report.render_search(found), content


def _sweep(experiment: Experiment, where: topology.Topology, counts: list[int]) -> tuple[str, Any]:
    """Plan on each number of devices, each device with the same number of examples."""
    each_batch = experiment.global_batch_size // len(where.devices)
    made = []
    for count in counts:
        _say(f"compiling for {count} devices")
        changed = dataclasses.replace(experiment, global_batch_size=each_batch * count)
        made.append(estimate.estimate(changed, topology.with_devices(where, count)))
    return report.render_sweep(made), [each.to_json() for each in made]


def _counts(text: str | None) -> list[int]:
    counts = [] if text is None else text.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f"--sweep-devices takes numbers of devices, for example 8,64,256; got {text!r}.")
    return sorted({int(count) for count in counts})


def _say(text: str) -> None:
    print(f"jaxdist: {text}", file=sys.stderr)
