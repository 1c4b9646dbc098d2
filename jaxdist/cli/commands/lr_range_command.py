"""`jaxdist lr-range`: the learning-rate range test of an experiment."""

import argparse
import json
import pathlib

from jaxdist.cli import selected_experiment
from jaxdist.errors import ExitStatus
from jaxdist.run.diagnosis import rate_range
from jaxdist.run.use.reporting import figure_page


def lr_range(options: argparse.Namespace) -> int:
    """Print how the loss moves while the learning rate rises, and a suggestion; draw it where that is asked for."""
    low, high = rate_range.parse(options.range)
    if options.plot is not None:
        figure_page.check(options.plot)
    devices, loaded = selected_experiment.start(options)
    with selected_experiment.record_alone_on_stdout(options):
        experiment = loaded()
        found = rate_range.run(experiment, devices, low=low, high=high, num_steps=options.steps)
    if options.plot is not None:
        _draw(options.plot, experiment.name, found)
    print(json.dumps(found.to_json()) if options.json else rate_range.render(found))
    return ExitStatus.OK


def _draw(out: pathlib.Path, name: str, found: rate_range.RateRange) -> None:
    traces = [
        {
            "x": found.rates,
            "y": found.losses,
            "name": "loss",
            "mode": "markers",
            "marker": {"size": 5, "color": "#b9c4d0"},
        },
        {
            "x": found.rates,
            "y": found.smoothed,
            "name": "smoothed",
            "mode": "lines",
            "line": {"color": "#0072b2", "width": 2.5},
        },
    ]
    for rate, what, color in (
        (found.steepest, "steepest fall", "#009e73"),
        (found.careful, "least loss / 10", "#d55e00"),
    ):
        if rate is not None:
            ends = [min(found.smoothed), max(found.smoothed)]
            line = {"color": color, "dash": "dash", "width": 1.6}
            traces.append({"x": [rate, rate], "y": ends, "name": f"{what}: {rate:.2g}", "mode": "lines", "line": line})
    layout = {
        "xaxis": {"type": "log", "title": {"text": "learning rate"}},
        "yaxis": {"title": {"text": "loss"}},
    }
    said = "The loss of each step while the learning rate rises"
    figure_page.write(out, title=f"{name}: learning-rate range", said=said, figures=[("Loss", traces, layout)])
