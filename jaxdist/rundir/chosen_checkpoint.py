"""Which checkpoint of a run is meant: the best, the last, or that of a step."""

import pathlib
from collections.abc import Sequence

from jaxdist import errors
from jaxdist.rundir import record


def chosen_step(made: record.RunRecord, run_dir: pathlib.Path, steps: Sequence[int], checkpoint: int | str) -> int:
    """Return the step of the checkpoint that is meant, one of `steps`, which ascend.

    `checkpoint` is "best" (the last, where the run watched no metric), "last", or a step.

    Raises:
      UserError: there is none.
    """
    if not steps:
        raise errors.UserError(f"{run_dir} has no checkpoint: the run ended before it saved one. Resume or train it.")
    best = made.extra.get("best")
    if checkpoint == "last" or (checkpoint == "best" and best is None):
        return steps[-1]
    step = best["step"] if checkpoint == "best" and best else checkpoint
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise errors.UserError(
            f"{run_dir} has no checkpoint {checkpoint!r} (step {step}); it has those of the steps {known}. Name one of "
            "these, or 'last'."
        )
    return int(step)
