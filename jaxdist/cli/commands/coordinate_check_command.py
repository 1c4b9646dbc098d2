"""`jaxdist coordinate-check`: whether activations grow with the width of a model."""

import argparse
import json
from typing import Any

from jaxdist.cli import selected_experiment
from jaxdist.errors import ExitStatus, UserError
from jaxdist.run.diagnosis import coordinate_check as checking
from jaxdist.run.use.reporting import figure_page

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#5e3c99", "#444c56")


def coordinate_check(options: argparse.Namespace) -> int:
    """Print the sizes of activations at several widths, and draw them where that is asked for; exit 1 if one grows."""
    try:
        widths = [int(each) for each in options.widths.split(",")]
    except ValueError as error:
        raise UserError(
            f"--widths takes whole numbers between commas, such as 64,128,256; got {options.widths!r}."
        ) from error
    if options.plot is not None:
        figure_page.check(options.plot)
    devices, loaded = selected_experiment.start(options)
    with selected_experiment.record_alone_on_stdout(options):
        experiment = loaded()
        found = checking.check(experiment, devices, widths=widths, num_steps=options.steps)
    if options.plot is not None:
        said = "Mean absolute activation of each layer over the width of the model; flat lines are what muP promises"
        title = f"{experiment.name}: coordinate check"
        figure_page.write(options.plot, title=title, said=said, figures=_figures(found))
    print(json.dumps(found.to_json()) if options.json else checking.render(found))
    return ExitStatus.FAILED if found.growing() else ExitStatus.OK


def _figures(found: checking.Coordinates) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Return a figure for each number of steps."""
    steps = len(next(iter(found.sizes.values())))
    layout = {
        "xaxis": {"type": "log", "title": {"text": "width"}, "tickvals": list(found.widths)},
        "yaxis": {"type": "log", "title": {"text": "mean |activation|"}},
    }
    return [
        (
            f"After {step} steps",
            [
                {
                    "x": list(found.widths),
                    "y": [value if 0 < value < float("inf") else None for value in sizes[step]],
                    "name": layer,
                    "mode": "lines+markers",
                    "line": {"color": _COLORS[number % len(_COLORS)], "width": 1.8},
                }
                for number, (layer, sizes) in enumerate(found.sizes.items())
            ],
            layout,
        )
        for step in range(steps)
    ]
