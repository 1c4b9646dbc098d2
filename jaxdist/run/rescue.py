"""The state that a job leaves in memory is saved as a checkpoint before the memory is freed, however the job ended.

The supervisor does it at its end. If the supervisor was killed, the fork server does it (see `killed_supervisor`); if
that was killed too, the next start of the run on this machine does.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

from jaxdist import errors
from jaxdist.checkpoint import checkpoints
from jaxdist.checkpoint import snapshots as snapshot
from jaxdist.launch.supervising import job_memory
from jaxdist.run import components, directory
from jaxdist.rundir import record

_PARAMS = re.compile(r"params\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescue:
    """How the state that a job left in memory is saved.

    Attributes:
      run_dir: run directory of the job.
      checkpoints: directory of its checkpoints.
      identity: identity of its checkpoints and snapshots.
      keep: the settings of the Checkpointer that say what is kept.
    """

    run_dir: str
    checkpoints: str
    identity: str
    keep: Mapping[str, Any]

    @classmethod
    def of(cls, run_dir: pathlib.Path, identity: components.Identity, keep: Mapping[str, Any]) -> "Rescue":
        """Return that of the run in `run_dir`; see the attributes for the rest."""
        where = run_dir.absolute()
        return cls(
            run_dir=str(where), checkpoints=str(where / directory.CHECKPOINTS_NAME), identity=str(identity), keep=keep
        )

    def save(self, memory: pathlib.Path, end_reason: str) -> int | None:
        """Save the newest snapshot in `memory` if no checkpoint is as new; return its step, None if there was none.

        The run record gets that step, and `end_reason` if the run wrote none.

        Raises:
          CheckpointError: it could not be written.
        """
        with checkpoints.Checkpointer(self.checkpoints, identity=self.identity, **self.keep) as checkpointer:
            newest = checkpointer.latest_step() or 0
            found = snapshot.read_newest(memory, identity=self.identity, after=newest)
            if found:
                metrics = _own_metrics(found)
                checkpointer.save_leaves(found.step, found.leaves, found.data_state, metrics)
                checkpointer.wait()
        with contextlib.suppress(OSError, ValueError):  # a record that is damaged cannot say more
            _record(pathlib.Path(self.run_dir), found, end_reason)
        return found.step if found else None

    def to_text(self) -> str:
        """Return this as the argument of a program."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Rescue":
        """Return what `to_text` gave."""
        return cls(**json.loads(text))


def save_left(left: Rescue) -> record.RunRecord | None:
    """Save what an earlier job of the run left in the memory of this machine; return the record then, None otherwise.

    The caller holds the lock of the run directory. What cannot be saved stays, and the run continues without it.
    """
    found = None
    for memory in job_memory.left_behind(pathlib.Path(left.run_dir)):
        try:
            step = left.save(memory, "error")
        except checkpoints.CheckpointError as error:
            errors.say(f"The state in {memory} could not be saved and stays there: {error}")
            continue
        if step:
            errors.say(f"Step {step} was saved from memory, as a checkpoint.")
            found = record.RunRecord.read(left.run_dir)
        shutil.rmtree(memory, ignore_errors=True)
    return found


def _own_metrics(saved: snapshot.Snapshot) -> dict[str, float]:
    """Return the metrics of the saved step itself: a checkpoint is not judged by the evaluation of another step."""
    progress = saved.data_state["progress"]
    evaluated = progress.get("last_evaluation") == saved.step
    return {name: value for name, value in progress["metrics"].items() if evaluated or not name.startswith("eval/")}


def _record(run_dir: pathlib.Path, saved: snapshot.Snapshot | None, end_reason: str) -> None:
    made = record.RunRecord.read(run_dir)
    if saved:
        progress = saved.data_state["progress"]
        params = [leaf.data for leaf in saved.leaves if _PARAMS.match(leaf.path)]
        made = dataclasses.replace(
            made,
            step=saved.step,
            examples_seen=progress["examples_seen"],
            metrics=progress["metrics"],
            params_sha256=record.params_sha256(params),
        )
    if saved or made.end_reason is None:
        dataclasses.replace(made, end_reason=made.end_reason or end_reason).write(run_dir)
