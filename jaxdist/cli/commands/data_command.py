"""`jaxdist data`: write a source as shards; show what an experiment's data are and cost."""

import argparse

from jaxdist import errors
from jaxdist.cli import selected_experiment
from jaxdist.data import inspect as inspection
from jaxdist.data import prepare as preparation
from jaxdist.errors import ExitStatus
from jaxdist.launch.joining import runtime
from jaxdist.run import components

_FROM_PYTHON = (
    "Leave the column out of the file, or prepare a source from Python, with `categories` or `columns`: "
    "jaxdist.data.prepare.prepare(source, OUT)."
)
_OF_A_COMMAND = {
    "Leave the column out of `columns`, or name it in `categories`.": _FROM_PYTHON,
    "Leave it out of `columns`, or give its texts in `categories`.": _FROM_PYTHON,
}
"""What a message advises who writes a source, and what it advises here, where no option says it."""


def prepare(options: argparse.Namespace) -> int:
    """Write a source as shards."""
    with errors.reworded(_OF_A_COMMAND), errors.as_user_error():
        made = preparation.prepare(
            options.source, options.out, shard_size=options.shard_size, tokenizer=options.tokenizer
        )
    print(made)
    return ExitStatus.OK


def inspect(options: argparse.Namespace) -> int:
    """Print what an experiment's training data are and what they cost."""
    runtime.start(options.devices)
    with errors.as_user_error():
        loader = components.make_loader(selected_experiment.load(options))
        print(inspection.render(inspection.inspect(loader)))
    return ExitStatus.OK
