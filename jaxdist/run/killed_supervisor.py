"""`python -m jaxdist.run.killed_supervisor RESCUE MEMORY`: what the fork server runs after a killed supervisor."""

import contextlib
import pathlib
import shutil
import sys
from collections.abc import Sequence

import jax

from jaxdist.checkpoint import checkpoints
from jaxdist.errors import UserError, say
from jaxdist.run import rescue
from jaxdist.rundir import lock


def main(arguments: Sequence[str]) -> None:
    """Save what the supervisor left in a directory in memory, and remove the directory."""
    left, memory = rescue.Rescue.from_text(arguments[0]), pathlib.Path(arguments[1])
    jax.config.update("jax_platforms", "cpu")
    said = "The supervisor was killed. "
    try:
        with lock.locked(pathlib.Path(left.run_dir), purpose=lock.SAVING), lock.locked(memory, purpose=lock.SAVING):
            step = left.save(memory, "error")
            shutil.rmtree(memory, ignore_errors=True)
        said += f"Step {step} was saved from memory, as a checkpoint." if step else "The newest checkpoint is kept."
    except (UserError, checkpoints.CheckpointError, OSError) as error:
        said += f"The state in {memory} was not saved: {error}"
    with contextlib.suppress(OSError):  # the terminal may be gone, too
        say(said)


if __name__ == "__main__":
    main(sys.argv[1:])
